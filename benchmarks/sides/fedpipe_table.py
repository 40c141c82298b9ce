"""benchmarks/results/fedpipe.md and .json: one table for each task and fleet, and planned against measured memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sides import results
from sides.fleets import FEDPIPE, LORA
from sides.kr_table import Spread
from sides.kr_tasks import TASKS

NAME = "fedpipe"
LUCK = 3
"""Rounds over which a loss that others are held against is a mean."""
GOALS = {"simulated time to LoRA's loss on the heterogeneous fleet, of the best baseline's": 0.5}
Record = Mapping[str, Any]
Point = Mapping[str, float]


def reached(curve: Sequence[Point], target: float) -> int | None:
    """Rounds to the first score that is no worse than the target; None where there is none.

    >>> reached([{"seconds": 4.0, "loss": 3.0}, {"seconds": 8.0, "loss": 2.5}, {"seconds": 12.0, "loss": 2.6}], 2.6)
    2
    """
    return next((number for number, point in enumerate(curve, 1) if point["loss"] <= target), None)


def at_time(curve: Sequence[Point], seconds: float) -> float:
    """The last loss that was scored by then; infinite where none was.

    >>> at_time([{"seconds": 4.0, "loss": 3.0}, {"seconds": 8.0, "loss": 2.5}], 7.9)
    3.0
    """
    return next((point["loss"] for point in reversed(curve) if point["seconds"] <= seconds), math.inf)


def settled(curve: Sequence[Point]) -> list[float]:
    """After every round the mean loss of it and the two before, so that no target and no choice is one lucky round.

    The first two rounds, which have fewer before them, are infinite.

    >>> settled([{"loss": 3.0}, {"loss": 2.0}, {"loss": 2.5}, {"loss": 1.5}])
    [inf, inf, 2.5, 2.0]
    """
    losses = [point["loss"] for point in curve]
    means = [math.fsum(three) / LUCK for three in zip(*(losses[first:] for first in range(LUCK)), strict=False)]
    return [math.inf] * min(len(losses), LUCK - 1) + means


def kept(out: Path) -> list[dict[str, Any]]:
    """The runs that are kept beside the tables."""
    groups = results.read_runs(out, NAME) or {}
    return [record for group in groups.values() for record in group]


def write(out: Path, compared: Sequence[Record], ablated: Sequence[Record], tuned: Sequence[Record], config: Mapping[str, Any]) -> None:
    """The results, and the tables also on the terminal."""
    if not compared and not ablated:
        print("no method is through with a seed: the tables stay as they are")
        return
    found = {"compared": compared, "without one part": ablated, "tuned": tuned}
    results.write(out, NAME, dict(config) | {"goals": GOALS}, aggregates(found), found)
    text = tables(compared, ablated, config)
    print(text)
    (out / f"{NAME}.md").write_text(text, encoding="utf-8")


def aggregates(found: Mapping[str, Sequence[Record]]) -> dict[str, list[dict[str, Any]]]:
    """A line for each run: what was asked, and the scores after as many rounds as were chosen for it, or after the last."""
    return {group: [_line(record) for record in records] for group, records in found.items()}


def _line(record: Record) -> dict[str, Any]:
    asked = {key: record[key] for key in ("task", "fleet", "method", "learning_rate", "seed")}
    if not record["curve"]:
        return asked | {"failed": record.get("failed", "").partition("\n")[0]}
    rounds = record["chosen"]["rounds"] if "chosen" in record else len(record["curve"])
    point = record["curve"][rounds - 1]
    return asked | {"rounds": rounds} | {key: point[key] for key in ("loss", "accuracy", "seconds", "bytes") if key in point}


def tables(compared: Sequence[Record], ablated: Sequence[Record], config: Mapping[str, Any]) -> str:
    """What fedpipe.md says."""
    parts = [_table(task, fleet, group) for (task, fleet), group in _by_pair(compared).items()]
    parts += [_ablations(task, fleet, group, config["ablation_rounds"]) for (task, fleet), group in _by_pair(ablated).items()]
    return "\n\n".join([_heading(config), *parts]) + "\n"


def _by_pair(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    pairs = dict[tuple[str, str], list[Record]]()
    for record in records:
        pairs.setdefault((record["task"], record["fleet"]), []).append(record)
    return pairs


def _title(task: str, fleet: str, records: Sequence[Record]) -> str:
    seeds = sorted({record["seed"] for record in records})
    return f"{TASKS[task].title}, {fleet} fleet, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _heading(config: Mapping[str, Any]) -> str:
    return (
        f"# FedPipe against other methods\n\n{config['model']}; {config['rounds']} rounds of {config['local_steps']} steps of"
        f" {config['rows']} rows, or what FedPipe makes of them; a constant learning rate, test rows scored after every round. Every method"
        f" looks for its rate (of {', '.join(f'{rate:g}' for rate in config['rates'])}) and its number of rounds on each fleet, by the"
        f" least loss on dev rows with seed {config['tuning_seed']}, as a mean of {LUCK} rounds. FedPipe warms up for 2 steps. Loss: nats"
        " per completion token, or per row of 20 Newsgroups, after so many rounds. At equal time: the loss when the first of all methods"
        " is through with its last round. Time to target: simulated seconds, warm-up included, to"
        f" the end of the first round after which the loss is no more than that of {LORA} with the same seed, as a mean of its last {LUCK}"
        " rounds; at the rate that was quickest there on dev rows."
        ' "-": not within these rounds, with one of the seeds at least.'
    )  # fmt: skip


def _table(task: str, fleet: str, records: Sequence[Record]) -> str:
    groups = {method: [one for one in records if one["method"] == method] for method in dict.fromkeys(one["method"] for one in records)}
    targets = {one["seed"]: settled(one["curve"])[one["chosen"]["rounds"] - 1] for one in _for_loss(groups.get(LORA, []))}
    taken = {method: _times(group, targets) for method, group in groups.items()}
    accuracy = any("accuracy" in point for one in records for point in one["curve"])
    ends = _ends(records)
    columns = ["method", "rate, rounds", "loss", *["accuracy"] * accuracy, "at equal time", "time to target", "of LoRA's", "its rate"]
    columns += ["a round takes", "numbers trained", "MB a round", "edges", "under-training"]
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for method, group in groups.items():
        whole = _for_loss(group)
        if not whole:
            rows.append(f"| {method} | - | {group[0]['failed'].splitlines()[0]} |" + " - |" * (len(columns) - 3))
            continue
        chosen, mean, lora = whole[0]["chosen"], _mean(taken[method]), _mean(taken.get(LORA, []))
        cells = [
            method, f"{chosen['rate']:g}, {chosen['rounds']}", _spread([_ended(one)["loss"] for one in whole], 3),
            *([_spread([_ended(one)["accuracy"] for one in whole], 2)] if accuracy else []),
            _spread([at_time(one["curve"], ends[one["seed"]]) for one in whole], 3),
            "-" if mean is None else _spread([time for time in taken[method] if time is not None], 1),
            "-" if mean is None or lora is None else f"{mean / lora:.2f}", f"{chosen['rate_for_time']:g}", *_of_a_round(whole),
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"## {_title(task, fleet, records)}", "", *rows, "", _goal(taken), "", _plan(groups.get(FEDPIPE, []))])


def _for_loss(records: Sequence[Record]) -> list[Record]:
    """The runs at the rate that was chosen for the least loss."""
    return [one for one in records if one["curve"] and one["learning_rate"] == one["chosen"]["rate"]]


def _ends(records: Sequence[Record]) -> dict[int, float]:
    """By seed the simulated seconds after which the first of all methods is through."""
    whole = _for_loss(records)
    return {seed: min(one["curve"][-1]["seconds"] for one in whole if one["seed"] == seed) for seed in {one["seed"] for one in whole}}


def _ended(record: Record) -> Point:
    """The scores after the rounds that were chosen on dev rows."""
    point: Point = record["curve"][record["chosen"]["rounds"] - 1]
    return point


def _times(records: Sequence[Record], targets: Mapping[int, float]) -> list[float | None]:
    """By seed the simulated seconds in which the target is reached; None where it is not."""
    quick = [one for one in records if one["learning_rate"] == one["chosen"]["rate_for_time"] and one["seed"] in targets]
    rounds = [(one["curve"], reached(one["curve"], targets[one["seed"]])) for one in quick]
    return [None if number is None else curve[number - 1]["seconds"] for curve, number in rounds]


def _spread(values: Sequence[float], digits: int) -> str:
    return Spread.of(values).text(digits)


def _of_a_round(records: Sequence[Record]) -> list[str]:
    """Time, numbers trained, bytes, edges, and the share of all edges' steps that nobody does."""
    first = records[0]
    # A warm-up is in the first.
    seconds = [(one["curve"][-1]["seconds"] - one["curve"][0]["seconds"]) / (len(one["curve"]) - 1) for one in records]
    moved = [one["curve"][-1]["bytes"] / 1e6 / len(one["curve"]) for one in records]
    trained = sum(edge["num_trainable"] for edge in first["edges"])
    whole = len(first["edges"]) + len(first["left_out"])
    untrained = math.fsum(edge["under_training"] or 0.0 for edge in first["edges"]) + len(first["left_out"])
    edges = f"{len(first['edges'])} of {whole}"
    return [f"{_spread(seconds, 1)} s", f"{trained:,}", _spread(moved, 1), edges, f"{untrained / whole:g}"]


