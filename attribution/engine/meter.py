"""The in-run meter: what each record of a batch did to a measurement through the step that was really taken.

    influence_i = Σ_j ∂m/∂θ_j · P_j · g_ij          g_i = record i's part of the step's gradient, G = Σ_i g_i
    P_j = (Δ_j(0) − Δ_j(G)) / G_j                    Δ(G) = the optimizer's update, Δ(0) = its update had the batch been empty

Positive: the record's gradient lowered m, the mean measurement over the queries, in units of m. Each coordinate of an update
depends on the batch through the sum G_j alone, so g_ij / G_j of the change that the batch made to it is record i's
Aumann-Shapley share, and the shares add up: Σ_i influence_i + carried = −∇m · Δ(G), the step's whole effect to first order,
with carried = −∇m · Δ(0) what momentum and decay would have done anyway (DESIGN §4: a step without weights still runs). P is
the learning rate times the momentum's own coefficient for SGD. For Adam, with h = coupled decay, a₀ = β₁m + (1−β₁)h and the
bias-corrected v₀ = v̂(h), v₁ = v̂(G+h), D = √v̂ + ε, c = (1−β₂)/(1−β₂ᵗ):

    P = η/(1−β₁ᵗ) · [(1−β₁) − a₀ · c · (G + 2h) / ((√v₁ + √v₀) · D₀)] / D₁

whose first term is the diagonal preconditioner and whose second is what the batch did to the momentum's size through v. Data
Shapley in one run: Wang et al. 2024, arXiv:2406.11011 (first order, SGD); with Adam: Ding et al. 2026, arXiv:2602.00329.
A gradient's later effect, through momentum, is `meter_log.totals`'.

Ghost dot products. A layer y = f(x; θ) that is linear in its own parameters has g_i · U = ⟨∂L/∂y_i, f(x_i; U)⟩: run the layer
once more with U = ∇m ⊙ P in place of its weights and multiply with the gradient that backward passed anyway. That is exact for
Linear, Conv, Embedding, the affine part of norms, biases, shared and tied ones, and no per-record gradient exists at any time.
Whether it holds for each parameter is not assumed but measured, on the queries at start; what does not pass is refused by
name, or left out by name (`leave_out`). At each measured step the sum over records is compared with ⟨G, U⟩.

Assumes: the step is small enough for first order; a record acts on no other's loss (BatchNorm in training is refused); the
factor of gradient clipping is taken as given. The meter reads; the trained weights are those of the loop without it, to the bit.

Cost. A measured step takes one and a half to two and a half plain ones (one more product per layer, the queries), so one of `every`
is measured, drawn at random within strata that grow from 1 to `every` (the start, where most is learnt, is measured densely);
all other steps cost an entry in the log. Totals stay unbiased over the draw. `every=1` measures all.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attribution.engine.errors import EngineError
from attribution.engine.meter_log import Entry, Head, LogWriter
from attribution.engine.task import seed_of

EVERY = 64
DENSITY = 4  # measured steps per doubling of the steps behind, over ln 2
OPTIMIZERS = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adamw"}
TRIAL_SIZES = (5, 7)  # two batches show which dimension is that of the records
TINY = 1e-38
UNWRITTEN = 32  # entries kept back at most
BLOCK = 2**16  # numbers of a parameter worked on at once
Tensors = dict[str, Tensor]


class Queries(Protocol):
    """`len(queries)` and `queries[int64 tensor]` -> a batch, whatever the measurement takes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Any: ...


@dataclass(frozen=True)
class Measured:
    """What one measured step showed. Influence: (n,) float32 in the order of `records`; positive = helpful."""

    step: int
    records: NDArray[np.int64]
    influence: NDArray[np.float32]
    measurement: float  # mean over the step's queries, before the step
    carried: float  # what the step would have done to it with an empty batch; positive = lowered it
    probability: float  # with which the step was drawn


