"""The states that an estimator works from, and how much training each of them stands for.

They are the task's checkpoints or, where it has none, states kept while training by the recipe. A segment of training moved
the weights by about

    θ → θ − P τ · (1/n) Σ_i m_i g_i(θ)        g_i = ∂ loss_i / ∂θ,  m_i: how often the segment saw record i, mean 1 over records

With a recipe, τ is the sum of learning rates, divided by 1 − momentum, and P the optimizer's own scaling of each coordinate
(1 for SGD, 1 / (√v̂ + ε) for Adam). Without one, m = P = 1 and τ is unknown: see `age`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attribution.engine.architectures import load_state
from attribution.engine.errors import EngineError
from attribution.engine.gradients import block_rows, named_gradients
from attribution.engine.task import Recipe, Task, initial_state_from_seed
from attribution.engine.training import Program, Progress, State, Tensors, preserved_generator

UNREAD = "no age can be read off: by steps at the other states' pace, or else from 0.1 of the mean eigenvalue"


@dataclass(frozen=True)
class Segment:
    """Some consecutive steps of training, seen from one state among them."""

    state: State
    steps: tuple[int, int]  # completed before, completed after
    visits: Tensor  # (n_train,): m above
    rate: Tensors | None  # parameter name -> P τ, a scalar or of the parameter's shape; None: unknown
    decay: dict[str, float]  # parameter name -> Σ learning rate · weight decay, with the same momentum factor

    def mean_rate(self) -> float:
        """τ as one number: the mean of P τ over all parameters' numbers."""
        assert self.rate is not None
        sizes = {name: p[0].numel() for name, p in self.state.parameters.items()}
        return sum(float(self.rate[name].mean()) * size for name, size in sizes.items()) / sum(sizes.values())


@dataclass(frozen=True)
class Trajectory:
    """A training from its start to the weights that are explained."""

    segments: list[Segment]
    final: State
    start: Tensors | None  # the trained parameters at step 0, where they are known

    @property
    def steps(self) -> list[int]:
        """After how many completed steps the states were taken."""
        return [segment.state.step for segment in self.segments]


def trajectory(task: Task, program: Program, *, n_segment: int, progress: Progress | None = None) -> Trajectory:
    """The task's checkpoints, at most `n_segment` of them; without any, states from the middle of `n_segment` equal stretches.

    Raises:
        EngineError: neither recipe nor checkpoint, or a checkpoint that is not of this model.
    """
    recipe = task.recipe
    if task.checkpoints:
        chosen = spread(len(task.checkpoints), n_segment)
        states = [load_checkpoint(program, number) for number in chosen]
        return _from_states(task, program, states)
    if recipe is None:
        raise EngineError("give a checkpoint, or the recipe to train by", pointer="/checkpoints")
    n_segment = min(n_segment, recipe.n_step)
    ends = [round(recipe.n_step * k / n_segment) for k in range(n_segment + 1)]
    middles = [(a + b) // 2 for a, b in pairwise(ends)]
    if n_segment == 1:
        middles = [recipe.n_step]  # one state has to be the one that is explained
    states = trained_states(program, [*middles, recipe.n_step], progress)
    segments = [_segment(recipe, program, state, span) for state, span in zip(states, pairwise(ends), strict=False)]
    return Trajectory(segments, states[-1], _start(program))


def at_state(task: Task, program: Program, state: State) -> Trajectory:
    """One state alone, standing for all the training before it."""
    return _from_states(task, program, [state])


def trained_states(program: Program, steps: Sequence[int], progress: Progress | None = None) -> list[State]:
    """Train by the recipe and return the states after the given numbers of completed steps, in the order given."""
    kept: dict[int, State] = {}
    state = program.initial(1)
    weights = next(iter(state.parameters.values())).new_ones(1, program.task.n_train)
    with preserved_generator():
        for step in range(max(steps) + 1):
            if step in steps:
                kept[step] = state
            if step < max(steps):
                state, _ = program.step(state, weights)
                if progress:
                    progress(step + 1, max(steps))
    return [kept[step] for step in steps]


def last_state(task: Task, program: Program, progress: Progress | None = None) -> State:
    """The weights to be explained: the last checkpoint, or the end of training by the recipe."""
    return trajectory(task, program, n_segment=1, progress=progress).final


def load_checkpoint(program: Program, number: int) -> State:
    """One of the task's checkpoints as a state of one run: `read_state`, whose errors point to the checkpoint."""
    step, path = program.task.checkpoints[number]
    return read_state(program, Path(path), step, pointer=f"/checkpoints/{number}")


def read_state(program: Program, path: Path, step: int, *, pointer: str) -> State:
    """The state of one run after `step` steps, from a checkpoint file.

    The file holds `model.NAME` for every parameter and buffer, and may hold `optimizer.NAME.FIELD`. A tied weight may be
    there under each of its names, if they agree; a buffer that the model does not save may be missing.

    Raises:
        EngineError: it cannot be read, lacks a tensor, has another shape or holds NaN.
    """
    blank = program.blank()
    expected = {name: t for name, t in blank.tensors().items() if name.startswith("model.")}
    try:
        found = load_state(path, pointer=pointer)
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror or error}", pointer=pointer) from error
    saved = {f"model.{name}": t for name, t in program.module.model.state_dict().items()}
    for name, tensor in expected.items():
        if name not in found:
            if name not in saved:
                found[name] = tensor  # a buffer that is made by build() and never saved
            elif twins := [n for n, t in saved.items() if n in found and _is_tied(t, saved[name])]:
                found[name] = found[twins[0]]
            else:
                raise EngineError(
                    f"lacks {name!r}; it has {', '.join(sorted(found)[:6]) or 'nothing'}: write it with keys model.NAME",
                    pointer=pointer,
                )
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise EngineError(
                f"{name!r} is {tuple(found[name].shape)} {found[name].dtype}, "
                f"the model has {tuple(tensor.shape)} {tensor.dtype}",
                pointer=pointer,
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(found[name]).all()):
            raise EngineError(f"{name!r} holds NaN or infinity; take an earlier checkpoint", pointer=pointer)
    for name in found:
        if name in expected or name.startswith("optimizer."):
            continue
        twin = next((n for n in expected if n in saved and name in saved and _is_tied(saved[n], saved[name])), None)
        if twin is None or not torch.equal(found[name], found[twin]):
            raise EngineError(
                f"has the tensor {name!r}, which the model does not"
                if twin is None
                else f"{name!r} and {twin!r} are one tensor in the model and two in the file",
                pointer=pointer,
            )

    def part(names: Tensors) -> Tensors:
        return {name: found[f"model.{name}"][None].to(program.device, copy=True) for name in names}

    moments: dict[str, Tensors] = {}
    for field in program.fields:
        wanted = {name: f"optimizer.{name}.{field}" for name in blank.parameters}
        if all(key in found and found[key].shape == blank.parameters[name][0].shape for name, key in wanted.items()):
            moments[field] = {name: found[key][None].to(program.device, copy=True) for name, key in wanted.items()}
    frozen = {name: found[f"model.{name}"].to(program.device) for name in blank.frozen}
    return State(step, part(blank.parameters), part(blank.buffers), moments, frozen)