def _goal(taken: Mapping[str, Sequence[float | None]]) -> str:
    """FedPipe's time by that of the fastest other method."""
    means = {method: mean for method, times in taken.items() if (mean := _mean(times)) is not None}
    if FEDPIPE not in means or len(means) < 2:
        return "FedPipe is not at the target, or alone."
    best = min((method for method in means if method != FEDPIPE), key=lambda method: means[method])
    return f"FedPipe is at the target after {means[FEDPIPE] / means[best]:.2f} of the time of the fastest other method ({best})."


def _ablations(task: str, fleet: str, records: Sequence[Record], rounds: int) -> str:
    columns = ("", f"loss after {rounds} rounds", "their time", "a round takes", "numbers trained", "MB a round", "edges", "under-training")
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for record in records:
        if record["curve"]:
            point = record["curve"][rounds - 1]
            cells = (record["method"], f"{point['loss']:.3f}", f"{point['seconds']:.1f} s", *_of_a_round([record]))
        else:
            cells = (record["method"], record["failed"].splitlines()[0], *["-"] * 6)
        rows.append("| " + " | ".join(cells) + " |")
    title = f"## Without one part: {_title(task, fleet, records)}, rate {records[0]['learning_rate']:g}"
    return "\n".join([title, "", *rows])


def _mean(times: Sequence[float | None]) -> float | None:
    """None where one of them is missing."""
    known = [time for time in times if time is not None]
    return sum(known) / len(known) if known and len(known) == len(times) else None


def _plan(records: Sequence[Record]) -> str:
    """What FedPipe planned for each edge."""
    whole = _for_loss(records)
    if not whole:
        return ""
    rows = ["What FedPipe gave each edge (what plans come to in real processes: planned_memory.json):", ""]
    rows += ["| edge | bits | ranks | batch | steps a round | planned memory |", "|---|---|---|---|---|---|"]
    for edge in whole[0]["edges"]:
        ranks = sorted(map(int, edge["ranks"]))
        span = f"{ranks[0]} to {ranks[-1]} on {sum(edge['ranks'].values())}"
        planned, steps = f"{edge['predicted_peak_bytes'] / 1e6:.1f} MB", f"{edge['steps'] / len(whole[0]['curve']):g}"
        rows.append(f"| {edge['name']} | {edge['bits']} | {span} | {edge['batch_size']} | {steps} | {planned} |")
    return "\n".join(rows)
