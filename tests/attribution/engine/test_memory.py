"""A memory budget is obeyed, costs what the plan says, and changes no bit."""

import functools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from attribution.engine import EngineError, metagradients, replay_values, training
from attribution.engine.training import Program, chunk_size, cost, forward_steps, plan_reverse

SETTINGS = {
    "optimizer": "adamw",
    "options": {"betas": (0.8, 0.95)},
    "learning_rate": torch.linspace(0.02, 0.002, 12),
    "clip_norm": 0.5,
    "groups": [("^3", {"learning_rate": 0.01, "weight_decay": 0.1})],
    "seed": 11,
    "epochs": 4,
}


def with_dropout(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Dropout(0.4), nn.Linear(width, 3))


def masks(task, runs, dtype=torch.float32):
    return (torch.rand(runs, task.n_train, generator=torch.Generator().manual_seed(3)) < 0.7).to(dtype)


@functools.cache
def fewest_steps(n: int, slots: int) -> int:
    """Plain steps that reversing n of them takes, the first state kept in one of the slots; every way tried."""
    if n == 1:
        return 0
    if slots == 1:
        return n * (n - 1) // 2
    return min(m + fewest_steps(n - m, slots - 1) + fewest_steps(m, slots) for m in range(1, n))


@pytest.mark.parametrize("slots", [1, 2, 3, 5, 8, 30])
def test_the_schedule_recomputes_as_few_steps_as_can_be(slots):
    for n in range(1, 40):
        assert forward_steps(n, slots) == fewest_steps(n, slots) + 1
    assert forward_steps(10_000, 10_000) == 10_000


def test_ten_thousand_steps_need_less_than_three_sweeps_of_recomputation():
    assert forward_steps(10_000, 53) < 3 * 10_000
    assert forward_steps(10_000, 141) < 2 * 10_000