@dataclass(eq=False)
class _Layer:
    """A module that owns parameters, and whether its output has rows of records or is shared by all of them."""

    name: str
    module: nn.Module
    parameters: dict[str, str]  # its own name of each -> the model's name of the same tensor
    is_shared: bool = False
    rows_per_record: int = 1

    def applied(self, U: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """f(x; U); what U lacks is 0."""
        own = self.module._parameters
        kept = {name: own[name] for name in self.parameters}
        try:
            for name, parameter in kept.items():
                assert parameter is not None
                u = U.get(self.parameters[name])
                own[name] = parameter.new_zeros(()).expand(parameter.shape) if u is None else u  # type: ignore[assignment]
            return self.module.forward(*args, **kwargs)
        finally:
            own.update(kept)


@dataclass(eq=False)
class _Call:
    """One run of a layer on one batch: its input, and the gradient that came back to its output."""

    layer: _Layer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int]
    start: int  # of the batch's records among the step's
    n: int
    gradient: Tensor | None = None

    def receive(self, gradient: Tensor) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient

    def factors(self, U: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """f(x_i; U) and ∂L/∂y_i of every record, (n, ·) each."""
        g = self.gradient
        assert g is not None
        y = self.layer.applied(U, self.args, self.kwargs).expand_as(g)
        return y.reshape(self.n, -1), g.reshape(self.n, -1)

    def products(self, U: Mapping[str, Tensor]) -> Tensor:
        """⟨∂L/∂y_i, f(x_i; U)⟩ of every record, (n,)."""
        return torch.linalg.vecdot(*self.factors(U))


class _Recorder:
    """Hooks that keep, for the layers of interest, what the ghost product needs. Present only while a step is measured."""

    def __init__(self, layers: Sequence[_Layer], after_backward: Callable[[], None] = lambda: None) -> None:
        self.calls: list[_Call] = []
        self._after_backward, self._is_queued = after_backward, False
        self.start = self.n = 0
        self.is_listening = False
        self._handles = [
            layer.module.register_forward_hook(self._hook(layer), with_kwargs=True, prepend=False) for layer in layers
        ]

    def _hook(self, layer: _Layer) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if not self.is_listening or not isinstance(output, Tensor) or not output.requires_grad:
                return None
            spread = None
            if layer.is_shared:
                # Adding up over the records is what broadcasting's backward does too; here each record's part passes by first.
                rest = output.shape[1:] if output.shape[0] == 1 else output.shape
                spread = output = output.expand(self.n, *rest)
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            call = _Call(layer, args, kwargs, [t._version for t in inputs], self.start, self.n)
            output.register_hook(self._receiver(call))
            self.calls.append(call)
            return spread

        return hook

    def _receiver(self, call: _Call) -> Callable[[Tensor], None]:
        def receive(gradient: Tensor) -> None:
            call.receive(gradient)
            if not self._is_queued:
                # A hook on the parameters would say when too, but once there it makes every later backward copy its gradients.
                self._is_queued = True
                torch.autograd.Variable._execution_engine.queue_callback(self._finished)

        return receive

    def _finished(self) -> None:
        self._is_queued = False
        self._after_backward()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self.calls = [], []


class Meter:
    """Meters a plain loop. Everything that cannot be measured right is refused with the place and the remedy.

        with Meter(model, optimizer, measurement=measurement, queries=queries, n_train=len(train), log=Path("run.meter")) as meter:
            for records in order:
                with meter.batch(records):                       # forward and backward; several before a step are summed
                    loss(model, train[records]).mean().backward()
                optimizer.step()
                optimizer.zero_grad()

    Args:
        measurement: (model, batch) -> (n_query,), lower is better; run in eval mode.
        queries: `queries[int64 tensor]` is a batch for it; hashed into the log's header.
        n_train: records are numbered below it.
        log: see `meter_log`; an existing one is continued, and must be of the same run.
        every: measure one step of this many, drawn by `seed`.
        queries_per_step: a random part of the queries for each measured step; None: all of them.
        leave_out: regexes over parameter names whose effect is knowingly not measured; in the log's header by name.
        first_step: where training goes on: 0, or the step of the checkpoint. What the log has from there on counts as undone.
        heads, heads_every: where the chain's heads are posted.

    Attributes:
        left_out: the names of the parameters that are not measured.
        last: the last measured step.
        head: of the chain, hex, up to the last entry written (`flush` writes the rest).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        measurement: Callable[[nn.Module, Any], Tensor],
        queries: Queries,
        n_train: int,
        log: Path | str,
        every: int = EVERY,
        queries_per_step: int | None = None,
        seed: int = 0,
        leave_out: Sequence[str] = (),
        first_step: int = 0,
        heads: Path | str | Callable[[Head], None] | None = None,
        heads_every: int = 64,
    ) -> None:
        for pointer, value in (
            ("/n_train", n_train),
            ("/every", every),
            ("/queries_per_step", 1 if queries_per_step is None else queries_per_step),
        ):
            if value < 1:
                raise EngineError(f"{value} is below 1", pointer=pointer)
        if len(queries) == 0:
            raise EngineError("no queries; without a question no record can help", pointer="/queries")
        self.model, self.optimizer, self.n_train, self.every, self.seed = model, optimizer, n_train, every, seed
        self._measurement, self._queries = measurement, queries
        self._n_query = min(queries_per_step or len(queries), len(queries))
        _check_model(model)
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._groups, settings = _check_optimizer(optimizer, self._trained)
        self.left_out = _matching(leave_out, self._trained)
        self._layers = self._checked_layers()
        header = {
            "every": every,
            "left_out": self.left_out,
            "n_query": len(queries),
            "n_train": n_train,
            "optimizer": settings,
            "queries": _digest(queries),
            "queries_per_step": self._n_query,
            "seed": seed,
        }
        self.last: Measured | None = None
        self._log = LogWriter(Path(log), header, first_step=first_step, heads=heads, heads_every=heads_every)
        self._step = self._log.step
        self._entries: list[Entry] = []  # of the last steps, not yet written
        self._strata = _strata(every)
        self._begin_stratum(next(self._strata))
        self._recorder: _Recorder | None = None
        self._count = 0  # of the optimizer's steps, once one was seen
        self._raw: dict[str, tuple[Tensor, int]] = {}
        self._batches: list[NDArray[np.int64]] = []
        self._entry: Entry | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def step(self) -> int:
        """Steps finished."""
        return self._step

    @property
    def head(self) -> str:
        return self._log.head.hex()

    def flush(self) -> None:
        """Write the last steps' entries; call it with every checkpoint, or the log ends up to 32 steps before it."""
        entries, self._entries = self._entries, []
        for entry in entries:
            self._log.append(entry)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take the meter off and close its log. Harmless to call twice."""
        for handle in self._handles:
            handle.remove()
        self._forget()
        if not self._log.is_closed:
            self.flush()
            self._log.close()

    def batch(self, records: Any) -> "_Batch":
        """The forward and backward of one batch; `records` are its (n,) numbers, one for each row of the batch, in its order."""
        return _Batch(self, records)

    def begin(self, records: Any) -> None:
        """What entering `batch` does, for loops that cannot use `with`: call before the forward."""
        ids = self._numbered(records)
        if not self._stratum[0] <= self._step < self._stratum_end:
            self._find_stratum()
        if self._step == self._drawn:
            if self._recorder is None:
                self._recorder = _Recorder(self._layers, self._keep_samples)
            self._recorder.start = sum(len(batch) for batch in self._batches)
            self._recorder.n = len(ids)
            self._recorder.is_listening = True
        self._batches.append(ids)

    def end(self) -> None:
        """What leaving `batch` does: a later forward, such as an evaluation, is not the batch's."""
        if self._recorder is not None:
            self._recorder.is_listening = False

    def abandon(self) -> None:
        """Forget the batches since the last step, whose gradients will not be used."""
        self._forget()

    def _numbered(self, records: Any) -> NDArray[np.int64]:
        pointer = f"/step/{self._step}/records"
        try:
            ids = np.asarray(records.detach().cpu() if isinstance(records, Tensor) else records)
        except (TypeError, ValueError) as error:
            raise EngineError(f"{records!r} are no record numbers", pointer=pointer) from error
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise EngineError(
                f"must be the (n,) integer numbers of the batch's records, is {ids.dtype} {ids.shape}", pointer=pointer
            )
        ids = ids.astype(np.int64)  # a copy: the caller's array may be filled anew before the entry is written
        if ids.view(np.uint64).max() >= self.n_train:  # so seen, a negative number is a large one
            wrong = ids[(ids < 0) | (ids >= self.n_train)]
            raise EngineError(f"names record {wrong[0]} of {self.n_train}", pointer=pointer)
        return ids

    def _begin_stratum(self, stratum: tuple[int, int]) -> None:
        self._stratum, (start, length) = stratum, stratum
        self._stratum_end = start + length
        self._drawn = _drawn_of(stratum, self.seed)

    def _find_stratum(self) -> None:
        while self._step >= self._stratum_end:
            self._begin_stratum(next(self._strata))

    def _keep_samples(self) -> None:
        """Clipping multiplies a gradient with one number, which a few of its entries, kept before, show afterwards."""
        for name, p in self._trained.items():
            if p.grad is not None and name not in self.left_out:
                self._raw[name] = (_sample(p.grad).clone(), p.grad._version)

    def _forget(self) -> None:
        if self._recorder is not None:
            self._recorder.remove()
            self._recorder = None
        self._raw, self._batches, self._entry = {}, [], None

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], kwargs.get("closure"))):
            raise EngineError(
                "step(closure) computes its gradients itself; call backward, then step()", pointer="/optimizer"
            )
        if not self._batches:
            raise EngineError(
                "the step has no record numbers; put forward and backward in `with meter.batch(records):`",
                pointer=f"/step/{self._step}/records",
            )
        records = self._batches[0] if len(self._batches) == 1 else np.concatenate(self._batches)
        rate, probability = float(optimizer.param_groups[0]["lr"]), 1 / self._stratum[1]
        self._count = self._update() if self._recorder is not None or not self._count else self._count + 1
        if self._recorder is None:
            self._entry = Entry(self._step, self._count, rate, probability, math.nan, math.nan, records, None)
            return
        try:
            influence, measurement, carried = self._influence(self._recorder.calls, len(records))
        except BaseException:
            self._forget()
            raise
        self._entry = Entry(self._step, self._count, rate, probability, measurement, carried, records, influence)
        self.last = Measured(self._step, records, influence, measurement, carried, probability)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._entry is not None
        self._entries.append(self._entry)
        self._forget()
        self._step += 1
        if len(self._entries) == UNWRITTEN:
            # One by one, each would run in a cache that the step has emptied: ten times as long.
            self.flush()

    def _update(self) -> int:
        """The optimizer's count of the step to come, from 1; SGD keeps none, but its first step fills the momentum."""
        states = [self.optimizer.state.get(p, {}) for p in self._trained.values() if p.grad is not None]
        if isinstance(self.optimizer, torch.optim.SGD):
            is_first = all(state.get("momentum_buffer") is None for state in states)
            return 1 if is_first else max(2, self._step + 1)
        return 1 + max((int(state["step"]) for state in states if "step" in state), default=0)

    def _influence(self, calls: Sequence[_Call], n: int) -> tuple[NDArray[np.float32], float, float]:
        where = f"/step/{self._step}"
        gradient, measurement = self._query_gradient(where)
        U: Tensors = {}
        carried = expected = 0.0
        with torch.no_grad():
            factors = self._factors()
            for name, p in self._trained.items():
                if p.grad is None or name not in gradient:
                    continue
                u = gradient[name].contiguous()
                carried += _through_update(p, u, self._groups[name], self.optimizer.state.get(p, {}))
                if name in self.left_out:
                    continue
                expected += _dot(p.grad, u)
                if name in factors:
                    u *= factors[name]
                U[name] = u
            influence = _products(calls, U, n, where)
        found = influence.double()
        if not bool(torch.isfinite(found).all()) or not math.isfinite(expected):
            wrong = (~torch.isfinite(found)).nonzero()
            row = int(wrong[0]) if len(wrong) else 0
            raise EngineError(
                f"the influence of row {row} is not finite: a loss or a gradient is NaN or infinite; lower the learning rate, "
                "clip, or repair the batch",
                pointer=f"{where}/influence/{row}",
            )
        if abs(float(found.sum()) - expected) > 1e-3 * float(found.abs().sum()):
            grads = {name: self._trained[name].grad for name in U}
            size = sum(float(U[n].norm() * g.norm()) for n, g in grads.items() if g is not None)
            if abs(float(found.sum()) - expected) > 1e-3 * float(found.abs().sum()) + 1e-4 * size:
                raise self._blamed(calls, U, factors, n, where)
        return influence.cpu().numpy().astype(np.float32), measurement, carried

    def _factors(self) -> dict[str, float]:
        """What each gradient was multiplied with since the backward, by clipping or unscaling; 1 is left out."""
        found: dict[str, float] = {}
        dark = []
        for name, (raw, version) in self._raw.items():
            grad = self._trained[name].grad
            if grad is None or version == grad._version:
                continue
            square = float(raw @ raw)
            if square > 0:
                found[name] = float(raw @ _sample(grad)) / square
            else:
                dark.append(name)
        shared = float(np.median(list(found.values()))) if found else 1.0
        return found | dict.fromkeys(dark, shared)

    def _blamed(
        self, calls: Sequence[_Call], U: Tensors, factors: Mapping[str, float], n: int, where: str
    ) -> EngineError:
        """Which parameter's gradient is not the sum over the records?"""
        off = {}
        with torch.no_grad():
            for name, u in U.items():
                grad = self._trained[name].grad
                assert grad is not None
                found = float(_products(calls, {name: u}, n, where).double().sum())
                wanted = _dot(grad, u) / factors.get(name, 1.0)
                off[name] = abs(found - wanted) / (abs(found) + abs(wanted) + TINY)
        name = max(off, key=lambda key: off[key])
        return EngineError(
            f"the step's gradient of {name} is not the sum over its records ({100 * off[name]:.0f} % off): zero the gradients "
            "before each step, backward inside `with meter.batch`, clip by norm only, and let no layer act at random or on "
            "other records; or leave the parameter out by name",
            pointer=f"{where}/gradient/{name}",
        )

    def _query_gradient(self, where: str) -> tuple[Tensors, float]:
        index = torch.arange(len(self._queries))
        if self._n_query < len(index):
            generator = torch.Generator().manual_seed(seed_of("meter queries", self.seed, self._step))
            index = torch.randperm(len(index), generator=generator)[: self._n_query]
        with _evaluating(self.model), torch.enable_grad():
            measured = self._asked(index)
            mean = measured.mean()
            found = torch.autograd.grad(mean, list(self._trained.values()), allow_unused=True)
        if not bool(torch.isfinite(mean)):
            raise EngineError("the measurement is not finite; training has exploded", pointer=f"{where}/measurement")
        return {n: g for n, g in zip(self._trained, found, strict=True) if g is not None}, float(mean.detach())

    def _asked(self, index: Tensor) -> Tensor:
        measured = self._measurement(self.model, self._queries[index])
        if not isinstance(measured, Tensor) or measured.shape != (len(index),):
            shape = tuple(measured.shape) if isinstance(measured, Tensor) else type(measured).__name__
            raise EngineError(
                f"gave {shape} for {len(index)} queries; return one number per query, (n_query,), not a mean: "
                'reduction="none"',
                pointer="/measurement",
            )
        return measured

    def _checked_layers(self) -> list[_Layer]:
        """The layers whose ghost products were found equal to autograd's, for every parameter or by name left out."""
        names = {p: name for name, p in self.model.named_parameters(remove_duplicate=False)}
        names |= {p: name for name, p in self._trained.items()}  # a tied tensor goes by its first name
        layers = []
        for name, module in self.model.named_modules():
            own = {key: names[p] for key, p in module._parameters.items() if p is not None}
            if any(full in self._trained and full not in self.left_out for full in own.values()):
                layers.append(_Layer(name or "the model", module, own))
        usable, reasons = self._with_layouts(layers)
        unmeasured = self._failing(usable, reasons)
        if unmeasured:
            listed = "; ".join(f"{name}: {reason}" for name, reason in sorted(unmeasured.items()))
            raise EngineError(
                f"{len(unmeasured)} of {len(self._trained)} parameters cannot be measured ({listed}). Build the layer of nn.Linear, "
                "nn.Conv, nn.Embedding and norms (a bare parameter: in a module of its own that multiplies or adds it), or name "
                "them in leave_out",
                pointer=f"/model/{min(unmeasured)}",
            )
        return usable

    def _with_layouts(self, layers: list[_Layer]) -> tuple[list[_Layer], dict[str, str]]:
        """Two forwards of different sizes show where each layer's output has its records."""
        shapes: dict[int, list[list[torch.Size | None]]] = {}
        for size in TRIAL_SIZES:
            seen: dict[_Layer, list[torch.Size | None]] = {layer: [] for layer in layers}

            def hook_of(kept: list[torch.Size | None]) -> Callable[..., None]:
                return lambda module, args, output: kept.append(output.shape if isinstance(output, Tensor) else None)

            handles = [layer.module.register_forward_hook(hook_of(kept)) for layer, kept in seen.items()]
            try:
                with _evaluating(self.model), torch.no_grad():
                    self._asked(torch.arange(size) % len(self._queries))
            finally:
                for handle in handles:
                    handle.remove()
            shapes[size] = list(seen.values())
        few, many = TRIAL_SIZES
        usable: list[_Layer] = []
        reasons: dict[str, str] = {}
        for layer, small, large in zip(layers, shapes[few], shapes[many], strict=True):
            reason = ""
            if not small or None in small or len(small) != len(large):
                reason = "its module is not called, or gives no single tensor"
            else:
                kinds = {_layout(a, b) for a, b in zip(small, large, strict=True) if a is not None and b is not None}
                if len(kinds) != 1 or None in kinds:
                    reason = "its module's output has no leading dimension of records"
                else:
                    layer.rows_per_record = kinds.pop() or 0
                    layer.is_shared = layer.rows_per_record == 0
            if reason:
                reasons |= dict.fromkeys(layer.parameters.values(), reason)
            else:
                usable.append(layer)
        for layer in [layer for layer in usable if layer.is_shared]:
            others = [other for other in usable if other is layer or not other.is_shared]
            try:
                self._trial(others, TRIAL_SIZES[0])[0].remove()
            except (RuntimeError, ValueError, IndexError):  # whatever the model does with a shape it does not expect
                usable.remove(layer)
                reasons |= dict.fromkeys(layer.parameters.values(), "its module's output is not broadcast over records")
        return usable, reasons

    def _trial(self, layers: Sequence[_Layer], size: int) -> tuple[_Recorder, Tensor]:
        recorder = _Recorder(layers)
        try:
            recorder.n, recorder.is_listening = size, True
            with _evaluating(self.model), torch.enable_grad():
                return recorder, self._asked(torch.arange(size) % len(self._queries))
        except BaseException:
            recorder.remove()
            raise

    def _failing(self, layers: Sequence[_Layer], reasons: dict[str, str]) -> dict[str, str]:
        """Parameters whose ghost products, in sum or row by row, are not what autograd says."""
        size = TRIAL_SIZES[0]
        recorder, measured = self._trial(layers, size)
        parameters = list(self._trained.values())
        failing = {}
        try:
            rows = [
                torch.autograd.grad(measured[row], parameters, retain_graph=True, allow_unused=True)
                for row in (0, size - 1)
            ]
            for call in recorder.calls:
                call.gradient = None
            whole = torch.autograd.grad(measured.sum(), parameters, allow_unused=True)
            if not bool(torch.isfinite(measured).all()):
                raise EngineError("is not finite at the weights as they are", pointer="/measurement")
            with torch.no_grad():
                for name, g, first, last in zip(self._trained, whole, *rows, strict=True):
                    if name in self.left_out or g is None:
                        continue
                    products, scale = torch.zeros(size, dtype=torch.float64), 0.0
                    for call in recorder.calls:
                        if name in call.layer.parameters.values() and call.gradient is not None:
                            y, back = call.factors({name: g})
                            products += torch.linalg.vecdot(y, back).double().cpu()
                            scale += float((y * back).abs().sum())
                    wanted = [_dot(r, g) if r is not None else 0.0 for r in (first, last)]
                    square = _dot(g, g)
                    bound = 1e-3 * square + 1e-5 * scale
                    off = abs(float(products.sum()) - square)
                    off_rows = max(abs(float(products[0]) - wanted[0]), abs(float(products[-1]) - wanted[1]))
                    if off > bound:
                        failing[name] = reasons.get(
                            name, "its module is not linear in it, or it is used outside of its module"
                        )
                    elif off_rows > bound + 1e-3 * float(products.abs().sum()):
                        failing[name] = "the rows of its module's output are not the records'"
        finally:
            recorder.remove()
        return failing


