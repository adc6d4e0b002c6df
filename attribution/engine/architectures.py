"""Descriptions of models, transforms, losses and measurements that a server may build: data, never code.

    {"kind": "sequential", "layers": [{"type": "linear", "in_features": 64, "out_features": 32}, {"type": "relu"}, ...]}

Every name and every option is on a list below; whatever is not is refused with its place. Sizes are added up from the
description and then counted on the meta device, so a model that does not fit is refused before a byte of it is allocated.
Tensors come from safetensors only: a pickle can run code, so none is read, whatever its file is called.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from attribution.engine.errors import EngineError
from attribution.engine.task import Batch, PerRecord

SAFETENSORS_HEADER_LIMIT = 100_000_000  # the format's own


@dataclass(frozen=True)
class Caps:
    parameters: int = 50_000_000
    layers: int = 64
    width: int = 65_536
    kernel: int = 31
    vocabulary: int = 1_000_000


@dataclass(frozen=True)
class _Option:
    """An allowed option: its kind, its bounds, and its default (`...` where it must be given)."""

    kind: type
    low: float = -math.inf
    high: float = math.inf
    default: Any = ...
    cap: str = ""  # a field of Caps that bounds it from above


_WIDTH = _Option(int, 1, cap="width")
_KERNEL = _Option(int, 1, cap="kernel")
_STRIDE = _Option(int, 1, 31, 1)
_PADDING = _Option(int, 0, 31, 0)
_BIAS = _Option(bool, default=True)
_POOL = {"kernel_size": _KERNEL, "stride": _Option(int, 1, 31, None), "padding": _PADDING}

LAYERS: dict[str, tuple[Callable[..., nn.Module], dict[str, _Option]]] = {
    "linear": (nn.Linear, {"in_features": _WIDTH, "out_features": _WIDTH, "bias": _BIAS}),
    "conv2d": (
        nn.Conv2d,
        {
            "in_channels": _WIDTH,
            "out_channels": _WIDTH,
            "kernel_size": _KERNEL,
            "stride": _STRIDE,
            "padding": _PADDING,
            "bias": _BIAS,
        },
    ),
    "relu": (nn.ReLU, {}),
    "gelu": (nn.GELU, {}),
    "tanh": (nn.Tanh, {}),
    "flatten": (nn.Flatten, {}),
    "layer_norm": (nn.LayerNorm, {"normalized_shape": _WIDTH, "eps": _Option(float, 1e-12, 1.0, 1e-5)}),
    "dropout": (nn.Dropout, {"p": _Option(float, 0.0, 0.95, 0.5)}),
    "max_pool2d": (nn.MaxPool2d, _POOL),
    "avg_pool2d": (nn.AvgPool2d, _POOL),
    "embedding": (nn.Embedding, {"num_embeddings": _Option(int, 1, cap="vocabulary"), "embedding_dim": _WIDTH}),
}

TRANSFORMS: dict[str, dict[str, _Option]] = {
    "scale": {"divide_by": _Option(float, 1e-12, 1e12)},
    "standardize": {"mean": _Option(list), "std": _Option(list)},
    "flatten": {},
    "reshape": {"shape": _Option(list)},
}


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="none")


def _mse(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    return (model(inputs) - targets).square().flatten(1).mean(1)


LOSSES: dict[str, PerRecord] = {"cross_entropy": _cross_entropy, "mse": _mse}
MEASUREMENTS: dict[str, PerRecord] = {"cross_entropy": _cross_entropy, "mse": _mse}


def architecture(
    description: Mapping[str, Any], *, caps: Caps | None = None, pointer: str = ""
) -> Callable[[], nn.Module]:
    """Check a description and give the `build` of a Task.

    Raises:
        EngineError: with the path of what is wrong, before anything of the model is allocated.
    """
    caps = caps or Caps()
    _only(description, {"kind", "layers"}, pointer)
    if description.get("kind") != "sequential":
        raise EngineError(f'{description.get("kind")!r}: the known kind is "sequential"', pointer=f"{pointer}/kind")
    layers = description.get("layers")
    if not isinstance(layers, list) or not layers:
        raise EngineError("must be a list of layers, not empty", pointer=f"{pointer}/layers")
    if len(layers) > caps.layers:
        raise EngineError(f"{len(layers)} layers; at most {caps.layers} are allowed", pointer=f"{pointer}/layers")
    checked: list[tuple[str, dict[str, Any]]] = []
    total = 0
    for number, layer in enumerate(layers):
        here = f"{pointer}/layers/{number}"
        name = layer.get("type") if isinstance(layer, dict) else None
        if not isinstance(name, str) or name not in LAYERS:
            raise EngineError(f"{name!r} is none of {sorted(LAYERS)}", pointer=f"{here}/type")
        # The parameters are counted first: "too many" is a better answer than "too wide".
        total += _parameters(name, layer)
        if total > caps.parameters:
            raise EngineError(
                f"this {name} layer brings the model to {total:,} parameters; at most {caps.parameters:,} are allowed",
                pointer=here,
            )
        checked.append((name, _options(layer, LAYERS[name][1], caps, here)))

    def build() -> nn.Module:
        return nn.Sequential(*(LAYERS[name][0](**options) for name, options in checked))

    with torch.device("meta"):
        counted = sum(p.numel() for p in build().parameters())
    if counted > caps.parameters:
        raise EngineError(
            f"{counted:,} parameters; at most {caps.parameters:,} are allowed", pointer=f"{pointer}/layers"
        )
    if counted == 0:
        raise EngineError("no layer has parameters; there is nothing to train", pointer=f"{pointer}/layers")
    return build


def check_shapes(build: Callable[[], nn.Module], example: Tensor, *, pointer: str = "/layers") -> tuple[int, ...]:
    """Run the model on the meta device: the output's shape for one record, or the first layer that does not fit."""
    with torch.device("meta"):
        model = build()
    x = torch.empty(example.shape, dtype=example.dtype, device="meta")
    assert isinstance(model, nn.Sequential)
    for number, layer in enumerate(model):
        try:
            x = layer(x)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise EngineError(
                f"does not fit its input {tuple(x.shape)}: {reason}", pointer=f"{pointer}/{number}"
            ) from error
    return tuple(x.shape)


