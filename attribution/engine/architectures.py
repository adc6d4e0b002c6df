"""Model descriptions that a server may build: JSON in, modules out, from allow-lists and nothing else.

    {"kind": "sequential", "layers": [{"kind": "linear", "in_features": 64, "out_features": 32}, {"kind": "gelu"}, …]}
    {"kind": "gpt", "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}

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
from attribution.engine.text import GPT, VOCABULARY, MeanEmbedding, byte_tokens, hashed_ngrams, next_byte

MAX_PARAMETERS = 50_000_000
MAX_LAYERS = 64
MAX_WIDTH = 1_000_000  # of any one size in a description: a vocabulary, a layer's width
MAX_ACTIVATIONS = 200_000_000  # numbers that all layers put out together, over a batch
MAX_STATE_BYTES = 4_000_000_000
MAX_FEATURES = 100_000_000  # numbers that all records' texts become together

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
    "mean_embedding": Layer(
        MeanEmbedding, {"num_embeddings": SIZE, "embedding_dim": SIZE, "padding_idx": (int, False)}
    ),
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

GPT_OPTIONS: Mapping[str, tuple[type, bool]] = {
    "n_positions": SIZE,
    "n_embd": SIZE,
    "n_layer": SIZE,
    "n_head": SIZE,
    "dropout": (float, False),
}
KINDS = ("sequential", "gpt")


def builder(description: Description, *, max_parameters: int = MAX_PARAMETERS) -> Callable[[], nn.Module]:
    """A function that builds the described model, untrained; checked and counted now, built when called.

    Raises:
        EngineError: a kind or option that is not allowed, a size out of range, too many layers or parameters; the pointer
            names the place, relative to the description.
    """
    if _kind(description) == "gpt":
        return _gpt_builder(description, max_parameters)
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


def check_activations(
    build: Callable[[], nn.Module], shape: Sequence[int], *, batch: int, dtype: torch.dtype = torch.float32
) -> None:
    """Refuse a model whose layers put out more for a batch than fits; shapes alone, on the meta device.

    Args:
        shape: of one record, as the model takes it.
        batch: records that a step sees.
        dtype: of the records; int64 for tokens.

    Raises:
        EngineError: a layer does not take what the one before it gives, or the sum is too large.
    """
    total = 0
    with torch.device("meta"), torch.no_grad():
        model, passed = build().eval(), torch.empty(1, *shape, dtype=dtype)
        is_chain = isinstance(model, nn.Sequential)
        for index, part in enumerate(model.children() if is_chain else [model]):
            pointer = f"/layers/{index}" if is_chain else ""
            put_out: list[int] = []  # by every layer inside this one, or by itself
            for inner in part.modules():
                if next(inner.children(), None) is None:
                    inner.register_forward_hook(lambda _, __, out, put_out=put_out: put_out.append(out.numel()))
            try:
                passed = part(passed)
            except (RuntimeError, IndexError, TypeError, ValueError) as error:
                raise EngineError(f"does not take what comes to it: {error}", pointer=pointer) from error
            total += sum(put_out) * batch
            if total > MAX_ACTIVATIONS:
                raise EngineError(
                    f"up to this layer the model puts out {total:.1e} numbers for a batch of {batch}; at most "
                    f"{MAX_ACTIVATIONS:,} can be replayed",
                    pointer=pointer,
                )


def check_tokens(description: Description, steps: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a model whose embedding lacks a token that the transform can give: the first records need not show it.

    Raises:
        EngineError: with a pointer relative to the description.
    """
    if not steps or steps[0].get("kind") != "bytes":
        return
    if description.get("kind") == "gpt":
        if description["n_positions"] < steps[0]["length"]:
            raise EngineError(
                f"the model has {description['n_positions']} positions, the transform gives {steps[0]['length']} bytes",
                pointer="/n_positions",
            )
        return
    first = description["layers"][0]
    if first["kind"] not in ("embedding", "mean_embedding"):
        raise EngineError("bytes are numbers of tokens; begin with embedding or mean_embedding", pointer="/layers/0")
    if first["num_embeddings"] < VOCABULARY:
        raise EngineError(
            f"bytes and the padding are {VOCABULARY} tokens; give at least that many",
            pointer="/layers/0/num_embeddings",
        )


def _kind(description: Any) -> str:
    kind = description.get("kind") if isinstance(description, Mapping) else description
    if kind not in KINDS:
        raise EngineError(f"architecture {kind!r} is not allowed; use {' or '.join(KINDS)}", pointer="/kind")
    return str(kind)


def _gpt_builder(description: Description, max_parameters: int) -> Callable[[], nn.Module]:
    given = {name: value for name, value in description.items() if name != "kind"}
    options = _options("gpt", given, GPT_OPTIONS, "")
    if options["n_layer"] > MAX_LAYERS:
        raise EngineError(f"at most {MAX_LAYERS} layers", pointer="/n_layer")
    if options["n_embd"] % options["n_head"]:
        raise EngineError(f"must divide n_embd, {options['n_embd']}", pointer="/n_head")
    least = 12 * options["n_layer"] * options["n_embd"] ** 2 + options["n_positions"] * options["n_embd"]
    if least <= max_parameters:  # else even its description could be too large to make
        with torch.device("meta"):
            least = sum(parameter.numel() for parameter in GPT(**options).parameters())
    if least > max_parameters:
        raise EngineError(
            f"the model has {least:.1e} parameters or more; at most {max_parameters:,} can be replayed", pointer=""
        )
    return lambda: GPT(**options)