class _Batch:
    """`with meter.batch(records):`; a class, because a generator would cost a small model's step."""

    def __init__(self, meter: Meter, records: Any) -> None:
        self._meter, self._records = meter, records

    def __enter__(self) -> None:
        self._meter.begin(self._records)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._meter.end()
        if kind is not None:
            self._meter.abandon()


def _products(calls: Sequence[_Call], U: Tensors, n: int, where: str) -> Tensor:
    """Σ over layers of g_i · U for the n records of a step."""
    total: Tensor | None = None
    for call in calls:
        if call.gradient is None or not any(name in U for name in call.layer.parameters.values()):
            continue
        layer, rows = call.layer, call.gradient.shape[0]
        if rows != call.n * max(layer.rows_per_record, 1) and (layer.rows_per_record <= 1 or rows % call.n):
            raise EngineError(
                f"{call.n} record numbers, but {layer.name} ran on a batch of {rows}; name each row's record, once per row",
                pointer=f"{where}/records",
            )
        inputs = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
        if [t._version for t in inputs] != call.versions:
            raise EngineError(
                f"the input of {layer.name} was overwritten before the step; give every batch tensors of its own",
                pointer=f"{where}/records",
            )
        weight = next(layer.module.parameters(recurse=False))
        if call.gradient.dtype != weight.dtype:
            raise EngineError(
                f"{layer.name} ran in {call.gradient.dtype}, its weights are {weight.dtype}: mixed precision rounds away what one "
                "record does; train in float32",
                pointer=f"/model/{layer.name}",
            )
        found = call.products(U)
        if total is None:
            total = torch.zeros(n, dtype=found.dtype, device=found.device)
        total[call.start : call.start + call.n] += found.to(total.device)
    if total is None:
        raise EngineError(
            "no layer saw the batch's backward; put both forward and backward into `with meter.batch(records):`",
            pointer=f"{where}/records",
        )
    return total


