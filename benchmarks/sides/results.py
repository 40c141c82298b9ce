"""What a benchmark keeps: NAME.json for people to read and, where runs are many, all of them in raw/NAME.json.xz.

Never a host name or a path.
"""

from __future__ import annotations

import json
import lzma
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "flwr", "numpy", "safetensors")
WIDTH, ROW_WIDTH = 140, 320
Json = Mapping[str, object]


def write(out: Path, name: str, config: Json, results: Json, runs: object = None) -> None:
    """Write the results with their settings, versions and machine, and say where they are.

    `runs` is all that was measured, where `results` is only its aggregates.
    """
    versions = {"python": platform.python_version()} | {library: version(library) for library in LIBRARIES}
    keep(out, name, {"config": config, "machine": _machine(), "versions": versions, "results": results}, runs)


def keep(out: Path, name: str, whole: Json, runs: object = None) -> None:
    """Write both files; equal values give equal bytes."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(lines(whole) + "\n", encoding="utf-8")
    if runs is not None:
        _raw(out, name).parent.mkdir(exist_ok=True)
        _raw(out, name).write_bytes(lzma.compress(json.dumps(runs, indent=1).encode(), preset=9))
    print(f"written: {name}.json in {out.name}")


def read(out: Path, name: str) -> dict[str, Any] | None:
    """What NAME.json says; None where there is none."""
    path = out / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_runs(out: Path, name: str) -> Any:
    """All runs, as `write` was given them; None where none are kept."""
    path = _raw(out, name)
    return json.loads(lzma.decompress(path.read_bytes())) if path.exists() else None


def _raw(out: Path, name: str) -> Path:
    return out / "raw" / f"{name}.json.xz"


def lines(value: object, margin: str = "\n") -> str:
    """JSON in which a list or table is one line where it fits; one that holds no other is a row, and may be longer.

    >>> print(lines({"short": {"a": 1, "b": [2]}, "rows": [{"long": "x" * WIDTH}, {"a": 3}]}).replace("x" * WIDTH, "x"))
    {
     "short": {"a": 1, "b": [2]},
     "rows": [
      {"long": "x"},
      {"a": 3}
     ]
    }
    """
    line, inner = json.dumps(value), margin + " "
    if not isinstance(value, dict | list | tuple) or len(line) < WIDTH:
        return line
    parts = list(value.values()) if isinstance(value, dict) else value
    if len(line) < ROW_WIDTH and not any(isinstance(part, dict | list | tuple) for part in parts):
        return line
    if isinstance(value, dict):
        return "{" + ",".join(f"{inner}{json.dumps(key)}: {lines(part, inner)}" for key, part in value.items()) + margin + "}"
    return "[" + ",".join(inner + lines(part, inner) for part in parts) + margin + "]"


def _machine() -> dict[str, object]:
    """CPU model, cores and memory."""
    cpu = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu[0] if cpu else platform.machine(), "cores": os.cpu_count(), "memory_bytes": memory, "system": platform.system()}
