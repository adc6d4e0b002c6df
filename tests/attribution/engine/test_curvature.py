import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attribution.engine import Task, TensorRecords, train
from attribution.engine import curvature as curvatures
from attribution.engine.curvature import blocks_of, curvature_gradients, fit, labels_of
from attribution.engine.estimators import ekfac, graddot, tracin, trak
from attribution.engine.gradients import flat
from attribution.engine.training import Program


def gauss_newton(task: Task, state) -> Tensor:
    """(1/n) Σ Jᵀ (diag p − p pᵀ) J of a softmax classifier, one record after the other."""
    model = task.model()
    model.load_state_dict({name.removeprefix("model."): t for name, t in state.tensors().items() if "model." in name})
    parameters, total = list(model.parameters()), 0.0
    for i in range(task.n_train):
        z = model(task.train[torch.tensor([i])][0])[0]
        J = torch.stack(
            [torch.cat([g.flatten() for g in torch.autograd.grad(o, parameters, retain_graph=True)]) for o in z]
        )
        p = z.softmax(0).detach()
        total += J.T @ (p.diag() - torch.outer(p, p)) @ J / task.n_train
    return total


def as_matrix(found: curvatures.Curvature) -> Tensor:
    """H in the model's own coordinates."""
    basis = flat(found.restore(torch.eye(len(found.eigenvalues), dtype=torch.float64)))  # one row per eigenvector
    return basis.T @ found.eigenvalues.diag() @ basis


def test_with_few_outputs_the_rows_add_up_to_the_gauss_newton_matrix(make_task):
    task = make_task()
    program, state = Program(task), train(task).state

    labels = labels_of(program, state)
    found = curvature_gradients(program, state, torch.arange(task.n_train), labels)

    rows = torch.cat([g.flatten(2) for g in found.values()], 2).flatten(0, 1)
    assert (labels.kind, rows.shape[0]) == ("exact", 2 * task.n_train)  # softmax over 3 has 2 directions
    torch.testing.assert_close(rows.T @ rows / task.n_train, gauss_newton(task, state))


def test_small_blocks_are_the_gauss_newton_blocks(make_task):
    task = make_task()
    program, state = Program(task), train(task).state

    found = fit(program, state)

    exact = gauss_newton(task, state)
    blocks = [slice(0, 25), slice(25, 43)]
    expected = torch.zeros_like(exact)
    for block in blocks:
        expected[block, block] = exact[block, block]
    torch.testing.assert_close(as_matrix(found), expected)


def squared(model, batch):
    inputs, labels = batch
    return (model(inputs) - (labels[:, None] == torch.arange(3)).double()).square().sum(1)


def test_kronecker_factors_are_exact_for_one_linear_layer_with_a_squared_loss(make_task, monkeypatch):
    monkeypatch.setattr(curvatures, "FULL", 0)
    task = make_task(build=lambda: nn.Linear(4, 3).double(), task={"loss": squared}, learning_rate=0.01)
    program, state = Program(task), train(task).state

    found = fit(program, state)

    inputs = torch.cat([task.train[torch.arange(10)][0], torch.ones(10, 1, dtype=torch.float64)], 1)
    A = 2 * torch.kron(torch.eye(3, dtype=torch.float64), inputs.T @ inputs / 10)  # the bias as a fifth input
    order = [5 * o + i for o in range(3) for i in range(4)] + [5 * o + 4 for o in range(3)]
    assert found.treatments["weight"] == "eigenvalue-corrected Kronecker block 3 × 5"
    torch.testing.assert_close(as_matrix(found), A[order][:, order])


def test_kronecker_blocks_are_the_slow_formula(make_task, monkeypatch):
    monkeypatch.setattr(curvatures, "FULL", 0)
    task = make_task()
    program, state = Program(task), train(task).state
    labels = labels_of(program, state)
    gradients = curvature_gradients(program, state, torch.arange(task.n_train), labels)
    G = torch.cat([gradients["0.weight"], gradients["0.bias"][..., None]], 3).flatten(0, 1)  # (20, 5, 5)
    left = torch.linalg.eigh(sum(g @ g.T for g in G))[1]
    right = torch.linalg.eigh(sum(g.T @ g for g in G))[1]

    found = fit(program, state, rows=3)

    values = sum((left.T @ g @ right).square() for g in G) / task.n_train
    torch.testing.assert_close(found.eigenvalues[:25], values.flatten())
    x = torch.randn(4, 43, generator=torch.Generator().manual_seed(0)).double()
    back = found.rotate(found.restore(x))
    torch.testing.assert_close(back, x)


