"""What an attribution is about: a model, its records, its queries and the recipe that trained it.

Everything is checked on construction, so that a mistake is found before the first hour of compute, not after it.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from attribution.engine.devices import PRECISIONS
from attribution.engine.errors import EngineError

Batch = tuple[Tensor, ...]
PerRecord = Callable[[nn.Module, Batch], Tensor]

DEFAULTS: dict[str, dict[str, Any]] = {  # torch's own names and defaults
    "sgd": {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
    "adam": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
}


class Records(Protocol):
    """`len(records)` and `records[int64 tensor]` -> a tuple of tensors with leading dimension B."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Batch: ...


class TensorRecords:
    """Records held in memory: parallel tensors that share their first dimension."""

    def __init__(self, *tensors: Tensor) -> None:
        if not tensors or len({len(tensor) for tensor in tensors}) != 1:
            raise EngineError(f"tensors of one length are needed, got {[len(t) for t in tensors]}", pointer="/records")
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: Tensor, /) -> Batch:
        return tuple(tensor[index] for tensor in self.tensors)


def epoch_order(n_records: int, batch: int, epochs: int, seed: int) -> Tensor:
    """Which records each step sees, by a rule that anyone can recompute.

    Epoch `e` is `torch.randperm(n_records)` from a CPU generator seeded with the first 8 bytes, big-endian, of
    SHA-256(f"order:{seed}:{e}"), cut into rows of `batch`; its last row is filled up with -1.

    Returns:
        (epochs · ceil(n_records / batch), batch) int64.
    """
    if n_records < 1 or batch < 1 or epochs < 1:
        raise EngineError(f"all must be at least 1: n_records {n_records}, batch {batch}, epochs {epochs}")
    rows = -(-n_records // batch)
    order = torch.full((epochs, rows * batch), -1, dtype=torch.int64)
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed_of("order", seed, epoch))
        order[epoch, :n_records] = torch.randperm(n_records, generator=generator)
    return order.reshape(epochs * rows, batch)


def without_copies(order: Tensor, copy_of: Tensor) -> Tensor:
    """The order, (n_step, batch) int64, with the slots of copies left empty: training sees each class of copies once an epoch.

    Empty slots are -1 and stay where they are, so the draw of `epoch_order` is the same whoever uploads copies of what.

    Args:
        copy_of: (n_train,) the record that stands for each record's class, as `Task.copy_of`.
    """
    is_copy = copy_of != torch.arange(len(copy_of))
    return torch.where((order >= 0) & is_copy[order.clamp_min(0)], -1, order)


def initial_state_from_seed(build: Callable[[], nn.Module], seed: int) -> dict[str, Tensor]:
    """The state that `build()` has when torch's generator is seeded with the public seed, and nothing else is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("initial", seed))
        return {name: tensor.detach().clone() for name, tensor in build().state_dict().items()}


def seed_of(*parts: object) -> int:
    """The first 8 bytes, big-endian, of SHA-256 of the parts joined by colons."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "big")


