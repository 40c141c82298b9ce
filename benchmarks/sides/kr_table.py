"""benchmarks/results/kill_and_revive.md and .json: one table for each task, relative to the full pool."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sides import results
from sides.kr_runs import BASE_SETTING, Record
from sides.kr_settings import BUDGET, FULL, KR, LEAN, LOTTERY, OTHERS, policy_of
from sides.kr_tasks import MODEL, MODELS, TASKS

NAME = "kill_and_revive"
GOALS = {"loss above the full pool's, in its standard deviations": 1.0, "traffic less": 0.875, "compute without head less": 0.82,
         "bytes of the lean wire less than the naive full pool": 0.97}  # fmt: skip
LISTED = (FULL, KR, LOTTERY, BUDGET, *OTHERS, *LEAN)
METRICS = {"bleu": "BLEU", "label_accuracy": "accuracy", "choice_accuracy": "accuracy"}


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and standard deviation over seeds; one run has none."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def text(self, digits: int) -> str:
        """As people write it."""
        return f"{self.mean:.{digits}f}" + ("" if self.deviation is None else f" ± {self.deviation:.{digits}f}")


@dataclass(frozen=True, slots=True)
class Line:
    """One setting on one task; shares are of the full pool's."""

    setting: str
    learning_rate: float
    loss: Spread
    score: Spread | None
    shared: Spread
    unshared: Spread
    written: Spread
    flops: Spread
    flops_with_head: Spread
    active: Spread
    naive: Spread
    """Bytes by formula ÷ those of the dense unshared full pool in fp16: half of what the full pool needs unshared in dense fp32."""


def lines(task: str, records: Sequence[Record]) -> list[Line]:
    """One for each setting that has runs; measured bytes need the full pool's run of the same seed."""
    full = {record["seed"]: record for record in records if record["setting"] == FULL}
    found = []
    keys: set[str] = set()
    for setting in dict.fromkeys(record["setting"] for record in records):
        mine = [record for record in records if record["setting"] == setting and record["seed"] in full and setting != BASE_SETTING]
        if mine and mine[0]["key"] not in keys:  # Two settings may ask for the same run: "keep 1/8" and the default.
            keys.add(mine[0]["key"])
            found.append(_line(task, setting, mine, full))
    return found


def _line(task: str, setting: str, mine: Sequence[Record], full: Mapping[int, Record]) -> Line:
    def spread(value: Any) -> Spread:
        return Spread.of([value(record, full[record["seed"]]) for record in mine])

    metric = TASKS[task].metric
    return Line(
        setting, mine[0]["learning_rate"], spread(lambda one, _: one["scores"]["loss"]),
        spread(lambda one, _: one["scores"][metric]) if metric else None,
        spread(lambda one, whole: _formula(one, "shared") / _formula(whole, "shared")),
        spread(lambda one, whole: _formula(one, "unshared") / _formula(whole, "unshared")),
        spread(lambda one, whole: _written(one) / _written(whole)),
        spread(lambda one, whole: _flops(one, ("adapter", "block")) / _flops(whole, ("adapter", "block"))),
        spread(lambda one, whole: _flops(one, ("adapter", "block", "head")) / _flops(whole, ("adapter", "block", "head"))),
        spread(lambda one, _: one["active_share"]), spread(lambda one, whole: _formula(one, "shared") / (_formula(whole, "unshared") / 2)),
    )  # fmt: skip


def _formula(record: Record, rule: str) -> float:
    return record["traffic"][f"formula_{rule}_bytes"]


def _written(record: Record) -> float:
    return record["traffic"]["up_bytes"] + record["traffic"]["down_bytes"]


def _flops(record: Record, parts: Iterable[str]) -> float:
    return sum(record["edge_compute"][f"{part}_flops"] for part in parts)


def name_of(model: str, steps: int) -> str:
    """What the files of runs on this base are called, which are so long."""
    if model == MODEL:
        return NAME
    return f"{NAME}_{model}" + ("" if steps == MODELS[model].steps else f"_{steps}_steps")


def write(out: Path, found: Mapping[str, Sequence[Record]], config: Mapping[str, Any], *, aloud: bool) -> None:
    """The results; with the tables on the terminal, too, where they are wanted `aloud`."""
    settings = dict(config) | {"goals": GOALS, "source": sorted({r["source"] for records in found.values() for r in records})}
    kept = {task: [_kept(record) for record in records] for task, records in found.items()}
    name, text = name_of(config["model"], config["steps"]), tables(kept, settings)
    results.write(out, name, settings, aggregates(kept, settings), kept)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    if aloud:
        print(text)


