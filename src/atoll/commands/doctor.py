"""atoll doctor: what this machine has, what would fail, and what to do; and its profile, measured. Nothing leaves the machine."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
from packaging.requirements import Requirement

from atoll.config.fleet import Profile
from atoll.cost.limits import UsableMemory, usable_memory
from atoll.errors import OutputError
from atoll.report.tables import wrapped
from atoll.runs.files import write_json
from atoll.units import counted, format_bytes, format_flops, format_seconds

if TYPE_CHECKING:
    from atoll.jobs.split import HostAccess
    from atoll.split.device.link import Link
    from atoll.training.speed import Speed

Status = Literal["ok", "warn", "fail"]
_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
_ANY_COLUMNS = 1_000_000
_FREE_MEMORY_BYTES = 1_000_000_000  # torch and transformers alone hold some 500 MB
_FREE_DISK_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at; `do` says what to change where it is not well."""

    name: str
    status: Status
    found: str
    do: str = ""


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """All checks of one examination."""

    checks: tuple[Check, ...]

    @property
    def is_well(self) -> bool:
        """Whether nothing would fail."""
        return all(check.status != "fail" for check in self.checks)

    def to_json(self) -> dict[str, object]:
        """As `atoll doctor --json` prints it."""
        return {"well": self.is_well, "checks": [asdict(check) for check in self.checks]}

    def to_text(self, columns: int = _ANY_COLUMNS) -> str:
        """One line for each check, and what to do below those that are not well; lines that are longer are broken between words."""
        lines: list[str] = []
        width = max(16, *(len(check.name) for check in self.checks))
        left, below = columns - width - 7, " " * (width + 7)
        for check in self.checks:
            found = wrapped(check.found, left) or [""]
            lines += [f"{_MARKS[check.status]}  {check.name:<{width}} {found[0]}", *(below + line for line in found[1:])]
            lines += [below + line for line in wrapped(f"-> {check.do}", left, "   ")] if check.do else []
        return "\n".join(lines)


def doctor() -> DoctorReport:
    """Examine this machine; takes a second or two, reads the hub settings and does not use the network."""
    checks = [_python(), *_libraries(), _memory(), _disk(), _waiting(), _hub()]
    return DoctorReport((*checks, *_torch()))


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """What was measured, and the file it was written to."""

    profile: Profile
    path: Path
    lines: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, object]:
        """As the file has it."""
        return self.profile.model_dump(mode="json")

    def to_text(self) -> str:
        """One line for each thing measured, and how run.toml names the file."""
        shown = [f"{name:<10} {found}" for name, found in self.lines]
        return "\n".join([*shown, f"wrote {self.path}", f'next:      profile = "{self.path}" below this machine\'s [[edge]]'])


def profile(path: Path, *, base: str = "tiny", host: HostAccess | None = None) -> ProfileReport:
    """Measure this machine, and its link to a `host`; write it to `path`, whole or not at all. Takes half a minute; longer on a large base.

    Raises: OutputError; what load_base raises; TransportError, HostLostError.
    """
    _check_output(path)
    memory, accelerator_bytes = usable_memory(), _accelerator_bytes()
    link = None if host is None else _measured_link(host)
    speed = _measured_speed(base)
    found = Profile(
        memory=memory.num_bytes if accelerator_bytes is None else accelerator_bytes,
        process_memory=None if accelerator_bytes is None else 0, flops=speed.flops_per_second,
        bandwidth=link.bits_per_second if link else None, latency=link.latency_seconds if link else None,
        measured=_measured(base, memory, speed, link),
    )  # fmt: skip
    try:
        write_json(path, found.model_dump(mode="json"))
    except OSError as problem:
        raise _no_output(path, problem.strerror or str(problem)) from None
    return ProfileReport(found, path, _profile_lines(base, memory, accelerator_bytes, speed, link))


def _accelerator_bytes() -> int | None:
    """What is free on the accelerator that a base goes to, now that it has its context; None where there is none."""
    import torch

    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def _measured_speed(base: str) -> Speed:
    from atoll.base.load import load_base
    from atoll.base.read_shapes import read_shapes
    from atoll.training.speed import measure_speed

    return measure_speed(load_base(base), read_shapes(base))


def _measured_link(host: HostAccess) -> Link:
    from atoll.split.certificates import open_channel
    from atoll.split.device.link import measure_link

    with open_channel(host.address, host.tls, insecure=host.insecure) as channel:
        return measure_link(channel)


