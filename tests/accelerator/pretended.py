"""An accelerator that is not there, so that whole runs can be tried on one on any machine.

torch lets Python be a backend (PrivateUse1). This one keeps each tensor's numbers in an ordinary CPU tensor and says of itself that it lies
on "pretend:0". So numbers are real: `.item()`, generation, aggregation, files and gRPC work, and what comes out is compared. And the device
is real to torch: an operation on tensors of two devices is refused, as CUDA does it; a backward pass runs in autograd's own thread for the
device; `.numpy()` fails; attention refuses masks that CUDA's kernels refuse. Every moment at which Python would wait for an accelerator is
counted by the line of Atoll's that causes it.

Not seen: speed, the numerics of CUDA's kernels and their determinism, bitsandbytes (its kernels know their devices by name), streams.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten

NAME = "pretend"
_COPIES = {aten.copy_, aten._to_copy}
_INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
"""Their indices may lie on the CPU: they are copied over first, and Python waits for that."""
_WAITS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2}
_FACTORIES = (
    "empty.memory_format", "empty_strided", "zeros", "ones", "full", "arange", "arange.start", "arange.start_step", "eye", "eye.m", "rand",
    "rand.generator", "randn", "randn.generator", "randint", "randperm", "linspace", "scalar_tensor", "tril_indices", "triu_indices",
)  # fmt: skip


class MixedDevices(RuntimeError):
    """An operation on tensors of two devices."""


class Ledger:
    """What the accelerator was asked to do."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        """Times that Python waited for it: "why at file:line"."""
        self._lock = threading.Lock()

    def wait(self, why: str) -> None:
        """Count one."""
        with self._lock:
            self.waits[f"{why} at {_line_of_atoll()}"] += 1


LEDGER = Ledger()


class OnDevice(torch.Tensor):
    """A tensor of the pretended accelerator; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, index: int = 0, requires_grad: bool = False) -> OnDevice:
        if isinstance(held, OnDevice):  # accelerate makes parameters anew by their class.
            made = held.detach().requires_grad_(requires_grad)
            made._is_param = True
            return made  # type: ignore[return-value]
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, layout=held.layout,
            device=torch.device(NAME, index),
        )  # fmt: skip
        made.held = held
        return made

    @property
    def data(self) -> Tensor:
        return super().data

    @data.setter
    def data(self, other: OnDevice) -> None:
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]  Its sizes; the numbers come along:
        self.held = other.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        LEDGER.wait("tolist")
        return self.held.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert a {NAME} tensor to numpy; use .cpu() first")

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            _check_attention(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():  # Else what comes to the CPU would be called a tensor of this class.
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_device(func, args, kwargs or {})


def _check_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> None:
    """As CUDA's memory-efficient kernel, the one that takes masks on most GPUs; the CPU's takes fp32 masks beside bf16 queries."""
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, query.dtype):
        raise RuntimeError("invalid dtype for bias - should match query's dtype")


