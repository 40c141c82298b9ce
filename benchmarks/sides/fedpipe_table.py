"""benchmarks/results/fedpipe.md and .json: one table for each task and fleet, and planned against measured memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sides import results
from sides.fleets import FEDPIPE, LORA
from sides.kr_table import Spread
from sides.kr_tasks import TASKS

NAME = "fedpipe"
GOALS = {"simulated time to LoRA's loss on the heterogeneous fleet, of the best baseline's": 0.5}
Record = Mapping[str, Any]


def write(compared: Sequence[Record], ablated: Sequence[Record], config: Mapping[str, Any]) -> None:
    """Both files, and the tables on the terminal."""
    results.write(NAME, dict(config) | {"goals": GOALS}, {"compared": list(compared), "without one part": list(ablated)})
    parts = [_table(task, fleet, group) for (task, fleet), group in _by_pair(compared).items()]
    parts += [_ablations(task, fleet, group) for (task, fleet), group in _by_pair(ablated).items()]
    text = "\n\n".join([_heading(config), *parts]) + "\n"
    print(text)
    (results.RESULTS / f"{NAME}.md").write_text(text, encoding="utf-8")


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
        f"# FedPipe against other methods\n\n{config['model']}; a round is {config['local_steps']} steps of {config['rows']} rows, or"
        f" what FedPipe makes of it. Learning rates are of {', '.join(f'{rate:g}' for rate in config['rates'])}, looked for by every"
        f" method on dev rows and the heterogeneous fleet, in runs of {config['tuning_rounds']} rounds; for that of"
        f" {config['rounds'][-1]} the next lower is tried as well. FedPipe warms up for 4 steps."
        f" Loss: nats per completion token, or per row of 20 Newsgroups, on test rows, after {config['rounds'][-1]} rounds. Time to"
        f" target: simulated seconds, warm-up included, until the loss that the longest run of {LORA} with the same seed ends with, on"
        f" the line between the ends of two runs, of {', '.join(map(str, config['rounds']))} rounds, about it; they are found by halving."
        ' "-": with one of the seeds the longest does not get there. Without one part: at FedPipe\'s learning rate.'
    )  # fmt: skip


def _table(task: str, fleet: str, records: Sequence[Record]) -> str:
    methods = list(dict.fromkeys(record["method"] for record in records))
    targets = _targets(records)
    accuracy = any("accuracy" in (record.get("scores") or {}) for record in records)
    columns = ["method", "rate", "final loss", *["accuracy"] * accuracy, "time to target", "of LoRA's", "simulated time", "numbers trained"]
    columns += ["MB moved", "edges"]
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    taken = {method: _times([record for record in records if record["method"] == method], targets) for method in methods}
    for method in methods:
        mine = [record for record in records if record["method"] == method]
        whole = _longest([record for record in mine if record["loss"] is not None])
        if not whole:
            rows.append(f"| {method} | - | {mine[0]['failed'].splitlines()[0]} |" + " - |" * (len(columns) - 3))
            continue
        mean, lora = _mean(taken[method]), _mean(taken.get(LORA, []))
        moved = [(one["traffic"]["up_bytes"] + one["traffic"]["down_bytes"]) / 1e6 for one in whole]
        cells = [
            method, f"{whole[0]['learning_rate']:g}", Spread.of([one["loss"] for one in whole]).text(3),
            *([Spread.of([one["scores"]["accuracy"] for one in whole]).text(2)] if accuracy else []),
            "-" if mean is None else Spread.of([time for time in taken[method] if time is not None]).text(1),
            "-" if mean is None or lora is None else f"{mean / lora:.2f}",
            Spread.of([one["simulated_seconds"] for one in whole]).text(1), f"{_trained(whole[0]):,}", Spread.of(moved).text(1),
            _edges(whole[0]),
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"## {_title(task, fleet, records)}", "", *rows, "", _goal(taken), "", _plan(records)])


def _goal(taken: Mapping[str, Sequence[float | None]]) -> str:
    """FedPipe's time by that of the fastest other method."""
    means = {method: mean for method, times in taken.items() if (mean := _mean(times)) is not None}
    if FEDPIPE not in means or len(means) < 2:
        return "FedPipe is not at the target, or alone."
    best = min((method for method in means if method != FEDPIPE), key=lambda method: means[method])
    return f"FedPipe is at the target after {means[FEDPIPE] / means[best]:.2f} of the time of the fastest other method ({best})."