def transform(steps: Sequence[Mapping[str, Any]], *, pointer: str = "") -> Callable[[Tensor], Tensor]:
    """A feature transform: listed steps, in order, on tensors with leading dimension B; integers become float32."""
    checked: list[tuple[str, dict[str, Any]]] = []
    if not isinstance(steps, list | tuple) or len(steps) > 8:
        raise EngineError("must be a list of at most 8 steps", pointer=pointer)
    for number, step in enumerate(steps):
        here = f"{pointer}/{number}"
        name = step.get("type") if isinstance(step, Mapping) else None
        if not isinstance(name, str) or name not in TRANSFORMS:
            raise EngineError(f"{name!r} is none of {sorted(TRANSFORMS)}", pointer=f"{here}/type")
        options = _options(step, TRANSFORMS[name], Caps(), here)
        for key in ("mean", "std", "shape"):
            if key in options:
                options[key] = _numbers(options[key], f"{here}/{key}", whole=key == "shape", positive=key != "mean")
        checked.append((name, options))

    def apply(x: Tensor) -> Tensor:
        x = x if x.is_floating_point() else x.float()
        for name, options in checked:
            if name == "scale":
                x = x / options["divide_by"]
            elif name == "standardize":
                x = (x - torch.tensor(options["mean"], dtype=x.dtype)) / torch.tensor(options["std"], dtype=x.dtype)
            elif name == "flatten":
                x = x.flatten(1)
            else:
                x = x.reshape(len(x), *options["shape"])
        return x

    return apply


def loss(name: str, *, pointer: str = "/loss") -> PerRecord:
    return _listed(LOSSES, name, pointer)


def measurement(name: str, *, pointer: str = "/measurement") -> PerRecord:
    return _listed(MEASUREMENTS, name, pointer)


