"""The deterministic loop, run once or many times at once, forwards and backwards.

Step s minimises  Σ_slots w_i · loss_i / D  with D the number of slots ("batch") or the sum of their weights ("weight"),
after `torch.manual_seed(first 8 bytes of SHA-256(f"{seed}:{s}"))`; so counterfactual runs share every random mask,
which belongs to a slot and not to a record.

Counterfactual runs differ in their weights w only. They are trained as one model whose tensors carry a leading
dimension R (torch.vmap over functional_call): where one run is bound by overhead, sixty cost little more than one.

Reverse mode. With state z_s = (parameters, moments) and z_{s+1} = Φ_s(z_s, w), the metagradient of f = −measurement is

    λ_T = ∂f/∂z_T        λ_s = (∂Φ_s/∂z_s)ᵀ λ_{s+1}        ∂f/∂w = Σ_s (∂Φ_s/∂w)ᵀ λ_{s+1}

exact for the recorded run (Maclaurin et al. 2015, arXiv:1502.03492; Engstrom et al. 2025, arXiv:2503.13751). As many states
are kept as the memory holds; the others are recomputed from the kept ones by the schedule that recomputes the fewest steps
(revolve: Griewank & Walther 2000, doi:10.1145/347837.347846). With s states kept, t sweeps reverse C(s + t, t) steps:

    forward steps = t · T − C(s + t, t − 1) + 1        C(s + t − 1, t − 1) < T ≤ C(s + t, t)

so 53 states reverse 10,000 steps in less than three sweeps. The same bits come out whatever the memory: neither the schedule nor
the number of runs at once changes the order of any sum within a run. (One run by itself takes torch's ordinary path, so it
has the bits of an ordinary loop; two or more are stacked, and a chunk of one is never left over.)
"""

import hashlib
import json
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from attribution.engine.checks import check_losses
from attribution.engine.devices import CPU, moved, repeatable
from attribution.engine.errors import EngineError, TrainingDiverged
from attribution.engine.files import written_whole
from attribution.engine.progress import Interrupted
from attribution.engine.task import Batch, Recipe, Task, seed_of

Tensors = dict[str, Tensor]
Progress = Callable[[int, int], None]  # (steps done, steps in all)

MEMORY_BYTES = 2**30  # what one chunk of runs may hold, where the caller sets no budget and a run needs no more
MAX_RUNS = 64  # beyond this a chunk gains no speed on a CPU: its working set leaves the cache
SOLO_BYTES = (
    2**24
)  # a run whose step holds more than this is bound by its products; company only pushes it out of the cache
UPDATE_BYTES = 2**20  # of one parameter, updated at a time: the dozen passes of an optimizer stay in the cache
MAX_QUESTIONS = 64  # more at once gain no speed
QUESTION_BYTES = 2**28  # what the questions of one pass may hold, where they are pulled back together
QUERY_CHUNK = 4096
RESUME_SECONDS = 60.0  # of training that a kill costs at most


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
        """One run's state under the names of a checkpoint file, `model.NAME`, `optimizer.NAME.FIELD`, in the CPU's memory."""
        model = {f"model.{name}": t[run] for name, t in (self.parameters | self.buffers).items()}
        model |= {f"model.{name}": t for name, t in self.frozen.items()}
        optimizer = {f"optimizer.{n}.{f}": t[run] for f, ts in self.moments.items() for n, t in ts.items()}
        return {name: t.detach().to(CPU, copy=True).contiguous() for name, t in (model | optimizer).items()}


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
    step_flops: float  # one step of it
    measure_flops: float  # one measurement of all queries
    metagradient_flops: float  # one run forwards and backwards, every state kept
    state_bytes: int  # one run's parameters, buffers and moments
    run_bytes: int  # held per run by a batched replay
    is_solo: bool  # too big to gain from company: its runs are trained one after the other

    @property
    def metagradient_ratio(self) -> float:
        return self.metagradient_flops / self.run_flops if self.run_flops else 5.0


