import copy
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from attribution.engine import EngineError, Meter, TensorRecords
from attribution.engine import meter as meter_module
from attribution.engine.meter_log import entries, totals

B, N_QUERY, N_TRAIN = 6, 8, 40


class Residual(nn.Module):
    """A layer used twice, a position embedding without rows of records, a tied output, norms, and a bare scale."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(11, 8), nn.Embedding(5, 8)
        self.norm, self.mix, self.scale = nn.LayerNorm(8), nn.Linear(8, 8), Scale(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
        x = x + self.mix(torch.tanh(self.mix(self.norm(x))))
        return self.head(self.scale(x))


class Scale(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.linspace(0.5, 1.5, d))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


class Attention(nn.Module):
    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(11, d), nn.Embedding(5, d)
        self.norm, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.head = nn.Linear(d, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1])[None])
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return self.head(x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True)))


class Flattened(nn.Module):
    """Rows of tokens, not of records, in the middle, as some implementations have it."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.mix, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        return self.head(gelu(self.mix(x.reshape(-1, 8))).reshape(x.shape))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.GroupNorm(3, 6),
        nn.ConvTranspose2d(6, 4, 2, stride=2),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3))


def per_record(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    inputs, labels = batch
    return cross_entropy(model(inputs), labels, reduction="none")


def per_text(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    (ids,) = batch
    return cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


def vectors(*shape: int) -> TensorRecords:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(N_TRAIN + N_QUERY, *shape, generator=generator, dtype=torch.float64)
    return TensorRecords(inputs, inputs.flatten(1)[:, :3].argmax(1))


def texts() -> TensorRecords:
    generator = torch.Generator().manual_seed(1)
    return TensorRecords(torch.randint(11, (N_TRAIN + N_QUERY, 6), generator=generator))


WORLDS = {
    "Linear, LayerNorm": (perceptron, per_record, lambda: vectors(4)),
    "Conv with stride, padding, dilation, groups; GroupNorm; transposed": (
        convolutions,
        per_record,
        lambda: vectors(2, 6, 6),
    ),
    "Embedding, shared positions, a layer run twice, tied weights, a bare scale": (Residual, per_text, texts),
    "attention built of Linear": (Attention, per_text, texts),
    "rows of tokens": (Flattened, per_text, texts),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.8, 0.95)),
}


@pytest.fixture
def world(tmp_path: Path):
    """(model, optimizer, records, loss, a meter on them), in double precision."""
    made = []

    def make(name: str = "Linear, LayerNorm", optimizer: str = "adamw", dtype=torch.float64, **settings):
        build, loss, data = WORLDS[name]
        torch.manual_seed(3)
        model, records = build(), data()
        if dtype == torch.float32:
            records = TensorRecords(*(t.float() if t.is_floating_point() else t for t in records.tensors))
        loss(model.float(), tuple(t.float() if t.is_floating_point() else t for t in records[torch.arange(2)]))
        model = model.to(dtype)
        optim = OPTIMIZERS[optimizer](model.parameters())
        queries = TensorRecords(*(t[N_TRAIN:] for t in records.tensors))
        options = {
            "measurement": loss,
            "queries": queries,
            "n_train": N_TRAIN,
            "log": tmp_path / "run.meter",
            "every": 1,
        }
        made.append(Meter(model, optim, **(options | settings)))
        return model, optim, records, loss, made[-1]

    yield make
    for meter in made:
        meter.close()


def batches(n_step: int, size: int = B):
    generator = torch.Generator().manual_seed(5)
    return [torch.randperm(N_TRAIN, generator=generator)[:size] for _ in range(n_step)]