def _layers(description: Description) -> list[tuple[str, dict[str, Any]]]:
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
    return kind, _options(kind, given, LAYERS[kind].options, pointer)


def _options(
    kind: str, given: dict[str, Any], allowed: Mapping[str, tuple[type, bool]], pointer: str
) -> dict[str, Any]:
    if unknown := sorted(set(given) - set(allowed)):
        takes = ", ".join(allowed) or "no options"
        raise EngineError(f"unknown option of {kind}; it takes {takes}", pointer=f"{pointer}/{unknown[0]}")
    for name, (wanted, is_needed) in allowed.items():
        if name not in given:
            if is_needed:
                raise EngineError(f"{kind} needs it", pointer=f"{pointer}/{name}")
            continue
        given[name] = _value(given[name], wanted, f"{pointer}/{name}")
    return given


def _value(value: Any, wanted: type, pointer: str) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise EngineError(f"must be {wanted.__name__}, not {value!r}", pointer=pointer)
    sizes: Any = value if wanted is list else [value] if wanted is int else []
    lowest = 0 if pointer.endswith(("/padding", "/padding_idx")) else 1
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


# --- feature transforms: list of steps, applied in order to (n, …) float64 content, or to texts


#: What makes numbers of a text, and between which bounds; it comes first, and only for texts.
TEXT_STEPS: dict[str, dict[str, tuple[int, int]]] = {
    "bytes": {"length": (1, 4_096)},
    "hashed_ngrams": {"shortest": (1, 8), "longest": (1, 8), "buckets": (16, 65_536)},
}


def transform(steps: Sequence[Mapping[str, Any]], content: Tensor | Sequence[str]) -> Tensor:
    """Content as the model takes it.

    Args:
        steps: each {"kind": "scale", "divide_by": 16} or {"kind": "standardize", "mean": m, "std": s} with numbers, or
            lists of one number per column. Of texts the first one is {"kind": "bytes", "length": 64}, the only one, or
            {"kind": "hashed_ngrams", "shortest": 1, "longest": 4, "buckets": 2048}.
        content: (n, length) float64, or n texts.

    Returns:
        (n, length) float32; of bytes int64.

    Raises:
        EngineError: a step that is not allowed; the pointer is relative to the list.
    """
    first = 0
    if not isinstance(content, Tensor):
        check_features(steps, len(content))
        options = {name: value for name, value in steps[0].items() if name != "kind"}
        if steps[0]["kind"] == "bytes":
            return byte_tokens(content, **options)
        content, first = hashed_ngrams(content, **options), 1
    for index, step in enumerate(steps[first:], first):
        content = _transformed(step, content, f"/{index}")
    if not torch.isfinite(content).all():
        raise EngineError("the transformed features hold a number that is not finite", pointer="")
    return content.float()


def check_features(steps: Sequence[Mapping[str, Any]], n_records: int) -> None:
    """Refuse, before a text is read, steps that make no numbers of texts, or too many.

    Raises:
        EngineError: the pointer is relative to the list.
    """
    kind = str(steps[0].get("kind")) if steps else "none"
    if kind not in TEXT_STEPS:
        raise EngineError(
            f"of texts, transform {kind!r} makes no numbers; begin with {' or '.join(TEXT_STEPS)}",
            pointer="/0/kind" if steps else "",
        )
    options, bounds = {name: value for name, value in steps[0].items() if name != "kind"}, TEXT_STEPS[kind]
    if set(options) != set(bounds):
        raise EngineError(f"{kind} takes exactly {', '.join(bounds)}", pointer="/0")
    for name, (low, high) in bounds.items():
        value = options[name]
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise EngineError(f"must be a whole number from {low} to {high:,}, not {value!r}", pointer=f"/0/{name}")
    if kind == "hashed_ngrams" and options["longest"] < options["shortest"]:
        raise EngineError(f"is below shortest, {options['shortest']}", pointer="/0/longest")
    if kind == "bytes" and len(steps) > 1:
        raise EngineError("tokens are numbers of an embedding and cannot be scaled; bytes stands alone", pointer="/1")
    widest = "length" if kind == "bytes" else "buckets"
    if n_records * options[widest] > MAX_FEATURES:
        raise EngineError(
            f"{n_records:,} records of {options[widest]:,} numbers are more than {MAX_FEATURES:,}; give at most "
            f"{MAX_FEATURES // n_records:,}, or cite less",
            pointer=f"/0/{widest}",
        )


def _transformed(step: Mapping[str, Any], content: Tensor, pointer: str) -> Tensor:
    kind = step.get("kind")
    if kind in TEXT_STEPS:
        raise EngineError(f"{kind} takes texts, and comes first", pointer=f"{pointer}/kind")
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


# --- losses and measurements: (model, batch) -> (B,); a batch is (features, class index), or (tokens,)


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


PER_RECORD: dict[str, PerRecord] = {
    "cross_entropy": _cross_entropy,
    "squared_error": _squared_error,
    "next_byte": next_byte,
}


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
