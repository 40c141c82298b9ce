"""What really happened, to stand beside what the formulas predicted."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import psutil

from atoll.cost.formulas import Flops

if TYPE_CHECKING:
    from torch import Tensor

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"
"""What the kernel takes as: set VmHWM back to the resident size of now. Source: man 5 proc_pid_clear_refs."""
_FUSED_ATTENTION = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention", "fused_attention_overrideable")
"""PyTorch's kernels that make Q K^T and P V in one; its counter leaves some of them out, which ones depends on its version."""


class PeakMemory:
    """The largest memory of this process between the two ends of a `with`: resident, plus what CUDA holds where it is in use.

    Where the kernel does not let a process set its peak back (another system than Linux), the figure is the peak since the start.
    """

    __slots__ = ("num_bytes",)

    def __init__(self) -> None:
        self.num_bytes = 0

    def __enter__(self) -> PeakMemory:
        _reset_resident_peak()
        cuda = _cuda()
        if cuda is not None:
            cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        cuda = _cuda()
        self.num_bytes = resident_peak_bytes() + (int(cuda.max_memory_reserved()) if cuda is not None else 0)


@dataclass(frozen=True, slots=True)
class CountedStep:
    """FLOPs of one optimizer step that were really done."""

    block_and_adapter_flops: int
    head_flops: int


@dataclass(frozen=True, slots=True)
class FirstStep:
    """The FLOPs of an edge's first step, as counted and as predicted."""

    counted: CountedStep
    formula: Flops

    def to_numbers(self) -> dict[str, int]:
        """As a flat record: "counted.head_flops", "formula.block_flops", ..."""
        counted, formula = self.counted, self.formula
        return {
            "counted.block_and_adapter_flops": counted.block_and_adapter_flops, "counted.head_flops": counted.head_flops,
            "formula.block_flops": formula.block_flops, "formula.adapter_flops": formula.adapter_flops,
            "formula.head_flops": formula.head_flops,
        }  # fmt: skip

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, int]) -> Self:
        """What `to_numbers` made.

        Raises: KeyError where something is missing.
        """
        return cls(
            CountedStep(numbers["counted.block_and_adapter_flops"], numbers["counted.head_flops"]),
            Flops(numbers["formula.block_flops"], numbers["formula.adapter_flops"], numbers["formula.head_flops"]),
        )  # fmt: skip


class CountedFlops:
    """Counts the FLOPs of this thread's torch products between the two ends of a `with`, forward and backward; no other thread's.

    `head_flops`: of `flops`, the products that read the tensor `head` or a transposed view of it. Counted as by PyTorch's own counter
    (an (n, a) by (a, b) product is 2 n a b; attention without its causal half), and beside it sums into an operand in place, and fused
    attention on every device: two products forward and five backward, the scores being made anew. Products inside a kernel that PyTorch
    does not know, such as those of quantized weights, are not seen.
    """

    __slots__ = ("_head", "_inside", "flops", "head_flops")

    def __init__(self, head: Tensor) -> None:
        self._head, self._inside = head, ExitStack()
        self.flops = self.head_flops = 0

    def __enter__(self) -> CountedFlops:
        import torch

        with ExitStack() as inside:
            # A backward pass in threads of its own would not be this thread's.
            inside.enter_context(torch.autograd.set_multithreading_enabled(False))
            inside.enter_context(_watched_products(self._add))
            self._inside = inside.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._inside.close()

    def _add(self, flops: int, operands: tuple[Any, ...]) -> None:
        self.flops += flops
        if any(self._is_head(operand) for operand in operands):
            self.head_flops += flops

    def _is_head(self, operand: Any) -> bool:
        # By place and size: what a product reads is a view, and a head that is tied to the embedding is in no other product.
        pointer = getattr(operand, "data_ptr", None)
        return pointer is not None and operand.numel() == self._head.numel() and pointer() == self._head.data_ptr()


def resident_peak_bytes() -> int:
    """The largest resident size of this process since its start, or since it was last set back."""
    if _STATUS.is_file():
        lines = [line for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines() if line.startswith("VmHWM:")]
        if lines:
            return int(lines[0].split()[1]) * 1024
    # ru_maxrss is in KiB, but in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """The resident size of this process now."""
    return int(psutil.Process().memory_info().rss)


def _reset_resident_peak() -> None:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        # Not Linux, or /proc is read-only: the peak since the start is still an upper bound.
        return


def _cuda():  # type: ignore[no-untyped-def]
    """torch.cuda, if torch is loaded and CUDA has been used; torch is never imported from here."""
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None


def _watched_products(told: Callable[[int, tuple[Any, ...]], None]) -> AbstractContextManager[object]:
    """Tells the FLOPs and the operands of each product of this thread.

    PyTorch's FlopCounterMode is not used itself: it hooks into modules of all threads, and so disturbs a host in another.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    aten = torch.ops.aten
    known = {**flop_registry, aten.addmm_: flop_registry[aten.addmm], aten.baddbmm_: flop_registry[aten.baddbmm]}
    forward = {getattr(aten, f"_scaled_dot_product_{name}", None) for name in _FUSED_ATTENTION}
    backward = {getattr(aten, f"_scaled_dot_product_{name}_backward", None) for name in _FUSED_ATTENTION}

    class ProductCounter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out, packet = func(*args, **(kwargs or {})), func._overloadpacket
            if packet in forward:
                told(_attention_flops(*args[:3], score_products=1, value_products=1), args)
            elif packet in backward:
                told(_attention_flops(*args[1:4], score_products=3, value_products=2), args)
            elif packet in known:
                told(known[packet](*args, **(kwargs or {}), out_val=out), args)
            return out

    return ProductCounter()


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *, score_products: int, value_products: int) -> int:
    """Products of T x S scores with the width of a query (Q K^T and its gradients) and with that of a value."""
    num_scores = query.shape[:-1].numel() * key.shape[-2]
    return 2 * num_scores * (score_products * query.shape[-1] + value_products * value.shape[-1])