def _ablations(task: str, fleet: str, records: Sequence[Record]) -> str:
    rows = ["| | final loss | simulated time | numbers trained | MB moved | edges |", "|---|---|---|---|---|---|"]
    for method in dict.fromkeys(record["method"] for record in records):
        mine = [record for record in records if record["method"] == method]
        whole = [record for record in mine if record["loss"] is not None]
        if not whole:
            rows.append(f"| {method} | {mine[0]['failed'].splitlines()[0]} | - | - | - | - |")
            continue
        moved = [(one["traffic"]["up_bytes"] + one["traffic"]["down_bytes"]) / 1e6 for one in whole]
        loss, seconds = Spread.of([one["loss"] for one in whole]), Spread.of([one["simulated_seconds"] for one in whole])
        cells = (method, loss.text(3), seconds.text(1), f"{_trained(whole[0]):,}", Spread.of(moved).text(1), _edges(whole[0]))
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"## Without one part: {_title(task, fleet, records)}, {records[0]['rounds']} rounds", "", *rows])


def _edges(record: Record) -> str:
    return f"{len(record['edges'])} of {len(record['edges']) + len(record['left_out'])}"


def _targets(records: Sequence[Record]) -> dict[int, float]:
    """The loss that LoRA ends with, by seed: they differ more than methods do."""
    return {record["seed"]: record["loss"] for record in _longest([r for r in records if r["method"] == LORA and r["loss"] is not None])}


def _times(records: Sequence[Record], targets: Mapping[int, float]) -> list[float | None]:
    """By seed the simulated seconds in which the target is reached; None where the longest run does not end there."""
    found = list[float | None]()
    for seed in dict.fromkeys(record["seed"] for record in records):
        mine = [record for record in records if record["seed"] == seed and record["loss"] is not None]
        ends = sorted((one["rounds"], one["simulated_seconds"], one["loss"]) for one in mine)
        found.append(_crossing([end[1:] for end in ends], targets.get(seed, -math.inf)))
    return found


def _crossing(ends: Sequence[tuple[float, float]], target: float) -> float | None:
    """Of seconds and losses of runs, the shortest first: where the straight line between the two about the target meets it.

    >>> _crossing([(14, 2.6), (18, 2.4), (44, 2.2)], 2.5), _crossing([(14, 2.6)], 2.5), _crossing([(14, 2.4), (18, 2.3)], 2.5)
    (16.0, None, 14)
    """
    if not ends or ends[-1][1] > target:
        return None
    above = [end for end in ends if end[1] > target]
    if not above:
        return ends[0][0]
    (before, high), (after, low) = above[-1], ends[ends.index(above[-1]) + 1]
    return before + (after - before) * (high - target) / (high - low)


def _longest(records: Sequence[Record]) -> list[Record]:
    """The runs of the most rounds."""
    most = max((record["rounds"] for record in records), default=0)
    return [record for record in records if record["rounds"] == most]


def _mean(times: Sequence[float | None]) -> float | None:
    """None where one of them is missing."""
    known = [time for time in times if time is not None]
    return sum(known) / len(known) if known and len(known) == len(times) else None


def _trained(record: Record) -> int:
    """Numbers that the edges train, all together."""
    return sum(edge["num_trainable"] for edge in record["edges"])


def _plan(records: Sequence[Record]) -> str:
    """What FedPipe planned for each edge."""
    whole = _longest([record for record in records if record["method"] == FEDPIPE and record["loss"] is not None])
    if not whole:
        return ""
    rows = ["What FedPipe gave each edge (planned against measured memory of such plans: planned_memory.json):", ""]
    rows += ["| edge | bits | ranks | batch | steps a round | planned memory |", "|---|---|---|---|---|---|"]
    for edge in whole[0]["edges"]:
        ranks = sorted(set(edge["ranks"].values()))
        span = f"{ranks[0]} to {ranks[-1]} on {len(edge['ranks'])}"
        planned, steps = f"{edge['predicted_peak_bytes'] / 1e6:.1f} MB", f"{edge['steps'] / whole[0]['rounds']:g}"
        rows.append(f"| {edge['name']} | {edge['bits']} | {span} | {edge['batch_size']} | {steps} | {planned} |")
    return "\n".join(rows)