@dataclass(frozen=True)
class ReversePlan:
    """How the metagradients of some runs fit a memory budget, and what that costs."""

    runs: int  # at once
    questions: int  # answered by one reverse pass
    snapshots: int  # states kept at once, the first included
    forward_steps: int  # plain steps per pass, recomputed ones included; `n_step` if all states are kept
    memory: int  # bytes held at most, beyond the task, the weights and the result
    run_equivalents: float  # of all runs and all questions, in FLOPs of one plain run


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
        self.task, self.device = task, torch.device(task.device)
        with preserved_generator():
            self.module = _Losses(task)
        model = self.module.model
        if task.recipe is not None:
            model.load_state_dict(dict(task.recipe.initial_state))
        model.to(self.device)
        self._trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        self._frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
        self._buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        self._options = {name: task.recipe.options_for(name) for name in self._trained} if task.recipe else {}
        self.fields: tuple[str, ...] = ()
        if task.recipe is not None:
            self.fields = ("momentum_buffer",) if task.recipe.optimizer == "sgd" else ("exp_avg", "exp_avg_sq")
            if task.recipe.optimizer == "sgd" and not any(options["momentum"] for options, _ in self._options.values()):
                self.fields = ()
        self.needs: dict[tuple[int, int], _Needs] = {}  # by (runs, questions): see `plan_reverse`
        self._check_rates()
        self._check_loss_shapes()
        check_losses(self.module, task)

    @property
    def recipe(self) -> Recipe:
        """What a step needs; a state of a checkpoint can be measured without one."""
        return self.task.require_recipe()

    def initial(self, runs: int) -> State:
        """Where R runs start.

        Raises:
            EngineError: the task has no recipe.
        """
        self.task.require_recipe()
        return self.blank(runs)

    def blank(self, runs: int = 1) -> State:
        """The recipe's initial state or, without a recipe, one with the names and shapes that matter and `build()`'s values."""

        def stack(tensors: Tensors) -> Tensors:
            return {name: t.expand(runs, *t.shape).clone() for name, t in tensors.items()}

        zeros = {name: torch.zeros_like(t) for name, t in self._trained.items()}
        moments = {f: stack(zeros) for f in self.fields}
        return State(0, stack(self._trained), stack(self._buffers), moments, self._frozen)

    def restored(self, step: int, tensors: Mapping[str, Tensor]) -> State:
        """One run's state from a checkpoint's tensors, see `State.tensors`; those of the optimizer must be there."""

        def of(names: Iterable[str], pattern: str) -> Tensors:
            return {name: tensors[pattern.format(name)][None].to(self.device, copy=True) for name in names}

        moments = {field: of(self._trained, f"optimizer.{{}}.{field}") for field in self.fields}
        return State(step, of(self._trained, "model.{}"), of(self._buffers, "model.{}"), moments, self._frozen)

    def slots(self, step: int, weights: Tensor) -> tuple[Batch, Tensor]:
        """The batch of one step and the weights (R, B) of its slots; an empty slot shows record 0 at weight 0."""
        index = self.recipe.order[step]
        shown = index.clamp_min(0)
        slots = weights[:, shown.to(weights.device)].to(self.device) * (index >= 0).to(self.device)
        return moved(self.task.train[shown], self.device), slots

    def step(self, state: State, weights: Tensor, *, consume: bool = False) -> tuple[State, Tensor]:
        """One step of R runs with record weights (R, n_train); also the objective each run saw, (R,).

        Args:
            consume: write the new parameters and moments over the old ones, which takes less memory and time; same bits.
        """
        batch, slot_weights = self.slots(state.step, weights)
        return self._step(state, batch, slot_weights, consume=consume)

    def _step(self, state: State, batch: Batch, slots: Tensor, *, consume: bool = False) -> tuple[State, Tensor]:
        parameters = {name: p.detach().requires_grad_() for name, p in state.parameters.items()}
        gradients, buffers, objective = self._gradients(state, parameters, batch, slots, create_graph=False)
        with torch.no_grad():
            new, moments = self._update(state, parameters, self._clipped(gradients), consume=consume)
        return State(state.step + 1, new, buffers, moments, self._frozen), objective

    def _gradients(
        self, state: State, parameters: Tensors, batch: Batch, slots: Tensor, *, create_graph: bool
    ) -> tuple[Tensors, Tensors, Tensor]:
        """Each run's gradient (R, ...) at `parameters`, the buffers after the forward, and the objective (R,)."""
        self.module.train()
        torch.manual_seed(seed_of(self.recipe.seed, state.step))
        with torch.enable_grad(), repeatable(self.device), _differentiable_twice(create_graph):
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
        return dict(zip(parameters, gradients, strict=True)), buffers, objective.detach()

    def _update(
        self, state: State, old: Tensors, gradients: Tensors, *, consume: bool
    ) -> tuple[Tensors, dict[str, Tensors]]:
        """torch.optim's SGD, Adam and AdamW, by the very operations that give its bits.

        Where the old state may be consumed, a few runs at a time, so that a dozen passes over the numbers stay in the cache.
        """
        new: Tensors = {}
        moments: dict[str, Tensors] = {f: {} for f in self.fields}
        for name, p in old.items():
            given = [gradients[name], p.detach() if consume else p, *(state.moments[f][name] for f in self.fields)]
            if consume:
                rows = max(1, UPDATE_BYTES // max(1, p[0].numel() * p.element_size()))
                for parts in zip(*(t.split(rows) for t in given), strict=True):
                    self._update_in_place(name, state.step, *parts)
                found = given[1:]
            else:
                found = self._updated(name, state.step, *given)
            new[name] = found[0]
            for field, moment in zip(self.fields, found[1:], strict=True):
                moments[field][name] = moment
        return new, moments

    def _updated(self, name: str, step: int, g: Tensor, p: Tensor, *moments: Tensor) -> list[Tensor]:
        options, rates = self._options[name]
        decay, rate = options["weight_decay"], rates[step]
        if self.recipe.optimizer == "adamw":
            p = p * (1 - rate * decay)
        elif decay:
            g = g.add(p, alpha=decay)
        if self.recipe.optimizer == "sgd":
            if not moments:
                return [p.add(g, alpha=-rate)]
            momentum = options["momentum"]
            buffer = g if step == 0 else (moments[0] * momentum).add_(g, alpha=1 - options["dampening"])
            if momentum:
                g = g.add(buffer, alpha=momentum) if options["nesterov"] else buffer
            return [p.add(g, alpha=-rate), buffer]
        beta1, beta2 = options["betas"]
        m = moments[0].lerp(g, 1 - beta1)
        v = (moments[1] * beta2).addcmul_(g, g, value=1 - beta2)
        root = (v.sqrt() / math.sqrt(1 - beta2 ** (step + 1))).add_(options["eps"])
        return [p.addcdiv(m, root, value=-rate / (1 - beta1 ** (step + 1))), m, v]

    def _update_in_place(self, name: str, step: int, g: Tensor, p: Tensor, *moments: Tensor) -> None:
        """`_updated`, operation by operation, over its own arguments."""
        options, rates = self._options[name]
        decay, rate = options["weight_decay"], rates[step]
        if self.recipe.optimizer == "adamw":
            p.mul_(1 - rate * decay)
        elif decay:
            g = g.add(p, alpha=decay)
        if self.recipe.optimizer == "sgd":
            if moments:
                momentum, buffer = options["momentum"], moments[0]
                if step == 0:
                    buffer.copy_(g)
                else:
                    buffer.mul_(momentum).add_(g, alpha=1 - options["dampening"])
                if momentum:
                    g = g.add(buffer, alpha=momentum) if options["nesterov"] else buffer
            p.add_(g, alpha=-rate)
            return
        beta1, beta2 = options["betas"]
        m, v = moments
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = v.sqrt().div_(math.sqrt(1 - beta2 ** (step + 1))).add_(options["eps"])
        p.addcdiv_(m, root, value=-rate / (1 - beta1 ** (step + 1)))

    def _clipped(self, gradients: Tensors) -> Tensors:
        if self.recipe.clip_norm is None:
            return gradients
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()], 1)
        norm = torch.linalg.vector_norm(norms, dim=1)  # (R,)
        factor = (self.recipe.clip_norm / (norm + 1e-6)).clamp(max=1)  # torch's own 1e-6
        return {name: g * factor.reshape(-1, *[1] * (g.ndim - 1)) for name, g in gradients.items()}

    def adjoint(
        self, state: State, weights: Tensor, outer: "Adjoint", *, one_by_one: bool = False
    ) -> tuple["Adjoint", Tensor]:
        """Pull the adjoint of the next state back through one step.

        Args:
            outer: of the next state; used up, since its tensors become those of the result.
            one_by_one: the questions after each other, each with the bits that it would have alone; else all together.

        Returns:
            The adjoint of `state`, and the gradient with respect to the slots' weights, (G, R, B).
        """
        parameters = {name: p.detach().requires_grad_() for name, p in state.parameters.items()}
        batch, slots = self.slots(state.step, weights)
        slots = slots.detach().requires_grad_()
        gradients, _, _ = self._gradients(state, parameters, batch, slots, create_graph=True)
        with torch.enable_grad():
            gradients = self._clipped(gradients)
        seeds = {
            name: self._pulled_through_update(name, state, g.detach(), outer) for name, g in gradients.items()
        }  # (G, R, ...)
        inputs = [*parameters.values(), slots]
        kept = [name for name, g in gradients.items() if g.requires_grad]  # a constant gradient pulls nothing back
        questions = next(iter(seeds.values())).shape[0]
        pulled: list[Tensor | None] = [None] * len(inputs)

        def pull(seeds: list[Tensor], is_last: bool, together: bool) -> tuple[Tensor | None, ...]:
            with repeatable(self.device):
                return torch.autograd.grad(
                    [gradients[name] for name in kept],
                    inputs,
                    seeds,
                    retain_graph=not is_last,
                    is_grads_batched=together,
                    allow_unused=True,
                )

        of_slots = torch.zeros(questions, *slots.shape, dtype=slots.dtype, device=slots.device)
        if questions > 1 and not one_by_one:
            *pulled, found = pull([seeds[name] for name in kept], True, True) if kept else [*pulled]
            for name, part in zip(parameters, pulled, strict=True):
                if part is not None:
                    outer.parameters[name] += part
            if found is not None:
                of_slots = found
            return outer, of_slots
        for g in range(questions if kept else 0):
            *pulled, found = pull([seeds[name][g] for name in kept], g == questions - 1, False)
            for name, part in zip(parameters, pulled, strict=True):
                if part is not None:
                    outer.parameters[name][g] += part
            if found is not None:
                of_slots[g] = found
        return outer, of_slots

    def _pulled_through_update(self, name: str, state: State, g: Tensor, outer: "Adjoint") -> Tensor:
        """The adjoint (G, R, ...) of one parameter's (clipped) gradient; that of the parameter and its moments is moved on in place.

        Written out, since autograd keeps a dozen tensors of the parameter's size for it and reads each from memory several times.
        A part at a time stays in the cache.
        """
        own = [outer.parameters[name], *(outer.moments[field][name] for field in self.fields)]
        questions, size = len(own[0]), g.numel()
        pulled = torch.empty(questions, size, dtype=g.dtype, device=g.device)
        rows = [t.view(questions, size) for t in own]
        seen = [t.reshape(size) for t in (g, state.parameters[name], *(state.moments[f][name] for f in self.fields))]
        step = max(1, UPDATE_BYTES // (8 * g.element_size() * questions))  # some ten tensors at once
        for start in range(0, size, step):
            part = slice(start, start + step)
            pulled[:, part] = self._update_adjoint(
                name, state.step, [t[part] for t in seen], [r[:, part] for r in rows]
            )
        return pulled.view(own[0].shape)

    def _update_adjoint(self, name: str, step: int, seen: list[Tensor], adjoints: list[Tensor]) -> Tensor:
        """`_updated` backwards: λ of (p, moments) after the step becomes that before it, in place; gives λ of the gradient."""
        options, rates = self._options[name]
        decay, rate = options["weight_decay"], rates[step]
        g, p, *moments = seen
        of_p, *of_moments = adjoints  # (G, n)
        if self.recipe.optimizer == "sgd":
            of_g = of_p * -rate
            if of_moments:
                momentum, (of_buffer,) = options["momentum"], of_moments
                entering = 1.0 if step == 0 else 1 - options["dampening"]
                if momentum:
                    of_buffer.add_(of_g, alpha=momentum if options["nesterov"] else 1.0)
                straight = of_g if options["nesterov"] or not momentum else torch.zeros_like(of_g)
                of_g = straight.add_(of_buffer, alpha=entering)
                of_buffer.mul_(momentum) if step else of_buffer.zero_()
            if decay:
                of_p.add_(of_g, alpha=decay)
            return of_g
        beta1, beta2 = options["betas"]
        m, v = moments
        of_m, of_v = of_moments
        if decay and self.recipe.optimizer == "adam":
            g = g.add(p, alpha=decay)
        m, v = m.lerp(g, 1 - beta1), (v * beta2).addcmul_(g, g, value=1 - beta2)
        scale, correction = rate / (1 - beta1 ** (step + 1)), math.sqrt(1 - beta2 ** (step + 1))
        deviation = v.sqrt()
        root = (deviation / correction).add_(options["eps"])
        # 1/√v, and 0 at v = 0: there the gradient is 0 too, and 0 · ∞ would be NaN.
        slope = deviation.div_(v.add_(torch.finfo(v.dtype).tiny)).mul_(scale / (2 * correction))
        slope.mul_(m).div_(root).div_(root)
        of_m.addcdiv_(of_p, root, value=-scale)
        of_v.addcmul_(of_p, slope)
        of_g = (of_m * (1 - beta1)).addcmul_(of_v, g, value=2 * (1 - beta2))
        of_m.mul_(beta1)
        of_v.mul_(beta2)
        if self.recipe.optimizer == "adamw":
            of_p.mul_(1 - rate * decay)
        elif decay:
            of_p.add_(of_g, alpha=decay)
        return of_g

    def measure(self, state: State) -> Tensor:
        """The measurement of every query, (R, n_query) in the CPU's memory, in eval mode; lower is better."""
        with torch.no_grad(), repeatable(self.device):
            parts = [self._measured(state.parameters, state.buffers, batch) for _, batch in self._query_batches()]
        measured = torch.cat(parts, 1).cpu()
        if not bool(torch.isfinite(measured).all()):
            raise TrainingDiverged("a measurement is not finite; training has exploded", step=state.step - 1)
        return measured

    def measurement_adjoint(self, state: State, query_weights: Tensor) -> "Adjoint":
        """∂f/∂z_T for f_g = −Σ_q weight[g, q] · measurement[q]; tensors of shape (G, R, ...)."""
        parameters = {name: p.detach().requires_grad_() for name, p in state.parameters.items()}
        total = {n: p.new_zeros(len(query_weights), *p.shape) for n, p in state.parameters.items()}
        for index, batch in self._query_batches():
            with torch.enable_grad(), repeatable(self.device):
                measured = self._measured(parameters, state.buffers, batch).sum(0)  # (n_chunk,)
            if not measured.requires_grad:
                continue  # a constant, or steps such as an error count: their slope is 0
            for g, weights in enumerate(query_weights):
                w = weights[index.to(weights.device)].to(measured)
                if not bool(w.any()):
                    continue
                with repeatable(self.device):
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
            yield index, moved(self.task.queries[index], self.device)

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
            # squeeze, not [0], whose derivative fills a tensor of the parameter's size with zeros first
            losses, after = one(
                {n: p.squeeze(0) for n, p in parameters.items()}, {n: b.squeeze(0) for n, b in buffers.items()}
            )
            return losses[None], {n: b[None] for n, b in after.items()}
        with _differentiable_twice(True):  # the fused kernels have no batched version either
            if buffers:
                return torch.vmap(one, randomness="same")(parameters, buffers)
            return torch.vmap(lambda p: one(p, {})[0], randomness="same")(parameters), {}

    def _check_rates(self) -> None:
        for name, (_, rates) in self._options.items():
            most = torch.finfo(self._trained[name].dtype).max
            step, rate = max(enumerate(rates), key=lambda pair: pair[1])
            if rate > most:
                raise EngineError(
                    f"{rate:g} at step {step} is more than {name} can hold ({most:g}); lower the learning rate",
                    pointer="/recipe/learning_rate",
                )

    def _check_loss_shapes(self) -> None:
        state = self.blank()
        index = torch.arange(min(2, self.task.n_train))
        with preserved_generator():
            for pointer, records, training in (
                ("/loss", self.task.train, True),
                ("/measurement", self.task.queries, False),
            ):
                size = min(len(records), len(index))
                self.module.train(training)
                with torch.no_grad(), repeatable(self.device):
                    batch = moved(records[index[:size]], self.device)
                    losses, after = self._call(state.parameters, state.buffers, batch)
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
    resume: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
) -> TrainedRun:
    """Train once by the recipe; `weights` (n_train,) default to 1.

    Checkpoints are written after the given numbers of completed steps, whole or not at all.

    Args:
        resume: where the state is kept once a minute and when told to stop; a call that finds one of the same training goes on from it,
            with the same bytes. It is removed at the end.
        stop: asked after every step.

    Raises:
        Interrupted: told to stop.
    """
    program = Program(task)
    n_step = program.recipe.n_step
    if checkpoint_steps and checkpoint_dir is None:
        raise EngineError("say where to write them: checkpoint_dir", pointer="/checkpoint_steps")
    for number, step in enumerate(checkpoint_steps):
        if not 0 <= step <= n_step:
            raise EngineError(f"{step} is not in 0..{n_step}", pointer=f"/checkpoint_steps/{number}")
    W = _weights(task, torch.ones(task.n_train) if weights is None else weights[None])
    paths = {step: checkpoint_dir / f"step-{step:08d}.safetensors" for step in checkpoint_steps if checkpoint_dir}
    state, losses = program.initial(1), list[float]()
    if resume is not None:
        kept = _resumed(program, W, resume)
        if kept and all(paths[step].exists() for step in paths if step < kept[0].step):
            state, losses = kept
    saved, first = time.monotonic(), state.step
    with preserved_generator():
        for step in range(first, n_step + 1):
            if step in paths and not (step == first > 0 and paths[step].exists()):
                save_state(state.tensors(), paths[step])
            if step == n_step:
                break
            if resume is not None and step > 0 and (stop() or time.monotonic() - saved > RESUME_SECONDS):
                _keep_resumable(state, losses, W, program.task, resume)
                saved = time.monotonic()
            if stop():
                raise Interrupted(f"{step:,} of {n_step:,} steps are {'kept' if resume else 'lost'}")
            state, objective = program.step(state, W)
            losses.append(float(objective))
            if progress:
                progress(step + 1, n_step)
    if resume is not None:
        resume.unlink(missing_ok=True)
    return TrainedRun(state, sorted(paths.items()), losses)


