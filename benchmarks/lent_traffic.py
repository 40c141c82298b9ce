"""Bytes of the full pool over the wire, by mode and by tokens of a step, and what the lean lent wire costs in loss.

LoRA on query, key and value of all blocks, E2E rows, cut (0, 0). The yardstick is the naive wire: dense, fp16, x once for every module.
Bytes are tensor bytes by formula; that they are what sockets carry is shown by split_step.py. For the loss, `atoll.train` runs with lent
adapters in fp16 and hidden states in int8 through a host on loopback, and beside the whole base, with the same seeds; every finished run is
a line of the work folder and is not done again.

Usage: python benchmarks/lent_traffic.py [--model SmolLM2-135M] [--batches 1 2 4 8 16 32] [--seeds 0 1 2] [--steps 100]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from atoll.adapters.targets import resolve_targets
from atoll.base.load import load_tokenizer
from atoll.base.read_shapes import read_shapes
from atoll.commands.train import train
from atoll.config.schema import Adapter, Cut, Model, RunConfig, Wire
from atoll.cost.split_traffic import step_bytes, step_round_trips
from atoll.shapes import BaseShapes
from atoll.tasks.batches import BatchStream
from atoll.tasks.tokens import pad_id
from sides import results, task
from sides.needs import shared
from sides.options import Options

RANK, TARGETS = 8, ("q_proj", "k_proj", "v_proj")
NAIVE = "dense, unshared, fp16"
WIRES = {
    "dense, fp32": Wire(mode="dense"), "dense, int8": Wire(mode="dense", codec="int8"),
    "factored, int8": Wire(mode="factored", codec="int8"), "lent, fp32": Wire(mode="lent"),
    "lent, int8, adapters fp16": Wire(mode="lent", codec="int8", adapters="fp16"),
}  # fmt: skip
LEAN = "lent, int8, adapters fp16"
GOAL_SAVED = 0.97
ROWS = 256
RUN = """
[run]
name = "lent-traffic"
rounds = 1
seed = {seed}
placement = "{placement}"
[model]
base = "{base}"
cut = {{ front = 0, back = 0 }}
[data]
train = "{train}"
eval = "{held_out}"
prompt = "{{mr}} ->"
completion = " {{ref}}"
max_length = 128
[adapter]
targets = {targets}
rank = {rank}
alpha = 16
[train]
learning_rate = 1e-3
batch_size = {batch}
local_steps = {steps}
schedule = "linear"
[evaluate]
batch_size = 16
[wire]
mode = "lent"
codec = "int8"
adapters = "fp16"
"""


def traffic(model: str, folder: Path, batch_size: int) -> dict[str, Any]:
    """Bytes of a mean step by wire, and the share of the naive ones that each saves."""
    shapes, tokenizer = read_shapes(str(folder)), load_tokenizer(str(folder))
    stream = BatchStream(task.examples_for(model, tokenizer, ROWS), batch_size, 0, "bench", "bucket", pad_id(tokenizer))
    batches = [stream.batch(number) for number in range(max(1, ROWS // batch_size))]
    tokens = round(statistics.mean(batch.num_tokens for batch in batches))
    labels = round(statistics.mean(batch.num_label_tokens for batch in batches))
    naive = _bytes(shapes, Wire(mode="dense"), tokens, labels).unshared_bytes // 2
    row: dict[str, Any] = {"tokens": tokens, "label_tokens": labels, NAIVE: naive}
    for name, wire in WIRES.items():
        moved = _bytes(shapes, wire, tokens, labels)
        row[name] = {"bytes": moved.shared_bytes, "saved": 1 - moved.shared_bytes / naive, "round_trips": _trips(shapes, wire)}
    return row


def _config(wire: Wire) -> RunConfig:
    return RunConfig(model=Model(cut=Cut(front=0, back=0)), adapter=Adapter(rank=RANK), wire=wire)


def _ranks(shapes: BaseShapes) -> dict[str, int]:
    return dict.fromkeys(resolve_targets(list(TARGETS), shapes.modules), RANK)


def _bytes(shapes: BaseShapes, wire: Wire, tokens: int, labels: int) -> Any:
    return step_bytes(_config(wire), shapes, _ranks(shapes), _mode(wire), num_tokens=tokens, num_label_tokens=labels)


def _trips(shapes: BaseShapes, wire: Wire) -> int:
    return step_round_trips(_config(wire), shapes, _ranks(shapes), _mode(wire))


def _mode(wire: Wire) -> Any:
    return wire.mode


def losses(folder: Path, placement: str, seed: int, given: Any) -> dict[str, float]:
    """Of the base and of the adapter after training, on held-out rows."""
    source = shared("data", "e2e")
    with tempfile.TemporaryDirectory() as temporary:
        rows, path = given.batch * given.steps, Path(temporary) / "run.toml"
        for name, count in (("trainset.csv", rows), ("devset.csv", given.scored)):
            lines = (source / name).read_text(encoding="utf-8").splitlines(keepends=True)
            (Path(temporary) / name).write_text("".join(lines[: 1 + count]), encoding="utf-8")
        path.write_text(RUN.format(
            seed=seed, placement=placement, base=folder, train="trainset.csv", held_out="devset.csv",
            targets=json.dumps(TARGETS), rank=RANK, batch=given.batch, steps=given.steps,
        ), encoding="utf-8")  # fmt: skip
        result = train(path, out=Path(temporary) / "run")
    summary = result.summary.to_json()
    scores: Any = summary["eval"]
    moved: Any = summary["traffic"]
    return {
        "base": scores["base"]["loss"], "adapted": scores["adapted"]["loss"], "socket_bytes": moved["up_bytes"] + moved["down_bytes"],
        "formula_bytes": moved.get("formula_shared_bytes") or 0, "naive_bytes": (moved.get("full_pool_unshared_bytes") or 0),
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    options = Options(__doc__, work="lent_traffic")
    options.size("--model", "SmolLM2-135M", task.TINY)
    options.size("--batches", [1, 2, 4, 8, 16, 32], [2])
    options.size("--batch", 8, 2, help="of the runs")
    options.size("--seeds", [0, 1, 2], [0])
    options.size("--steps", 100, 2, help="of the runs")
    options.size("--scored", 256, 8, help="held-out rows")
    given = options.parse()
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = task.model_folder(given.model, Path(temporary))
        curve = {f"{batch} rows": traffic(given.model, folder, batch) for batch in given.batches}
        for name, row in curve.items():
            shown = ", ".join(f"{wire} {row[wire]['bytes'] / 1e6:.2f} MB ({-100 * row[wire]['saved']:+.1f} %)" for wire in WIRES)
            print(f"{name}: {row['tokens']} tokens, {row['label_tokens']} labels: naive {row[NAIVE] / 1e6:.2f} MB; {shown}", flush=True)
        runs: dict[str, dict[str, float]] = {}
        for seed, placement in itertools.product(given.seeds, ("local", "split")):
            key = f"{given.model} {placement} {given.steps} x {given.batch}, seed {seed}"
            kept = given.work / f"{key}.json"
            if not kept.exists():
                kept.write_text(json.dumps(losses(folder.resolve(), placement, seed, given)), encoding="utf-8")
            runs[f"{placement}, seed {seed}"] = json.loads(kept.read_text(encoding="utf-8"))
            print(key, runs[f"{placement}, seed {seed}"], flush=True)
    settings = {"model": given.model, "rank": RANK, "targets": TARGETS, "steps": given.steps, "batch": given.batch, "goal": GOAL_SAVED}
    results.write(given.out, "lent_traffic", settings, {"bytes of a step": curve, "loss on held-out rows": runs})


if __name__ == "__main__":
    main()