def test_rotation_keeps_inner_products_and_no_block_size_matters(make_task, monkeypatch):
    for full in (0, 2048):
        monkeypatch.setattr(curvatures, "FULL", full)
        task = make_task()
        program, state = Program(task), train(task).state
        a, b = fit(program, state, rows=1), fit(program, state)

        torch.testing.assert_close(as_matrix(a), as_matrix(b))
        rotated = a.rotate({n: torch.cat([p, 2 * p]) for n, p in state.parameters.items()})
        lengths = flat(state.parameters).norm()
        torch.testing.assert_close(rotated.norm(dim=1), torch.stack([lengths, 2 * lengths]))


def test_visits_weigh_records_and_leave_out_the_unseen(make_task):
    task = make_task()
    program, state = Program(task), train(task).state
    visits = torch.ones(10, dtype=torch.float64)
    visits[3], visits[4] = 0.0, 2.0

    labels = labels_of(program, state)
    g = curvature_gradients(program, state, torch.arange(10), labels)
    rows = torch.cat([g["2.weight"].flatten(2), g["2.bias"]], 2)
    expected = torch.einsum("b,brd,bre->de", visits, rows, rows) / 10
    got = as_matrix(fit(program, state, visits=visits))[25:, 25:]

    torch.testing.assert_close(got, expected)


class Sequence(nn.Module):
    """Token ids (B, 6) → logits (B, 6, 40): an embedding tied to the output layer, attention and norms."""

    def __init__(self, packed: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.norm = nn.LayerNorm(8)
        self.packed = packed
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True) if packed else nn.Linear(8, 24)
        self.out = nn.Linear(8, 40, bias=False)
        self.out.weight = self.embed.weight
        self.gain = nn.Parameter(torch.ones(()))
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        h = self.norm(x)
        if self.packed:
            h = self.attention(h, h, h, need_weights=False)[0]
        else:
            q, k, v = self.attention(h).chunk(3, -1)
            h = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(x + self.gain * h)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 4, 3, groups=2, bias=False)
        self.head = nn.Linear(16, 3)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(images)).tanh()).flatten(1))