def _is_tied(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


def spread(n: int, wanted: int) -> list[int]:
    """Indices of at most `wanted` of n, evenly spread and with the last."""
    if n <= wanted:
        return list(range(n))
    return sorted({round(n * (k + 1) / wanted) - 1 for k in range(wanted)})


def _from_states(task: Task, program: Program, states: list[State]) -> Trajectory:
    if task.recipe is None:
        ends = [0, *(state.step for state in states)]
        segments = [
            Segment(state, (ends[k], ends[k + 1]), torch.ones(task.n_train), None, dict.fromkeys(state.parameters, 0.0))
            for k, state in enumerate(states)
        ]
        return Trajectory(segments, states[-1], None)
    # Each state stands for the steps nearest to it.
    middles = [(a.step + b.step) // 2 for a, b in pairwise(states)]
    ends = [0, *middles, states[-1].step]
    spans = pairwise(ends)
    segments = [_segment(task.recipe, program, s, span) for s, span in zip(states, spans, strict=True)]
    return Trajectory(segments, states[-1], _start(program))


def _start(program: Program) -> Tensors:
    return {name: t[0] for name, t in program.initial(1).parameters.items()}


def _segment(recipe: Recipe, program: Program, state: State, steps: tuple[int, int]) -> Segment:
    n = program.task.n_train
    order = recipe.order[steps[0] : steps[1]]
    used = order >= 0
    divisor = used.sum(1).clamp_min(1) if recipe.normalizer == "weight" else torch.full((len(order),), recipe.batch)
    base = torch.as_tensor(recipe.learning_rate, dtype=torch.float64).expand(recipe.n_step)[steps[0] : steps[1]]
    per_slot = (base / divisor)[:, None] * used
    if not per_slot.any():  # no rate, no move: τ is 0, and m says who was seen, or that nobody was
        per_slot = used.double()
    visits = torch.zeros(n, dtype=torch.float64).index_add_(0, order.clamp_min(0).flatten(), per_slot.flatten())
    share = used.sum(1) / divisor  # of a step's normaliser that its records make up
    rate: Tensors = {}
    decay: dict[str, float] = {}
    for name in state.parameters:
        options, rates = recipe.options_for(name)
        rates_here = torch.tensor(rates[steps[0] : steps[1]], dtype=torch.float64)
        factor = 1.0
        if recipe.optimizer == "sgd" and options["momentum"]:
            factor = (1 - options["dampening"]) / (1 - options["momentum"])
        total = (rates_here * share).sum() * factor
        rate[name] = total * _scaling(recipe, state, name, options)
        of_decay = factor if recipe.optimizer == "sgd" else 1.0
        decay[name] = float(rates_here.sum()) * of_decay * options["weight_decay"]
    mean = visits.mean()
    return Segment(state, steps, visits / mean if mean > 0 else torch.ones_like(visits), rate, decay)


def _scaling(recipe: Recipe, state: State, name: str, options: dict[str, Any]) -> Tensor:
    """P: what the optimizer multiplies each coordinate of a gradient with, beside the learning rate."""
    if recipe.optimizer == "sgd" or "exp_avg_sq" not in state.moments or state.step == 0:
        return torch.ones((), dtype=torch.float64)
    v: Tensor = state.moments["exp_avg_sq"][name][0].double() / (1 - options["betas"][1] ** state.step)
    return 1 / (v.sqrt() + options["eps"])


def age(curvature: Tensor, moved: Tensor, remaining: float) -> float:
    """For how long, in Σ learning rates, gradient flow must have run to leave this much of the gradient.

    Along an eigendirection with curvature σ, gradient flow for a time τ moves the weights by δ and leaves a gradient g with
    −g δ = δ² σ / (e^{τσ} − 1). τ is where the sum of that over directions is what is seen, −⟨ḡ, θ − θ₀⟩. It falls from ∞ to 0 as
    τ grows, so there is one τ. No held-out data, no learning rate: one checkpoint and where it started from are enough.
    With σ → 0 it is −⟨ḡ, δ⟩ / ‖δ‖² = 1/τ: the ridge for which this checkpoint is stationary.

    Args:
        curvature: (d,) eigenvalues, 0 or more.
        moved: (d,) δ² in the same basis; entries may be below 0, where what the start contributes was taken off.
        remaining: −⟨ḡ, θ − θ₀⟩.

    Returns:
        τ > 0, or NaN where nothing can be read off (the gradient does not point back along the path).
    """

    def left(tau: float) -> float:
        x = tau * curvature.double()
        ratio = torch.where(x > 1e-6, x / torch.expm1(x.clamp(1e-6, 700)), 1 - x / 2)
        return float((moved.double() * ratio).sum()) / tau

    low, high = 1e-8, 1e12
    if not remaining > 0 or left(low) < remaining or left(high) > remaining:
        return float("nan")
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if left(middle) > remaining else (low, middle)
    return (low * high) ** 0.5


def where_unread(taus: Sequence[float], lengths: Sequence[int], defaults: Sequence[float]) -> list[float]:
    """Ages with those that could not be read off, NaN, filled in: by steps, at the pace of the others; by the defaults if there are none.

    Args:
        lengths: steps of training that each age stands for.
    """
    read = [(tau, length) for tau, length in zip(taus, lengths, strict=True) if tau == tau]
    if not read:
        return list(defaults)
    pace = sum(tau for tau, _ in read) / max(1, sum(length for _, length in read))
    return [tau if tau == tau else max(1, length) * pace for tau, length in zip(taus, lengths, strict=True)]


def mean_gradient(program: Program, state: State) -> Tensors:
    """ḡ = (1/n) Σ_i g_i of the training loss at a state of one run, per parameter."""
    n, total = program.task.n_train, {name: torch.zeros_like(p[0]) for name, p in state.parameters.items()}
    for index in torch.arange(n).split(block_rows(program, state)):
        for name, g in named_gradients(program, state, program.task.train, index, of_loss=True).items():
            total[name] += g.sum(0)
    return {name: g / n for name, g in total.items()}


def expected_start(program: Program) -> tuple[Tensors, dict[str, float], Tensors]:
    """Where training of this model probably began, the variance of each parameter's numbers about it, and one such deviation.

    What two builds agree on (a gain of 1, pretrained weights) has variance 0. What they draw is taken to have mean 0.
    """
    builds = []
    for seed in (0, 1):
        drawn = initial_state_from_seed(program.task.model, seed)
        builds.append({name: drawn[name].to(program.device) for name in program.blank().parameters})
    start, variance, deviation = {}, {}, {}
    for name, first in builds[0].items():
        second = builds[1][name]
        is_fixed = torch.equal(first, second)
        start[name] = first if is_fixed else torch.zeros_like(first)
        variance[name] = 0.0 if is_fixed else float((first.square() + second.square()).mean()) / 2
        deviation[name] = first - start[name]
    return start, variance, deviation