def _keep_resumable(state: State, losses: list[float], W: Tensor, task: Task, path: Path) -> None:
    said = {"task": task.digest, "weights": _bytes_digest(W), "step": state.step}
    tensors = state.tensors() | {"losses": torch.tensor(losses, dtype=torch.float64)}
    said["sha256"] = _bytes_digest(*(tensors[name] for name in sorted(tensors)))
    with written_whole(path) as partial:
        save_file(tensors, partial, metadata={"residual": json.dumps(said, sort_keys=True)})


def _resumed(program: Program, W: Tensor, path: Path) -> tuple[State, list[float]] | None:
    """Where this very training was stopped; None if it was not, or if the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {})["residual"])
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
        return None
    digest = _bytes_digest(*(tensors[name] for name in sorted(tensors)))
    if said != {"task": program.task.digest, "weights": _bytes_digest(W), "step": said.get("step"), "sha256": digest}:
        return None
    losses: list[float] = tensors.pop("losses").tolist()
    return program.restored(said["step"], tensors), losses


def _bytes_digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def replay_values(
    task: Task,
    weights: Tensor,
    *,
    per_query: bool = False,
    program: Program | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """f of R counterfactual runs, trained as one model: minus the measurement after the last step.

    Args:
        weights: (R, n_train), bool or float: 0 leaves a record out and keeps its slots.
        per_query: (R, n_query) instead of their mean (R,).
        memory: bytes that may be held beyond the task, the weights and the result; what is too much is split. The same
            bits come out whatever it is.

    Raises:
        EngineError: a memory too small for what cannot be split.
    """
    program = program or Program(task)
    W = _weights(task, weights)
    size = chunk_size(task, len(W), memory)
    values = []
    n_step = program.recipe.n_step
    with preserved_generator():
        for start in range(0, len(W), size):
            chunk = _in_company(W[start : start + size], len(W), size)
            state = program.initial(len(chunk))
            for step in range(n_step):
                state, _ = program.step(state, chunk, consume=True)
                if progress:
                    progress(min(start + size, len(W)) * (step + 1) + start * (n_step - step - 1), len(W) * n_step)
            values.append(-program.measure(state)[: len(W) - start])
    f = torch.cat(values)
    return f if per_query else f.mean(1)


def metagradients(
    task: Task,
    weights: Tensor,
    *,
    query_weights: Tensor | None = None,
    program: Program | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """f of R counterfactual runs and its exact gradient with respect to every record's weight.

    Args:
        weights: (R, n_train), where the gradient is taken.
        query_weights: (G, n_query): one reverse pass answers G questions f_g = −Σ_q weight[g, q] · measurement[q];
            the mean over queries by default.
        memory: bytes that may be held beyond the task, the weights and the result; see `plan_reverse`. The same bits come
            out whatever it is.

    Returns:
        f per query (R, n_query), and the gradients (G, R, n_train).

    Raises:
        EngineError: a memory too small for one run and one kept state; a model that writes float buffers.
    """
    program = program or Program(task)
    if program.writes_float_buffers:
        raise EngineError("training writes float buffers, which the reverse pass would miss", pointer="/model")
    W = _weights(task, weights)
    Q = torch.full((1, task.n_query), 1 / task.n_query, dtype=torch.float64) if query_weights is None else query_weights
    plan = plan_reverse(task, len(W), len(Q), program=program, memory=memory)
    one_pass = plan.forward_steps + program.recipe.n_step
    passes = math.ceil(len(Q) / plan.questions)
    values: list[Tensor] = []
    gradients: list[Tensor] = []
    with preserved_generator():
        for start in range(0, len(W), plan.runs):
            chunk = _in_company(W[start : start + plan.runs], len(W), plan.runs)
            here = min(plan.runs, len(W) - start)
            parts = []
            for number, questions in enumerate(Q.split(plan.questions)):
                report = _scaled(
                    progress, (start * passes + here * number) * one_pass, here, len(W) * passes * one_pass
                )
                f, gradient = _reverse(program, chunk, questions, plan.snapshots, report)
                parts.append(gradient[:, :here])
            values.append(f[:here])
            gradients.append(torch.cat(parts))
    return torch.cat(values), torch.cat(gradients, 1)


def plan_reverse(
    task: Task, n_run: int, n_question: int, *, program: Program | None = None, memory: int | None = None
) -> ReversePlan:
    """Fit metagradients of `n_run` runs to a memory budget in bytes at the least compute.

    What one step of the reverse pass holds is measured by doing one, not estimated. What is left holds kept states; if that is
    too little, questions of a big model are split over several passes. Runs share a pass as long as no step need be recomputed
    twice.

    Raises:
        EngineError: the memory does not hold one step and one state.
    """
    program = program or Program(task)
    known, n_step = cost(task), program.recipe.n_step
    least = 2 if n_run > 1 and not known.is_solo else 1
    state = known.state_bytes

    def fits(questions: int, runs: int, budget: int) -> int:
        """How many states may be kept."""
        return min(n_step, (budget // runs - _pass_needs(program, least, questions).bytes) // state)

    def flops(questions: int, snapshots: int) -> float:
        passes = math.ceil(n_question / questions)
        forward = forward_steps(n_step, snapshots) * known.step_flops
        return passes * (forward + n_step * _pass_needs(program, least, questions).flops + 3 * known.measure_flops)

    if known.is_solo:
        sizes = {math.ceil(n_question / passes) for passes in range(1, n_question + 1)}
    else:  # the bits of questions that are pulled back together depend on their number, so that depends on the task alone
        room = QUESTION_BYTES // max(1, _pass_needs(program, least, 3).bytes - _pass_needs(program, least, 2).bytes)
        sizes = {min(n_question, MAX_QUESTIONS, max(2, room))} if n_question > 1 else {1}
    smallest = min(sizes)
    needed = least * (_pass_needs(program, least, smallest).bytes + state)
    memory = task.memory if memory is None else memory
    budget = max(default_memory(program.device), needed) if memory is None else memory
    if needed > budget:
        raise EngineError(
            f"{budget:,} bytes: one step of this training and its reverse, and one kept state, need {needed:,}; give at least that",
            pointer="/memory",
        )
    possible = {size: kept for size in sizes if (kept := fits(size, least, budget)) > 0}
    questions = min(possible, key=lambda size: (flops(size, possible[size]), -size))
    enough = min(possible[questions], next(s for s in range(1, n_step + 1) if math.comb(s + 2, 2) >= n_step))
    runs = least if known.is_solo else min(MAX_RUNS, max(n_run, least))
    while runs > least and fits(questions, runs, budget) < enough:
        runs -= 1
    snapshots = fits(questions, runs, budget)
    return ReversePlan(
        runs=runs,
        questions=questions,
        snapshots=snapshots,
        forward_steps=forward_steps(n_step, snapshots),
        memory=runs * (_pass_needs(program, least, questions).bytes + snapshots * state),
        run_equivalents=n_run * flops(questions, snapshots) / known.run_flops if known.run_flops else math.nan,
    )


def forward_steps(n_step: int, snapshots: int) -> int:
    """Plain steps that reversing `n_step` takes with so many states kept, the one to the last state included."""
    if n_step < 2:
        return n_step
    sweeps = _sweeps(n_step, snapshots)
    return sweeps * n_step - math.comb(snapshots + sweeps, sweeps - 1) + 1


def _sweeps(n_step: int, snapshots: int) -> int:
    """The least t with C(s + t, t) ≥ n: how often a step is done at most."""
    return next(t for t in range(n_step) if math.comb(snapshots + t, t) >= n_step) if n_step > 1 else 0


def _advance(n_step: int, snapshots: int) -> int:
    """How far to go before the next state is kept, with `snapshots` of them in all for n steps; see Griewank & Walther."""
    sweeps = _sweeps(n_step, snapshots)
    return min(math.comb(snapshots + sweeps - 1, sweeps - 1), n_step - math.comb(snapshots + sweeps - 2, sweeps - 1))


def _reverse(
    program: Program, W: Tensor, Q: Tensor, snapshots: int, report: Callable[[int], None]
) -> tuple[Tensor, Tensor]:
    """f (R, n_query) and its gradients (G, R, n_train), with at most `snapshots` states kept."""
    n_step, is_solo = program.recipe.n_step, cost(program.task).is_solo
    gradient = torch.zeros(len(Q), *W.shape, dtype=W.dtype, device=program.device)
    kept, done = [program.initial(len(W))], 0
    f = adjoint = None
    for end in range(n_step, 0, -1):
        state, free = kept[-1], snapshots - len(kept)
        while state.step < end - 1:
            left = end - state.step
            for _ in range(_advance(left, free + 1) if free else left - 1):
                state, _ = program.step(state, W)
                done += 1
                report(done)
            if free:
                kept.append(state)
                free -= 1
        if adjoint is None:
            last, _ = program.step(state, W)
            done += 1
            f, adjoint = -program.measure(last), program.measurement_adjoint(last, Q)
            del last
        adjoint, slots = program.adjoint(state, W, adjoint, one_by_one=is_solo)
        index = program.recipe.order[end - 1]
        used = (index >= 0).nonzero()[:, 0].to(program.device)
        gradient.index_add_(2, index.to(program.device)[used], slots[:, :, used])
        if kept[-1].step == end - 1:
            kept.pop()
        done += 1
        report(done)
    assert f is not None
    return f, gradient.cpu()


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
    counts = []
    for work in (_plain_step, _measurement, _adjoint_step):
        with preserved_generator(), FlopCounterMode(display=False) as counter:
            work(program, 1, 1)
        counts.append(counter.get_total_flops())
    step, measure, adjoint = counts
    is_solo = _peak_bytes(program, 1, 1, (_plain_step,)) > SOLO_BYTES
    runs = 1 if is_solo else 2
    held = _peak_bytes(program, runs, 1, (_plain_step, _measurement)) // runs
    return Cost(
        run_flops=n_step * step + measure,
        step_flops=step,
        measure_flops=measure,
        metagradient_flops=n_step * (step + adjoint) + 3 * measure,
        state_bytes=sum(t.numel() * t.element_size() for t in program.initial(1).tensors().values()),
        run_bytes=held,
        is_solo=is_solo,
    )


def _plain_step(program: Program, runs: int, questions: int) -> None:
    program.step(program.initial(runs), torch.ones(runs, program.task.n_train))


def _measurement(program: Program, runs: int, questions: int) -> None:
    program.measure(program.initial(runs))


def _adjoint_step_one_by_one(program: Program, runs: int, questions: int) -> None:
    _adjoint_step(program, runs, questions, one_by_one=True)


def _adjoint_step(program: Program, runs: int, questions: int, *, one_by_one: bool = False) -> None:
    state = program.initial(runs)

    def asked(tensors: Tensors) -> Tensors:
        return {name: t.expand(questions, *t.shape).clone() for name, t in tensors.items()}

    outer = Adjoint(asked(state.parameters), {field: asked(ts) for field, ts in state.moments.items()})
    program.adjoint(state, torch.ones(runs, program.task.n_train), outer, one_by_one=one_by_one)


def _measurement_adjoint(program: Program, runs: int, questions: int) -> None:
    program.measurement_adjoint(program.initial(runs), torch.ones(questions, program.task.n_query))


def _peak_bytes(
    program: Program, runs: int, questions: int, works: Sequence[Callable[[Program, int, int], None]]
) -> int:
    peaks = []
    for work in works:
        with preserved_generator(), _Held() as held:
            work(program, runs, questions)
        peaks.append(held.peak)
    return max(peaks)


@dataclass(frozen=True)
class _Needs:
    """What a step of the reverse pass takes per run: bytes held beyond the kept states, and FLOPs."""

    bytes: int
    flops: float


def _pass_needs(program: Program, runs: int, questions: int) -> _Needs:
    """Measured; for more than three questions extended linearly."""
    pull = _adjoint_step_one_by_one if cost(program.task).is_solo else _adjoint_step
    works = (_plain_step, _measurement, pull, _measurement_adjoint)
    found = []
    for asked in (1,) if questions == 1 else (2, 3):
        if (runs, asked) not in program.needs:
            held = _peak_bytes(program, runs, asked, works) // runs
            with preserved_generator(), FlopCounterMode(display=False) as counter:
                pull(program, runs, asked)
            program.needs[runs, asked] = _Needs(held, counter.get_total_flops() / runs)
        found.append(program.needs[runs, asked])
    first, last = found[0], found[-1]
    more = max(0, questions - 2)
    return _Needs(
        first.bytes + more * max(0, last.bytes - first.bytes), first.flops + more * (last.flops - first.flops)
    )


class _Held(TorchDispatchMode):
    """The most bytes that tensors made inside have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self._live: set[int] = set()
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._live:
                    self._live.add(storage._cdata)
                    self._now += storage.nbytes()
                    self.peak = max(self.peak, self._now)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return made

    def _freed(self, key: int, size: int) -> None:
        self._live.discard(key)
        self._now -= size


