"""What a benchmark keeps: benchmarks/results/NAME.json with machine, versions, every repeat and medians; never a host name or a path."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "flwr", "numpy", "safetensors")


def machine() -> dict[str, object]:
    """CPU model, cores and memory."""
    cpu = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if "model name" in line]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu[0] if cpu else platform.machine(), "cores": os.cpu_count(), "memory_bytes": memory, "system": platform.system()}


def write(name: str, config: Mapping[str, object], results: Mapping[str, object]) -> None:
    """Write the file, and say where it is."""
    versions = {"python": platform.python_version()} | {library: version(library) for library in LIBRARIES}
    RESULTS.mkdir(exist_ok=True)
    whole = {"config": dict(config), "machine": machine(), "versions": versions, "results": dict(results)}
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(f"written: benchmarks/results/{name}.json")
