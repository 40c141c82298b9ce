"""benchmarks/results/fedpipe.md and .json: one table for each task and fleet, and planned against measured memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sides import results
from sides.fleets import FEDPIPE, LORA
from sides.kr_table import Spread
from sides.kr_tasks import TASKS

NAME = "fedpipe"
GOALS = {"simulated time to LoRA's loss, of the best baseline's": 0.5}
Record = Mapping[str, Any]


def write(records: Sequence[Record], config: Mapping[str, Any]) -> None:
    """Both files, and the tables on the terminal."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["task"], record["fleet"]), []).append(record)
    parts = [_table(task, fleet, group) for (task, fleet), group in groups.items()]
    text = "\n\n".join([_heading(config), *parts]) + "\n"
    print(text)
    (results.RESULTS / f"{NAME}.md").write_text(text, encoding="utf-8")
    results.write(NAME, dict(config) | {"goals": GOALS}, {f"{task} {fleet}": list(group) for (task, fleet), group in groups.items()})


def _heading(config: Mapping[str, Any]) -> str:
    return (
        f"# FedPipe against other methods\n\n{config['model']}, {', '.join(map(str, config['rounds']))} rounds of at least"
        f" {config['local_steps']} steps of {config['rows']} rows; seeds {', '.join(map(str, config['seeds']))}."
        " Loss: nats per completion token on test rows."
        ' Final loss: of the longest run. Time to target: simulated seconds of the shortest run that ends with no more than what the'
        ' longest of "LoRA, one rank" with the same seed ends with; "-": with one of the seeds none does.'
    )  # fmt: skip


def _table(task: str, fleet: str, records: Sequence[Record]) -> str:
    methods = list(dict.fromkeys(record["method"] for record in records))
    targets = _targets(records)
    columns = ("method", "rate", "final loss", "time to target", "of LoRA's", "simulated time", "numbers trained", "MB moved", "edges")
    rows = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lora = _times([record for record in records if record["method"] == LORA], targets)
    for method in methods:
        mine = [record for record in records if record["method"] == method]
        whole = [record for record in mine if record["losses"]]
        if not whole:
            page = mine[0]["failed"].splitlines()[0]
            rows.append(f"| {method} | - | {page} | - | - | - | - | - | - |")
            continue
        times, whole = _times(whole, targets), _longest(whole)
        share = "-" if None in times or None in lora or not lora else f"{_mean(times) / _mean(lora):.2f}"
        moved = [(one["traffic"]["up_bytes"] + one["traffic"]["down_bytes"]) / 1e6 for one in whole]
        cells = (
            method, f"{whole[0]['learning_rate']:g}", Spread.of([one["losses"][-1][1] for one in whole]).text(3),
            "-" if None in times else Spread.of([time for time in times if time is not None]).text(1), share,
            Spread.of([one["simulated_seconds"] for one in whole]).text(1), f"{_trained(whole[0]):,}", Spread.of(moved).text(1),
            f"{len(whole[0]['edges'])} of {len(whole[0]['edges']) + len(whole[0]['left_out'])}",
        )  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"## {TASKS[task].title}, {fleet} fleet", "", *rows, "", _memory(records)])


def _targets(records: Sequence[Record]) -> dict[int, float]:
    """The loss that LoRA ends with, by seed: they differ more than methods do."""
    return {record["seed"]: record["losses"][-1][1] for record in _longest([r for r in records if r["method"] == LORA and r["losses"]])}


def _times(records: Sequence[Record], targets: Mapping[int, float]) -> list[float | None]:
    """By seed the simulated seconds of the shortest run that ends at the target; None where none does."""
    ended: dict[int, list[float]] = {record["seed"]: [] for record in records}
    for record in records:
        if record["losses"] and record["losses"][-1][1] <= targets.get(record["seed"], 0.0):
            ended[record["seed"]].append(record["simulated_seconds"])
    return [min(seconds, default=None) for seconds in ended.values()]


def _longest(records: Sequence[Record]) -> list[Record]:
    """The runs of the most rounds."""
    most = max((record["rounds"] for record in records), default=0)
    return [record for record in records if record["rounds"] == most]


def _mean(times: Sequence[float | None]) -> float:
    return sum(time or 0.0 for time in times) / len(times)


def _trained(record: Record) -> int:
    """Numbers that the edges train, all together."""
    return sum(edge["num_trainable"] for edge in record["edges"])


def _memory(records: Sequence[Record]) -> str:
    """What FedPipe planned for each edge."""
    whole = _longest([record for record in records if record["method"] == FEDPIPE and record["losses"]])
    if not whole:
        return ""
    rows = ["What FedPipe gave each edge:", "", "| edge | bits | ranks | batch | steps | planned memory |", "|---|---|---|---|---|---|"]
    for edge in whole[0]["edges"]:
        ranks = sorted(set(edge["ranks"].values()))
        span = f"{ranks[0]} to {ranks[-1]} on {len(edge['ranks'])}"
        planned = f"{edge['predicted_peak_bytes'] / 1e6:.1f} MB"
        rows.append(f"| {edge['name']} | {edge['bits']} | {span} | {edge['batch_size']} | {edge['steps']} | {planned} |")
    return "\n".join(rows)
