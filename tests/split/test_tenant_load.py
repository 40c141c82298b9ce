"""The load benchmark, at a tiny size: what it says of losses, bits and parts holds at any size; its times are not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_tenant_that_does_its_worst_costs_the_others_no_exchange_and_no_bit() -> None:
    command = [sys.executable, "benchmarks/tenant_load.py", "--size", "tiny", "--devices", "3", "--minutes", "0.1", "--cycles", "1"]
    command += ["--sessions", "20", "--pause", "0.1", "--print"]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["lost"], found["failed"], found["losses_bit_for_bit"]) == (0, [], True)
    did = found["the worst did"]
    assert did["largest exchanges"] > 0
    assert did["padded exchanges"] > 0
    assert did["silent streams"] >= 30
    assert did["bytes of parts that are not its own"] == 0
    first, last = found["sessions"][0], found["sessions"][-1]
    assert last["threads"] <= first["threads"]
    assert last["files"] <= first["files"]
