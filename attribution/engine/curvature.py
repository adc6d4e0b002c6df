"""The curvature of a training loss at one state, as blocks whose eigenbases and eigenvalues are known (EK-FAC).

    H = (1/n) Σ_i m_i E_y[ g_i,y g_i,yᵀ ]        g_i,y: record i's gradient for a label y that the model itself would draw

For a softmax or squared loss this is the Gauss–Newton matrix (1/n) Σ m_i J_iᵀ H_out J_i. It is preferred to the empirical
Fisher, which takes the labels as they are: that one confuses how curved the loss is with how wrong the model still is,
fades where training has fitted its labels, and predicts retraining worse here (benchmarks/attribution/estimators.py;
Kunstner et al. 2019, arXiv:1905.12558). With few outputs the expectation over labels is exact: one gradient for each
eigenvector of H_out. With many, labels are drawn; only a loss that cannot be split at the model's output falls back to
the empirical Fisher, and the report says so.

A weight W with its bias as a last column is a matrix, and so is its gradient G. In the basis of

    R = Q_L ⊗ Q_R        E[G Gᵀ] = Q_L · Q_Lᵀ,   E[Gᵀ G] = Q_R · Q_Rᵀ

H is taken to be diagonal, with E[(Q_Lᵀ G Q_R)²] as eigenvalues: George et al. 2018, arXiv:1806.03884; Grosse et al. 2023,
arXiv:2308.03296. The factors come from whole gradients and not from a layer's inputs and outputs (for one position per
record the two differ by a weight; see Morwani et al. 2024, arXiv:2406.17748). So whatever a parameter is used for,
convolution, attention's packed projection, a weight tied to an embedding, used twice or by a function call, its
gradient is all that is needed and no parameter is left out. A block of up to FULL numbers is treated exactly; a side longer
than SIDE (a vocabulary) keeps its own axes; what fits neither is diagonal. `treatments` says which is which.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribution.engine.devices import moved
from attribution.engine.gradients import BLOCK_BYTES, named_gradients, parameter_count
from attribution.engine.task import Batch, seed_of
from attribution.engine.training import Program, Progress, State, Tensors, preserved_generator

FULL = 3072  # numbers in a block that is treated exactly: its eigenvectors take seconds
SIDE = 4096  # of a matrix, beyond which its eigenvectors would take minutes and gigabytes
EXACT_OUTPUTS = 32  # outputs per record up to which every label counts
HESSIAN_OUTPUTS = 256  # up to which H_out is written down at all
DRAWS = 2048  # label draws in all, when labels are drawn: few records get several each


# --- gradients for the model's own labels


@dataclass(frozen=True)
class Labels:
    """Where the gradients of H come from."""

    kind: str  # "exact", "drawn" (from H_out), "softmax" (drawn from the model's probabilities) or "empirical"
    draws: int  # gradients per record; 0: one per output
    why: str  # in words, for the report


def labels_of(program: Program, state: State) -> Labels:
    """Choose by looking at the first records how H's gradients can be had."""
    n = program.task.n_train
    draws = max(1, min(16, DRAWS // n))
    index = torch.arange(min(4, n))
    try:
        with _outputs_seen(program) as seen:
            z, losses, u = _at_output(program, state, index, seen)
            whole = named_gradients(program, state, program.task.train, index, of_loss=True)
            split = _pulled_back(program, state, index, u[:, None], seen)
    except _NotSplit as reason:
        return Labels("empirical", 1, f"the records' own labels, since {reason}")
    same = all(
        torch.allclose(split[name][:, 0], g, rtol=1e-3, atol=1e-5 * float(g.abs().max())) for name, g in whole.items()
    )
    if not same:
        return Labels("empirical", 1, "the records' own labels, since the loss depends on more than the model's output")
    m = z[0].numel()
    if m <= EXACT_OUTPUTS:
        return Labels("exact", 0, f"expected over the model's own labels, exactly: {m} outputs per record")
    if _softmax_scale(z, u) is not None:
        return Labels("softmax", draws, f"{draws} labels per record drawn from the model's own probabilities")
    if m <= HESSIAN_OUTPUTS:
        return Labels("drawn", draws, f"{draws} draws per record from the loss's curvature in {m} outputs")
    return Labels(
        "empirical", 1, f"the records' own labels, since the loss is no softmax of its {m} outputs per record"
    )


def curvature_gradients(program: Program, state: State, index: Tensor, labels: Labels) -> Tensors:
    """Gradients g with E[Σ g gᵀ] = Σ_i of H's terms, per parameter (B, rows, *shape), in eval mode."""
    if labels.kind == "empirical":
        found = named_gradients(program, state, program.task.train, index, of_loss=True)
        return {name: g[:, None] for name, g in found.items()}
    with _outputs_seen(program) as seen:
        z, _, u = _at_output(program, state, index, seen)
        if labels.kind == "softmax":
            scale = _softmax_scale(z, u)
            assert scale is not None
            rows = _drawn_labels(program.task.train[index], z, scale, labels.draws)
        else:
            rows = _root(_output_hessian(program, state, index, z, seen))  # (B, m, m)
            if labels.kind == "drawn":
                sign = _uniform(program.task.train[index], labels.draws * rows.shape[1]).reshape(
                    len(index), -1, rows.shape[1]
                )
                rows = torch.where(sign < 0.5, -1.0, 1.0).to(rows) @ rows / labels.draws**0.5
            rows = rows.reshape(*rows.shape[:2], *z.shape[1:])
        return _pulled_back(program, state, index, rows, seen)


class _NotSplit(Exception):
    """The loss is not a function of one output of the model."""


@contextmanager
def _outputs_seen(program: Program) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = program.module.model.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    program.module.train()  # its own flag: the loss, not the measurement
    program.module.model.eval()
    try:
        with preserved_generator(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no batching rule
            yield seen
    finally:
        handle.remove()


def _tensors(state: State) -> tuple[Tensors, Tensors]:
    """One run's parameters, and whatever else the model holds, by the names of `program.module`."""
    parameters = {f"model.{name}": p[0].detach() for name, p in state.parameters.items()}
    fixed = {f"model.{name}": b[0] for name, b in state.buffers.items()}
    return parameters, fixed | {f"model.{name}": t for name, t in state.frozen.items()}


def _one(program: Program, tensors: Tensors, record: Batch, seen: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(output, loss) of one record."""
    seen.clear()
    loss = torch.func.functional_call(program.module, tensors, (tuple(part[None] for part in record),))[0]
    if len(seen) != 1:
        raise _NotSplit(f"the loss calls the model {len(seen)} times")
    (output,) = seen
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.shape[:1] != (1,):
        raise _NotSplit("the model's output is not one tensor of floats with a row per record")
    return output[0], loss


@contextmanager
def _output_given(module: nn.Module, output: Tensor) -> Iterator[None]:
    module.forward = lambda *_, **__: output
    try:
        yield
    finally:
        del module.forward


def _at_output(program: Program, state: State, index: Tensor, seen: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs z (B, ...), losses (B,), and ∂loss/∂z (B, ...)."""
    parameters, fixed = _tensors(state)
    batch = moved(program.task.train[index], program.device)
    dims = tuple(0 for _ in batch)
    with torch.no_grad():
        z, losses = torch.vmap(lambda *r: _one(program, parameters | fixed, r, seen), in_dims=dims)(*batch)
    u = torch.vmap(torch.func.grad(lambda z, *r: _loss_of(program, parameters | fixed, z, r)), in_dims=(0, *dims))(
        z, *batch
    )
    return z, losses, u


def _loss_of(program: Program, tensors: Tensors, z: Tensor, record: Batch) -> Tensor:
    """One record's loss as a function of the model's output for it; the model itself is not run."""
    with _output_given(program.module.model, z[None]):
        return torch.func.functional_call(program.module, tensors, (tuple(part[None] for part in record),))[0]


def _output_hessian(program: Program, state: State, index: Tensor, z: Tensor, seen: list[Tensor]) -> Tensor:
    """(B, m, m)"""
    parameters, fixed = _tensors(state)
    batch = moved(program.task.train[index], program.device)

    def loss(flat: Tensor, *record: Tensor) -> Tensor:
        return _loss_of(program, parameters | fixed, flat.reshape(z.shape[1:]), record)

    return torch.vmap(torch.func.jacrev(torch.func.grad(loss)), in_dims=(0, *[0] * len(batch)))(z.flatten(1), *batch)


def _root(hessian: Tensor) -> Tensor:
    """Rows v with Σ v vᵀ = H; a direction in which the loss is concave in the output counts as flat."""
    values, vectors = torch.linalg.eigh(hessian.double())
    rows = (vectors * values.clamp_min(0).sqrt()[:, None]).transpose(1, 2)
    matters = values.amax(0) > 1e-9 * values.max().clamp_min(1e-300)  # softmax has one null direction for every record
    return rows[:, matters].to(hessian.dtype) if bool(matters.any()) else rows[:, -1:].to(hessian.dtype)


def _pulled_back(program: Program, state: State, index: Tensor, rows: Tensor, seen: list[Tensor]) -> Tensors:
    """Jᵀv for every row v (B, r, *z): per parameter (B, r, *shape)."""
    parameters, fixed = _tensors(state)
    batch = moved(program.task.train[index], program.device)

    def one(v: Tensor, *record: Tensor) -> Tensors:
        pull = torch.func.vjp(lambda p: _one(program, p | fixed, record, seen)[0], parameters)[1]
        return torch.vmap(lambda cotangent: pull(cotangent)[0])(v)

    found = torch.vmap(one, randomness="different")(rows, *batch)
    return {name.removeprefix("model."): g for name, g in found.items()}


def _softmax_scale(z: Tensor, u: Tensor) -> Tensor | None:
    """c (B, ...) if the loss is Σ_positions c · cross entropy of softmax(z) in the last dimension, else None.

    Then ∂loss/∂z = c (p − e_y) at every position: one entry below 0, the others in proportion to p.
    """
    p, u = z.double().softmax(-1), u.double()
    label = u.argmin(-1, keepdim=True)
    others = p.scatter(-1, label, 0.0)
    c = u.abs().sum(-1) / (2 * others.sum(-1)).clamp_min(1e-30)
    one_hot = torch.zeros_like(p).scatter(-1, label, 1.0)
    off = (u - c[..., None] * (p - one_hot)).abs().amax()
    return c if bool(torch.isfinite(c).all()) and bool(off <= 1e-3 * u.abs().amax()) else None


def _drawn_labels(batch: Batch, z: Tensor, scale: Tensor, draws: int) -> Tensor:
    """√c (p − e_ŷ) with ŷ ~ p, (B, draws, *z), whose covariance is H_out."""
    p = z.double().softmax(-1)
    shape = z.shape[1:-1]
    at = _uniform(batch, draws * max(1, shape.numel())).reshape(len(z), draws, *shape, 1).to(z.device)
    drawn = torch.searchsorted(p.cumsum(-1)[:, None].expand(-1, draws, *p.shape[1:]).contiguous(), at.contiguous())
    one_hot = p.new_zeros(len(z), draws, *p.shape[1:]).scatter_(-1, drawn.clamp_max(p.shape[-1] - 1), 1.0)
    return ((scale / draws).sqrt()[:, None, ..., None] * (p[:, None] - one_hot)).to(z.dtype)


def _uniform(batch: Batch, count: int) -> Tensor:
    """(B, count) in [0, 1), drawn from each record's own bytes: neither its place nor its batch matters."""
    drawn = torch.empty(len(batch[0]), count, dtype=torch.float64)
    for row in range(len(drawn)):
        digest = hashlib.sha256()
        for part in batch:
            digest.update(part[row].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        generator = torch.Generator().manual_seed(seed_of("labels", digest.hexdigest()))
        drawn[row] = torch.rand(count, generator=generator, dtype=torch.float64)
    return drawn


# --- blocks


@dataclass
class Block:
    """One weight with its bias, or what else belongs together, and the basis in which H is diagonal there."""

    weight: str
    bias: str | None
    shape: torch.Size  # of the weight
    matrix: tuple[int, int]  # its gradient as a matrix, the bias as a last column; (1, size) for a vector
    whole: bool  # one eigenbasis for all of it
    sides: tuple[bool, bool]  # whether the left and the right side have one
    bases: dict[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.matrix[0] * self.matrix[1]

    @property
    def names(self) -> list[str]:
        return [self.weight, *([self.bias] if self.bias else [])]

    @property
    def treatment(self) -> str:
        rows, columns = self.matrix
        if self.whole:
            return f"one exact block of {self.size}"
        if self.sides == (True, True):
            return f"eigenvalue-corrected Kronecker block {rows} × {columns}"
        if any(self.sides):
            return (
                f"eigenvalue-corrected block {rows} × {columns}, its {'columns' if self.sides[1] else 'rows'} rotated"
            )
        return f"diagonal of {self.size}"

    def join(self, tensors: Tensors) -> Tensor:
        """(B, *shape) and (B, out) → (B, rows, columns)."""
        weight = tensors[self.weight]
        bias = [tensors[self.bias].reshape(len(weight), self.matrix[0], -1)] if self.bias else []
        return torch.cat([weight.reshape(len(weight), self.matrix[0], -1), *bias], 2)

    def split(self, joined: Tensor) -> Tensors:
        """The inverse of `join`."""
        if self.bias is None:
            return {self.weight: joined.reshape(len(joined), *self.shape)}
        columns = self.shape.numel() // self.matrix[0]
        return {
            self.weight: joined[:, :, :columns].reshape(len(joined), *self.shape),
            self.bias: joined[:, :, columns:].flatten(1),
        }

    def rotate(self, joined: Tensor) -> Tensor:
        """(B, rows, columns) → coordinates (B, size) in the eigenbasis; lengths and inner products stay."""
        if "whole" in self.bases:
            return joined.flatten(1) @ self.bases["whole"]
        if "left" in self.bases:
            joined = self.bases["left"].T @ joined
        if "right" in self.bases:
            joined = joined @ self.bases["right"]
        return joined.flatten(1)

    def restore(self, coordinates: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        if "whole" in self.bases:
            return (coordinates @ self.bases["whole"].T).reshape(-1, *self.matrix)
        joined = coordinates.reshape(-1, *self.matrix)
        if "left" in self.bases:
            joined = self.bases["left"] @ joined
        if "right" in self.bases:
            joined = joined @ self.bases["right"].T
        return joined


def blocks_of(parameters: Tensors) -> list[Block]:
    """Every trained parameter in exactly one block; shapes without the leading dimension of runs."""
    left, blocks = dict(parameters), []
    for name, weight in parameters.items():
        if name not in left:
            continue
        del left[name]
        found = left.get(name.removesuffix("weight") + "bias") if name.endswith("weight") and weight.ndim else None
        bias = name.removesuffix("weight") + "bias" if found is not None and found.shape == weight.shape[:1] else None
        if bias:
            del left[bias]
        if weight.ndim >= 2:
            rows, columns = weight.shape[0], weight[0].numel() + bool(bias)
        else:
            # A vector is a row; LayerNorm's gains and shifts make one of pairs.
            rows, columns = (weight.numel(), 2) if bias else (1, weight.numel())
        whole = rows * columns <= FULL
        is_matrix = weight.ndim >= 2 and not whole
        sides = (is_matrix and rows <= SIDE, is_matrix and columns <= SIDE)
        blocks.append(Block(name, bias, weight.shape, (rows, columns), whole, sides))
    return blocks


@dataclass
class Curvature:
    """H at one state: `blocks` in the model's order, and the eigenvalues of all of them side by side."""

    blocks: list[Block]
    eigenvalues: Tensor  # (d,) float64, 0 or more
    labels: Labels

    def rotate(self, tensors: Tensors) -> Tensor:
        """Per parameter (B, *shape) → coordinates (B, d)."""
        return torch.cat([block.rotate(block.join(tensors)) for block in self.blocks], 1)

    def restore(self, coordinates: Tensor) -> Tensors:
        """The inverse of `rotate`."""
        pieces = coordinates.split([block.size for block in self.blocks], 1)
        found: Tensors = {}
        for block, piece in zip(self.blocks, pieces, strict=True):
            found |= block.split(block.restore(piece))
        return found

    def spread(self, per_parameter: dict[str, Any]) -> Tensor:
        """(d,) float64 from a number or tensor for each parameter: its mean over the block it belongs to."""
        parts = []
        for block in self.blocks:
            sizes = [block.shape.numel(), block.size - block.shape.numel()]
            means = [float(torch.as_tensor(per_parameter[name], dtype=torch.float64).mean()) for name in block.names]
            mean = sum(s * m for s, m in zip(sizes, means, strict=False)) / block.size
            parts.append(torch.full((block.size,), mean, dtype=torch.float64))
        return torch.cat(parts).to(self.eigenvalues.device)

    @property
    def treatments(self) -> dict[str, str]:
        """How each parameter was treated; none is missing."""
        return {name: block.treatment for block in self.blocks for name in block.names}


def fit(
    program: Program,
    state: State,
    *,
    visits: Tensor | None = None,
    rows: int | None = None,
    progress: Progress | None = None,
) -> Curvature:
    """Estimate H at a state of one run, in two passes over the records: bases, then eigenvalues.

    Args:
        visits: (n_train,) m_i; 1 by default.
        rows: records at a time; as many as fit by default. It changes no result beyond rounding.
    """
    m = torch.ones(program.task.n_train) if visits is None else visits
    labels = labels_of(program, state)
    used = m.nonzero()[:, 0]
    blocks = blocks_of({name: p[0] for name, p in state.parameters.items()})
    parts = used.split(rows or curvature_rows(program, state, labels))

    def passes(number: int) -> Iterator[tuple[Block, Tensor]]:
        for done, index in enumerate(parts):
            found = curvature_gradients(program, state, index, labels)
            scale = (m[index] / program.task.n_train).sqrt()
            for block in blocks:
                joined = torch.stack(
                    [block.join({n: g[:, r] for n, g in found.items()}) for r in range(_n_rows(found))], 1
                )
                yield block, (joined * scale.to(joined)[:, None, None, None]).flatten(0, 1)
            if progress:
                progress(number * len(parts) + done + 1, 2 * len(parts))

    sums: dict[tuple[str, str], Tensor] = {}

    def add(block: Block, part: str, product: Tensor) -> None:
        key = (block.weight, part)
        sums[key] = sums[key] + product.double() if key in sums else product.double()

    for block, G in passes(0):  # (B · rows, out, in)
        if block.whole:
            add(block, "whole", G.flatten(1).T @ G.flatten(1))
        if block.sides[0]:
            side = G.transpose(0, 1).flatten(1)
            add(block, "left", side @ side.T)
        if block.sides[1]:
            side = G.flatten(0, 1)
            add(block, "right", side.T @ side)
    dtype = next(iter(state.parameters.values())).dtype
    values: dict[str, Tensor] = {}
    for block in blocks:
        for part in ("whole", "left", "right"):
            if (block.weight, part) in sums:
                found, basis = torch.linalg.eigh(sums.pop((block.weight, part)))
                block.bases[part] = basis.to(dtype)
                if part == "whole":
                    values[block.weight] = found
    if not all(block.whole for block in blocks):
        for block, G in passes(1):
            if not block.whole:
                add(block, "values", block.rotate(G).square().sum(0))
    for block in blocks:
        if not block.whole:
            values[block.weight] = sums[block.weight, "values"]
    return Curvature(blocks, torch.cat([values[block.weight] for block in blocks]).clamp_min(0), labels)


def _n_rows(gradients: Tensors) -> int:
    return next(iter(gradients.values())).shape[1]


def curvature_rows(program: Program, state: State, labels: Labels) -> int:
    """How many records' curvature gradients fit a block."""
    per_record = labels.draws or EXACT_OUTPUTS
    return max(1, min(1024, BLOCK_BYTES // (16 * per_record * parameter_count(program, state))))