def run(model, optimizer, records, loss, meter, steps, weights=None):
    for number, index in enumerate(steps):
        with meter.batch(index):
            losses = loss(model, records[index])
            (losses if weights is None else weights[number] * losses).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def slow_influence(model, optimizer, records, loss, index, queries):
    """Materialised per-record gradients, and the step taken with and without the batch."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(parameters, *record):
        return loss(lambda x: functional_call(model, parameters, (x,)), tuple(part[None] for part in record))[0]

    each = vmap(grad(one), in_dims=(None, *[0] * len(records.tensors)))
    g = {name: t / len(index) for name, t in each(parameters, *records[index]).items()}
    m = {name: t.mean(0) for name, t in each(parameters, *queries[torch.arange(len(queries))]).items()}
    moved = {}
    for keep in (1.0, 0.0):
        twin = copy.deepcopy(model)
        other = type(optimizer)(
            [
                {**group, "params": ps}
                for group, ps in zip(optimizer.param_groups, [list(twin.parameters())], strict=True)
            ]
        )
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for name, p in twin.named_parameters():
            p.grad = keep * g[name].sum(0)
        other.step()
        moved[keep] = {name: p.detach() - parameters[name] for name, p in twin.named_parameters()}
    influence = torch.zeros(len(index), dtype=torch.float64)
    for name in parameters:
        G = g[name].sum(0)
        P = torch.where(G == 0, torch.zeros_like(G), (moved[0.0][name] - moved[1.0][name]) / G)
        influence += (g[name] * (P * m[name])).flatten(1).sum(1)
    return influence, -sum((m[name] * moved[0.0][name]).sum() for name in parameters)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", WORLDS)
def test_ghost_products_are_those_of_materialised_gradients_through_the_actual_update(world, name, optimizer):
    model, optim, records, loss, meter = world(name, optimizer)
    *before, last = batches(4)
    run(model, optim, records, loss, meter, before)
    queries = TensorRecords(*(t[N_TRAIN:] for t in records.tensors))
    expected, carried = slow_influence(model, optim, records, loss, last, queries)

    run(model, optim, records, loss, meter, [last])

    found = torch.from_numpy(meter.last.influence).double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    torch.testing.assert_close(torch.tensor(meter.last.carried).double(), carried, rtol=1e-6, atol=1e-12)
    assert meter.left_out == []


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_influence_and_what_was_carried_add_up_to_what_each_step_did(world, optimizer):
    model, optim, records, loss, meter = world(optimizer=optimizer)
    for group in optim.param_groups:
        group["lr"] /= 20  # first order
    queries = TensorRecords(*(t[N_TRAIN:] for t in records.tensors))
    said, done = [], []
    for index in batches(12):
        before = loss(model, queries[torch.arange(N_QUERY)]).mean().item()
        run(model, optim, records, loss, meter, [index])
        done.append(before - loss(model, queries[torch.arange(N_QUERY)]).mean().item())
        said.append(float(meter.last.influence.sum()) + meter.last.carried)

    torch.testing.assert_close(torch.tensor(said), torch.tensor(done), rtol=0.02, atol=0.01 * max(map(abs, done)))


@pytest.mark.parametrize(("optimizer", "least"), [("momentum", 0.99), ("adam", 0.99), ("adamw", 0.99)])
def test_influence_is_what_leaving_the_record_out_of_the_step_would_have_undone(world, optimizer, least):
    model, optim, records, loss, meter = world(optimizer=optimizer)
    *before, last = batches(30, 24)
    run(model, optim, records, loss, meter, before)
    kept = copy.deepcopy(model.state_dict()), copy.deepcopy(optim.state_dict())
    queries = records[torch.arange(N_TRAIN, N_TRAIN + N_QUERY)]
    run(model, optim, records, loss, meter, [last])
    influence = torch.from_numpy(meter.last.influence).double()
    with_all = loss(model, queries).mean().item()
    meter.close()

    effect, proxy = torch.zeros(len(last), dtype=torch.float64), torch.zeros(len(last), dtype=torch.float64)
    for slot in range(len(last)):
        model.load_state_dict(kept[0])
        optim.load_state_dict(copy.deepcopy(kept[1]))
        optim.zero_grad()
        mine = torch.autograd.grad(loss(model, records[last[slot : slot + 1]])[0], list(model.parameters()))
        asked = torch.autograd.grad(loss(model, queries).mean(), list(model.parameters()))
        proxy[slot] = sum((a * b).sum() for a, b in zip(mine, asked, strict=True))
        weights = torch.ones(len(last)).double()
        weights[slot] = 0
        (weights * loss(model, records[last])).mean().backward()
        optim.step()
        effect[slot] = loss(model, queries).mean().item() - with_all

    correlation = torch.corrcoef(torch.stack([influence, effect, proxy]))
    assert correlation[0, 1] > least
    if optimizer != "momentum":
        assert correlation[2, 1] < correlation[0, 1] - 0.005  # the plain gradient product knows nothing of Adam


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_training_is_the_same_to_the_bit_with_the_meter_on(world, name, optimizer):
    model, optim, records, loss, meter = world(name, optimizer, dtype=torch.float32)
    plain = copy.deepcopy(model)
    other = OPTIMIZERS[optimizer](plain.parameters())
    torch.manual_seed(9)
    run(model, optim, records, loss, meter, batches(8))
    drawn = torch.rand(3)

    torch.manual_seed(9)
    for index in batches(8):
        loss(plain, records[index]).mean().backward()
        other.step()
        other.zero_grad()

    assert torch.equal(drawn, torch.rand(3))
    for (key, metered), unmetered in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(metered, unmetered), key


def test_weights_clipping_and_accumulation_reach_the_influence(world, tmp_path):
    model, optim, records, loss, meter = world()
    twin = copy.deepcopy(model)
    twin_optim = OPTIMIZERS["adamw"](twin.parameters())
    other = Meter(
        twin,
        twin_optim,
        measurement=loss,
        queries=TensorRecords(*(t[N_TRAIN:] for t in records.tensors)),
        n_train=N_TRAIN,
        log=tmp_path / "twin.meter",
        every=1,
    )
    index = batches(1)[0]
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 1.0]).double()

    with meter.batch(index):
        (weights * loss(model, records[index])).mean().backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    nn.utils.clip_grad_norm_(model.parameters(), float(whole) / 3)
    optim.step()
    for half in (slice(0, 2), slice(2, 6)):
        with other.batch(index[half]):
            ((weights * 1.0)[half] * loss(twin, records[index[half]])).sum().div(3 * B).backward()
    twin_optim.step()

    assert meter.last.influence[1] == 0
    torch.testing.assert_close(other.last.influence, meter.last.influence, rtol=1e-3, atol=1e-9)
    assert other.last.records.tolist() == index.tolist()


def test_totals_follow_momentum_to_the_end_of_the_run(world, tmp_path):
    model, optim, records, loss, meter = world(optimizer="momentum")
    for group in optim.param_groups:
        group |= {"lr": 2e-4, "weight_decay": 0.0}
    queries = records[torch.arange(N_TRAIN, N_TRAIN + N_QUERY)]
    before = loss(model, queries).mean().item()
    run(model, optim, records, loss, meter, batches(60))
    gone = before - loss(model, queries).mean().item()
    meter.close()

    with_carry, own_steps = totals(tmp_path / "run.meter"), totals(tmp_path / "run.meter", carry=False)

    assert with_carry.shape == (N_TRAIN,)
    assert float(with_carry.sum()) == pytest.approx(gone, rel=0.03)
    assert float(own_steps.sum()) < 0.3 * gone


def test_drawn_steps_estimate_the_totals_without_bias(world, tmp_path):
    spans = [span for span, _ in zip(meter_module._strata(8), range(20), strict=False)]
    steps = batches(sum(spans[-1]))
    everything, drawn = None, []
    for seed in range(16):
        log = tmp_path / f"{seed}.meter"
        model, optim, records, loss, meter = world(every=1 if seed == 0 else 8, seed=seed, log=log)
        run(model, optim, records, loss, meter, steps)
        meter.close()
        if seed == 0:
            everything = totals(log, carry=False)
        else:
            drawn.append(totals(log, carry=False))
            measured = [entry for entry in entries(log) if entry.influence is not None]
            assert len(measured) == len(spans)
            assert sum(1 / entry.probability for entry in measured) == len(steps)

    mean, error = torch.stack(drawn).mean(0), torch.stack(drawn).std(0) / 15**0.5
    assert ((mean - everything).abs() / (error + 1e-9)).square().mean() < 2.5
    assert torch.corrcoef(torch.stack([mean, everything]))[0, 1] > 0.9


def test_a_part_of_the_queries_is_drawn_anew_for_each_step(world):
    model, optim, records, loss, meter = world(queries_per_step=3)
    asked = []
    meter._measurement = lambda model, batch: asked.append(batch[0][:, 0].tolist()) or loss(model, batch)

    run(model, optim, records, loss, meter, batches(4))

    assert [len(part) for part in asked] == [3] * 4
    assert len({tuple(part) for part in asked}) == 4


def test_parameters_without_a_ghost_product_are_named_at_start_and_may_be_left_out(tmp_path):
    class WithMultihead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
            self.start = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            x = (x + self.start)[:, None]
            return self.head(self.attention(x, x, x)[0][:, 0])

    torch.manual_seed(0)
    model, data = WithMultihead().double(), vectors(4)
    optim = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"measurement": per_record, "queries": data, "n_train": N_TRAIN, "log": tmp_path / "a.meter", "every": 1}

    with pytest.raises(EngineError) as refused:
        Meter(model, optim, **settings)
    for name in ("attention.in_proj_weight", "attention.out_proj.weight", "start"):
        assert f"{name}: " in str(refused.value)
    assert "head.weight" not in str(refused.value)
    assert not (tmp_path / "a.meter").exists()

    meter = Meter(model, optim, leave_out=["^attention", "start"], **settings)
    assert meter.left_out == sorted(n for n, _ in model.named_parameters() if not n.startswith("head"))
    index = torch.arange(B)
    with meter.batch(index):
        per_record(model, data[index]).mean().backward()
    optim.step()
    assert meter.last.influence.any()


class Transposed(nn.Module):
    """Sequence first: the leading dimension is not the records'."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.mix, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.token(ids).transpose(0, 1)).transpose(0, 1))


