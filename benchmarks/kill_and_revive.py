"""Ways of choosing which modules are trained, side by side: quality, traffic and device compute against the full pool, on three real tasks.

Every run is the real thing: `atoll.train` in split mode against a host on loopback, so that bytes are measured, in a process of its own.
All policies take the same number of steps and choose their learning rate from the same grid, on dev rows with a seed of its own;
what is reported comes from test rows and other seeds. A finished run is a line in WORK/results.jsonl and is not done again.

Usage: python benchmarks/kill_and_revive.py [prepare | run | table | all] [--work build/kr] [--groups main wire curve] ...
"""

from __future__ import annotations

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch

import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence

from sides import kr_curve, kr_table
from sides.kr_runs import BASE_SETTING, Results, Spec, perform_all
from sides.kr_settings import FULL, GROUPS, KR, Setting, settings
from sides.kr_tasks import TASKS, Sizes, prepare
from sides.options import Options

TUNING_SEED = 100


def tuning_specs(task: str, chosen: Sequence[Setting], rates: Sequence[float]) -> Iterator[Spec]:
    """One run on dev rows for each policy and learning rate; the settings of one policy share its learning rate."""
    for setting in chosen:
        if setting.tuned:
            for rate in rates:
                yield Spec(task, setting.name, setting.overrides, rate, TUNING_SEED, "dev")


def learning_rates(task: str, chosen: Sequence[Setting], rates: Sequence[float], results: Results) -> dict[str, float]:
    """By policy the rate with the least dev loss, where its climb up the grid has ended: at the top, or at a rate that did worse."""
    found = {}
    for setting in chosen:
        losses = _climb(task, setting, rates, results)
        if len(losses) == len(rates) or _fell(losses):
            found[setting.name] = min(losses, key=losses.__getitem__)
    return found


def _climb(task: str, setting: Setting, rates: Sequence[float], results: Results) -> dict[float, float]:
    """The dev losses by rate, from the lowest one up to the first that did worse than the one before, as far as they are there."""
    losses: dict[float, float] = {}
    for spec in tuning_specs(task, [setting], sorted(rates)):
        record = results.get(spec)
        if record is None or _fell(losses):
            break
        loss = record["scores"]["loss"]
        losses[spec.learning_rate] = loss if math.isfinite(loss) else math.inf
    return losses


def _fell(losses: Mapping[float, float]) -> bool:
    """Whether the last rate did no better than the one before."""
    *_, before, last = (math.nan, math.nan, *losses.values())
    return last >= before


def _tune(given: Namespace, tuning: Sequence[Setting], results: Results, deadline: float) -> list[str]:
    """All policies climb the same grid on dev rows; a higher rate is tried while the last one did better."""
    problems = []
    for number in range(1, len(given.rates) + 1):
        rates = sorted(given.rates)[:number]
        climbing = [(task, one) for task in given.tasks for one in tuning if not _fell(_climb(task, one, rates, results))]
        trials = [spec for task, one in climbing for spec in tuning_specs(task, [one], rates[-1:])]
        problems += perform_all(trials, results, given.jobs, deadline)
    return problems


def reporting_specs(task: str, chosen: Sequence[Setting], best: dict[str, float], seeds: Sequence[int]) -> Iterator[Spec]:
    """The runs that are reported: the base once, and every setting whose policy has its learning rate, for every seed."""
    yield Spec(task, BASE_SETTING, (), 0.0, 0, "test")
    for seed in seeds:
        for setting in chosen:
            if setting.policy in best:
                yield Spec(task, setting.name, setting.overrides, best[setting.policy], seed, "test")


def main() -> None:
    """Do what the command line says."""
    given = _arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    sizes = Sizes(given.batch_size, given.steps, given.epochs, scored_rows=given.scored_rows)
    prepare(given.work, given.tasks, sizes, given.what == "prepare")
    everything, results = settings(given.set), Results(given.work)
    problems = _run(given, everything, results) if given.what in ("run", "all") else []
    if given.what in ("table", "all"):
        _report(given, everything, results)
    for problem in problems:
        print(problem, file=sys.stderr)
    raise SystemExit(bool(problems))


def _run(given: Namespace, everything: Sequence[Setting], results: Results) -> list[str]:
    chosen = [one for one in everything if one.group in given.groups and (not given.settings or one.name in given.settings)]
    deadline = time.monotonic() + 60 * given.minutes
    tuned = {one.policy for one in chosen}
    tuning = [one for one in everything if one.tuned and one.policy in tuned]
    problems = _tune(given, tuning, results, deadline)
    reporting: list[Spec] = []
    for task in given.tasks:
        best = learning_rates(task, tuning, given.rates, results)
        print(f"{task}: learning rates {best}", flush=True)
        reporting += reporting_specs(task, chosen, best, given.seeds)
    return problems + perform_all(reporting, results, given.jobs, deadline)


def _report(given: Namespace, everything: Sequence[Setting], results: Results) -> None:
    tuning, found = [one for one in everything if one.tuned], {}
    for task in given.tasks:
        best = learning_rates(task, tuning, given.rates, results)
        records = [results.get(spec) for spec in reporting_specs(task, everything, best, given.seeds)]
        found[task] = [record for record in records if record is not None]
    config = {
        "tasks": list(given.tasks), "batch_size": given.batch_size, "steps": given.steps, "epochs": given.epochs, "rates": given.rates,
        "seeds": given.seeds, "tuning_seed": TUNING_SEED, "model": "house-4M", "rank": Sizes().rank, "alpha": Sizes().alpha,
        "cut": "front 0, back 0", "set": given.set,
    }  # fmt: skip
    kr_table.write(given.out, found, config)
    kr_curve.draw(given.out, found)


def _arguments() -> Namespace:
    options = Options(__doc__, work="kr")
    options.add_argument("what", nargs="?", choices=("prepare", "run", "table", "all"), default="all")
    options.size("--tasks", ["e2e", "20news", "openbookqa"], ["e2e"], choices=tuple(TASKS))
    options.size("--groups", ["main", "wire"], ["main"], choices=GROUPS)
    options.size("--settings", [], [FULL, KR], help="only these of the groups, by name")
    options.add_argument("--set", action="append", default=[], metavar="POLICY:section.key=value", help="for all settings of a policy")
    options.size("--rates", [3e-3, 1e-2, 2e-2], [1e-2])
    options.size("--seeds", [0, 1, 2], [0])
    options.size("--batch-size", Sizes().batch_size, 2)
    options.size("--steps", Sizes().steps, 6)
    options.size("--epochs", Sizes().epochs, 1)
    options.size("--scored-rows", Sizes().scored_rows, 2, help="at most so many dev rows and test rows")
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--minutes", type=float, default=1e6, help="start nothing new after so long")
    return options.parse()


if __name__ == "__main__":
    main()
