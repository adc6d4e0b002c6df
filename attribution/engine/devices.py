"""Where the numbers are computed, and how that leaves a run what it is.

A task's records, order and initial state stay where its author put them, usually in the CPU's memory; a batch is moved when it is used,
and what is kept (values, gradients of weights, scores, checkpoints) comes back to the CPU. So a file says nothing of the
device that wrote it, and another device can read it.

Seeds. A CUDA generator draws other numbers than the CPU's from one seed. So whatever is random inside a model is drawn on the
CPU and copied: dropout leaves out the same units on every device, and a recipe is the same training everywhere, up to rounding.

Rounding. On CUDA only deterministic kernels are used, TF32 is off and attention goes by plain products, so that two runs on one kind of card
have the same bits. Kernels of different devices add up in different orders, so bits differ between them; see `verification`.

Precision. bfloat16 has 8 bits of mantissa. Gradients that are compared with each other (a gradient store, the estimators, their
curvature) may be computed in it; a replay never is, because its weights must be those of the recorded run.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from attribution.engine.errors import EngineError

CPU = torch.device("cpu")
PRECISIONS = ("float32", "bf16")
WORKSPACE = (
    "CUBLAS_WORKSPACE_CONFIG",
    ":4096:8",
)  # or cuBLAS picks its own workspaces, and with them the order of sums


def resolve(text: str) -> list[torch.device]:
    """The devices that `auto`, `cpu`, `cuda`, `cuda:N` or several of the last, by commas, name.

    Raises:
        EngineError: there is no such device here, or it is named twice.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    found: list[torch.device] = []
    for part in text.split(","):
        device = _device(part.strip())
        if device in found:
            raise EngineError(f"{part.strip()!r} is named twice", pointer="/device")
        found.append(device)
    return found


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(f"{name!r} is none of auto, cpu, cuda, cuda:N", pointer="/device") from error
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"{name!r} is none of auto, cpu, cuda, cuda:N", pointer="/device")
    if device.type == "cpu":
        return CPU
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        have = f"there are {count}" if count else "torch finds no CUDA here"
        raise EngineError(f"{name!r}: {have}; use --device auto or cpu", pointer="/device")
    return torch.device("cuda", index)


def resolve_precision(text: str, device: torch.device) -> str:
    """`auto` is bf16 on cards that multiply it in hardware, else float32."""
    if text == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return "bf16" if has_bf16 else "float32"
    if text not in PRECISIONS:
        raise EngineError(f"{text!r} is none of auto, {', '.join(PRECISIONS)}", pointer="/precision")
    return text


def moved(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Deterministic kernels, and random numbers from the CPU's generator. On the CPU that is so anyway.

    Raises:
        EngineError: the model uses an operation that has no deterministic kernel on this device.
    """
    if device.type == "cpu":
        yield
        return
    os.environ.setdefault(*WORKSPACE)
    was = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.allow_tf32
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with sdpa_kernel(SDPBackend.MATH), DrawnOnCPU():
            yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise EngineError(
            f"{str(error).splitlines()[0]} Such a training cannot be replayed on {device}; use another operation, or --device cpu",
            pointer="/model",
        ) from error
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = was[1], tf32


class DrawnOnCPU(TorchDispatchMode):
    """Runs every operation that draws random numbers on the CPU, with the CPU's generator, and copies what came out."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device(kwargs.get("device") or CPU))
        if device.type == "cpu":
            return func(*args, **kwargs)
        there, kwargs_there = tree_map_only(Tensor, lambda t: t.to(CPU), (args, kwargs))
        if kwargs_there.get("device") is not None:
            kwargs_there = kwargs_there | {"device": CPU}
        drawn = func(*there, **kwargs_there)
        if func._schema.is_mutable:  # bernoulli_ and its like: written into where it was asked for
            return args[0].copy_(there[0])
        return tree_map_only(Tensor, lambda t: t.to(device), drawn)


@contextmanager
def lowered(precision: str, device: torch.device) -> Iterator[None]:
    """bfloat16 where autocast holds it to be safe: products, not sums, norms, softmax or losses."""
    if precision == "float32":
        yield
        return
    with torch.autocast(device.type, torch.bfloat16):
        yield