def _through_update(p: Tensor, u: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """Turn ∂m/∂θ into ∂m/∂θ ⊙ P in place, before the optimizer's step, and return −∂m/∂θ · Δ(0).

    `p.grad` is the gradient that the optimizer will use. In blocks, so that what lies between stays in the cache.
    """
    G = p.grad
    assert G is not None
    tensors = [
        p.detach(),
        G,
        u,
        *(state[k] for k in ("momentum_buffer", "exp_avg", "exp_avg_sq") if state.get(k) is not None),
    ]
    if not all(t.is_contiguous() for t in tensors):
        tensors = [t if t is u else t.contiguous() for t in tensors]
    names = [k for k in ("momentum_buffer", "exp_avg", "exp_avg_sq") if state.get(k) is not None]
    idle = u.new_zeros(())
    through = _through_adam if "betas" in group else _through_sgd
    t = int(state["step"]) + 1 if "step" in state else 1
    for start in range(0, u.numel(), BLOCK):
        block, grad, slope, *moments = (x.view(-1)[start : start + BLOCK] for x in tensors)
        idle += through(block, grad, slope, group, dict(zip(names, moments, strict=True)), t)
    return float(idle)


def _through_sgd(p: Tensor, G: Tensor, u: Tensor, group: Mapping[str, Any], state: Tensors, t: int) -> Tensor:
    rate, decay, momentum = float(group["lr"]), group["weight_decay"], group["momentum"]
    h, buffer = decay * torch.dot(u, p) if decay else u.new_zeros(()), state.get("momentum_buffer")
    if not momentum:
        u.mul_(rate)
        return rate * h
    entering = 1.0 if buffer is None else 1 - group["dampening"]
    idle = entering * h if buffer is None else momentum * torch.dot(u, buffer) + entering * h
    if group["nesterov"]:
        u.mul_(rate * (1 + momentum * entering))
        return rate * (h + momentum * idle)
    u.mul_(rate * entering)
    return rate * idle


def _through_adam(p: Tensor, G: Tensor, u: Tensor, group: Mapping[str, Any], state: Tensors, t: int) -> Tensor:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    rate, decay, eps = float(group["lr"]), group["weight_decay"], group["eps"]
    rate_t, c = rate / (1 - beta1**t), (1 - beta2) / (1 - beta2**t)
    m, v = (state[key] if key in state else torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq"))
    v, a0, change = v * (beta2 / (1 - beta2**t)), m * beta1, G * c
    if decay and not group.get("decoupled_weight_decay"):
        h = p * decay
        a0.add_(h, alpha=1 - beta1)
        change.add_(h, alpha=2 * c)
        root1 = torch.addcmul(v, G + h, G + h, value=c).sqrt_()
        root0 = v.addcmul_(h, h, value=c).sqrt_()
    else:
        root1 = torch.addcmul(v, G, G, value=c).sqrt_()
        root0 = v.sqrt_()
    a0.div_(root0 + eps)
    idle = rate_t * torch.dot(u, a0)
    if decay and group.get("decoupled_weight_decay"):
        idle = idle + rate * decay * torch.dot(u, p)
    # Where both roots are 0 nothing was ever seen, and `change` is 0 too.
    change.mul_(a0).div_(root0.add_(root1).clamp_min_(TINY))
    u.mul_(torch.rsub(change, 1 - beta1)).div_(root1.add_(eps)).mul_(rate_t)
    return idle


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.reshape(-1), b.reshape(-1)))


