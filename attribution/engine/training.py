"""The deterministic loop, run once or many times at once, forwards and backwards.

Step s minimises  Σ_slots w_i · loss_i / D  with D the number of slots ("batch") or the sum of their weights ("weight"),
after `torch.manual_seed(first 8 bytes of SHA-256(f"{seed}:{s}"))`; so counterfactual runs share every random mask,
which belongs to a slot and not to a record.

Counterfactual runs differ in their weights w only. They are trained as one model whose tensors carry a leading
dimension R (torch.vmap over functional_call): where one run is bound by overhead, sixty cost little more than one.

Reverse mode. With state z_s = (parameters, moments) and z_{s+1} = Φ_s(z_s, w), the metagradient of f = −measurement is

    λ_T = ∂f/∂z_T        λ_s = (∂Φ_s/∂z_s)ᵀ λ_{s+1}        ∂f/∂w = Σ_s (∂Φ_s/∂w)ᵀ λ_{s+1}

exact for the recorded run (Maclaurin et al. 2015, arXiv:1502.03492; Engstrom et al. 2025, arXiv:2503.13751). States are
kept for every step, or, where memory is short, for every √T-th step with the rest recomputed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from attribution.engine.checks import check_losses
from attribution.engine.errors import EngineError, TrainingDiverged
from attribution.engine.files import written_whole
from attribution.engine.task import Batch, Recipe, Task, seed_of

Tensors = dict[str, Tensor]
Progress = Callable[[int, int], None]  # (steps done, steps in all)

MEMORY_BYTES = 2**30  # what one chunk of runs may hold
MAX_RUNS = 64  # beyond this a chunk gains no speed on a CPU: its working set leaves the cache
QUERY_CHUNK = 4096


@dataclass
class State:
    """Where R runs stand after `step` steps; every tensor but the frozen ones has the leading dimension R."""

    step: int
    parameters: Tensors
    buffers: Tensors
    moments: dict[str, Tensors]  # field -> parameter name -> tensor
    frozen: Tensors  # parameters that require no gradient: one copy for all runs

    def stacked(self, runs: int) -> "State":
        """One run's state, for so many runs."""

        def stack(tensors: Tensors) -> Tensors:
            return {name: t.detach().expand(runs, *t.shape[1:]).clone() for name, t in tensors.items()}

        moments = {field: stack(tensors) for field, tensors in self.moments.items()}
        return State(self.step, stack(self.parameters), stack(self.buffers), moments, self.frozen)

    def tensors(self, run: int = 0) -> Tensors:
        """One run's state under the names of a checkpoint file: `model.NAME`, `optimizer.NAME.FIELD`."""
        model = {f"model.{name}": t[run] for name, t in (self.parameters | self.buffers).items()}
        model |= {f"model.{name}": t for name, t in self.frozen.items()}
        optimizer = {f"optimizer.{n}.{f}": t[run] for f, ts in self.moments.items() for n, t in ts.items()}
        return {name: t.detach().contiguous().clone() for name, t in (model | optimizer).items()}


@dataclass(frozen=True)
class TrainedRun:
    """A finished plain run: its last state, its checkpoints, and the mean weighted loss that each step saw."""

    state: State
    checkpoints: list[tuple[int, Path]]
    losses: list[float]

    def model_state(self) -> Tensors:
        """Parameters and buffers by the model's own names."""
        return {name.removeprefix("model."): t for name, t in self.state.tensors().items() if name.startswith("model.")}


@dataclass(frozen=True)
class Cost:
    """What one run takes. FLOPs are those of matrix products and convolutions, counted by torch, not estimated."""

    run_flops: float  # one unbatched run: every step's forward and backward, and one measurement of all queries
    metagradient_flops: float  # one run forwards and backwards
    run_bytes: float  # held per run by a batched replay
    metagradient_bytes: float  # held per run and state by a reverse pass, beyond its kept states

    @property
    def metagradient_ratio(self) -> float:
        return self.metagradient_flops / self.run_flops if self.run_flops else 5.0