def default_memory(device: torch.device) -> int:
    """What replays may hold where nobody says: a GiB beside whatever else runs on the CPU, most of what is free on a card."""
    return int(0.8 * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else MEMORY_BYTES


def chunk_size(task: Task, n_run: int, memory: int | None = None) -> int:
    """How many of `n_run` plain runs to train at once in so many bytes.

    Raises:
        EngineError: the memory does not hold what cannot be split.
    """
    known = cost(task)
    if n_run == 1 or known.is_solo:
        least = most = 1
    else:
        least, most = 2, min(MAX_RUNS, n_run)
    memory = task.memory if memory is None else memory
    budget = max(default_memory(torch.device(task.device)), least * known.run_bytes) if memory is None else memory
    if least * known.run_bytes > budget:
        raise EngineError(
            f"{budget:,} bytes: a step of this training needs {least * known.run_bytes:,}; give at least that",
            pointer="/memory",
        )
    return max(least, min(most, budget // max(known.run_bytes, 1)))


def _in_company(rows: Tensor, total: int, size: int) -> Tensor:
    """A last row that would be alone in its chunk, twice: one run takes another path than several, with other bits."""
    return rows.expand(2, -1) if len(rows) == 1 and total > 1 and size > 1 else rows


@contextmanager
def _differentiable_twice(wanted: bool) -> Iterator[None]:
    """Attention by plain products where its derivative, or many at once, are needed: the fused kernels have neither."""
    if not wanted:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def preserved_generator() -> Iterator[None]:
    """Steps seed torch's global generators; hand them back as they were."""
    cards = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=cards):
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
    weights = weights.to(torch.device(task.device), dtype)
    wrong = (~torch.isfinite(weights) | (weights < 0)).nonzero()
    if len(wrong):
        run, record = wrong[0].tolist()
        raise EngineError(f"{float(weights[run, record])} is not 0 or more", pointer=f"/weights/{run}/{record}")
    return weights


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
    } | (
        {"cards": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]}
        if torch.cuda.is_available()
        else {}
    )
