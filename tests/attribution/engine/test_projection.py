"""The projection against its definition: gradients by plain autograd, one record at a time, each entry put in its bucket."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attribution.engine import EngineError, Task, TensorRecords
from attribution.engine import projection as projection_module
from attribution.engine.projection import COLUMNS, SPARSITY, Hash, Projector, hashes, project


class Tokens(nn.Module):
    """A byte model with tied weights, a position embedding and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(11, 8), nn.Embedding(5, 8)
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position(torch.arange(x.shape[1]))
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        return self.head(h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class ByHand(nn.Module):
    """A weight of its own, one borrowed from its layer, and a layer that sees the records in one row."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer, self.flat = nn.Parameter(torch.ones(6)), nn.Linear(6, 6), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(torch.relu_(self.layer(x * self.scale)), self.layer.weight)
        return self.flat(h.reshape(-1, 3)).reshape(len(x), 6)


def image_model() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)),
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Flatten(2),
        nn.Conv1d(4, 3, 2, dilation=2),
        nn.Flatten(),
        nn.Linear(21, 5),
    )


def wide_model() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 30), nn.GELU(), nn.Linear(30, 5))


def classified(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def next_token(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return F.cross_entropy(model(batch[0][:, :-1]).transpose(1, 2), batch[0][:, 1:], reduction="none").mean(1)


def task_of(build, loss=classified, *inputs: Tensor) -> tuple[Task, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        state = build().state_dict()
    records = TensorRecords(*inputs)
    task = Task(model=lambda: build(), loss=loss, measurement=loss, train=records, queries=records)
    return task, state


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def labels(n: int, classes: int) -> Tensor:
    return torch.arange(n) % classes


CASES = {
    "linear": (lambda: wide_model().double(), classified, random(7, 12), labels(7, 5)),
    "conv": (lambda: image_model().double(), classified, random(7, 36), labels(7, 5)),
    "tokens": (lambda: Tokens().double(), next_token, (random(7, 6).abs() * 4).long() % 11),
    "by hand": (lambda: ByHand().double(), classified, random(7, 6), labels(7, 6)),
}


def slowly(task: Task, state: dict[str, Tensor], width: int, seed: int) -> Tensor:
    model = task.model()
    model.load_state_dict(state)
    by = hashes(dict(model.named_parameters()), width, seed)
    rows = []
    for i in range(task.n_train):
        gradients = torch.autograd.grad(
            task.loss(model, task.train[torch.tensor([i])]).sum(), list(model.parameters()), materialize_grads=True
        )
        z = [0.0] * width
        for h, g in zip(by.values(), gradients, strict=True):
            g = g.reshape(len(h.rows), len(h.columns))
            for r in range(g.shape[0]):
                for c in range(g.shape[1]):
                    bucket = int(h.rows[r] + h.columns[c]) % width
                    z[bucket] += float(g[r, c] * h.row_signs[r] * h.column_signs[c])
        rows.append(z)
    return torch.tensor(rows)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("is_formed", [True, False])
def test_projection_is_each_entry_of_the_gradient_in_its_bucket(case, is_formed, monkeypatch):
    if not is_formed:  # every outer product by its factors, however small the layer
        monkeypatch.setattr(projection_module, "FORMED_NS", (1e9, 1e9))
    build, loss, *inputs = CASES[case]
    task, state = task_of(build, loss, *inputs)
    projector = Projector(task, state, width=64, seed=5)

    found = projector.gradients(task.train, torch.arange(7), of_loss=True)

    torch.testing.assert_close(found, slowly(task, state, 64, 5), rtol=1e-5, atol=1e-6)


def test_only_what_the_hooks_miss_is_left_to_torch_func():
    missed = {}
    for name, (build, loss, *inputs) in CASES.items():
        projector = Projector(*task_of(build, loss, *inputs), width=64)
        projector.prepare(of_loss=True)
        missed[name] = projector.unhooked[True]

    assert missed == {
        "linear": [],
        "conv": [],
        "tokens": [],
        "by hand": ["scale", "layer.weight", "flat.weight", "flat.bias"],
    }


def test_inner_products_are_exact_where_all_parameters_fit():
    task, state = task_of(lambda: nn.Linear(4, 3).double(), classified, random(6, 4), labels(6, 3))

    z = Projector(task, state, width=16).gradients(task.train, torch.arange(6), of_loss=True)

    model = task.model()
    model.load_state_dict(state)
    G = []
    for i in range(6):
        g = torch.autograd.grad(classified(model, task.train[torch.tensor([i])]).sum(), list(model.parameters()))
        G.append(torch.cat([part.flatten() for part in g]))
    torch.testing.assert_close(z @ z.T, (torch.stack(G) @ torch.stack(G).T).float())


def test_inner_products_are_kept_on_average_over_seeds():
    task, state = task_of(*CASES["linear"][:2], *CASES["linear"][2:])
    exact = Projector(task, state, width=4096).gradients(task.train, torch.arange(7), of_loss=True)
    truth = exact @ exact.T

    drawn = torch.stack(
        [
            z @ z.T
            for seed in range(80)
            for z in [Projector(task, state, width=64, seed=seed).gradients(task.train, torch.arange(7), of_loss=True)]
        ]
    )

    standard_error = drawn.std(0) / 80**0.5
    assert bool(((drawn.mean(0) - truth).abs() < 4.5 * standard_error).all())
    norms = truth.diagonal().sqrt()
    assert float((drawn.std(0) / (norms[:, None] * norms)).max()) < 3 / 64**0.5


def test_a_record_s_projection_depends_on_neither_its_batch_nor_its_place():
    task, state = task_of(*CASES["tokens"][:2], *CASES["tokens"][2:])
    projector = Projector(task, state, width=64)
    whole = projector.gradients(task.train, torch.arange(7), of_loss=True)

    alone = torch.cat([projector.gradients(task.train, torch.tensor([i]), of_loss=True) for i in range(7)])
    turned = projector.gradients(task.train, torch.arange(7).flip(0), of_loss=True)
    as_many_as_positions = projector.gradients(task.train, torch.arange(5), of_loss=True)

    torch.testing.assert_close(alone, whole)
    torch.testing.assert_close(turned.flip(0), whole)
    torch.testing.assert_close(as_many_as_positions, whole[:5])


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_map():
    task, state = task_of(*CASES["linear"][:2], *CASES["linear"][2:])
    index = torch.arange(7)
    first, again, other = (
        Projector(task, state, width=64, seed=s).gradients(task.train, index, of_loss=True) for s in (1, 1, 2)
    )

    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_gradient_that_is_not_finite_is_refused_by_its_record():
    task, state = task_of(lambda: nn.Linear(4, 3).double(), classified, random(6, 4), labels(6, 3))
    task.train.tensors[0][4] = float("inf")

    with pytest.raises(EngineError, match=r"^/train/4: its gradient is not finite"):
        Projector(task, state, width=16).gradients(task.train, torch.arange(6), of_loss=True)


def test_a_mean_loss_and_a_width_that_is_no_power_of_two_are_refused():
    def mean(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return classified(model, batch).mean()

    task, state = task_of(lambda: nn.Linear(4, 3).double(), mean, random(6, 4), labels(6, 3))
    with pytest.raises(EngineError, match=r"^/loss: gave shape"):
        Projector(task, state, width=16).prepare(of_loss=True)
    with pytest.raises(EngineError, match=r"^/width: 1000 is not a power of two"):
        Projector(task, state, width=1000)


def test_hashes_depend_on_the_name_and_the_seed_alone():
    both = hashes({"a": torch.zeros(30, 40), "b": torch.zeros(50)}, 64, 0)
    alone = hashes({"b": torch.zeros(50), "c": torch.zeros(60)}, 64, 0)

    assert isinstance(both["b"], Hash)
    assert torch.equal(both["b"].columns, alone["b"].columns)
    assert torch.equal(both["b"].column_signs, alone["b"].column_signs)


# --- of gradients that are held


def test_a_projection_is_linear_repeats_by_seed_and_treats_each_row_by_itself():
    x = torch.randn(5, 100, generator=torch.Generator().manual_seed(0)).double()

    y = project(x, 32, seed=3)

    assert torch.equal(y, project(x, 32, seed=3))
    assert not torch.equal(y, project(x, 32, seed=4))
    torch.testing.assert_close(project(x[2:3], 32, seed=3), y[2:3])
    torch.testing.assert_close(project(2 * x[:1] - x[1:2], 32, seed=3), 2 * y[:1] - y[1:2])


def test_each_coordinate_keeps_its_length_and_goes_to_as_many_places():
    S = project(torch.eye(50, dtype=torch.float64), 64, seed=0).T  # (width, d)

    assert (S != 0).sum(0).eq(SPARSITY).all()
    torch.testing.assert_close(S.square().sum(0), torch.ones(50, dtype=torch.float64))


def test_inner_products_are_kept_within_their_standard_deviation():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, COLUMNS + 1000, generator=generator)  # two pieces of columns
    x[1] += x[0]
    true = float(x[0] @ x[1])

    found = torch.tensor([float(p[0] @ p[1]) for p in (project(x, 512, seed) for seed in range(20))])

    sigma = (2 / 512) ** 0.5 * float(x[0].norm() * x[1].norm())
    assert abs(float(found.mean()) - true) < 3 * sigma / 20**0.5
    assert float(found.std()) < 1.5 * sigma


def test_a_width_that_cannot_be_cut_in_bands_is_refused():
    with pytest.raises(ValueError, match="multiple"):
        project(torch.zeros(1, 4), 12, seed=0)