class _Losses(nn.Module):
    """Gives `functional_call` one module whose forward is the task's loss or measurement."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model()
        self._of = {True: task.loss, False: task.measurement}

    def forward(self, batch: Batch) -> Tensor:
        return self._of[self.training](self.model, batch)


class Program:
    """A task as pure functions of a `State`: initial state, one step, its adjoint, the measurement."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.recipe: Recipe = task.require_recipe()
        with preserved_generator():
            self.module = _Losses(task)
        model = self.module.model
        model.load_state_dict(dict(self.recipe.initial_state))
        self._trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        self._frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        self._buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        self._options = {name: self.recipe.options_for(name) for name in self._trained}
        self.fields: tuple[str, ...] = (
            ("momentum_buffer",) if self.recipe.optimizer == "sgd" else ("exp_avg", "exp_avg_sq")
        )
        if self.recipe.optimizer == "sgd" and not any(options["momentum"] for options, _ in self._options.values()):
            self.fields = ()
        self._check_loss_shapes()
        check_losses(self.module, task)

    def initial(self, runs: int) -> State:
        def stack(tensors: Tensors) -> Tensors:
            return {name: t.expand(runs, *t.shape).clone() for name, t in tensors.items()}

        zeros = {name: torch.zeros_like(t) for name, t in self._trained.items()}
        moments = {f: stack(zeros) for f in self.fields}
        return State(0, stack(self._trained), stack(self._buffers), moments, self._frozen)

    def restored(self, step: int, tensors: Mapping[str, Tensor]) -> State:
        """One run's state from a checkpoint's tensors, see `State.tensors`; those of the optimizer must be there."""

        def of(names: Iterable[str], pattern: str) -> Tensors:
            return {name: tensors[pattern.format(name)][None].clone() for name in names}

        moments = {field: of(self._trained, f"optimizer.{{}}.{field}") for field in self.fields}
        return State(step, of(self._trained, "model.{}"), of(self._buffers, "model.{}"), moments, self._frozen)

    def slots(self, step: int, weights: Tensor) -> tuple[Batch, Tensor]:
        """The batch of one step and the weights (R, B) of its slots; an empty slot shows record 0 at weight 0."""
        index = self.recipe.order[step]
        shown = index.clamp_min(0)
        return self.task.train[shown], weights[:, shown] * (index >= 0)

    def step(self, state: State, weights: Tensor, *, create_graph: bool = False) -> tuple[State, Tensor]:
        """One step of R runs with record weights (R, n_train); also the objective each run saw, (R,)."""
        batch, slot_weights = self.slots(state.step, weights)
        return self._step(state, batch, slot_weights, create_graph=create_graph)

    def _step(self, state: State, batch: Batch, slots: Tensor, *, create_graph: bool) -> tuple[State, Tensor]:
        parameters = state.parameters
        if not create_graph:
            parameters = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        self.module.train()
        torch.manual_seed(seed_of(self.recipe.seed, state.step))
        with torch.enable_grad():
            losses, buffers = self._call(parameters, state.buffers, batch)  # (R, B)
            objective = (slots * losses).sum(1)
            if self.recipe.normalizer == "batch":
                objective = objective / slots.shape[1]
            else:
                total = slots.sum(1)
                objective = objective / torch.where(total > 0, total, torch.ones_like(total))
            # Runs do not touch each other, so the gradient of the sum holds each run's own gradient.
            gradients = torch.autograd.grad(
                objective.sum(), list(parameters.values()), create_graph=create_graph, materialize_grads=True
            )
        if not bool(torch.isfinite(objective.detach()).all()):
            raise TrainingDiverged(
                f"the loss of step {state.step} is not finite; lower the learning rate, clip, or repair the batch",
                step=state.step,
            )
        with torch.set_grad_enabled(create_graph):
            new, moments = self._update(state, parameters, dict(zip(parameters, gradients, strict=True)))
        return State(state.step + 1, new, buffers, moments, self._frozen), objective.detach()

    def _update(self, state: State, old: Tensors, gradients: Tensors) -> tuple[Tensors, dict[str, Tensors]]:
        """torch.optim's SGD, Adam and AdamW, out of place and differentiable."""
        step, optimizer = state.step, self.recipe.optimizer
        gradients = self._clipped(gradients)
        new: Tensors = {}
        moments: dict[str, Tensors] = {f: {} for f in self.fields}
        for name, p in old.items():
            g, (options, rates) = gradients[name], self._options[name]
            decay, rate = options["weight_decay"], rates[step]
            if optimizer == "adamw":
                p = p * (1 - rate * decay)
            elif decay:
                g = g + decay * p
            if optimizer == "sgd":
                if self.fields:
                    momentum, before = options["momentum"], state.moments["momentum_buffer"][name]
                    buffer = g if step == 0 else momentum * before + (1 - options["dampening"]) * g
                    moments["momentum_buffer"][name] = buffer
                    if momentum:
                        g = g + momentum * buffer if options["nesterov"] else buffer
                new[name] = p - rate * g
            else:
                beta1, beta2 = options["betas"]
                m = state.moments["exp_avg"][name] * beta1 + (1 - beta1) * g
                v = state.moments["exp_avg_sq"][name] * beta2 + (1 - beta2) * g * g
                moments["exp_avg"][name], moments["exp_avg_sq"][name] = m, v
                scale = math.sqrt(1 - beta2 ** (step + 1))
                new[name] = p - (rate / (1 - beta1 ** (step + 1))) * m / (_sqrt(v) / scale + options["eps"])
        return new, moments

    def _clipped(self, gradients: Tensors) -> Tensors:
        if self.recipe.clip_norm is None:
            return gradients
        squares = sum(g.flatten(1).square().sum(1) for g in gradients.values())
        assert isinstance(squares, Tensor)
        factor = (self.recipe.clip_norm / (_sqrt(squares) + 1e-6)).clamp(max=1)  # (R,); torch's own 1e-6
        return {name: g * factor.reshape(-1, *[1] * (g.ndim - 1)) for name, g in gradients.items()}

    def adjoint(self, state: State, weights: Tensor, outer: "Adjoint") -> tuple["Adjoint", Tensor]:
        """Pull the adjoint of the next state back through one step.

        Returns:
            The adjoint of `state`, and the gradient with respect to the slots' weights, (G, R, B).
        """
        parameters = {name: p.detach().requires_grad_() for name, p in state.parameters.items()}
        moments = {f: {n: t.detach().requires_grad_() for n, t in ts.items()} for f, ts in state.moments.items()}
        batch, slots = self.slots(state.step, weights)
        slots = slots.detach().requires_grad_()
        here = State(state.step, parameters, state.buffers, moments, self._frozen)
        after, _ = self._step(here, batch, slots, create_graph=True)
        outputs, pulled = _flat(after.parameters, after.moments), _flat(outer.parameters, outer.moments)
        inputs = [*_flat(parameters, moments), slots]
        # A moment that the step overwrites (the first momentum buffer) has no gradient, and may not even be in the graph.
        kept = [(o, a) for o, a in zip(outputs, pulled, strict=True) if o.requires_grad]
        batched = pulled[0].shape[0] > 1
        found = torch.autograd.grad(
            [o for o, _ in kept],
            inputs,
            [a if batched else a[0] for _, a in kept],
            is_grads_batched=batched,
            materialize_grads=not batched,
            allow_unused=True,
        )
        gradients = [
            torch.zeros(pulled[0].shape[0], *i.shape, dtype=i.dtype) if g is None else (g if batched else g[None])
            for g, i in zip(found, inputs, strict=True)
        ]
        names = list(parameters)
        n = len(names)
        back = {f: dict(zip(names, gradients[n * (k + 1) : n * (k + 2)], strict=True)) for k, f in enumerate(moments)}
        return Adjoint(dict(zip(names, gradients[:n], strict=True)), back), gradients[-1]

    def measure(self, state: State) -> Tensor:
        """The measurement of every query, (R, n_query), in eval mode; lower is better."""
        with torch.no_grad():
            parts = [self._measured(state.parameters, state.buffers, batch) for _, batch in self._query_batches()]
        measured = torch.cat(parts, 1)
        if not bool(torch.isfinite(measured).all()):
            raise TrainingDiverged("a measurement is not finite; training has exploded", step=state.step - 1)
        return measured

    def measurement_adjoint(self, state: State, query_weights: Tensor) -> "Adjoint":
        """∂f/∂z_T for f_g = −Σ_q weight[g, q] · measurement[q]; tensors of shape (G, R, ...)."""
        parameters = {name: p.detach().requires_grad_() for name, p in state.parameters.items()}
        total = {n: torch.zeros(len(query_weights), *p.shape, dtype=p.dtype) for n, p in parameters.items()}
        for index, batch in self._query_batches():
            with torch.enable_grad():
                measured = self._measured(parameters, state.buffers, batch).sum(0)  # (n_chunk,)
            for g, weights in enumerate(query_weights):
                w = weights[index].to(measured.dtype)
                if not bool(w.any()):
                    continue
                found = torch.autograd.grad(
                    -(w * measured).sum(), list(parameters.values()), retain_graph=True, materialize_grads=True
                )
                for name, gradient in zip(parameters, found, strict=True):
                    total[name][g] += gradient
        zeros = {f: {n: torch.zeros_like(t) for n, t in total.items()} for f in self.fields}
        return Adjoint(total, zeros)

    def _query_batches(self) -> Iterator[tuple[Tensor, Batch]]:
        for start in range(0, self.task.n_query, QUERY_CHUNK):
            index = torch.arange(start, min(start + QUERY_CHUNK, self.task.n_query))
            yield index, self.task.queries[index]

    def _measured(self, parameters: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
        self.module.eval()
        return self._call(parameters, buffers, batch)[0]

    def _call(self, parameters: Tensors, buffers: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        """Losses (R, B) of R stacked models on one batch, and their buffers afterwards."""

        def one(p: Tensors, b: Tensors) -> tuple[Tensor, Tensors]:
            tensors = {f"model.{n}": t for n, t in (p | self._frozen | b).items()}
            losses = torch.func.functional_call(self.module, tensors, (batch,))
            return losses, {n: tensors[f"model.{n}"] for n in b}

        buffers = {name: b.clone() for name, b in buffers.items()}  # a forward may write into them
        runs = next(iter(parameters.values())).shape[0]
        if runs == 1:
            losses, after = one({n: p[0] for n, p in parameters.items()}, {n: b[0] for n, b in buffers.items()})
            return losses[None], {n: b[None] for n, b in after.items()}
        mapped = torch.vmap(one, randomness="same")
        if buffers:
            return mapped(parameters, buffers)
        return torch.vmap(lambda p: one(p, {})[0], randomness="same")(parameters), {}

    def _check_loss_shapes(self) -> None:
        state = self.initial(1)
        index = torch.arange(min(2, self.task.n_train))
        with preserved_generator():
            for pointer, records, training in (
                ("/loss", self.task.train, True),
                ("/measurement", self.task.queries, False),
            ):
                size = min(len(records), len(index))
                self.module.train(training)
                with torch.no_grad():
                    losses, after = self._call(state.parameters, state.buffers, records[index[:size]])
                if losses.shape != (1, size):
                    raise EngineError(
                        f"gave shape {tuple(losses.shape[1:])} for {size} records; return one number per record, (B,), "
                        'not a mean: reduction="none"',
                        pointer=pointer,
                    )
                if training:
                    self.writes_float_buffers = any(
                        b.is_floating_point() and not torch.equal(b, after[n]) for n, b in state.buffers.items()
                    )


@dataclass
class Adjoint:
    """λ of one state, for G measurements at once: tensors of shape (G, R, ...)."""

    parameters: Tensors
    moments: dict[str, Tensors]


def train(
    task: Task,
    weights: Tensor | None = None,
    *,
    checkpoint_steps: Sequence[int] = (),
    checkpoint_dir: Path | None = None,
    progress: Progress | None = None,
) -> TrainedRun:
    """Train once by the recipe; `weights` (n_train,) default to 1.

    Checkpoints are written after the given numbers of completed steps, whole or not at all.
    """
    program = Program(task)
    n_step = program.recipe.n_step
    if checkpoint_steps and checkpoint_dir is None:
        raise EngineError("say where to write them: checkpoint_dir", pointer="/checkpoint_steps")
    for number, step in enumerate(checkpoint_steps):
        if not 0 <= step <= n_step:
            raise EngineError(f"{step} is not in 0..{n_step}", pointer=f"/checkpoint_steps/{number}")
    W = _weights(task, torch.ones(task.n_train) if weights is None else weights[None])
    state, written, losses = program.initial(1), [], []
    with preserved_generator():
        for step in range(n_step + 1):
            if step in checkpoint_steps:
                assert checkpoint_dir is not None
                written.append((step, save_state(state.tensors(), checkpoint_dir / f"step-{step:08d}.safetensors")))
            if step == n_step:
                break
            state, objective = program.step(state, W)
            losses.append(float(objective))
            if progress:
                progress(step + 1, n_step)
    return TrainedRun(state, written, losses)


def replay_values(
    task: Task,
    weights: Tensor,
    *,
    per_query: bool = False,
    program: Program | None = None,
    memory: int = MEMORY_BYTES,
    progress: Progress | None = None,
) -> Tensor:
    """f of R counterfactual runs, trained as one model: minus the measurement after the last step.

    Args:
        weights: (R, n_train), bool or float: 0 leaves a record out and keeps its slots.
        per_query: (R, n_query) instead of their mean (R,).
    """
    program = program or Program(task)
    W = _weights(task, weights)
    size = chunk_size(cost(task).run_bytes, memory)
    values = []
    n_step = program.recipe.n_step
    with preserved_generator():
        for start in range(0, len(W), size):
            chunk = W[start : start + size]
            state = program.initial(len(chunk))
            for step in range(n_step):
                state, _ = program.step(state, chunk)
                if progress:
                    progress(start * n_step + len(chunk) * (step + 1), len(W) * n_step)
            values.append(-program.measure(state))
    f = torch.cat(values)
    return f if per_query else f.mean(1)


def metagradients(
    task: Task,
    weights: Tensor,
    *,
    query_weights: Tensor | None = None,
    program: Program | None = None,
    memory: int = MEMORY_BYTES,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """f of R counterfactual runs and its exact gradient with respect to every record's weight.

    Args:
        weights: (R, n_train), where the gradient is taken.
        query_weights: (G, n_query): one reverse pass answers G questions f_g = −Σ_q weight[g, q] · measurement[q];
            the mean over queries by default.

    Returns:
        f per query (R, n_query), and the gradients (G, R, n_train).
    """
    program = program or Program(task)
    if program.writes_float_buffers:
        raise EngineError("training writes float buffers, which the reverse pass would miss", pointer="/model")
    W = _weights(task, weights)
    Q = torch.full((1, task.n_query), 1 / task.n_query, dtype=torch.float64) if query_weights is None else query_weights
    known, n_step = cost(task), program.recipe.n_step
    state_bytes = sum(t.numel() * t.element_size() for t in program.initial(1).tensors().values())
    keep = min(n_step, 2 * math.isqrt(n_step) + 2)  # states at once, if most are recomputed
    size = chunk_size((known.metagradient_bytes + keep * state_bytes) * (1 + (len(Q) - 1) / 4), memory)
    every = 1 if n_step * state_bytes * min(size, len(W)) <= memory else math.isqrt(n_step)
    values, gradients = [], []
    with preserved_generator():
        for start in range(0, len(W), size):
            done = start * 2 * n_step
            report = _scaled(progress, done, min(size, len(W) - start), len(W) * 2 * n_step)
            f, g = _metagradient_chunk(program, W[start : start + size], Q, every, report)
            values.append(f)
            gradients.append(g)
    return torch.cat(values), torch.cat(gradients, 1)


def _metagradient_chunk(
    program: Program, W: Tensor, Q: Tensor, every: int, report: Callable[[int], None]
) -> tuple[Tensor, Tensor]:
    n_step = program.recipe.n_step
    state, kept = program.initial(len(W)), []
    for step in range(n_step):
        if step % every == 0:
            kept.append(state)
        state, _ = program.step(state, W)
        report(step + 1)
    f = -program.measure(state)
    adjoint = program.measurement_adjoint(state, Q)
    gradient = torch.zeros(len(Q), *W.shape, dtype=W.dtype)
    for start in reversed(range(0, n_step, every)):
        states = [kept.pop()]
        for _ in range(start + 1, min(start + every, n_step)):
            states.append(program.step(states[-1], W)[0])
        for here in reversed(states):
            adjoint, slots = program.adjoint(here, W, adjoint)
            index = program.recipe.order[here.step]
            gradient.index_add_(2, index[index >= 0], slots[:, :, index >= 0])
            report(2 * n_step - here.step)
    return f, gradient


_COSTS: dict[int, tuple[Task, Cost]] = {}


def cost(task: Task) -> Cost:
    """What a run and a metagradient cost, from one step of each, run once and counted."""
    found = _COSTS.get(id(task))
    if found is None or found[0] is not task:
        _COSTS.clear()  # one task at a time is worked on; the entry keeps it alive so that its id stays its own
        found = _COSTS[id(task)] = (task, _cost(task))
    return found[1]


def _cost(task: Task) -> Cost:
    program, n_step = Program(task), task.require_recipe().n_step
    W = _weights(task, torch.ones(1, task.n_train))
    state = program.initial(1)
    with preserved_generator():
        with FlopCounterMode(display=False) as counter, _saved_bytes() as forward:
            program.step(state, W)
        step_flops = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            program.measure(state)
        measure_flops = counter.get_total_flops()
        outer = Adjoint(dict(state.parameters), dict(state.moments))
        outer = Adjoint(
            {n: t[None] for n, t in outer.parameters.items()},
            {f: {n: t[None] for n, t in ts.items()} for f, ts in outer.moments.items()},
        )
        with FlopCounterMode(display=False) as counter, _saved_bytes() as backward:
            program.adjoint(state, W, outer)
        adjoint_flops = counter.get_total_flops()
    run = n_step * step_flops + measure_flops
    state_bytes = sum(t.numel() * t.element_size() for t in state.tensors().values())
    return Cost(
        run_flops=run,
        metagradient_flops=run + n_step * adjoint_flops + 2 * measure_flops,
        run_bytes=4 * state_bytes + forward[0],
        metagradient_bytes=6 * state_bytes + backward[0],
    )


@contextmanager
def _saved_bytes() -> Iterator[list[int]]:
    """Count the bytes that autograd keeps for a backward pass."""
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        total[0] += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def chunk_size(bytes_per_run: float, memory: int) -> int:
    return max(1, min(MAX_RUNS, int(memory // max(bytes_per_run, 1))))


@contextmanager
def preserved_generator() -> Iterator[None]:
    """Steps seed torch's global generator; hand it back as it was."""
    with torch.random.fork_rng(devices=[]):
        yield


def save_state(tensors: Tensors, path: Path) -> Path:
    """Write a safetensors file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        save_file(tensors, partial)
    return path


def _weights(task: Task, weights: Tensor) -> Tensor:
    recipe = task.require_recipe()
    if weights.ndim == 1:
        weights = weights[None]
    if weights.ndim != 2 or weights.shape[1] != task.n_train:
        raise EngineError(f"must be (runs, {task.n_train}), is {tuple(weights.shape)}", pointer="/weights")
    dtype = next(t.dtype for t in recipe.initial_state.values() if t.is_floating_point())
    weights = weights.to(dtype)
    wrong = (~torch.isfinite(weights) | (weights < 0)).nonzero()
    if len(wrong):
        run, record = wrong[0].tolist()
        raise EngineError(f"{float(weights[run, record])} is not 0 or more", pointer=f"/weights/{run}/{record}")
    return weights


def _sqrt(x: Tensor) -> Tensor:
    """√x whose derivative at 0 is 0: there v and its gradient are both 0, and 0 · ∞ would be NaN."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)).sqrt(), torch.zeros_like(x))


def _flat(parameters: Tensors, moments: dict[str, Tensors]) -> list[Tensor]:
    return [*parameters.values(), *(t for ts in moments.values() for t in ts.values())]


def _scaled(progress: Progress | None, done: int, runs: int, total: int) -> Callable[[int], None]:
    def report(steps: int) -> None:
        if progress:
            progress(done + runs * steps, total)

    return report


def environment() -> dict[str, Any]:
    """What the bits of a run may depend on."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
