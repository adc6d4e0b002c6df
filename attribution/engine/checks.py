"""What two records show of a loss before the first step: that it repeats, and that records do not act through each other."""

import torch
from torch import Tensor, nn

from attribution.engine.devices import moved, repeatable
from attribution.engine.errors import EngineError
from attribution.engine.task import Batch, Records, Task, seed_of

SAME = 1e-4  # relative: one record's loss among other records is the same but for rounding


def check_losses(module: nn.Module, task: Task) -> None:
    """Call the loss, and the measurement, on the same two records again and with the second one exchanged.

    Args:
        module: its forward is the task's loss in training mode and the measurement in eval mode, on `module.model`.

    Raises:
        EngineError: a number is not finite, differs from call to call under one seed, or depends on the rest of its batch.
    """
    for pointer, records, training in (("/loss", task.train, True), ("/measurement", task.queries, False)):
        module.train(training)
        index = torch.arange(min(2, len(records)))
        first = _called(module, records, index)
        for record, value in enumerate(first.tolist()):
            if value - value != 0:  # NaN or infinity
                raise EngineError(
                    f"is {value} for record {record} at the initial weights; repair the record, or the {pointer[1:]}",
                    pointer=pointer,
                )
        if not torch.equal(first, _called(module, records, index)):
            raise EngineError(
                "gave other numbers for the same records, weights and seed, so that no run could be replayed; draw "
                "whatever is random from torch's global generator alone, which every step seeds",
                pointer=pointer,
            )
        alone = _called(module, records, torch.zeros_like(index))  # as many slots, so the same random masks
        if not torch.allclose(alone[0], first[0], rtol=SAME, atol=SAME * 1e-2):
            raise EngineError(
                f"gave record 0 another number when record 1 changed ({first[0]:.6g}, then {alone[0]:.6g}): a record of weight "
                "0 would still act through the batch; use LayerNorm or GroupNorm, and no statistics over a batch",
                pointer=pointer,
            )


def _called(module: nn.Module, records: Records, index: Tensor) -> Tensor:
    model = module.get_submodule("model")
    buffers = {
        f"model.{name}": buffer.clone() for name, buffer in model.named_buffers()
    }  # a forward may write into them
    device = next(model.parameters()).device
    batch: Batch = moved(records[index], device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), repeatable(device):
        torch.manual_seed(seed_of("check", len(index)))
        losses: Tensor = torch.func.functional_call(module, buffers, (batch,))
    return losses.detach().double().cpu()