def next_token(model, batch):
    (tokens,) = batch
    logits = model(tokens)[:, :-1]
    return cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def classes(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def text_task(packed: bool = True) -> Task:
    tokens = torch.randint(40, (9, 6), generator=torch.Generator().manual_seed(0))
    return Task(
        model=lambda: Sequence(packed),
        loss=next_token,
        measurement=next_token,
        train=TensorRecords(tokens[:6]),
        queries=TensorRecords(tokens[6:]),
    )


def image_task() -> Task:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(9, 1, 6, 6, generator=generator).double(), torch.arange(9) % 3
    return Task(
        model=Grouped,
        loss=classes,
        measurement=classes,
        train=TensorRecords(images[:6], labels[:6]),
        queries=TensorRecords(images[6:], labels[6:]),
    )


@pytest.mark.parametrize("full", [0, 20, 2048])
@pytest.mark.parametrize(
    "make", [text_task, lambda: text_task(False), image_task], ids=["packed attention", "plain attention", "conv"]
)
def test_every_parameter_is_in_exactly_one_block_and_listed(make, full, monkeypatch):
    monkeypatch.setattr(curvatures, "FULL", full)
    task = make()
    program = Program(task)
    torch.manual_seed(0)
    state = program.blank()

    found = fit(program, state)

    named = dict(task.model().named_parameters())
    assert set(found.treatments) == set(named)
    assert sum(block.size for block in found.blocks) == sum(p.numel() for p in named.values())
    assert found.eigenvalues.isfinite().all() and found.eigenvalues.ge(0).all()
    assert found.eigenvalues.sum() > 0
    # Whatever the basis, the trace is that of the true curvature.
    index = torch.arange(task.n_train)
    rows = curvature_gradients(program, state, index, found.labels)
    trace = sum(g.square().sum() for g in rows.values()) / task.n_train
    torch.testing.assert_close(found.eigenvalues.sum(), trace)


@pytest.mark.parametrize("method", [graddot, tracin, trak, ekfac])
@pytest.mark.parametrize("make", [text_task, image_task], ids=["attention and tied embedding", "conv"])
def test_every_estimator_runs_on_them_and_lists_every_parameter(make, method, monkeypatch):
    monkeypatch.setattr(curvatures, "FULL", 20)
    task = make()
    torch.manual_seed(0)
    state = Program(task).blank()

    found = method.estimate(task, state=state)

    assert found.scores.isfinite().all() and found.scores.ne(0).all()
    if method is not graddot:
        assert set(found.settings["parameters"]) == {name for name, _ in task.model().named_parameters()}


def test_vectors_beyond_the_limit_are_diagonal_and_long_sides_keep_their_axes(monkeypatch):
    monkeypatch.setattr(curvatures, "FULL", 4)
    monkeypatch.setattr(curvatures, "SIDE", 8)
    parameters = {
        "embed.weight": torch.zeros(40, 8),
        "norm.weight": torch.zeros(8),
        "norm.bias": torch.zeros(8),
        "wide.weight": torch.zeros(9, 30),
        "wide.bias": torch.zeros(9),
        "scale": torch.zeros(()),
    }

    treatments = {name: b.treatment for b in blocks_of(parameters) for name in b.names}

    assert treatments == {
        "embed.weight": "eigenvalue-corrected block 40 × 8, its columns rotated",
        "norm.weight": "diagonal of 16",
        "norm.bias": "diagonal of 16",
        "wide.weight": "diagonal of 279",
        "wide.bias": "diagonal of 279",
        "scale": "one exact block of 1",
    }


def test_labels_drawn_from_a_softmax_average_to_its_curvature_and_belong_to_the_record(monkeypatch):
    task = text_task()
    program = Program(task)
    torch.manual_seed(1)
    state = program.blank()
    index = torch.arange(task.n_train)
    labels = labels_of(program, state)
    assert labels.kind == "softmax"

    first = curvature_gradients(program, state, index, labels)
    alone = curvature_gradients(program, state, index[4:5], labels)
    for name in first:
        torch.testing.assert_close(first[name][4:5], alone[name])  # whatever the batch

    # At the output, where slow sums are cheap: E[v vᵀ] = c (diag p − p pᵀ) at each position.
    z, scale = torch.randn(1, 5, 40, generator=torch.Generator().manual_seed(2)).double(), torch.full((1, 5), 0.2)
    v = curvatures._drawn_labels((torch.zeros(1, 3),), z, scale.double(), 20_000)[0] * 20_000**0.5
    p = z[0].softmax(-1)
    for t in range(5):
        got = v[:, t].T @ v[:, t] / 20_000
        torch.testing.assert_close(got, 0.2 * (p[t].diag() - torch.outer(p[t], p[t])), atol=1e-3, rtol=0)


def test_a_loss_that_cannot_be_split_takes_the_records_own_labels_and_says_so(make_task):
    def twice(model, batch):
        return cross_entropy(model(batch[0]) + model(batch[0] / 2), batch[1], reduction="none")

    def more(model, batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="none") + model[0].weight.square().sum()

    for loss, why in ((twice, "calls the model 2 times"), (more, "more than the model's output")):
        task = make_task(task={"loss": loss})
        program = Program(task)
        state = program.initial(1)

        labels = labels_of(program, state)
        found = fit(program, state)

        assert labels.kind == "empirical" and why in labels.why and why in found.labels.why
        rows = curvature_gradients(program, state, torch.arange(10), labels)
        torch.testing.assert_close(found.eigenvalues.sum(), sum(g.square().sum() for g in rows.values()) / 10)