def test_a_layer_whose_rows_are_not_records_is_refused(world, monkeypatch):
    monkeypatch.setitem(WORLDS, "transposed", (Transposed, per_text, texts))

    with pytest.raises(EngineError, match=r"mix\.weight: its module's output has no leading dimension of records"):
        world("transposed")


def compiled() -> nn.Module:
    """As torch.compile leaves its mark; loading the compiler takes longer than all of these tests."""
    model = perceptron()
    model._orig_mod = model[0]
    return model


@pytest.mark.parametrize(
    ("change", "pointer", "reason"),
    [
        ({"optimizer": torch.optim.RMSprop}, "/optimizer", "RMSprop is none of"),
        (
            {"optimizer": lambda p: torch.optim.Adam(p, amsgrad=True)},
            "/optimizer/param_groups/0/amsgrad",
            "turn it off",
        ),
        (
            {
                "optimizer": lambda p: torch.optim.AdamW(
                    [{"params": [q], "betas": (0.5 + 0.1 * i, 0.9)} for i, q in enumerate(p)]
                )
            },
            "/optimizer/param_groups/1/betas",
            "one momentum",
        ),
        (
            {"optimizer": lambda p: torch.optim.SGD([*p, nn.Parameter(torch.ones(2))], lr=0.1)},
            "/optimizer/param_groups/0",
            "not the model's",
        ),
        ({"measurement": lambda m, b: per_record(m, b).mean()}, "/measurement", "not a mean"),
        ({"measurement": lambda m, b: per_record(m, b) * float("nan")}, "/measurement", "not finite"),
        ({"queries": TensorRecords(torch.zeros(0, 4), torch.zeros(0).long())}, "/queries", "no queries"),
        (
            {"model": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))},
            "/model/1",
            "BatchNorm",
        ),
        ({"model": lambda: nn.DataParallel(perceptron())}, "/model", "plain module"),
        ({"model": compiled}, "/model", "nor compiled"),
        ({"model": lambda: perceptron().half()}, "/model/0.weight", "float32"),
        ({"leave_out": ["nothing"]}, "/leave_out/0", "matches no parameter"),
        ({"leave_out": ["("]}, "/leave_out/0", "regular expression"),
        ({"leave_out": ["."]}, "/leave_out", "every parameter"),
        ({"every": 0}, "/every", "below 1"),
        ({"queries_per_step": 0}, "/queries_per_step", "below 1"),
    ],
)
def test_what_cannot_be_metered_is_refused_before_training(tmp_path, change, pointer, reason):
    model = change.pop("model", perceptron)()
    data = TensorRecords(*(t.float() if t.is_floating_point() else t for t in vectors(4).tensors))
    optim = change.pop("optimizer", lambda p: torch.optim.SGD(p, lr=0.1))(model.parameters())
    settings = {"measurement": per_record, "queries": data, "n_train": N_TRAIN, "log": tmp_path / "a.meter"}

    with pytest.raises(EngineError) as refused:
        Meter(model, optim, **(settings | change))

    assert (refused.value.pointer, reason in str(refused.value)) == (pointer, True), str(refused.value)
    assert not (tmp_path / "a.meter").exists()


