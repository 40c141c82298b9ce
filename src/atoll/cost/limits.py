"""How much memory a new process may use here: what is free, what its control groups leave, what its own limits allow."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_NO_LIMIT = 2**60
"""Version 1 says "no limit" by a number near 2^63."""


@dataclass(frozen=True, slots=True)
class UsableMemory:
    """Bytes by what bounds them; None: it does not."""

    free_bytes: int
    """RAM that nobody uses, or that the kernel can take back."""
    cgroup_bytes: int | None
    """What the tightest control group has left."""
    rlimit_bytes: int | None
    """The smaller of RLIMIT_AS and RLIMIT_DATA."""

    @property
    def num_bytes(self) -> int:
        """What the process may use."""
        return min(bound for bound in (self.free_bytes, self.cgroup_bytes, self.rlimit_bytes) if bound is not None)

    @property
    def bound_by(self) -> str:
        """Which of them it is, in words."""
        bounds = {"free memory": self.free_bytes, "control group": self.cgroup_bytes, "resource limit": self.rlimit_bytes}
        return next(name for name, bound in bounds.items() if bound == self.num_bytes)


def usable_memory(groups: Path = _GROUPS, own_groups: Path = _OWN_GROUPS) -> UsableMemory:
    """What a process may use that is started when this one has ended.

    `groups` is where control groups are mounted, `own_groups` the file that names those of this process.
    """
    own_bytes = _own_bytes()
    left = [bound for bound in _bounds(groups, own_groups, own_bytes) if bound is not None]
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    finite = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    return UsableMemory(int(psutil.virtual_memory().available) + own_bytes, min(left, default=None), min(finite, default=None))


def _own_bytes() -> int:
    """What this process holds and nobody else: not its files, which count as free already."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", info.rss))


def _bounds(groups: Path, own_groups: Path, own_bytes: int) -> Iterator[int | None]:
    """What each control group above this process has left; a group is bound by all that it stands in."""
    for line in _lines(own_groups):
        _, controllers, own = (*line.split(":", 2), "", "")[:3]
        if "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
            yield from (_left(folder, own_bytes, *names) for folder in _upwards(groups / "memory", own))
        elif not controllers:
            # Beside version 1 it is mounted one level below.
            root = groups / "unified" if (groups / "unified").is_dir() else groups
            names = ("memory.max", "memory.current", "inactive_file", "active_file")
            yield from (_left(folder, own_bytes, *names) for folder in _upwards(root, own))


def _upwards(root: Path, own: str) -> Iterator[Path]:
    """The group and those above it. In a container its name may be the one outside, so that only the root is there."""
    folder = root / own.strip("/")
    yield from (one for one in (folder, *folder.parents) if one.is_relative_to(root) and one.is_dir())


def _left(folder: Path, own_bytes: int, limit_name: str, usage_name: str, *cache_names: str) -> int | None:
    """Limit less usage, but for files that are only cached: as the kernel counts free memory of the whole machine."""
    limit = _number(folder / limit_name)
    if limit is None or limit >= _NO_LIMIT:
        return None
    fields = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    cached = sum(int(fields.get(name, "0")) for name in cache_names)
    return max(0, limit - max(0, (_number(folder / usage_name) or 0) - cached - own_bytes))


def _number(file: Path) -> int | None:
    """The number in a file; None for "max", or where there is no such file."""
    lines = _lines(file)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