def load_state(path: Path | str, expected: Mapping[str, Tensor], *, pointer: str = "") -> dict[str, Tensor]:
    """Read a safetensors file whose names, shapes and dtypes must be `expected`'s (tensors on any device, meta too).

    Raises:
        EngineError: not safetensors, or a tensor missing, unknown, of another shape or dtype, or not finite.
    """
    path = Path(path)
    _check_magic(path, pointer)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise EngineError(f"{path.name} is not a readable safetensors file: {error}", pointer=pointer) from error
    for name in [*expected, *tensors]:
        here = f"{pointer}/{name}"
        if name not in tensors:
            raise EngineError(f"is missing from {path.name}", pointer=here)
        if name not in expected:
            raise EngineError(f"is in {path.name} but not in the model", pointer=here)
        found, wanted = tensors[name], expected[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise EngineError(
                f"is {found.dtype} {tuple(found.shape)}, the model has {wanted.dtype} {tuple(wanted.shape)}",
                pointer=here,
            )
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise EngineError("holds NaN or infinity", pointer=here)
    return tensors


def _check_magic(path: Path, pointer: str) -> None:
    """Name the usual impostors: a pickle and a zip (torch.save) announce themselves in their first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise EngineError(f"{path.name} cannot be read: {error.strerror}", pointer=pointer) from error
    if head[:2] == b"PK" or head[:1] == b"\x80":
        raise EngineError(
            f"{path.name} is a pickle, whatever its name says; a pickle can run code and is never read. Save it again with "
            "safetensors.torch.save_file",
            pointer=pointer,
        )
    if len(head) < 9 or int.from_bytes(head[:8], "little") > SAFETENSORS_HEADER_LIMIT or head[8:9] != b"{":
        raise EngineError(f"{path.name} is not a safetensors file", pointer=pointer)


def _parameters(name: str, layer: Mapping[str, Any]) -> int:
    """What a layer adds, from its numbers alone; nonsense counts as nothing here and is refused by its option."""

    def size(key: str) -> int:
        value = layer.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

    if name == "linear":
        return size("in_features") * size("out_features")
    if name == "conv2d":
        return size("in_channels") * size("out_channels") * size("kernel_size") ** 2
    if name == "embedding":
        return size("num_embeddings") * size("embedding_dim")
    return 0


def _options(given: Mapping[str, Any], allowed: Mapping[str, _Option], caps: Caps, pointer: str) -> dict[str, Any]:
    _only(given, {"type", *allowed}, pointer)
    options = {}
    for name, option in allowed.items():
        here = f"{pointer}/{name}"
        if name not in given:
            if option.default is ...:
                raise EngineError("is missing", pointer=here)
            options[name] = option.default
            continue
        value = given[name]
        kinds = (int, float) if option.kind is float else option.kind
        if not isinstance(value, kinds) or (isinstance(value, bool) and option.kind is not bool):
            raise EngineError(f"{value!r} is not of type {option.kind.__name__}", pointer=here)
        high = getattr(caps, option.cap) if option.cap else option.high
        if isinstance(value, int | float) and not isinstance(value, bool) and not option.low <= value <= high:
            raise EngineError(f"{value!r} is not between {option.low:g} and {high:g}", pointer=here)
        options[name] = value
    return options


def _numbers(values: list[Any], pointer: str, *, whole: bool, positive: bool) -> list[Any]:
    if not 1 <= len(values) <= 65_536:
        raise EngineError(f"must hold 1 to 65,536 numbers, holds {len(values)}", pointer=pointer)
    for number, value in enumerate(values):
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not right or not math.isfinite(value) or (positive and value <= 0):
            kind = "a whole number above 0" if whole else "a number above 0" if positive else "a finite number"
            raise EngineError(f"{value!r} is not {kind}", pointer=f"{pointer}/{number}")
    return values


def _only(given: Any, allowed: set[str], pointer: str) -> None:
    if not isinstance(given, Mapping):
        raise EngineError(f"must be an object, is {type(given).__name__}", pointer=pointer)
    for name in given:
        if name not in allowed:
            raise EngineError(f"is unknown here; allowed: {sorted(allowed)}", pointer=f"{pointer}/{name}")


def _listed(known: Mapping[str, PerRecord], name: object, pointer: str) -> PerRecord:
    if not isinstance(name, str) or name not in known:
        raise EngineError(f"{name!r} is none of {sorted(known)}", pointer=pointer)
    return known[name]