def _measured(base: str, memory: UsableMemory, speed: Speed, link: Link | None) -> dict[str, object]:
    """How and when, for the file."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("atoll", "torch", "transformers")}},
        "machine": f"{platform.system()} {platform.machine()}, {counted(_cores(), 'core')}", "memory": asdict(memory),
        "base": base, "speed": asdict(speed), "link": None if link is None else asdict(link),
    }  # fmt: skip


def _profile_lines(
    base: str, memory: UsableMemory, accelerator_bytes: int | None, speed: Speed, link: Link | None
) -> tuple[tuple[str, str], ...]:  # fmt: skip
    pace = f"{format_seconds(min(speed.step_seconds))} to {format_seconds(max(speed.step_seconds))}"
    what = f"LoRA steps on {base}, {counted(speed.num_rows, 'row')} x {counted(speed.row_tokens, 'token')}, {speed.device}"
    held = f"{format_bytes(memory.num_bytes)} (bound by: {memory.bound_by})"
    if accelerator_bytes is not None:
        held = f"{format_bytes(accelerator_bytes)} (free on the accelerator, beside its context; the machine's own: {held})"
    lines = [
        ("memory", held),
        ("speed", f"{format_flops(speed.flops_per_second)}/s (median of {len(speed.step_seconds)} {what}: {pace} each)"),
    ]
    if link is None:
        return (*lines, ("link", "not measured; give --host HOST:PORT"))
    down = "not measured" if link.down_bits_per_second is None else _rate(link.down_bits_per_second)
    note = f"; {link.note}" if link.note else ""
    bandwidth = f"{_rate(link.bits_per_second)} (up {_rate(link.up_bits_per_second)}, down {down}{note})"
    return (*lines, ("bandwidth", bandwidth), ("latency", f"{format_seconds(link.latency_seconds)} one way"))


def _rate(bits_per_second: float) -> str:
    return f"{bits_per_second / 1e6:.3g} Mbit/s"


def _check_output(path: Path) -> None:
    """Whether the file could be written: before what takes half a minute."""
    if path.is_dir():
        raise _no_output(path, "a folder")
    if not path.parent.is_dir():
        raise _no_output(path, f"no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise _no_output(path, "a folder that may not be written")


def _no_output(path: Path, got: str) -> OutputError:
    what, expected = "the profile cannot be written there", "a file in a folder that can be written"
    return OutputError(what, where=str(path), got=got, expected=expected, do="choose another place")


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    well = sys.version_info >= (3, 11)
    return Check("python", "ok" if well else "fail", found, "" if well else "use Python 3.11 or newer")


def library(name: str) -> Check:
    """One library that the package asks for, against the range it was tested with."""
    return next(_library(wanted) for wanted in map(Requirement, requires("atoll") or ()) if wanted.name == name)


def _libraries() -> list[Check]:
    """Every library that the package asks for, against the range it was tested with."""
    wanted = [Requirement(text) for text in requires("atoll") or ()]
    return [_library(one) for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]


def _library(wanted: Requirement) -> Check:
    again = f"pip install '{wanted}'"
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return Check(wanted.name, "fail", "not installed", again)
    if wanted.specifier.contains(found, prereleases=True):
        return Check(wanted.name, "ok", f"{found} (tested: {wanted.specifier or 'any'})")
    return Check(wanted.name, "warn", f"{found} is outside the tested range {wanted.specifier}", again)


def _memory() -> Check:
    memory = psutil.virtual_memory()
    found = f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}; {counted(_cores(), 'core')}"
    if memory.available < _FREE_MEMORY_BYTES:
        return Check("memory", "warn", found, f"free some: torch alone takes half a GB, {format_bytes(_FREE_MEMORY_BYTES)} is little")
    return Check("memory", "ok", found)


def _cores() -> int:
    # What this process may use, which in a container is less than what the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _disk() -> Check:
    usage = shutil.disk_usage(Path.cwd())
    found = f"{format_bytes(usage.free)} free where runs/ would be"
    if not os.access(Path.cwd(), os.W_OK):
        return Check("disk", "warn", "this folder cannot be written", "change to another folder, or give --out")
    if usage.free < _FREE_DISK_BYTES:
        return Check("disk", "warn", found, "free some disk space: checkpoints are kept for every round")
    return Check("disk", "ok", found)


def _waiting() -> Check:
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.upper() == "PASSIVE":
        return Check("OMP_WAIT_POLICY", "ok", policy)
    do = "unset it, or export OMP_WAIT_POLICY=PASSIVE: spinning threads make steps 2 to 10 times slower when cores are shared"
    return Check("OMP_WAIT_POLICY", "warn", policy or "not set", do)


def _hub() -> Check:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    mode = "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "online when a hub id is asked for"
    return Check("hub", "ok", f"{mode}; {models} models in {cache}")


def _torch() -> list[Check]:
    """Threads, GPU and the speed of a matrix product; needs torch to open."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Check("torch opens", "fail", str(error).splitlines()[0], "install torch again; see pytorch.org for this machine")]
    threads = torch.get_num_threads()
    many = threads > _cores()
    do = f"export OMP_NUM_THREADS={_cores()}" if many else ""
    checks = [Check("threads", "warn" if many else "ok", f"{threads} for {counted(_cores(), 'core')}", do)]
    return [*checks, _gpu(), _speed()]


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", "ok", "none that torch can use; runs on the CPU")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return Check("gpu", "ok", ", ".join(names))


def _speed() -> Check:
    import torch

    side, repeats = 512, 20
    a_MM, b_MM = torch.ones(side, side), torch.ones(side, side)
    a_MM @ b_MM  # the first product starts the threads
    started = time.perf_counter()
    for _ in range(repeats):
        a_MM @ b_MM
    flops = 2 * side**3 * repeats / max(time.perf_counter() - started, 1e-9)
    return Check("speed", "ok", f"{format_flops(flops)}/s in fp32 matrix products ({side} x {side})")