def _reported(records: Sequence[Record], rates: Mapping[str, float] | None) -> list[Record]:
    """Those on test rows, at the rates that were chosen; of what is kept of dev rows nothing is reported."""
    tested = [record for record in records if record.get("part", "test") == "test"]
    if rates is None:
        return tested
    return [one for one in tested if one["learning_rate"] in (0.0, rates.get(policy_of(one["setting"])))]


def aggregates(found: Mapping[str, Sequence[Record]], config: Mapping[str, Any]) -> dict[str, Any]:
    """By task what its goals come to, and a line for each run."""
    return {
        task: {"goals": _goals(lines(task, reported)), "runs": [_figures(task, record) for record in reported]}
        for task, reported in all_reported(found, config).items()
    }  # fmt: skip


def tables(found: Mapping[str, Sequence[Record]], config: Mapping[str, Any]) -> str:
    """What kill_and_revive.md says."""
    parts = [_heading(config)]
    for task, reported in all_reported(found, config).items():
        rows = lines(task, reported)
        parts += [_table(task, reported, rows), *_curves(reported, rows)]
    return "\n".join([*parts, _notes()])


def all_reported(found: Mapping[str, Sequence[Record]], config: Mapping[str, Any]) -> dict[str, list[Record]]:
    """What the tables are made of, by task."""
    chosen = config.get("chosen_rates")
    return {task: _reported(records, None if chosen is None else chosen.get(task, {})) for task, records in found.items()}


def _curves(records: Sequence[Record], rows: Sequence[Line]) -> list[str]:
    """How the loss on dev rows falls with the steps, as means over seeds, and what is left between a setting and the full pool."""
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        points = [(point["steps"], point["loss"]) for one in records if one["setting"] == row.setting for point in one.get("curve", ())]
        if points:
            steps_of = sorted({step for step, _ in points})
            curves[row.setting] = {step: statistics.mean(loss for other, loss in points if other == step) for step in steps_of}
    if not curves:
        return []
    steps = sorted({step for curve in curves.values() for step in curve})
    table = ["| dev loss after steps | " + " | ".join(map(str, steps)) + " |", "|" + "---|" * (len(steps) + 1)]
    for setting, curve in curves.items():
        table.append(f"| {setting} | " + " | ".join(f"{curve[step]:.3f}" if step in curve else "" for step in steps) + " |")
    return ["\n".join([*table, ""])]


def _figures(task: str, record: Record) -> dict[str, Any]:
    """What the tables take of a run."""
    metric = TASKS[task].metric
    figures = {key: record[key] for key in ("setting", "learning_rate", "seed")} | {"loss": record["scores"]["loss"]}
    figures |= {metric: record["scores"][metric]} if metric else {}
    if "traffic" in record:
        figures |= {"active_share": record["active_share"], "shared_bytes": _formula(record, "shared")}
        figures |= {"unshared_bytes": _formula(record, "unshared"), "written_bytes": _written(record)}
        figures |= {"flops": _flops(record, ("adapter", "block")), "head_flops": _flops(record, ("head",))}
    return figures


def _kept(record: Record) -> dict[str, Any]:
    """What is kept of a run; the choices by block and letter, "5.q" for model.layers.5.self_attn.q_proj."""
    first = ("key", "task", "part", "setting", "learning_rate", "seed", "steps", "overrides", "scores", "source")
    kept = {key: record[key] for key in (*first, "wall_seconds", "failed") if key in record}
    if "traffic" in record:
        kept |= {key: record[key] for key in ("traffic", "edge_compute", "active_share", "train_loss", "train_seconds")}
        kept |= {key: record[key] for key in ("curve", "times_resumed", "versions")}
        kept["choices"] = [
            choice if isinstance(choice, str) else f"{choice['step']}: {' '.join(map(short_name, choice['active']))}"
            for choice in record["choices"]
        ]  # fmt: skip
    return kept


def short_name(module: str) -> str:
    """Block and first letter of a module of this base."""
    parts = module.split(".")
    return f"{parts[2]}.{parts[-1][0]}"


