"""The gradient that each record, or each query, has at one set of weights.

g_i = ∂ loss_i / ∂θ        one row per record, parameters flattened in the model's own order
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attribution.engine.devices import lowered, moved
from attribution.engine.errors import EngineError
from attribution.engine.task import Records, seed_of
from attribution.engine.training import Program, State, Tensors, preserved_generator

BLOCK_BYTES = 2**28  # of gradients held at once


def parameter_count(program: Program, state: State) -> int:
    return sum(p[0].numel() for p in state.parameters.values())


def record_gradients(program: Program, state: State, records: Records, index: Tensor, *, of_loss: bool) -> Tensor:
    """Per-example gradients (B, d) at a state of one run, of the training loss or of the measurement, in eval mode."""
    return flat(named_gradients(program, state, records, index, of_loss=of_loss))


def flat(gradients: Tensors) -> Tensor:
    """(B, d): one row per record, its parameters side by side in the model's own order."""
    return torch.cat([g.reshape(len(g), -1) for g in gradients.values()], 1)


def named_gradients(program: Program, state: State, records: Records, index: Tensor, *, of_loss: bool) -> Tensors:
    """The same, as one tensor (B, *shape) for each parameter."""
    module = program.module.train(of_loss)  # its own flag picks the loss or the measurement
    module.model.eval()
    fixed = state.frozen | {name: b[0] for name, b in state.buffers.items()}
    names = list(state.parameters)

    def one(parameters: Tensors, *record: Tensor) -> Tensor:
        batch = tuple(part[None] for part in record)
        tensors = {f"model.{name}": t for name, t in (parameters | fixed).items()}
        with lowered(program.task.precision, program.device):
            return torch.func.functional_call(module, tensors, (batch,))[0]

    parameters = {name: p[0].detach() for name, p in state.parameters.items()}
    batch = moved(records[index], program.device)
    # The fused attention kernels have no batching rule: vmap would run them record by record.
    with preserved_generator(), sdpa_kernel(SDPBackend.MATH):
        try:
            found = torch.vmap(torch.func.grad(one), in_dims=(None, *[0] * len(batch)), randomness="different")(
                parameters, *batch
            )
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise EngineError(
                f"cannot be mapped over records: {str(error).splitlines()[0]} Write it without looking at values: no .item(), no "
                "branch on a tensor, labels[:, None] == torch.arange(classes) instead of one_hot",
                pointer="/loss" if of_loss else "/measurement",
            ) from error
    return {name: found[name] for name in names}


def sketched(gradients: Tensor, width: int, seed: int) -> Tensor:
    """Project (B, d) to (B, width) by a count sketch: each coordinate, with a random sign, joins one random bucket.

    Inner products are kept in expectation (Charikar, Chen, Farach-Colton 2002), at a cost linear in d.
    """
    generator = torch.Generator().manual_seed(seed_of("sketch", seed))
    d = gradients.shape[1]
    bucket = torch.randint(width, (d,), generator=generator).to(gradients.device)
    sign = (torch.randint(2, (d,), generator=generator) * 2 - 1).to(gradients)
    return gradients.new_zeros(len(gradients), width).index_add_(1, bucket, gradients * sign)


def block_rows(program: Program, state: State) -> int:
    """How many records' gradients fit a block."""
    return max(1, min(1024, BLOCK_BYTES // (8 * parameter_count(program, state))))
