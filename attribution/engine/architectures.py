"""Model descriptions that a server may build: JSON in, modules out, from allow-lists and nothing else.

    {"kind": "sequential", "layers": [{"kind": "linear", "in_features": 64, "out_features": 32}, {"kind": "gelu"}, …]}

A layer's options are torch's own, by torch's names. A description is counted on the meta device, which holds shapes and no
numbers, before anything is built. Likewise the allow-lists of feature transforms, losses and measurements.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from attribution.engine.errors import EngineError
from attribution.engine.task import Batch, PerRecord

MAX_PARAMETERS = 50_000_000
MAX_LAYERS = 64
MAX_WIDTH = 1_000_000  # of any one size in a description: a vocabulary, a layer's width
MAX_ACTIVATIONS = 200_000_000  # numbers that all layers put out together, over a batch
MAX_STATE_BYTES = 4_000_000_000

Description = Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """What a layer may be told: option → (type, whether it must be given)."""

    make: Callable[..., nn.Module]
    options: Mapping[str, tuple[type, bool]]


SIZE = (int, True)
LAYERS: dict[str, Layer] = {
    "linear": Layer(nn.Linear, {"in_features": SIZE, "out_features": SIZE, "bias": (bool, False)}),
    "conv2d": Layer(
        nn.Conv2d,
        {
            "in_channels": SIZE,
            "out_channels": SIZE,
            "kernel_size": SIZE,
            "stride": (int, False),
            "padding": (int, False),
            "groups": (int, False),
            "bias": (bool, False),
        },
    ),
    "embedding": Layer(nn.Embedding, {"num_embeddings": SIZE, "embedding_dim": SIZE}),
    "layer_norm": Layer(nn.LayerNorm, {"normalized_shape": SIZE, "eps": (float, False), "bias": (bool, False)}),
    "relu": Layer(nn.ReLU, {}),
    "gelu": Layer(nn.GELU, {}),
    "tanh": Layer(nn.Tanh, {}),
    "flatten": Layer(nn.Flatten, {}),
    "unflatten": Layer(lambda shape: nn.Unflatten(1, tuple(shape)), {"shape": (list, True)}),
    "dropout": Layer(nn.Dropout, {"p": (float, False)}),
    "max_pool2d": Layer(nn.MaxPool2d, {"kernel_size": SIZE, "stride": (int, False), "padding": (int, False)}),
    "avg_pool2d": Layer(nn.AvgPool2d, {"kernel_size": SIZE, "stride": (int, False), "padding": (int, False)}),
}


def builder(description: Description, *, max_parameters: int = MAX_PARAMETERS) -> Callable[[], nn.Module]:
    """A function that builds the described model, untrained; checked and counted now, built when called.

    Raises:
        EngineError: a kind or option that is not allowed, a size out of range, too many layers or parameters; the pointer
            names the place, relative to the description.
    """
    layers = _layers(description)
    with torch.device("meta"):
        total = 0
        for index, (kind, options) in enumerate(layers):
            # The product of a layer's sizes bounds its parameters; asking torch first could overflow even without memory.
            largest = math.prod(value for value in options.values() if isinstance(value, int) and value > 1)
            if largest > 1_000 * max_parameters:
                raise _too_many(largest, max_parameters, index, kind)
            total += sum(parameter.numel() for parameter in _build(index, kind, options).parameters())
            if total > max_parameters:
                raise _too_many(total, max_parameters, index, kind)

    def build() -> nn.Module:
        return nn.Sequential(*(_build(index, kind, options) for index, (kind, options) in enumerate(layers)))

    return build


def count_parameters(description: Description) -> int:
    """How many parameters the described model has; nothing is built.

    Raises:
        EngineError: see `builder`.
    """
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in builder(description)().parameters())


def check_activations(build: Callable[[], nn.Module], shape: Sequence[int], *, batch: int) -> None:
    """Refuse a model whose layers put out more for a batch than fits; shapes alone, on the meta device.

    Args:
        shape: of one record, as the model takes it.
        batch: records that a step sees.

    Raises:
        EngineError: a layer does not take what the one before it gives, or the sum is too large.
    """
    total = 0
    with torch.device("meta"), torch.no_grad():
        passed = torch.empty(1, *shape)
        for index, layer in enumerate(build().eval().children()):
            try:
                passed = layer(passed)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                raise EngineError(f"does not take what comes to it: {error}", pointer=f"/layers/{index}") from error
            total += passed.numel() * batch
            if total > MAX_ACTIVATIONS:
                raise EngineError(
                    f"up to this layer the model puts out {total:.1e} numbers for a batch of {batch}; at most "
                    f"{MAX_ACTIVATIONS:,} can be replayed",
                    pointer=f"/layers/{index}",
                )


def _layers(description: Description) -> list[tuple[str, dict[str, Any]]]:
    if not isinstance(description, Mapping) or description.get("kind") != "sequential":
        kind = description.get("kind") if isinstance(description, Mapping) else description
        raise EngineError(f"architecture {kind!r} is not allowed; use 'sequential'", pointer="/kind")
    if unknown := sorted(set(description) - {"kind", "layers"}):
        raise EngineError(f"unknown option {unknown[0]!r}; 'sequential' takes layers", pointer=f"/{unknown[0]}")
    layers = description.get("layers")
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not 1 <= len(layers) <= MAX_LAYERS:
        raise EngineError(f"give a list of 1 to {MAX_LAYERS} layers", pointer="/layers")
    return [_layer(index, layer) for index, layer in enumerate(layers)]


def _layer(index: int, layer: Any) -> tuple[str, dict[str, Any]]:
    pointer = f"/layers/{index}"
    kind = layer.get("kind") if isinstance(layer, Mapping) else None
    if kind not in LAYERS:
        raise EngineError(f"layer {kind!r} is not allowed; use one of {', '.join(LAYERS)}", pointer=f"{pointer}/kind")
    given = {name: value for name, value in layer.items() if name != "kind"}
    allowed = LAYERS[kind].options
    if unknown := sorted(set(given) - set(allowed)):
        takes = ", ".join(allowed) or "no options"
        raise EngineError(f"unknown option of {kind}; it takes {takes}", pointer=f"{pointer}/{unknown[0]}")
    for name, (wanted, is_needed) in allowed.items():
        if name not in given:
            if is_needed:
                raise EngineError(f"{kind} needs it", pointer=f"{pointer}/{name}")
            continue
        given[name] = _value(given[name], wanted, f"{pointer}/{name}")
    return kind, given


def _value(value: Any, wanted: type, pointer: str) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise EngineError(f"must be {wanted.__name__}, not {value!r}", pointer=pointer)
    sizes: Any = value if wanted is list else [value] if wanted is int else []
    lowest = 0 if pointer.endswith("/padding") else 1
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or not lowest <= size <= MAX_WIDTH:
            raise EngineError(f"must be a whole number from {lowest} to {MAX_WIDTH:,}, not {size!r}", pointer=pointer)
    if isinstance(value, float) and not (math.isfinite(value) and 0 <= value < 1):
        raise EngineError(f"must be from 0 up to, not including, 1, not {value!r}", pointer=pointer)
    return value


def _build(index: int, kind: str, options: Mapping[str, Any]) -> nn.Module:
    try:
        return LAYERS[kind].make(**options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise EngineError(f"torch refuses it: {error}", pointer=f"/layers/{index}") from error


def _too_many(found: int, limit: int, index: int, kind: str) -> EngineError:
    return EngineError(
        f"with this layer ({kind}) the model has {found:.1e} parameters or more; at most {limit:,} can be replayed",
        pointer=f"/layers/{index}",
    )


# --- feature transforms: list of steps, applied in order to (n, …) float64 content


def transform(steps: Sequence[Mapping[str, Any]], content: Tensor) -> Tensor:
    """Content as the model takes it.

    Args:
        steps: each {"kind": "scale", "divide_by": 16} or {"kind": "standardize", "mean": m, "std": s} with numbers, or
            lists of one number per column.
        content: (n, length) float64.

    Returns:
        (n, length) float32.

    Raises:
        EngineError: a step that is not allowed; the pointer is relative to the list.
    """
    for index, step in enumerate(steps):
        content = _transformed(step, content, f"/{index}")
    if not torch.isfinite(content).all():
        raise EngineError("the transformed features hold a number that is not finite", pointer="")
    return content.float()


def _transformed(step: Mapping[str, Any], content: Tensor, pointer: str) -> Tensor:
    kind = step.get("kind")
    wanted = {"scale": {"divide_by"}, "standardize": {"mean", "std"}}.get(str(kind))
    if wanted is None:
        raise EngineError(f"transform {kind!r} is not allowed; use scale or standardize", pointer=f"{pointer}/kind")
    if set(step) != wanted | {"kind"}:
        raise EngineError(f"{kind} takes exactly {', '.join(sorted(wanted))}", pointer=pointer)
    if kind == "scale":
        return content / _numbers(step["divide_by"], content, f"{pointer}/divide_by", is_divisor=True)
    mean = _numbers(step["mean"], content, f"{pointer}/mean")
    return (content - mean) / _numbers(step["std"], content, f"{pointer}/std", is_divisor=True)


def _numbers(value: Any, content: Tensor, pointer: str, *, is_divisor: bool = False) -> Tensor:
    """One number for all columns, or one per column."""
    given = value if isinstance(value, list) else [value]
    if len(given) not in (1, content.shape[1]) or any(
        isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x) for x in given
    ):
        raise EngineError(f"give one finite number, or {content.shape[1]} of them", pointer=pointer)
    if is_divisor and 0 in given:
        raise EngineError("cannot divide by 0", pointer=pointer)
    return torch.tensor(given, dtype=torch.float64)


# --- losses and measurements: (model, batch) -> (B,); a batch is (features, class index)


def _cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    features, target = batch
    return functional.cross_entropy(model(features), target, reduction="none")


def _squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over outputs of (output − one-hot target)²: the Brier score without the softmax."""
    features, target = batch
    output = model(features)
    # functional.one_hot looks at the values, which vmap over records does not allow.
    one_hot = target[:, None] == torch.arange(output.shape[1])
    return (output - one_hot.to(output)).square().mean(1)


