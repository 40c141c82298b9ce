"""What runs on a CPU runs on an accelerator, with the same result and without waiting for it more than it must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.accelerator.runs import CASES, PLANTED, TWO_ACCELERATORS, WAITS

ROOT = Path(__file__).resolve().parents[2]
SPLIT = [name for name in CASES if name.startswith("split")]
GROUPS = {
    "in one process": [name for name, (_, edges, _) in CASES.items() if name not in SPLIT and len(edges) == 1],
    "several edges": [name for name, (_, edges, _) in CASES.items() if len(edges) > 1],
    "with a host": [*SPLIT, TWO_ACCELERATORS],
}


def found(folder: Path, *names: str) -> dict[str, dict[str, Any]]:
    """What the runs came to, by case."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.accelerator.runs", folder, *names], cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    assert len(lines) == len(names), done.stderr[-3000:]
    return {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("group", GROUPS)
def test_a_run_comes_to_the_same_on_an_accelerator(group: str, tmp_path: Path) -> None:
    results = found(tmp_path, *GROUPS[group])
    assert {name: one["problem"] for name, one in results.items() if "problem" in one} == {}
    for name, one in results.items():
        here, there = one["losses"]
        assert there == pytest.approx(here, rel=1e-2 if "bf16" in name else 1e-3), name


def test_a_step_waits_for_the_accelerator_where_it_must_and_what_is_on_two_devices_is_found(tmp_path: Path) -> None:
    """Two steps: their batches go there; loss and norm come back; and the library looks whether rows are packed, before it begins."""
    results = found(tmp_path, WAITS, PLANTED)
    assert results[WAITS] == {"waits": {
        "CPU to device at tasks/batches.py": 6, "aten._local_scalar_dense at training/step.py": 4,
        "aten._local_scalar_dense at base/head.py": 2,
    }}  # fmt: skip
    assert "aten.embedding.default at base/head.py" in results[PLANTED]["problem"]