@pytest.mark.parametrize(("runs", "questions"), [(1, 1), (1, 5), (5, 1), (5, 3)])
def test_any_memory_gives_the_same_bits_and_takes_the_steps_that_were_planned(make_task, runs, questions, monkeypatch):
    task = make_task(build=with_dropout, **SETTINGS)
    program, W = Program(task), masks(task, runs)
    Q = torch.rand(questions, task.n_query, generator=torch.Generator().manual_seed(4)).double()
    f, gradient = metagradients(task, W, query_weights=Q, program=program)
    roomy = plan_reverse(task, runs, questions, program=program)
    assert (roomy.runs, roomy.forward_steps) == (runs, 12)
    needed = least_memory(task, runs, questions)
    taken = []
    plain = program.step
    monkeypatch.setattr(program, "step", lambda *a, **k: taken.append(1) or plain(*a, **k))
    seen = set()

    for memory in [needed + step * (roomy.memory - needed) // 6 for step in range(7)]:
        plan = plan_reverse(task, runs, questions, program=program, memory=memory)
        taken.clear()
        again, other = metagradients(task, W, query_weights=Q, program=program, memory=memory)

        assert torch.equal(again, f) and torch.equal(other, gradient)
        assert plan.memory <= memory
        assert len(taken) == plan.forward_steps * -(-runs // plan.runs) * -(-questions // plan.questions)
        seen.add((plan.runs, plan.questions, plan.snapshots))
    assert len(seen) > 3 and min(seen)[2] < 12


def least_memory(task, runs, questions=1):
    """As the refusal of less says."""
    with pytest.raises(EngineError) as refused:
        plan_reverse(task, runs, questions, memory=1)
    return int(re.search(r"need ([\d,]+);", str(refused.value))[1].replace(",", ""))


@settings(max_examples=10, deadline=None)
@given(memory=st.integers(20_000, 100_000), runs=st.integers(2, 7))
def test_any_memory_gives_the_same_values(make_task, memory, runs):
    task = make_task(build=with_dropout, **SETTINGS)
    program, W = Program(task), masks(task, 7)

    together = replay_values(task, W, per_query=True, program=program)

    assert torch.equal(replay_values(task, W[:runs], per_query=True, program=program, memory=memory), together[:runs])


def test_the_budget_is_obeyed_by_what_torch_allocates(make_task):
    """Measured by torch's own allocator, not by the plan's count; kernels' scratch is the margin."""
    task = make_task(
        build=lambda: with_dropout(400), n_train=64, batch=16, **{**SETTINGS, "learning_rate": 0.01, "epochs": 2}
    )
    program = Program(task)
    for runs in (1, 4):
        W = masks(task, runs)
        least, roomy = least_memory(task, runs), plan_reverse(task, runs, 1, program=program).memory
        for memory in (least, roomy):
            peak = allocated(lambda W=W, memory=memory: metagradients(task, W, program=program, memory=memory))
            assert 0.3 * memory < peak <= 1.1 * memory
            values = allocated(lambda W=W, memory=memory: replay_values(task, W, program=program, memory=memory))
            assert values <= 1.1 * memory


def allocated(work) -> int:
    """The most bytes held at once, by the allocator's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_a_budget_below_one_step_is_refused_with_what_it_takes(make_task):
    task = make_task(build=with_dropout, **SETTINGS)
    for work in (metagradients, replay_values):
        with pytest.raises(EngineError, match=r"needs? [\d,]+; give at least that") as refused:
            work(task, masks(task, 3), memory=1000)
        assert refused.value.pointer == "/memory"


def test_metagradient_through_dropout_schedule_clipping_and_groups_is_the_slope(make_task):
    task = make_task(build=lambda: with_dropout().double(), **SETTINGS)
    W = torch.rand(2, task.n_train, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.3
    program = Program(task)
    _, gradient = metagradients(task, W, program=program, memory=least_memory(task, 2) + 5000)

    steps = 1e-5 * torch.eye(task.n_train, dtype=torch.float64)
    for run in range(2):
        slope = (replay_values(task, W[run] + steps) - replay_values(task, W[run] - steps)) / 2e-5
        torch.testing.assert_close(gradient[0, run], slope, rtol=1e-5, atol=1e-8)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(1, 8), nn.LayerNorm(8)
        self.mix, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x):
        h = self.embed(x[:, :, None])
        q, k, v = self.mix(self.norm(h)).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out((h + scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)).mean(1))


def test_metagradient_through_attention_is_the_slope(make_task):
    """Torch's fused attention has no second derivative and no batched version."""
    task = make_task(build=lambda: Attention().double())

    _, gradient = metagradients(task, torch.ones(1, task.n_train))

    steps = 1e-5 * torch.eye(task.n_train, dtype=torch.float64)
    slope = (replay_values(task, 1 + steps) - replay_values(task, 1 - steps)) / 2e-5
    torch.testing.assert_close(gradient[0, 0], slope, rtol=1e-4, atol=1e-8)


def test_runs_too_big_to_gain_from_company_go_one_by_one_and_so_do_their_questions(make_task, monkeypatch):
    monkeypatch.setattr(training, "SOLO_BYTES", 1000)
    task = make_task(build=with_dropout, **SETTINGS)
    program, W, Q = Program(task), masks(task, 2), torch.eye(task.n_query)[:3]

    _, gradient = metagradients(task, W, query_weights=Q, program=program)

    assert cost(task).is_solo and chunk_size(task, 3) == 1 and plan_reverse(task, 2, 3).runs == 1
    for run in range(2):
        for q in range(3):
            alone = metagradients(task, W[run], query_weights=Q[q : q + 1], program=program)[1]
            assert torch.equal(gradient[q, run], alone[0, 0])
    short = least_memory(task, 2, 3)
    assert plan_reverse(task, 2, 3, program=program, memory=short).questions == 1
    assert torch.equal(metagradients(task, W, query_weights=Q, program=program, memory=short)[1], gradient)


def test_runs_are_split_where_memory_is_short(make_task):
    task = make_task(build=with_dropout, **SETTINGS)
    per_run = cost(task).run_bytes

    assert [chunk_size(task, 40, memory) for memory in (2 * per_run, 7 * per_run + 5, 10**9)] == [2, 7, 40]
    assert chunk_size(task, 1000) == training.MAX_RUNS and chunk_size(task, 1) == 1