def _on_device(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    packet = func.overloadpacket
    flat, spec = pytree.tree_flatten((args, kwargs))
    tensors = [one for one in flat if isinstance(one, Tensor)]
    mine = {id(one.held): one for one in tensors if isinstance(one, OnDevice)}
    asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if packet in _COPIES:
        _note_copy(*(args[1], args[0].device) if packet is aten.copy_ else (args[0], asked or args[0].device))
    else:
        _check_devices(func, tensors)
    if packet in _WAITS:
        LEDGER.wait(str(packet))
    args, kwargs = pytree.tree_unflatten([one.held if isinstance(one, OnDevice) else one for one in flat], spec)
    out = func(*args, **(kwargs if asked is None else {**kwargs, "device": torch.device("cpu")}))
    if packet is aten.copy_:
        return flat[0]
    place = asked or next(iter(mine.values())).device

    def told(one: Tensor) -> Tensor:
        return mine[id(one)] if id(one) in mine else OnDevice(one, place.index or 0) if place.type == NAME else one

    return pytree.tree_map_only(Tensor, told, out)


def _check_devices(func: Any, tensors: Sequence[Tensor]) -> None:
    away = [one for one in tensors if one.device.type != NAME and one.ndim]  # A number may come from the CPU.
    if away and func.overloadpacket in _INDEXED and all(one.dtype in (torch.int64, torch.bool) for one in away):
        LEDGER.wait("indices from the CPU")
    elif away or len({one.device for one in tensors if one.device.type == NAME}) > 1:
        found = ", ".join(f"{one.device} {tuple(one.shape)}" for one in tensors)
        raise MixedDevices(f"{func} at {_line_of_atoll()}: {found}")


def _note_copy(source: Tensor, target: torch.device) -> None:
    if source.device.type != target.type:
        LEDGER.wait("CPU to device" if target.type == NAME else "device to CPU")


def _line_of_atoll() -> str:
    """The nearest line of Atoll's but its FLOP counter's, through which everything goes in a first step."""
    frame = sys._getframe(1)
    while frame is not None:
        _, here, inside = frame.f_code.co_filename.rpartition("/src/atoll/")
        if here and inside != "cost/meters.py":
            return f"{inside}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "autograd"


class _Backend(_DummyBackendModule):
    """What torch asks of a backend's module: for checkpointing and seeds."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, *_: Any) -> None:
        torch.set_rng_state(state)


def install() -> torch.library.Library:
    """Make the accelerator known to torch, once a process; it is there as long as what this returns."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    library = torch.library.Library("aten", "IMPL")

    def factory(name: str) -> Any:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(aten, packet), overload or "default")

        def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
            return OnDevice(operator(*args, device=torch.device("cpu"), **kwargs), torch.device(device or NAME).index or 0)

        return make

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        # Of torch.tensor(..., device=...) alone, which passes by __torch_dispatch__.
        _note_copy(source, target.device)
        numbers = [one.held if isinstance(one, OnDevice) else one for one in (source, target)]
        numbers[1].copy_(numbers[0])
        return target

    for name in _FACTORIES:
        library.impl(name, factory(name), "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


@contextmanager
def as_cuda(count: int = 1) -> Iterator[None]:
    """Inside, Atoll finds accelerators, and what it sends to "cuda" comes to the pretended one.

    Atoll says "cuda" in base.load and base.part. Were there one function that names the device, this would be a patch of that.
    """
    from atoll.base import load

    def from_atoll() -> bool:
        return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("atoll.")

    def redirected(place: Any) -> Any:
        if isinstance(place, int) and not isinstance(place, bool):
            return torch.device(NAME, place)
        is_cuda = isinstance(place, str | torch.device) and str(place).partition(":")[0] == "cuda"
        return torch.device(NAME, torch.device(place).index or 0) if is_cuda else place

    class Redirecting:
        """A model class whose device map is redirected."""

        def __init__(self, found: Any) -> None:
            self._found = found

        def from_pretrained(self, *args: Any, device_map: Any = None, **kwargs: Any) -> Any:
            places = {name: redirected(place) for name, place in device_map.items()} if isinstance(device_map, Mapping) else device_map
            return self._found.from_pretrained(*args, device_map=places, **kwargs)

    kept = torch.cuda.is_available, torch.cuda.device_count, nn.Module.to, load._get_model_class
    torch.cuda.is_available = lambda: from_atoll() or kept[0]()
    torch.cuda.device_count = lambda: count if from_atoll() else kept[1]()
    nn.Module.to = lambda self, *args, **kwargs: kept[2](self, *map(redirected, args), **kwargs)  # type: ignore[method-assign]
    load._get_model_class = lambda config, mapping: Redirecting(kept[3](config, mapping))
    try:
        yield
    finally:
        torch.cuda.is_available, torch.cuda.device_count, nn.Module.to, load._get_model_class = kept  # type: ignore[method-assign]
