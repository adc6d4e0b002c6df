"""An accelerator where there is none: tensors that say they are on `card:0`, compute on the CPU, and refuse to meet a CPU tensor.

What torch allows is allowed: CPU numbers without dimensions, CPU indices, copies from one device to the other. Everything else that mixes
devices raises, as it would on a real card. Random numbers drawn "on the card" come from another generator than the CPU's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CPU = torch.device("cpu")
_setup_privateuseone_for_python_backend("card")  # once in a process; torch then knows the name
CARD = torch.device("card:0")
_slot: list[torch.device] = []  # what is inserted now; torch asks, and would use it unasked
setattr(torch.card, "is_available", lambda: bool(_slot))  # type: ignore[attr-defined]  # noqa: B010
INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
COPIES = {torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten._copy_from}


class MixedDevices(AssertionError):
    """A CPU tensor and one of the card in one operation."""


class OnCard(Tensor):
    """A tensor of the fake card; `held` is where its numbers are."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnCard":
        card = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=CARD
        )
        card.held = held
        return card

    def __repr__(self) -> str:
        return f"OnCard({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class _Factories(TorchDispatchMode):
    """Tensors made on the card from none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_GENERATOR = torch.Generator()


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    packet = func.overloadpacket
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_card = [t for t in tensors if isinstance(t, OnCard)]
    asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    goes_to_card = asked.type == "card" if asked else bool(on_card)
    if not on_card and not goes_to_card:
        return func(*args, **kwargs)
    strangers = [t for t in tensors if not isinstance(t, OnCard) and t.ndim]
    if packet in INDEXED:
        strangers = [t for t in strangers if t is args[0] or (len(args) > 2 and t is args[2])]
        strangers = strangers if on_card and isinstance(args[0], OnCard) else on_card
    if strangers and on_card and packet not in COPIES:
        raise MixedDevices(f"{func}: {[(tuple(t.shape), t.device.type) for t in tensors]}")

    there, known = (tree_map(lambda t: t.held if isinstance(t, OnCard) else t, part) for part in (args, kwargs))
    if asked:
        known = known | {"device": CPU}
    if torch.Tag.nondeterministic_seeded in func.tags and goes_to_card:
        with torch.random.fork_rng(devices=[]):
            torch.random.set_rng_state(_GENERATOR.get_state())
            found = func(*there, **known)
            _GENERATOR.set_state(torch.random.get_rng_state())
    else:
        found = func(*there, **known)
    if packet is torch.ops.aten.copy_:
        return args[0]
    for given in on_card:
        if (
            found is given.held
        ):  # in place, or left where it is: the same object comes back; otherwise it is brought here
            return given if goes_to_card else found.clone()
    if packet in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal):
        return found
    return tree_map(lambda t: OnCard(t) if isinstance(t, Tensor) and goes_to_card else t, found)


@contextmanager
def inserted() -> Iterator[torch.device]:
    """While it lasts tensors can be made on the card."""
    _GENERATOR.manual_seed(12345)
    _slot.append(CARD)
    try:
        with _Factories():
            yield CARD
    finally:
        _slot.pop()