@dataclass(frozen=True, eq=False)
class Recipe:
    """How the weights came about: enough to train them again, to the bit on the same build and thread count."""

    optimizer: str
    learning_rate: float | Tensor  # or (n_step,)
    order: Tensor  # (n_step, batch) int64; -1 is an empty slot
    initial_state: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[tuple[str, Mapping[str, Any]]] = ()
    normalizer: str = "batch"
    clip_norm: float | None = None
    seed: int = 0
    order_seed: int | None = (
        None  # where stated, `verify` checks that `order` is epoch_order's by it, or without_copies of that
    )
    initial_seed: int | None = None  # where stated, that `initial_state` is initial_state_from_seed's

    def __post_init__(self) -> None:
        for name in ("order", "learning_rate"):  # they index and scale on the CPU, wherever training runs
            if isinstance(value := getattr(self, name), Tensor):
                object.__setattr__(self, name, value.cpu())
        if self.optimizer not in DEFAULTS:
            raise EngineError(f"{self.optimizer!r} is none of {sorted(DEFAULTS)}", pointer="/recipe/optimizer")
        _check_order(self.order)
        _check_rate(self.learning_rate, self.n_step, "/recipe/learning_rate")
        _check_options(self.optimizer, self.options, "/recipe/options")
        for number, group in enumerate(self.groups):
            pointer = f"/recipe/groups/{number}"
            if len(group) != 2:
                raise EngineError("a group is (regex over parameter names, overriding options)", pointer=pointer)
            try:
                re.compile(group[0])
            except re.error as error:
                raise EngineError(f"{group[0]!r} is no regular expression: {error}", pointer=f"{pointer}/0") from error
            options = dict(group[1])
            if "learning_rate" in options:
                _check_rate(options.pop("learning_rate"), self.n_step, f"{pointer}/1/learning_rate")
            _check_options(self.optimizer, {**self.options, **options}, f"{pointer}/1")
        if self.normalizer not in ("batch", "weight"):
            raise EngineError(f'{self.normalizer!r} is neither "batch" nor "weight"', pointer="/recipe/normalizer")
        if self.clip_norm is not None and not (_is_number(self.clip_norm) and self.clip_norm > 0):
            raise EngineError(f"{self.clip_norm!r} is not a positive number or None", pointer="/recipe/clip_norm")
        for name, seed in (("seed", self.seed), ("order_seed", self.order_seed), ("initial_seed", self.initial_seed)):
            if isinstance(seed, bool) or (not isinstance(seed, int) and (seed is not None or name == "seed")):
                raise EngineError(f"{seed!r} is not an integer", pointer=f"/recipe/{name}")
        for name, tensor in self.initial_state.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise EngineError(
                    "holds NaN or infinity; draw it again by initial_state_from_seed",
                    pointer=f"/recipe/initial_state/{name}",
                )

    @property
    def n_step(self) -> int:
        return self.order.shape[0]

    @property
    def batch(self) -> int:
        return self.order.shape[1]

    def options_for(self, name: str) -> tuple[dict[str, Any], list[float]]:
        """The options and the learning rate of every step for one parameter; the first matching group wins."""
        override: dict[str, Any] = next((dict(o) for regex, o in self.groups if re.search(regex, name)), {})
        rate = override.pop("learning_rate", self.learning_rate)
        rates = rate.tolist() if isinstance(rate, Tensor) else [float(rate)] * self.n_step
        return {**DEFAULTS[self.optimizer], **self.options, **override}, rates


