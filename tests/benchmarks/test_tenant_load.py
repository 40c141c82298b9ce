"""The load benchmark, at its smallest size: what it says of losses, bits and parts holds at any size; its times are not looked at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from sides import results
from sides.options import BENCHMARKS


def test_a_tenant_that_does_its_worst_costs_the_others_no_exchange_and_no_bit(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "tenant_load.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kept = results.read(tmp_path, "tenant_load")
    assert kept is not None
    found = kept["results"]
    assert (found["lost"], found["failed"], found["losses_bit_for_bit"]) == (0, [], True)
    did = found["the worst did"]
    assert did["largest exchanges"] > 0
    assert did["padded exchanges"] > 0
    assert did["silent streams"] >= 30
    assert did["bytes of parts that are not its own"] == 0
    first, last = found["sessions"][0], found["sessions"][-1]
    assert last["threads"] <= first["threads"]
    assert last["files"] <= first["files"]
