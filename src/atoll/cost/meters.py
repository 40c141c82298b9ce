"""What really happened, to stand beside what the formulas foretold."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import TracebackType

import psutil

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"
"""What the kernel takes as: set VmHWM back to the resident size of now. Source: man 5 proc_pid_clear_refs."""


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