def step_without_numbers(model, optim, records, loss, meter):
    loss(model, records[torch.arange(B)]).mean().backward()
    optim.step()


def numbers_of_another_batch(model, optim, records, loss, meter):
    with meter.batch(torch.arange(B + 1)):
        loss(model, records[torch.arange(B)]).mean().backward()
    optim.step()


def half_as_many_numbers(model, optim, records, loss, meter):
    with meter.batch(torch.arange(B // 2)):
        loss(model, records[torch.arange(B)]).mean().backward()
    optim.step()


def a_number_out_of_range(model, optim, records, loss, meter):
    with meter.batch([0, N_TRAIN]):
        loss(model, records[torch.arange(2)]).mean().backward()


def numbers_that_are_none(model, optim, records, loss, meter):
    with meter.batch([0.5, 1.5]):
        loss(model, records[torch.arange(2)]).mean().backward()


def a_forward_outside(model, optim, records, loss, meter):
    losses = loss(model, records[torch.arange(B)])
    with meter.batch(torch.arange(B)):
        losses.mean().backward()
    optim.step()


def a_nan_in_the_batch(model, optim, records, loss, meter):
    with meter.batch(torch.arange(B)):
        (loss(model, records[torch.arange(B)]) * torch.tensor([1, 1, float("nan"), 1, 1, 1])).mean().backward()
    optim.step()


def gradients_left_over(model, optim, records, loss, meter):
    for _ in range(2):
        with meter.batch(torch.arange(B)):
            loss(model, records[torch.arange(B)]).mean().backward()
        optim.step()


def clipped_by_value(model, optim, records, loss, meter):
    with meter.batch(torch.arange(B)):
        loss(model, records[torch.arange(B)]).mean().backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)
    optim.step()


def a_penalty_beside_the_records(model, optim, records, loss, meter):
    with meter.batch(torch.arange(B)):
        penalty = sum(p.square().sum() for p in model.parameters())
        (loss(model, records[torch.arange(B)]).mean() + penalty).backward()
    optim.step()


def a_closure(model, optim, records, loss, meter):
    with meter.batch(torch.arange(B)):
        loss(model, records[torch.arange(B)]).mean().backward()
    optim.step(lambda: torch.tensor(0.0))


@pytest.mark.parametrize(
    ("misuse", "pointer", "reason"),
    [
        (step_without_numbers, "/step/0/records", "no record numbers"),
        (numbers_of_another_batch, "/step/0/records", "7 record numbers, but 0 ran on a batch of 6"),
        (half_as_many_numbers, "/step/0/records", "3 record numbers, but 0 ran on a batch of 6"),
        (a_number_out_of_range, "/step/0/records", f"names record {N_TRAIN} of {N_TRAIN}"),
        (numbers_that_are_none, "/step/0/records", "integer numbers"),
        (a_forward_outside, "/step/0/records", "both forward and backward"),
        (a_nan_in_the_batch, "/step/0/influence/", "not finite"),
        (gradients_left_over, "/step/1/gradient/", "zero the gradients"),
        (clipped_by_value, "/step/0/gradient/", "clip by norm only"),
        (a_penalty_beside_the_records, "/step/0/gradient/", "not the sum over its records"),
        (a_closure, "/optimizer", "step(closure)"),
    ],
)
def test_misuse_in_the_loop_is_refused_and_not_logged(world, tmp_path, misuse, pointer, reason):
    model, optim, records, loss, meter = world()

    with pytest.raises(EngineError) as refused:
        misuse(model, optim, records, loss, meter)

    assert refused.value.pointer.startswith(pointer) and reason in str(refused.value), str(refused.value)
    meter.close()
    assert len(list(entries(tmp_path / "run.meter"))) == meter.step == (1 if misuse is gradients_left_over else 0)


def test_mixed_precision_is_refused_at_the_first_measured_step(world):
    model, optim, records, loss, meter = world(dtype=torch.float32)
    with meter.batch(torch.arange(B)), torch.autocast("cpu", torch.bfloat16):
        loss(model, records[torch.arange(B)]).mean().backward()

    with pytest.raises(EngineError, match="train in float32"):
        optim.step()


def test_an_input_overwritten_before_the_step_is_noticed(world):
    model, optim, records, loss, meter = world()
    inputs, labels = records[torch.arange(B)]
    with meter.batch(torch.arange(B)):
        loss(model, (inputs, labels)).mean().backward()
    inputs.zero_()

    with pytest.raises(EngineError, match="overwritten"):
        optim.step()


def test_a_batch_that_failed_is_forgotten(world):
    model, optim, records, loss, meter = world()
    with pytest.raises(ZeroDivisionError), meter.batch(torch.arange(B)):
        loss(model, records[torch.arange(B)]).mean().backward()
        raise ZeroDivisionError
    optim.zero_grad()

    run(model, optim, records, loss, meter, batches(1))

    assert meter.last.records.tolist() == batches(1)[0].tolist()
    assert meter.step == 1


def test_entries_are_written_by_the_dozen_and_with_a_checkpoint(world, tmp_path):
    model, optim, records, loss, meter = world(every=8)
    run(model, optim, records, loss, meter, batches(40))
    written = len(list(entries(tmp_path / "run.meter")))

    meter.flush()

    assert (written, meter.step) == (32, 40)
    assert [entry.step for entry in entries(tmp_path / "run.meter")] == list(range(40))
    assert [entry.update for entry in entries(tmp_path / "run.meter")] == list(range(1, 41))


def test_the_meter_leaves_nothing_behind(world):
    model, optim, records, loss, meter = world()
    run(model, optim, records, loss, meter, batches(2))

    meter.close()
    meter.close()

    assert not any(module._forward_hooks for module in model.modules())
    assert not optim._optimizer_step_pre_hooks and not optim._optimizer_step_post_hooks
    assert model.training
    run_plain = loss(model, records[torch.arange(B)]).mean()
    run_plain.backward()
    optim.step()


def test_strata_cover_every_step_once_and_are_dense_at_the_start():
    strata = meter_module._strata(8)
    spans = [next(strata) for _ in range(40)]

    assert spans[:6] == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2), (6, 2)]
    assert spans[-1][1] == 8
    assert all(start + length == following for (start, length), (following, _) in itertools.pairwise(spans))
