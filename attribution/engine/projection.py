"""A seeded random projection of per-record gradients that need never be held.

One count sketch over all parameters. Entry (r, c) of parameter p, seen as a matrix, joins one of K buckets with a sign:

    bucket = row_p[r] + column_p[c] mod K        sign = ±_p[r] · ±_p[c]        E[z_i · z_j] = g_i · g_j

(Charikar et al. 2002; a hash that is a sum makes it a TensorSketch, Pham & Pagh 2013.) A layer's gradient is a sum of outer
products over positions t, of what went in and of what came back, and the sketch of an outer product is the circular
convolution of the sketches of its factors, so that

    G_i = Σ_t δ_t a_tᵀ        z_i = irfft( Σ_layers Σ_t rfft(rows(δ_t)) ∘ rfft(columns(a_t)) )

costs (rows + columns + K log K) per position where the gradient has rows · columns entries, and no weight's gradient is
ever formed. Where forming it is cheaper (small layers, many positions) it is formed and sketched: the same map.

What each layer saw is taken from hooks. Whether that is the whole gradient of a parameter is not believed but checked, parameter by
parameter, against torch.func on the first records; what does not agree (a weight used outside its own layer, a layer
that mixes records or that is not known here) is differentiated by torch.func. No parameter is left out.

With no more parameters than K the map is the identity and the inner products are exact.

Gradients that are held anyway are projected by `project`, which errs a little less and reads every entry SPARSITY times:

    y = S x      S: (width, d) with SPARSITY entries ±1/√SPARSITY in each column, one in each of SPARSITY bands of rows

E[(S x)·(S z)] = x·z, with a standard deviation of at most √(2 / width) ‖x‖ ‖z‖: the sparse Johnson–Lindenstrauss transform of
Kane & Nelson 2014, arXiv:1012.1577.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attribution.engine.devices import lowered, moved
from attribution.engine.errors import EngineError
from attribution.engine.gradients import BLOCK_BYTES, named_gradients
from attribution.engine.task import Batch, PerRecord, Records, Task, TensorRecords, seed_of
from attribution.engine.training import Program, State, Tensors, preserved_generator

WIDTH = 1024
N_PROBE = 3  # records on which the hooks are checked against torch.func
MAX_ROWS = 512  # records at once; more gain no speed
POSITIONS = 64  # of factors transformed at once: their sketches stay in the cache
FORMED_NS = (1.2, 0.02)  # an entry of a gradient that is formed, and of a product; an entry of a factor takes 1
AGREEMENT = 1e-3  # of the hooks with torch.func, relative to a parameter's gradient; float32 sums differ by 1e-6
SPARSITY = 8
COLUMNS = 2**18  # columns of S made at once; part of the definition, since each piece has a seed of its own


@dataclass(frozen=True)
class Hash:
    """Where the entries of one parameter go: buckets 0..K-1 and signs, by row and by column."""

    rows: Tensor  # (r,) int64
    columns: Tensor  # (c,) int64
    row_signs: Tensor  # (r,)
    column_signs: Tensor  # (c,)
    width: int

    @cached_property
    def entries(self) -> tuple[Tensor, Tensor]:
        """Buckets and signs of all entries, (r · c,) each."""
        buckets = (self.rows[:, None] + self.columns).remainder_(self.width)
        return buckets.flatten(), (self.row_signs[:, None] * self.column_signs).flatten()


def hashes(parameters: Mapping[str, Tensor], width: int, seed: int) -> dict[str, Hash]:
    """A hash for every parameter, from its name and the seed alone; one that loses nothing where all entries fit."""
    found, start = {}, 0
    fits = sum(p.numel() for p in parameters.values()) <= width
    for name, p in parameters.items():
        r = p.shape[0] if p.ndim > 1 else 1
        c = p.numel() // r
        if fits:
            rows, columns, row_signs, column_signs = start + torch.arange(r) * c, torch.arange(c), *_ones(r, c)
            start += r * c
        else:
            generator = torch.Generator().manual_seed(seed_of("projection", seed, name))
            rows, columns = (torch.randint(width, (n,), generator=generator) for n in (r, c))
            row_signs, column_signs = (torch.randint(2, (n,), generator=generator) * 2.0 - 1 for n in (r, c))
        found[name] = Hash(rows.to(p.device), columns.to(p.device), row_signs.to(p), column_signs.to(p), width)
    return found


def sketch(gradients: Mapping[str, Tensor], by: Mapping[str, Hash]) -> Tensor:
    """Project gradients that are held, {name: (B, *shape)} -> (B, K)."""
    name, first = next(iter(gradients.items()))
    z = first.new_zeros(len(first), by[name].width)
    for name, gradient in gradients.items():
        buckets, signs = by[name].entries
        z.index_add_(1, buckets, gradient.flatten(1) * signs)
    return z


class Projector:
    """Projected gradients at one state of a task, of the training loss or of the measurement, in eval mode.

    The state holds every parameter by the first of its names, and the buffers; one that the model does not save may be missing.
    `unhooked[of_loss]` names the parameters that torch.func differentiates, after `prepare` or the first `gradients`.
    """

    def __init__(self, task: Task, state: Mapping[str, Tensor], *, width: int = WIDTH, seed: int = 0) -> None:
        if width < 2 or width & (width - 1):
            raise EngineError(f"{width} is not a power of two, 2 or more", pointer="/width")
        self.task, self.width, self.seed = task, width, seed
        self.program = Program(task)
        self.model = self.program.module.model.eval()
        saved = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in [
                *self.model.named_parameters(),
                *self.model.named_buffers(),
            ]:  # a tied weight comes once
                if name in state or name in saved:
                    tensor.copy_(state[name])
        self.trained = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}
        self.model.requires_grad_(False)  # no weight's gradient is formed by autograd
        self.by = hashes(self.trained, width, seed)
        self.unhooked: dict[bool, list[str]] = {}
        self._rows: dict[bool, int] = {}
        self._shared: dict[bool, set[int]] = {}  # ids of the lookups that come out once for all records

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.trained.values())

    def rows(self, *, of_loss: bool) -> int:
        """How many records to take at once."""
        self.prepare(of_loss=of_loss)
        return self._rows[of_loss]

    def gradients(self, records: Records, index: Tensor, *, of_loss: bool) -> Tensor:
        """Projected gradients (B, K) float32 of the records of `index`, however many.

        Raises:
            EngineError: a gradient that is not finite.
        """
        self.prepare(of_loss=of_loss, records=records)
        parts = [self.of_batch(records[i], i, of_loss=of_loss) for i in index.split(self._rows[of_loss])]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def prepare(self, *, of_loss: bool, records: Records | None = None) -> None:
        """Check which parameters the hooks account for, once: on the first of `records`, the task's own by default."""
        if of_loss in self.unhooked:
            return
        if records is None:
            records = self.task.train if of_loss else self.task.queries
        index = torch.arange(min(len(records), N_PROBE))
        batch = moved(records[index], self.program.device)
        with preserved_generator(), torch.no_grad():
            losses = self._objective(of_loss)(self.model, batch)
        if losses.shape != (len(index),):
            raise EngineError(
                f"gave shape {tuple(losses.shape)} for {len(index)} records; return one number per record, (B,), "
                'not a mean: reduction="none"',
                pointer="/loss" if of_loss else "/measurement",
            )
        truth = self._one_by_one(records, len(index), of_loss)
        best: tuple[int, set[int] | None, list[str], int] | None = None
        # A position embedding comes out once for all records; copied for each of them, it tells them apart.
        for shared in (None, set[int]()):
            try:
                found, bytes_held = self._hooked(batch, of_loss, shared, is_known=False, one_by_one=True)
            except (RuntimeError, IndexError, ValueError):  # a layer that cannot take what was copied
                found, bytes_held = {}, 0
            missing = [n for n, z in truth.items() if n not in found or not _agree(found[n], z)]
            size = sum(self.trained[n].numel() for n in missing)
            if best is None or size < best[0]:
                best = size, shared, missing, bytes_held
            if not missing:
                break
        assert best is not None
        size, shared, self.unhooked[of_loss], bytes_held = best
        self._shared[of_loss] = shared or set()
        per_record = bytes_held / len(index) + 3 * size * 8 + 4 * self.width * 8
        self._rows[of_loss] = int(max(1, min(MAX_ROWS, BLOCK_BYTES // per_record)))

    def of_batch(self, batch: Batch, index: Tensor, *, of_loss: bool) -> Tensor:
        """Projected gradients (B, K) float32 of at most `rows` records, whose numbers are `index`."""
        self.prepare(of_loss=of_loss)
        batch, missing = moved(batch, self.program.device), self.unhooked[of_loss]
        z: Tensor | None = None
        if len(missing) < len(self.trained):
            # The hooks were checked in full precision: bfloat16 differs from itself by more than they may.
            precision = self.task.precision
            z = self._hooked(batch, of_loss, self._shared[of_loss], skip=frozenset(missing), precision=precision)[0][""]
            z = z.float()
        if missing:
            rest = sketch(self._differentiated(batch, missing, of_loss), self.by).float()
            z = rest if z is None else z + rest
        assert z is not None
        if not bool(torch.isfinite(z.sum())):
            record = int(index[(~torch.isfinite(z)).any(1).cpu()][0])
            raise EngineError(
                "its gradient is not finite at this state; repair or leave out this record, or use an earlier checkpoint",
                pointer=f"/{'train' if of_loss else 'queries'}/{record}",
            )
        return z.cpu()

    def _objective(self, of_loss: bool) -> PerRecord:
        return self.task.loss if of_loss else self.task.measurement

    def _one_by_one(self, records: Records, n: int, of_loss: bool) -> dict[str, Tensor]:
        """Each parameter's sketch for the first n records, {name: (n, K)}, by the plainest way there is."""
        parameters = {name: p for name, p in self.model.named_parameters() if name in self.trained}
        found: dict[str, list[Tensor]] = {name: [] for name in parameters}
        for record in range(n):
            with preserved_generator(), torch.enable_grad():
                for p in parameters.values():
                    p.requires_grad_(True)
                one = moved(records[torch.tensor([record])], self.program.device)
                loss = self._objective(of_loss)(self.model, one)
                gradients = torch.autograd.grad(loss.sum(), list(parameters.values()), materialize_grads=True)
                for p in parameters.values():
                    p.requires_grad_(False)
            for (name, _), g in zip(parameters.items(), gradients, strict=True):
                found[name].append(sketch({name: g[None]}, self.by))
        return {name: torch.cat(rows) for name, rows in found.items()}

    def _differentiated(self, batch: Batch, names: list[str], of_loss: bool) -> Tensors:
        """Gradients of some parameters by torch.func, {name: (B, *shape)}."""
        parameters = {n: self.trained[n][None] for n in names}
        fixed: Tensors = {n: p for n, p in self.model.named_parameters() if n not in parameters}
        buffers = {n: b[None] for n, b in self.model.named_buffers()}
        state = State(0, parameters, buffers, {}, fixed)
        return named_gradients(self.program, state, TensorRecords(*batch), torch.arange(len(batch[0])), of_loss=of_loss)

    def _hooked(
        self,
        batch: Batch,
        of_loss: bool,
        shared: set[int] | None,
        *,
        is_known: bool = True,
        skip: frozenset[str] = frozenset(),
        one_by_one: bool = False,
        precision: str = "float32",
    ) -> tuple[dict[str, Tensor], int]:
        """Sketches from what went into each layer and what came back; under "" their sum, or under each parameter's name.

        Also how many bytes that took. `shared` names the lookups to copy for each record, or is filled with them if they
        are not yet known: by their shape alone, T positions look like T records.
        """
        n = len(batch[0])
        names = {id(p): name for name, p in self.model.named_parameters() if name in self.trained and name not in skip}
        own = next(iter(self.trained.values()))
        with preserved_generator(), _taps(self.model, names, n, shared, is_known) as taps, torch.enable_grad():
            with lowered(precision, self.program.device):
                losses = self._objective(of_loss)(self.model, batch)
            backs = torch.autograd.grad(losses.sum(), [tap.out for tap in taps], allow_unused=True) if taps else ()
        sums: dict[str, _Sum] = {}
        bytes_held = 0
        for tap, back in zip(taps, backs, strict=True):
            if back is None or back.shape[0] != n:
                continue
            back, went_in = back.to(own.dtype), tap.went_in
            went_in = went_in.to(own.dtype) if went_in.is_floating_point() else went_in
            for p, add in LAYERS[tap.kind](tap.module, went_in, back):
                if name := names.get(id(p)):
                    into = sums.setdefault(name if one_by_one else "", _Sum(n, self.width, own))
                    add(into, self.by[name])
            bytes_held += 4 * (tap.went_in.numel() + back.numel()) * back.element_size()
            bytes_held += min(n * _positions(back), POSITIONS) * self.width * 16
        if not one_by_one and "" not in sums:
            sums[""] = _Sum(n, self.width, own)
        return {name: total.whole() for name, total in sums.items()}, bytes_held


class _Sum:
    """A sum of sketches of n records, partly as it is and partly as a spectrum, transformed back once."""

    def __init__(self, n: int, width: int, like: Tensor) -> None:
        self.width = width
        self.direct = like.new_zeros(n, width)
        self.spectrum: Tensor | None = None
        self._scratch = like.new_empty(0, width)  # fresh memory for every chunk would cost more than the sum

    def entries(self, gradient: Tensor, by: Hash) -> None:
        """Add gradients that are held, (n, r · c)."""
        buckets, signs = by.entries
        self.direct.index_add_(1, buckets, gradient * signs)

    def outer(self, back: Tensor, went_in: Tensor, by: Hash) -> None:
        """Add Σ_t back_t went_in_tᵀ, from (n, T, r) and (n, T, c)."""
        n, positions, r = back.shape
        c = went_in.shape[2]
        entry_ns, product_ns = FORMED_NS
        if r * c * (entry_ns + product_ns * positions) < positions * (r + c + 2 * self.width):
            formed = torch.bmm(back.transpose(1, 2), went_in) if positions > 1 else back[:, 0, :, None] * went_in
            self.entries(formed.flatten(1), by)
            return
        if self.spectrum is None:
            complex_ = self.direct.dtype.to_complex()
            self.spectrum = self.direct.new_zeros(n, self.width // 2 + 1, dtype=complex_)
        step = max(1, POSITIONS // positions)
        for start in range(0, n, step):
            b = self._spectrum(back[start : start + step], by.rows, by.row_signs)
            a = self._spectrum(went_in[start : start + step], by.columns, by.column_signs)
            self.spectrum[start : start + step] += b.mul_(a)[:, 0] if positions == 1 else b.mul_(a).sum(1)

    def _spectrum(self, factor: Tensor, buckets: Tensor, signs: Tensor) -> Tensor:
        n, positions, size = factor.shape
        if len(self._scratch) < n * positions:
            self._scratch = factor.new_empty(n * positions, self.width)
        sketched = self._scratch[: n * positions].zero_()
        sketched.index_add_(1, buckets, factor.reshape(-1, size) * signs)
        return torch.fft.rfft(sketched).reshape(n, positions, -1)

    def rows_of(self, index: Tensor, back: Tensor, by: Hash) -> None:
        """Add Σ_t onehot(index_t) back_tᵀ, from (n, T) and (n, T, c): a lookup's gradient."""
        buckets = (by.rows[index][..., None] + by.columns).remainder_(self.width)
        values = back * by.row_signs[index][..., None] * by.column_signs
        self.direct.scatter_add_(1, buckets.flatten(1), values.flatten(1))

    def whole(self) -> Tensor:
        return self.direct if self.spectrum is None else self.direct + torch.fft.irfft(self.spectrum, n=self.width)


Contribution = tuple[Tensor, Callable[[_Sum, Hash], None]]  # a parameter, and how its gradient's sketch is added


def _linear(module: Any, went_in: Tensor, back: Tensor) -> Iterator[Contribution]:
    a, d = went_in.reshape(len(back), -1, went_in.shape[-1]), back.reshape(len(back), -1, back.shape[-1])
    yield module.weight, lambda into, by: into.outer(d, a, by)
    if module.bias is not None:
        yield module.bias, lambda into, by: into.entries(d.sum(1), by)


def _conv(module: Any, went_in: Tensor, back: Tensor) -> Iterator[Contribution]:
    how = [module.kernel_size, module.dilation, module.padding, module.stride]
    if back.ndim == 3:  # in one dimension: an image of height 1
        went_in, how = went_in[:, :, None], [(s, *given) for s, given in zip((1, 1, 0, 1), how, strict=True)]
    d = back.flatten(2).transpose(1, 2)  # (n, T, out)
    yield module.weight, lambda into, by: into.outer(d, F.unfold(went_in, *how).transpose(1, 2), by)
    if module.bias is not None:
        yield module.bias, lambda into, by: into.entries(d.sum(1), by)


def _embedding(module: Any, went_in: Tensor, back: Tensor) -> Iterator[Contribution]:
    index, d = went_in.reshape(len(back), -1), back.reshape(len(back), -1, back.shape[-1])
    yield module.weight, lambda into, by: into.rows_of(index, d, by)


def _layer_norm(module: Any, went_in: Tensor, back: Tensor) -> Iterator[Contribution]:
    normal = F.layer_norm(went_in, module.normalized_shape, eps=module.eps)
    shape = (len(back), -1, int(torch.tensor(module.normalized_shape).prod()))
    d = back.reshape(shape)
    yield module.weight, lambda into, by: into.entries((d * normal.reshape(shape)).sum(1), by)
    if module.bias is not None:
        yield module.bias, lambda into, by: into.entries(d.sum(1), by)


def _group_norm(module: Any, went_in: Tensor, back: Tensor) -> Iterator[Contribution]:
    normal = F.group_norm(went_in, module.num_groups, eps=module.eps)
    d = back.flatten(2) if back.ndim > 2 else back[..., None]
    yield module.weight, lambda into, by: into.entries((d * normal.reshape(d.shape)).sum(2), by)
    yield module.bias, lambda into, by: into.entries(d.sum(2), by)


LAYERS: dict[str, Callable[[Any, Tensor, Tensor], Iterator[Contribution]]] = {
    "linear": _linear,
    "conv": _conv,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
}


def _kind(module: nn.Module) -> str | None:
    """Which rule of LAYERS a module follows, in the plain settings that the rule covers."""
    match module:
        case nn.Linear():
            return "linear"
        case nn.Conv1d() | nn.Conv2d() if module.groups == 1 and module.padding_mode == "zeros":
            return None if isinstance(module.padding, str) else "conv"
        case nn.Embedding() if module.padding_idx is None and module.max_norm is None:
            return None if module.scale_grad_by_freq or module.sparse else "embedding"
        case nn.LayerNorm() if module.elementwise_affine:
            return "layer_norm"
        case nn.GroupNorm() if module.affine:
            return "group_norm"
    return None


@dataclass
class _Tap:
    module: nn.Module
    kind: str
    went_in: Tensor
    out: Tensor


@contextmanager
def _taps(
    model: nn.Module, names: Mapping[int, str], n: int, shared: set[int] | None, is_known: bool
) -> Iterator[list[_Tap]]:
    """What each call of each known layer took and gave, while the block runs."""
    taps: list[_Tap] = []

    def hook(kind: str) -> Callable[..., Tensor]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            went_in = inputs[0].detach()
            if shared is not None and kind == "embedding" and (id(module) in shared if is_known else out.shape[0] != n):
                shared.add(id(module))
                if went_in.ndim > 1 and out.shape[0] == 1:
                    went_in, out = went_in[0], out[0]
                went_in, out = went_in.expand(n, *went_in.shape), out.expand(n, *out.shape)
            if not out.requires_grad:
                out = out.detach().requires_grad_()
            taps.append(_Tap(module, kind, went_in, out))
            return out.clone()  # an operation in place that follows must not reach what is kept

        return keep

    handles = [
        module.register_forward_hook(hook(kind))
        for module in model.modules()
        if (kind := _kind(module)) and any(id(p) in names for p in module.parameters(recurse=False))
    ]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def _positions(back: Tensor) -> int:
    return max(1, back[0].numel() // back.shape[-1]) if back.ndim > 2 else 1


def _agree(found: Tensor, truth: Tensor) -> bool:
    difference = (found - truth).norm(dim=1)
    return bool((difference <= AGREEMENT * truth.norm(dim=1) + 1e-9 * truth.norm()).all())


def _ones(*sizes: int) -> list[Tensor]:
    return [torch.ones(size) for size in sizes]


def project(x: Tensor, width: int, seed: int) -> Tensor:
    """Project the rows of (B, d) to (B, width); width must be a multiple of SPARSITY."""
    if width < SPARSITY or width % SPARSITY:
        raise ValueError(f"width {width} is no multiple of {SPARSITY}")
    band = width // SPARSITY
    y = x.new_zeros(len(x), width)
    for number, piece in enumerate(x.split(COLUMNS, dim=1)):
        generator = torch.Generator().manual_seed(seed_of("projection", seed, number))
        for row in range(0, width, band):
            bucket = torch.randint(band, (COLUMNS,), generator=generator)[: piece.shape[1]] + row
            sign = torch.randint(2, (COLUMNS,), generator=generator)[: piece.shape[1]] * 2 - 1
            y.index_add_(1, bucket.to(x.device), piece * sign.to(x))
    return y / SPARSITY**0.5