def _heading(config: Mapping[str, Any]) -> str:
    seeds, rates = ", ".join(map(str, config["seeds"])), ", ".join(f"{rate:g}" for rate in config["rates"])
    model = "" if config["model"] == MODEL else f" --model {config['model']}"
    return (
        f"# Which modules to train, side by side\n\nMade by `python benchmarks/kill_and_revive.py{model}`. "
        f"{config['model']} ({config.get('modules', 24)} query, key and value modules), LoRA rank {config['rank']}, "
        f"{config['steps']} steps of {config['batch_size']} rows, {config['epochs']} passes; cut ({config['cut']}), wire dense fp32; "
        f"mean ± standard deviation over seeds {seeds}, or as many of them as the column runs says; learning rates from {rates}, by dev "
        "loss. Traffic and FLOPs in % of the full pool's; FLOPs of the device.\n"
    )


def _table(task: str, records: Sequence[Record], rows: Sequence[Line]) -> str:
    metric = TASKS[task].metric
    named = f" {METRICS[metric]} |" if metric else ""
    head = f"| policy | lr | runs | loss |{named} active | shared | unshared | written | FLOPs | with head |"
    table = [f"## {TASKS[task].title}", "", head, "|" + "---|" * (head.count("|") - 1)]
    for base in (record["scores"] for record in records if record["setting"] == BASE_SETTING):
        score = f" {_score_text(metric, Spread(base[metric], None, 1))} |" if metric else ""
        table.append(f"| no training | | | {base['loss']:.3f} |{score}" + " |" * 6)
    for row in sorted(rows, key=lambda row: row.setting not in LISTED):  # Points of the curve come after all policies.
        score = f" {_score_text(metric, row.score)} |" if metric and row.score else ""
        shares = " | ".join(map(_share, (row.active, row.shared, row.unshared, row.written, row.flops, row.flops_with_head)))
        table.append(f"| {row.setting} | {row.learning_rate:g} | {row.loss.count} | {row.loss.text(3)} |{score} {shares} |")
    goals = [f"* {name}: {value}" for name, value in _goals(rows).items()]
    return "\n".join([*table, "", *goals, ""])


def _share(spread: Spread) -> str:
    return Spread(100 * spread.mean, spread.deviation and 100 * spread.deviation, spread.count).text(1)


def _score_text(metric: str, spread: Spread) -> str:
    return spread.text(2) if metric == "bleu" else _share(spread) + " %"


def _goals(rows: Sequence[Line]) -> dict[str, str]:
    """What Kill-and-Revive comes to, goal by goal."""
    by_name = {row.setting: row for row in rows}
    found: dict[str, str] = {}
    full = by_name.get(FULL)
    for name in (KR, LOTTERY, BUDGET):
        if name not in by_name or full is None or full.loss.deviation is None:
            continue
        kr = by_name[name]
        above = (kr.loss.mean - full.loss.mean) / full.loss.deviation
        found[f"{name}: loss above the full pool's, in its standard deviations"] = _met(above <= 1, f"{above:.2f} (goal: at most 1)")
        for what, share, goal in (
            ("traffic, shared", kr.shared, 0.875), ("traffic, unshared", kr.unshared, 0.875), ("compute without head", kr.flops, 0.82),
        ):  # fmt: skip
            found[f"{name}: {what}"] = _met(1 - share.mean >= goal, f"{100 * (1 - share.mean):.1f} % lower (goal: {100 * goal:g} %)")
    if LEAN[0] in by_name and full is not None:
        lean = by_name[LEAN[0]]
        less, above = 1 - lean.naive.mean, lean.loss.mean - full.loss.mean
        said = f"{100 * less:.2f} % lower than the dense unshared fp16 full pool's (goal: 97 %)"
        found[f"{LEAN[0]}: traffic, shared"] = _met(less >= 0.97, said)
        said = f"{above:+.3f} from the full pool's (goal: one standard deviation)"
        found[f"{LEAN[0]}: loss"] = _met(above <= (full.loss.deviation or 0.0), said)
    return found


def _met(is_met: bool, text: str) -> str:
    return f"{text}: {'met' if is_met else 'missed'}"


def _notes() -> str:
    return (
        "loss: nats per completion token on test rows; active: mean share of modules trained in a step; shared, unshared: tensor bytes by "
        "formula, what several modules read counted once or once for each; written: whole frames on the socket, both ways; the fp16 "
        "yardstick is half of the unshared bytes of the dense fp32 full pool, by formula.\n"
    )
