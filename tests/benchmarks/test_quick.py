"""Every benchmark runs, at its smallest size; what it measures there says nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sides import needs, results

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
KEPT = BENCHMARKS / "results"


ON_THEIR_OWN = {"tenant_load"}
"""Those that another test runs, and asks more of."""
SCRIPTS = [path for path in sorted(BENCHMARKS.glob("*.py")) if path.stem not in ON_THEIR_OWN]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs_and_keeps_what_it_found(script: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in KEPT.rglob("*")}
    done = subprocess.run(
        [sys.executable, script, "--quick", "--out", tmp_path], capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode == needs.ABSENT:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    found = [results.read(tmp_path, path.stem) for path in tmp_path.glob("*.json")]
    assert [set(one or {}) for one in found] == [{"config", "machine", "versions", "results"}], "one file, whole"
    assert all(one["results"] for one in found if one)
    assert {path: path.stat().st_mtime_ns for path in KEPT.rglob("*")} == before, "the results in the repository are of full size"