PER_RECORD: dict[str, PerRecord] = {"cross_entropy": _cross_entropy, "squared_error": _squared_error}


def per_record(name: str, *, pointer: str = "") -> PerRecord:
    """The loss or measurement of that name, (model, batch) -> (B,), in nats or squared units; lower is better.

    Raises:
        EngineError: the name is not on the list.
    """
    if name not in PER_RECORD:
        raise EngineError(f"{name!r} is not allowed; use one of {', '.join(PER_RECORD)}", pointer=pointer)
    return PER_RECORD[name]


# --- states


def load_state(path: Path, *, expected: Mapping[str, Tensor] | None = None, pointer: str = "") -> dict[str, Tensor]:
    """Read a safetensors file, which can hold numbers and nothing that runs.

    Args:
        path: the file.
        expected: names, shapes and dtypes that it must have, neither more nor fewer; None takes any.

    Raises:
        EngineError: it is no safetensors file (a pickle by another name is one such), or its tensors are not the expected.
    """
    if path.stat().st_size > MAX_STATE_BYTES:
        raise EngineError(f"has {path.stat().st_size:,} bytes; at most {MAX_STATE_BYTES:,} are read", pointer=pointer)
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise EngineError(
            f"is not a safetensors file ({error}); save it with safetensors.torch.save_file", pointer=pointer
        ) from error
    if expected is None:
        return found
    for name, tensor in expected.items():
        if name not in found:
            raise EngineError(f"lacks the tensor {name!r}; it has {', '.join(sorted(found)[:10])}", pointer=pointer)
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise EngineError(
                f"{name!r} is {tuple(found[name].shape)} {found[name].dtype}, "
                f"the model has {tuple(tensor.shape)} {tensor.dtype}",
                pointer=pointer,
            )
    if extra := sorted(set(found) - set(expected)):
        raise EngineError(f"has the tensor {extra[0]!r}, which the model does not", pointer=pointer)
    return found