@dataclass(frozen=True, eq=False)
class Task:
    """One trained model and the question whose data did what for it. See DESIGN §4 for the game it defines."""

    model: Callable[[], nn.Module]
    loss: PerRecord
    measurement: PerRecord
    train: Records
    queries: Records
    owner: Tensor | None = None
    groups: Mapping[str, Tensor] = field(default_factory=dict)
    copy_of: Tensor | None = None
    recipe: Recipe | None = None
    checkpoints: Sequence[tuple[int, Path | str]] = ()
    device: torch.device | str = "cpu"  # where it is computed; the tensors above may lie anywhere
    precision: str = "float32"  # or "bf16", of gradients that are only compared with each other; replays keep their own
    memory: int | None = None  # bytes for what replays and metagradients hold at once; None: what they are best with

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "device", torch.device(self.device))
        except RuntimeError as error:
            raise EngineError(f"{self.device!r} is no device, such as cpu or cuda:0", pointer="/device") from error
        if self.precision not in PRECISIONS:
            raise EngineError(f"{self.precision!r} is none of {', '.join(PRECISIONS)}", pointer="/precision")
        if self.memory is not None and self.memory < 1:
            raise EngineError(f"{self.memory} bytes hold nothing", pointer="/memory")
        for name in ("owner", "copy_of"):
            if isinstance(value := getattr(self, name), Tensor):
                object.__setattr__(self, name, value.cpu())
        object.__setattr__(self, "groups", {n: g.cpu() if isinstance(g, Tensor) else g for n, g in self.groups.items()})
        if len(self.train) == 0:
            raise EngineError("no records; an empty selection trains nothing", pointer="/train")
        if len(self.queries) == 0:
            raise EngineError("no queries; without a question no record can help", pointer="/queries")
        for pointer, records in (("/train", self.train), ("/queries", self.queries)):
            _check_records(records, pointer)
        if self.owner is not None:
            _check_partition(self.owner, self.n_train, "/owner", lowest=0)
        for name, group in self.groups.items():
            _check_partition(group, self.n_train, f"/groups/{name}", lowest=-1)
        if self.copy_of is not None:
            _check_copies(self.copy_of, self.n_train)
        module = self._module
        for name, part in module.named_modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm | nn.SyncBatchNorm) and part.training:
                raise EngineError(
                    f"{name or 'the model'} is a BatchNorm: a record of weight 0 would still act through the batch "
                    "statistics; use LayerNorm or GroupNorm, or keep it in eval mode",
                    pointer="/model",
                )
        if not any(p.requires_grad for p in module.parameters()):
            raise EngineError("no parameter requires a gradient; there is nothing to train", pointer="/model")
        if self.recipe is not None:
            self._check_recipe(self.recipe, module)
        last = -1
        for number, (step, _) in enumerate(self.checkpoints):
            limit = self.recipe.n_step if self.recipe else math.inf
            if not last < step <= limit:
                raise EngineError(
                    f"completed steps {step} must exceed the last checkpoint's and be at most {limit}",
                    pointer=f"/checkpoints/{number}/0",
                )
            last = step

    def _check_recipe(self, recipe: Recipe, module: nn.Module) -> None:
        order = recipe.order
        if int(order.max()) >= self.n_train:
            step, slot = (order >= self.n_train).nonzero()[0].tolist()
            raise EngineError(
                f"names record {int(order[step, slot])} but there are {self.n_train}: remake it by epoch_order",
                pointer=f"/recipe/order/{step}/{slot}",
            )
        expected, given = module.state_dict(), recipe.initial_state
        for name in [*expected, *given]:
            if name not in given or name not in expected:
                where = "the model lacks it" if name in given else "missing"
                raise EngineError(f"{where}; take build().state_dict()", pointer=f"/recipe/initial_state/{name}")
            if expected[name].shape != given[name].shape or expected[name].dtype != given[name].dtype:
                raise EngineError(
                    f"is {given[name].dtype} {tuple(given[name].shape)}, the model has "
                    f"{expected[name].dtype} {tuple(expected[name].shape)}",
                    pointer=f"/recipe/initial_state/{name}",
                )
        names = [name for name, _ in module.named_parameters()]
        for number, (regex, _) in enumerate(recipe.groups):
            if not any(re.search(regex, name) for name in names):
                raise EngineError(f"{regex!r} matches no parameter of {names}", pointer=f"/recipe/groups/{number}/0")

    @cached_property
    def _module(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):  # looking at a task must not move the caller's generator
            module = self.model()
        if not isinstance(module, nn.Module):
            raise EngineError(f"build() gave a {type(module).__name__}, not an nn.Module", pointer="/model")
        return module.train()

    @property
    def n_train(self) -> int:
        return len(self.train)

    @property
    def n_query(self) -> int:
        return len(self.queries)

    @property
    def representative(self) -> Tensor:
        """(n_train,) int64: the record that stands for each record's class of copies."""
        return torch.arange(self.n_train) if self.copy_of is None else self.copy_of.long()

    @property
    def owners(self) -> Tensor:
        """(n_train,) int64: `owner`, or every record its own."""
        return torch.arange(self.n_train) if self.owner is None else self.owner.long()

    def require_recipe(self) -> Recipe:
        if self.recipe is None:
            raise EngineError("this needs the recipe: order, optimizer and initial state", pointer="/recipe")
        return self.recipe

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the recipe, checkpoints, records, queries and copies: what a round of work belongs to.

        Owners and groups are left out on purpose: whoever owns a record changes no measurement. Read in passing: it holds 4,096 records at a time.
        """
        digest, recipe = hashlib.sha256(), self.recipe
        tensors = [self.representative]
        if recipe is not None:
            plain: list[Any] = [
                recipe.optimizer,
                dict(recipe.options),
                [(r, _plain(dict(o))) for r, o in recipe.groups],
            ]
            plain += [recipe.normalizer, recipe.clip_norm, recipe.seed]
            digest.update(json.dumps(plain, sort_keys=True, default=list).encode())
            rate = torch.as_tensor(recipe.learning_rate, dtype=torch.float64)
            initial = [recipe.initial_state[name] for name in sorted(recipe.initial_state)]
            tensors = [rate, recipe.order, *initial, self.representative]
        for number, (step, path) in enumerate(self.checkpoints):
            try:
                with Path(path).open("rb") as file:
                    digest.update(f"{step}:{hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
            except OSError as error:
                raise EngineError(
                    f"{path} cannot be read: {error.strerror or error}", pointer=f"/checkpoints/{number}"
                ) from error

        def add(tensor: Tensor) -> None:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

        for tensor in tensors:
            add(tensor)
        for records in (self.train, self.queries):
            for start in range(0, len(records), 4096):
                for tensor in records[torch.arange(start, min(start + 4096, len(records)))]:
                    add(tensor)
        return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.floating) and not isinstance(value, bool) and math.isfinite(value)


def _check_order(order: Tensor) -> None:
    pointer = "/recipe/order"
    if not isinstance(order, Tensor) or order.dtype != torch.int64 or order.ndim != 2 or 0 in order.shape:
        shape = (order.dtype, tuple(order.shape)) if isinstance(order, Tensor) else type(order).__name__
        raise EngineError(f"must be (n_step, batch) int64 and not empty, is {shape}", pointer=pointer)
    if int(order.min()) < -1:
        step, slot = (order < -1).nonzero()[0].tolist()
        raise EngineError(f"{int(order[step, slot])}: an empty slot is -1", pointer=f"{pointer}/{step}/{slot}")


def _check_rate(rate: object, n_step: int, pointer: str) -> None:
    if isinstance(rate, Tensor):
        if rate.shape != (n_step,):
            raise EngineError(f"has shape {tuple(rate.shape)}, the order has {n_step} steps", pointer=pointer)
        wrong = (~(torch.isfinite(rate) & (rate >= 0))).nonzero()
        if len(wrong):
            step = int(wrong[0])
            raise EngineError(f"{float(rate[step])} is not a rate of 0 or more", pointer=f"{pointer}/{step}")
    elif not _is_number(rate) or rate < 0:  # type: ignore[operator]
        raise EngineError(f"{rate!r} is not a number of 0 or more, nor a tensor (n_step,)", pointer=pointer)


def _check_options(optimizer: str, options: Mapping[str, Any], pointer: str) -> None:
    known = DEFAULTS[optimizer]
    for name, value in options.items():
        here = f"{pointer}/{name}"
        if name not in known:
            raise EngineError(f"{optimizer} takes {sorted(known)}", pointer=here)
        if name == "betas":
            if len(value) != 2 or not all(_is_number(beta) and 0 <= beta < 1 for beta in value):
                raise EngineError(f"{value!r}: two numbers in [0, 1)", pointer=here)
        elif name == "nesterov":
            if not isinstance(value, bool):
                raise EngineError(f"{value!r}: true or false", pointer=here)
        elif not _is_number(value) or value < 0:
            raise EngineError(f"{value!r}: a number of 0 or more", pointer=here)
    merged = {**known, **options}
    if merged.get("nesterov") and (merged["momentum"] <= 0 or merged["dampening"] != 0):
        raise EngineError("needs momentum above 0 and no dampening", pointer=f"{pointer}/nesterov")
    if optimizer != "sgd" and merged["eps"] <= 0:
        raise EngineError("must be above 0: a record never seen would divide 0 by 0", pointer=f"{pointer}/eps")


def _check_partition(ids: Tensor, n_train: int, pointer: str, *, lowest: int) -> None:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool or ids.shape != (n_train,):
        shape = (ids.dtype, tuple(ids.shape)) if isinstance(ids, Tensor) else type(ids).__name__
        raise EngineError(f"must be ({n_train},) integers, one id per record, is {shape}", pointer=pointer)
    wrong = (ids < lowest).nonzero()
    if len(wrong):
        raise EngineError(
            f"{int(ids[wrong[0, 0]])} is below {lowest}" + ("; -1 means nobody" if lowest else ""),
            pointer=f"{pointer}/{int(wrong[0, 0])}",
        )


def _check_copies(copy_of: Tensor, n_train: int) -> None:
    _check_partition(copy_of, n_train, "/copy_of", lowest=0)
    wrong = (copy_of >= n_train).nonzero()
    if len(wrong):
        raise EngineError(f"names record {int(copy_of[wrong[0, 0]])} of {n_train}", pointer=f"/copy_of/{int(wrong[0])}")
    chained = (copy_of[copy_of.long()] != copy_of).nonzero()
    if len(chained):
        record = int(chained[0])
        raise EngineError(
            f"record {int(copy_of[record])} is itself a copy; name its representative", pointer=f"/copy_of/{record}"
        )


def _check_records(records: Records, pointer: str) -> None:
    """The first batch shows the shape; all floats are checked where they are held as tensors."""
    batch = records[torch.arange(min(len(records), 2))]
    if not isinstance(batch, tuple) or not all(isinstance(part, Tensor) for part in batch):
        raise EngineError("records[index] must be a tuple of tensors", pointer=pointer)
    for number, part in enumerate(batch):
        if part.ndim == 0 or part.shape[0] != min(len(records), 2):
            raise EngineError(f"tensor {number} has no leading dimension of the index's length", pointer=pointer)
    if isinstance(records, TensorRecords):
        for number, tensor in enumerate(records.tensors):
            if not tensor.is_floating_point():
                continue
            wrong = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero()
            if len(wrong):
                raise EngineError(
                    "holds NaN or infinity; repair or leave out this record",
                    pointer=f"{pointer}/{int(wrong[0])}/{number}",
                )
