"""Ways of choosing which modules are trained, side by side: quality, traffic and device compute against the full pool, on real tasks.

Every run is the real thing: `atoll.train` in split mode against a host on loopback, so that bytes are measured, in a process of its own.
All policies take the same number of steps and choose their learning rate from the same grid, on dev rows with a seed of its own;
what is reported comes from test rows and other seeds. A finished run is not done again: it is a line in WORK/results.jsonl and, of a
pretrained base, in benchmarks/results/raw/kill_and_revive_MODEL.json.xz, from where it counts on other machines. A run of a pretrained
base that was stopped goes on where its last 50 steps had ended.

Usage: python benchmarks/kill_and_revive.py [prepare | run | table | all] [--model SmolLM2-135M] [--groups main wire curve] ...
"""

from __future__ import annotations

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}  # before torch
os.environ.setdefault("OMP_NUM_THREADS", "1")

import dataclasses
import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence

from sides import kr_curve, kr_table, results
from sides.kr_runs import BASE_SETTING, Record, Results, Spec, perform_all
from sides.kr_settings import FULL, GROUPS, KR, Setting, settings
from sides.kr_tasks import MODEL, MODELS, TASKS, Sizes, prepare
from sides.options import Options

TUNING_SEED = 100
DEFAULTS = {
    MODEL: {
        "tasks": ["e2e", "20news", "openbookqa"], "groups": ["main", "wire"], "rates": [3e-3, 1e-2, 2e-2], "seeds": [0, 1, 2], "jobs": 2,
    },
    "SmolLM2-135M": {
        "tasks": ["e2e", "20news", "openbookqa-text", "arc-easy"], "groups": ["main", "ideas"], "rates": [1e-3, 3e-3, 1e-2],
        "seeds": [0, 1], "jobs": 1, "tuning_steps": 50, "set": ["windows:select.every=100"],
    },
}  # fmt: skip
"""What is usual for each base, where the command line says nothing else."""
MODULES = {"SmolLM2-135M": 90}
SIZES = ("batch_size", "steps", "epochs", "scored_rows", "curve_steps")
FIRST = (FULL, KR)
"""What decides most, and is run first for every task and seed."""


def tuning_specs(task: str, chosen: Sequence[Setting], rates: Sequence[float], shorter: Sequence[str]) -> Iterator[Spec]:
    """One run on dev rows for each policy and learning rate; the settings of one policy share its learning rate."""
    for setting in chosen:
        if setting.tuned:
            for rate in rates:
                yield Spec(task, setting.name, (*setting.overrides, *shorter), rate, TUNING_SEED, "dev")