def _sample(grad: Tensor) -> Tensor:
    flat = grad.detach().reshape(-1)
    return flat[:: max(1, len(flat) // 256)]


def _layout(small: torch.Size, large: torch.Size) -> int | None:
    """Rows per record, 0 for an output that all records share, None for anything else."""
    few, many = TRIAL_SIZES
    if small == large:
        return 0
    if len(small) and small[1:] == large[1:] and small[0] * many == large[0] * few:
        return small[0] // few
    return None


def _strata(every: int) -> Iterator[tuple[int, int]]:
    """(first step, length), growing with the steps behind up to `every`: influence falls about as one over the step."""
    start = 0
    while True:
        length = min(every, 1 + start // DENSITY)
        yield start, length
        start += length


def _drawn_of(stratum: tuple[int, int], seed: int) -> int:
    start, length = stratum
    return start + seed_of("meter", seed, start) % length


def measured_steps(every: int, seed: int) -> Iterator[tuple[int, float, int]]:
    """Of every stratum: the step that is measured, with which probability it was drawn, and where the stratum ends."""
    for start, length in _strata(every):
        yield _drawn_of((start, length), seed), 1 / length, start + length


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and the caller's random numbers, both handed back as they were, module by module."""
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _check_model(model: nn.Module) -> None:
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, parallel) or hasattr(model, "_orig_mod"):
        raise EngineError(
            "meter the plain module in one process: neither wrapped in parallel nor compiled", pointer="/model"
        )
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise EngineError(
            "several processes share this training, and each sees its own records only; meter a run of one process",
            pointer="/model",
        )
    for name, module in model.named_modules():
        pointer = f"/model/{name}"
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.SyncBatchNorm) and module.training:
            raise EngineError(
                "a BatchNorm mixes the records of a batch, so that none has a gradient of its own; use LayerNorm or GroupNorm, "
                "or keep it in eval mode",
                pointer=pointer,
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and (module.sparse or module.max_norm is not None):
            raise EngineError(
                "an embedding with sparse gradients or max_norm cannot be measured; turn both off", pointer=pointer
            )
    wrong = [
        n for n, p in model.named_parameters() if p.requires_grad and p.dtype not in (torch.float32, torch.float64)
    ]
    if wrong:
        raise EngineError(
            "is trained in less than float32, which rounds away what one record does; train in float32",
            pointer=f"/model/{wrong[0]}",
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise EngineError("no parameter requires a gradient; there is nothing to train", pointer="/model")


def _check_optimizer(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Each parameter's group, and what the log's header says of the optimizer."""
    kind = OPTIMIZERS.get(type(optimizer))
    if kind is None:
        raise EngineError(
            f"{type(optimizer).__name__} is none of {[c.__name__ for c in OPTIMIZERS]}, whose updates the meter knows",
            pointer="/optimizer",
        )
    names = {p: name for name, p in trained.items()}
    groups: dict[str, dict[str, Any]] = {}
    shared = ("betas",) if kind != "sgd" else ("momentum", "dampening", "nesterov")
    first = optimizer.param_groups[0]
    for number, group in enumerate(optimizer.param_groups):
        pointer = f"/optimizer/param_groups/{number}"
        for option in ("amsgrad", "maximize"):
            if group.get(option):
                raise EngineError("cannot be metered; turn it off", pointer=f"{pointer}/{option}")
        for option in shared:
            if group[option] != first[option]:
                raise EngineError(
                    f"{group[option]} differs from the first group's {first[option]}; the totals follow one momentum",
                    pointer=f"{pointer}/{option}",
                )
        for p in group["params"]:
            if p.requires_grad and p not in names:
                raise EngineError(
                    f"updates a parameter of shape {tuple(p.shape)} that is not the model's; meter a module that holds both",
                    pointer=pointer,
                )
            if p in names:
                groups[names[p]] = group
    for name in set(trained) - set(groups):
        groups[name] = {"lr": 0.0, "weight_decay": 0.0, "momentum": 0.0}  # never updated
    settings = {"name": kind} | {option: first[option] for option in shared}
    return groups, settings


def _matching(leave_out: Sequence[str], trained: Mapping[str, Any]) -> list[str]:
    found = set()
    for number, regex in enumerate(leave_out):
        try:
            matched = {name for name in trained if re.search(regex, name)}
        except re.error as error:
            raise EngineError(f"{regex!r} is no regular expression: {error}", pointer=f"/leave_out/{number}") from error
        if not matched:
            raise EngineError(f"{regex!r} matches no parameter of {list(trained)}", pointer=f"/leave_out/{number}")
        found |= matched
    if len(found) == len(trained):
        raise EngineError("leaves out every parameter", pointer="/leave_out")
    return sorted(found)


def _digest(queries: Queries) -> str:
    """SHA-256 over the queries' tensors in order."""
    digest = hashlib.sha256()
    for start in range(0, len(queries), 4096):
        batch = queries[torch.arange(start, min(start + 4096, len(queries)))]
        parts = sorted(batch.items()) if isinstance(batch, Mapping) else enumerate(batch)
        for name, tensor in parts:
            if not isinstance(tensor, Tensor):
                raise EngineError("a batch of queries is a tuple or a mapping of tensors", pointer=f"/queries/{name}")
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Collated:
    """A dataset of examples as queries: collated, and on the model's device."""

    examples: Any
    collate: Callable[[list[Any]], Any]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    drop: str = ""

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Tensor, /) -> Any:
        batch = self.collate([self.examples[int(i)] for i in index])
        return {key: value.to(self.device) for key, value in batch.items() if key != self.drop}


def meter_callback(
    *,
    measurement: Callable[[nn.Module, Any], Tensor],
    queries: Any,
    n_train: int,
    log: Path | str,
    collate: Callable[[list[Any]], Any] | None = None,
    column: str = "record_id",
    **settings: Any,
) -> Any:
    """A callback for Hugging Face `Trainer`, needs `transformers`; `.meter` is the `Meter` while training runs.

    Args:
        queries: a dataset of the Trainer's kind; `collate` (by default transformers' `default_data_collator`) makes its batches,
            mappings of tensors.
        column: the integer record number in every example of the training set. `remove_unused_columns=False` lets it through; it
            is taken out of the batch before the model sees it.
        settings: the rest of `Meter`'s.

    Raises:
        EngineError: when training begins, of an argument under which a record's part cannot be told; it says what to change.
    """
    from transformers import TrainerCallback, default_data_collator  # an optional dependency

    class MeterCallback(TrainerCallback):
        def __init__(self) -> None:
            self.meter: Meter | None = None
            self._handles: list[Any] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            _check_arguments(args)
            model, optimizer = given["model"], given["optimizer"]
            while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
                optimizer = optimizer.optimizer
            device = next(model.parameters()).device
            self._finish()
            options: dict[str, Any] = {"first_step": state.global_step, **settings}
            self.meter = Meter(
                model,
                optimizer,
                measurement=measurement,
                queries=_Collated(queries, collate or default_data_collator, device, column),
                n_train=n_train,
                log=log,
                **options,
            )
            self._handles = [
                model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                model.register_forward_hook(self._after_forward, always_call=True),
            ]

        def _before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            records = kwargs.pop(column, None)
            if model.training and torch.is_grad_enabled() and self.meter is not None:
                if records is None:
                    raise EngineError(
                        f"has no {column!r}: give every example its record number, and a collator that keeps it",
                        pointer=f"/train_dataset/{column}",
                    )
                self.meter.begin(records)
            return args, kwargs

        def _after_forward(self, model: nn.Module, args: Any, output: Any) -> None:
            if self.meter is not None:
                self.meter.end()

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if self.meter is not None:
                self.meter.flush()

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self._finish()

        def _finish(self) -> None:
            for handle in self._handles:
                handle.remove()
            self._handles = []
            if self.meter is not None:
                self.meter.close()

    return MeterCallback()


def _check_arguments(args: Any) -> None:
    """Refuse a `TrainingArguments` under which records cannot be told apart."""
    refusals = [
        ("remove_unused_columns", args.remove_unused_columns, "drops the record numbers; set it to False"),
        (
            "n_gpu",
            args.n_gpu > 1,
            "splits a batch over several GPUs in one process; show it one (CUDA_VISIBLE_DEVICES=0)",
        ),
        ("world_size", args.world_size > 1, "each process sees its own records only; train in one"),
        ("bf16", args.bf16, "mixed precision rounds away what one record does; train in float32 (tf32 may stay)"),
        ("fp16", args.fp16, "mixed precision rounds away what one record does; train in float32 (tf32 may stay)"),
        ("deepspeed", bool(args.deepspeed), "replaces the optimizer; train without it"),
        ("fsdp", bool(args.fsdp), "shards the weights; train without it"),
        ("torch_compile", args.torch_compile, "a compiled model runs no hooks; train without it"),
    ]
    for name, is_on, why in refusals:
        if is_on:
            raise EngineError(why, pointer=f"/args/{name}")
