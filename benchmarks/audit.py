"""What a curious host and coordinator recover of E2E rows from house-4M, by where the blocks are cut; Alpaca is the public text.

New adapters at every cut. Then a run of two edges is trained, whole, and what it would send at one cut is attacked with its finished
adapter, which the attacker of activations does not have, in the front blocks, too.

Attacks are bounded by steps and rows, so that what is found does not depend on how fast the machine is.

Usage: python benchmarks/audit.py [--cuts 0 1 2 4 6] [--inverter-steps 1500] [--steps 60]; --steps 0 leaves the finished run out
"""

from __future__ import annotations

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atoll.attacks.finding import NAMES, Name
from atoll.commands.privacy.audit import Effort, audit
from atoll.commands.train import train
from sides import needs, results
from sides.options import Options

OF_ACTIVATIONS: tuple[Name, ...] = ("nearest-embedding", "inverter", "optimisation")
FINISHED_CUT, LONG = 2, 1e6
RUN = """
[run]
name = "audited"
rounds = 2
[model]
base = "{base}"
cut = {{ front = 1, back = 0 }}
[data]
train = "{train}"
eval = "{eval}"
prompt = "{{mr}} ->"
completion = " {{ref}}"
train_rows = {rows}
eval_rows = {rows}
max_length = 128
[train]
local_steps = {steps}
batch_size = 8
[[edge]]
name = "north"
[[edge]]
name = "south"
"""


def settings(work: Path, rows: int, steps: int) -> Path:
    """run.toml in the work folder."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    path, e2e = work / "run.toml", needs.shared("data", "e2e")
    base = needs.shared("models", "house-4M")
    path.write_text(RUN.format(base=base, train=e2e / "trainset.csv", eval=e2e / "devset.csv", rows=rows, steps=max(1, steps)))
    return path


def figures(what: Mapping[str, object], document: Mapping[str, Any]) -> list[dict[str, object]]:
    """A row for each attack that applied."""
    applied = [one for one in document["attacks"] if one["rows"]]
    return [{**what, **{key: _short(value) for key, value in one.items() if value is not None}} for one in applied]


def _short(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return [_short(one) for one in value] if isinstance(value, list) else value


def main() -> None:
    """Measure, and keep it."""
    options = Options(__doc__, work="audit")
    options.size("--cuts", [0, 1, 2, 4, 6], [1])
    options.size("--inverter-steps", 1500, 2)
    options.size("--host-rows", 64, 2)
    options.size("--searched-rows", 16, 1)
    options.size("--update-rows", 24, 1, help="rows whose update is inverted")
    options.size("--steps", 60, 1)
    options.size("--rows", 2000, 8)
    given = options.parse()
    public, path = needs.shared("data", "alpaca") / "alpaca_5000.json", settings(given.work, given.rows, given.steps)
    found = list[dict[str, object]]()

    def measure(what: Mapping[str, object], run: Path, overrides: Sequence[str], attacks: Sequence[Name]) -> None:
        effort = Effort(LONG, public, attacks, given.host_rows, given.searched_rows, given.inverter_steps, given.update_rows)
        rows = figures(what, audit(run, overrides=overrides, effort=effort, example=what["cut"] == FINISHED_CUT))
        found.extend(rows)
        print(*rows, sep="\n", flush=True)

    for cut in given.cuts:
        attacks = NAMES if cut == 1 else OF_ACTIVATIONS
        measure({"cut": cut, "adapters": "new"}, path, [f"model.cut.front={cut}", "run.placement=split"], attacks)
    if given.steps:
        run, overrides = train(path, out=given.work / "run").run_dir, [f"model.cut.front={FINISHED_CUT}", "run.placement=split"]
        measure({"cut": FINISHED_CUT, "adapters": "finished"}, run, overrides, NAMES)
    sizes = {name: getattr(given, name) for name in ("inverter_steps", "host_rows", "searched_rows", "update_rows", "steps", "rows")}
    results.write(given.out, "audit", {"base": "house-4M", "private": "E2E", "public": "Alpaca", **sizes}, {"attacks": found})


if __name__ == "__main__":
    main()