def reporting_specs(task: str, chosen: Sequence[Setting], best: Mapping[str, float], seeds: Sequence[int]) -> Iterator[Spec]:
    """The runs that are reported: the base once, and every setting whose policy has its learning rate, for every seed."""
    yield Spec(task, BASE_SETTING, (), 0.0, 0, "test")
    for seed in seeds:
        for setting in chosen:
            if setting.policy in best:
                yield Spec(task, setting.name, setting.overrides, best[setting.policy], seed, "test")


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """The runs of one base that are asked for, and those that are there."""

    given: Namespace
    sizes: Sizes
    everything: Sequence[Setting]
    results: Results
    deadline: float

    def rates(self, task: str, chosen: Sequence[Setting]) -> dict[str, float]:
        """By policy the rate with the least dev loss, where its climb up the grid has ended: at the top, or at a rate that did worse."""
        rates, found = sorted(self.given.rates), {}
        for setting in (one for one in chosen if one.tuned):
            losses = self._climb(task, setting, rates)
            if len(rates) == 1:
                found[setting.policy] = rates[0]
            elif len(losses) == len(rates) or _fell(losses):
                found[setting.policy] = min(losses, key=losses.__getitem__)
        return found

    def run(self) -> list[str]:
        """All that is asked for, and what decides most first; a line for every run that failed or was left."""
        chosen = [one for one in self.everything if one.group in self.given.groups]
        chosen = [one for one in chosen if not self.given.settings or one.name in self.given.settings]
        stages: list[tuple[Sequence[Setting], Sequence[int], Sequence[str]]] = [(chosen, self.given.seeds, self.given.tasks)]
        if self.given.model != MODEL:
            parts = [[one for one in chosen if (one.name in FIRST) == first] for first in (True, False)]
            stages = [(part, [seed], [task]) for part in parts for seed in self.given.seeds for task in self.given.tasks]
        problems = []
        for some, seeds, tasks in stages:
            tuning = [one for one in self.everything if one.tuned and one.policy in {other.policy for other in some}]
            problems += self._tune(tasks, tuning)
            best = {task: self.rates(task, tuning) for task in tasks}
            print(f"learning rates {best}", flush=True)
            problems += self._perform([spec for task in tasks for spec in reporting_specs(task, some, best[task], seeds)])
        return problems

    def report(self, *, aloud: bool) -> None:
        """The files of results, as far as there are any."""
        rates = {task: self.rates(task, self.everything) for task in self.given.tasks}
        sizes = self.sizes
        config = {
            "tasks": list(self.given.tasks), "batch_size": sizes.batch_size, "steps": sizes.steps, "epochs": sizes.epochs,
            "rates": self.given.rates, "seeds": self.given.seeds, "tuning_seed": TUNING_SEED, "model": self.given.model, "rank": sizes.rank,
            "alpha": sizes.alpha, "cut": "front 0, back 0", "set": self.given.set,
        }  # fmt: skip
        if self.given.model == MODEL:
            specs = {task: reporting_specs(task, self.everything, rates[task], self.given.seeds) for task in rates}
            found = {task: [one for spec in some if (one := self.results.get(spec)) is not None] for task, some in specs.items()}
        else:  # All that there is, so that nothing is done again; the tables take of it what was chosen.
            config |= {"modules": MODULES[self.given.model], "tuning_steps": self.given.tuning_steps, "chosen_rates": rates}
            found = {task: [one for one in self._of_this_length() if one["task"] == task] for task in TASKS}
        found = {task: records for task, records in found.items() if records}
        kr_table.write(self.given.out, found, config, aloud=aloud)
        if aloud:
            kr_curve.draw(self.given.out, kr_table.name_of(self.given.model, self.sizes.steps), kr_table.all_reported(found, config))

    def _of_this_length(self) -> Iterator[Record]:
        """What is there, but for runs of another length that the work folder has as well."""
        lengths = (None, self.sizes.steps, self.given.tuning_steps)
        return (record for record in self.results.records.values() if record.get("steps") in lengths)

    def _climb(self, task: str, setting: Setting, rates: Sequence[float]) -> dict[float, float]:
        """The dev losses by rate, from the lowest one up to the first that did worse than the one before, as far as they are there."""
        losses: dict[float, float] = {}
        for spec in tuning_specs(task, [setting], sorted(rates), self._shorter):
            record = self.results.get(spec)
            if record is None or _fell(losses):
                break
            loss = record["scores"]["loss"]
            losses[spec.learning_rate] = loss if math.isfinite(loss) else math.inf
        return losses

    def _tune(self, tasks: Sequence[str], tuning: Sequence[Setting]) -> list[str]:
        """All policies climb the same grid on dev rows; a higher rate is tried while the last one did better."""
        problems: list[str] = []
        for number in range(1, len(self.given.rates) + 1 if len(self.given.rates) > 1 else 1):
            rates = sorted(self.given.rates)[:number]
            climbing = [(task, one) for task in tasks for one in tuning if not _fell(self._climb(task, one, rates))]
            problems += self._perform(
                [spec for task, one in climbing for spec in tuning_specs(task, [one], rates[-1:], self._shorter)]
            )  # fmt: skip
        return problems

    def _perform(self, specs: Sequence[Spec]) -> list[str]:
        def keep() -> None:
            if self.given.model != MODEL:
                self.report(aloud=False)

        return perform_all(specs, self.results, self.given.jobs, self.deadline, keep)

    @property
    def _shorter(self) -> tuple[str, ...]:
        return (f"run.rounds={self.given.tuning_steps // self.sizes.round_steps}",) if self.given.tuning_steps else ()


def _fell(losses: Mapping[float, float]) -> bool:
    """Whether the last rate did no better than the one before."""
    *_, before, last = (math.nan, math.nan, *losses.values())
    return last >= before


def main() -> None:
    """Do what the command line says."""
    given = _arguments()
    given.work.mkdir(parents=True, exist_ok=True)
    usual = MODELS[given.model]
    sizes = dataclasses.replace(usual, **{name: value for name in SIZES if (value := getattr(given, name))})
    prepare(given.work, given.tasks, sizes, given.what == "prepare")
    kept = results.read_runs(given.out, kr_table.name_of(given.model, sizes.steps)) if given.model != MODEL else None
    found = Results(given.work, [record for records in (kept or {}).values() for record in records])
    bench = Bench(given, sizes, settings(given.set, sizes.steps), found, time.monotonic() + 60 * given.minutes)
    problems = bench.run() if given.what in ("run", "all") else []
    if given.what in ("table", "all"):
        bench.report(aloud=True)
    for problem in problems:
        print(problem, file=sys.stderr)
    raise SystemExit(bool(problems))


def _arguments() -> Namespace:
    options = Options(__doc__, work="kr")
    options.add_argument("what", nargs="?", choices=("prepare", "run", "table", "all"), default="all")
    options.add_argument("--model", choices=tuple(MODELS), default=MODEL)
    options.size("--tasks", [], ["e2e"], choices=tuple(TASKS), help="this and what follows: by itself what is usual for the model")
    options.size("--groups", [], ["main"], choices=GROUPS)
    options.size("--settings", [], [FULL, KR], help="only these of the groups, by name")
    options.add_argument("--set", action="append", default=[], metavar="POLICY:section.key=value", help="for all settings of a policy")
    options.size("--rates", [], [1e-2])
    options.size("--seeds", [], [0])
    options.size("--batch-size", 0, 2)
    options.size("--steps", 0, 6)
    options.size("--epochs", 0, 1)
    options.size("--curve-steps", 0, 3)
    options.size("--tuning-steps", 0, 3, help="a run that looks for the rate is so long")
    options.size("--scored-rows", 0, 2, help="at most so many dev rows and test rows")
    options.add_argument("--jobs", type=int, default=0)
    options.add_argument("--minutes", type=float, default=1e6, help="start nothing new after so long")
    given = options.parse()
    for name, value in DEFAULTS[given.model].items():
        if not getattr(given, name):
            setattr(given, name, value)
    if given.model != MODEL:
        given.work = given.work / given.model
    return given


if __name__ == "__main__":
    main()
