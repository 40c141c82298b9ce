"""benchmarks/results/fedpipe.md and .json: one table for each task and fleet, and planned against measured memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sides import results
from sides.fleets import ABLATIONS, FEDPIPE, LORA
from sides.kr_table import Spread
from sides.kr_tasks import TASKS

NAME = "fedpipe"
NAMES_OF_ABLATIONS = [method.name for method in ABLATIONS]
GOALS = {"simulated time to LoRA's loss on the heterogeneous fleet, of the best baseline's": 0.5}
Record = Mapping[str, Any]


def write(records: Sequence[Record], config: Mapping[str, Any]) -> None:
    """Both files, and the tables on the terminal."""
    compared, ablated = dict[tuple[str, str], list[Record]](), dict[tuple[str, str], list[Record]]()
    for record in records:
        pair = (record["task"], record["fleet"])
        if record["method"] not in NAMES_OF_ABLATIONS:
            compared.setdefault(pair, []).append(record)
        if record["rounds"] == config["ablation_rounds"] and record["method"] in (FEDPIPE, *NAMES_OF_ABLATIONS):
            ablated.setdefault(pair, []).append(record)
    parts = [_table(task, fleet, group) for (task, fleet), group in compared.items()]
    parts += [_ablations(task, fleet, group) for (task, fleet), group in ablated.items() if len({one["method"] for one in group}) > 1]
    text = "\n\n".join([_heading(config), *parts]) + "\n"
    print(text)
    (results.RESULTS / f"{NAME}.md").write_text(text, encoding="utf-8")
    results.write(NAME, dict(config) | {"goals": GOALS}, {"runs": list(records)})


def _heading(config: Mapping[str, Any]) -> str:
    return (
        f"# FedPipe against other methods\n\n{config['model']}; a round is {config['local_steps']} steps of {config['rows']} rows, or"
        f" what FedPipe makes of it; seeds {', '.join(map(str, config['seeds']))}; learning rates"
        f" {', '.join(f'{rate:g}' for rate in config['rates'])}, chosen for every method on dev rows after {config['tuning_rounds']}"
        f" rounds. Loss: nats per completion token, or per row of 20 Newsgroups, on test rows, after {config['rounds'][-1]} rounds."
        f" Time to target: simulated seconds, warm-up included, of the shortest run of {', '.join(map(str, config['rounds']))} rounds that"
        f' ends with no more than what the longest of "{LORA}" with the same seed ends with; "-": with one of the seeds none does.'
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
            *[Spread.of([one["scores"]["accuracy"] for one in whole]).text(2)] * accuracy,
            "-" if mean is None else Spread.of([time for time in taken[method] if time is not None]).text(1),
            "-" if mean is None or lora is None else f"{mean / lora:.2f}",
            Spread.of([one["simulated_seconds"] for one in whole]).text(1), f"{_trained(whole[0]):,}", Spread.of(moved).text(1),
            f"{len(whole[0]['edges'])} of {len(whole[0]['edges']) + len(whole[0]['left_out'])}",
        ]  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"## {TASKS[task].title}, {fleet} fleet", "", *rows, "", _goal(taken), "", _plan(records)])


def _goal(taken: Mapping[str, Sequence[float | None]]) -> str:
    """FedPipe's time by that of the fastest other method."""
    means = {method: mean for method, times in taken.items() if (mean := _mean(times)) is not None}
    if FEDPIPE not in means or len(means) < 2:
        return "FedPipe is not at the target."
    best = min((method for method in means if method != FEDPIPE), key=lambda method: means[method])
    return f"FedPipe is at the target after {means[FEDPIPE] / means[best]:.2f} of the time of the fastest other method ({best})."


def _ablations(task: str, fleet: str, records: Sequence[Record]) -> str:
    rows = ["| | final loss | simulated time | numbers trained | MB moved |", "|---|---|---|---|---|"]
    for method in dict.fromkeys(record["method"] for record in records):
        mine = [record for record in records if record["method"] == method and record["loss"] is not None]
        moved = [(one["traffic"]["up_bytes"] + one["traffic"]["down_bytes"]) / 1e6 for one in mine]
        loss, seconds = Spread.of([one["loss"] for one in mine]), Spread.of([one["simulated_seconds"] for one in mine])
        rows.append(f"| {method} | {loss.text(3)} | {seconds.text(1)} | {_trained(mine[0]):,} | {Spread.of(moved).text(1)} |")
    return "\n".join([f"## Without one part: {TASKS[task].title}, {fleet} fleet, {records[0]['rounds']} rounds", "", *rows])


def _targets(records: Sequence[Record]) -> dict[int, float]:
    """The loss that LoRA ends with, by seed: they differ more than methods do."""
    return {record["seed"]: record["loss"] for record in _longest([r for r in records if r["method"] == LORA and r["loss"] is not None])}


def _times(records: Sequence[Record], targets: Mapping[int, float]) -> list[float | None]:
    """By seed the simulated seconds of the shortest run that ends at the target; None where none does."""
    ended: dict[int, list[float]] = {record["seed"]: [] for record in records}
    for record in records:
        if record["loss"] is not None and record["loss"] <= targets.get(record["seed"], 0.0):
            ended[record["seed"]].append(record["simulated_seconds"])
    return [min(seconds, default=None) for seconds in ended.values()]


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
