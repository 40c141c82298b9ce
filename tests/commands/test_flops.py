"""What the first step of an edge really computed stands in summary.json beside the formula, in every mode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from atoll.adapters import layers
from atoll.base.read_shapes import read_shapes
from atoll.commands.train import train
from atoll.errors import AtollError
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import Update

from tests.conftest import SMALL, write_job
from tests.run_files import Sections

WIDTH = int(str(SMALL["hidden_size"]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base and rows of three owners, all of one length: what a host is sent has no padding, which the formula would count."""
    sections: Sections = {"data": {"eval": None, "partition": "by:owner"}, "adapter": {"rank": 2}, "train": {"local_steps": 2}}
    sections["wire"] = {"mode": "dense"}  # Lent, a device without blocks of its own makes no product at all.
    write_job(tmp_path, sections, {"here": {"mode": "local"}, "split": {"mode": "split"}, "away": {"mode": "cloud"}})
    return tmp_path


def first_steps(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The first step's event of every edge."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return {event["edge"]: event for event in events if event["event"] == "step_done" and event["step"] == 0}


@pytest.mark.parametrize("overrides", [
    ["wire.mode=factored"], ["wire.mode=dense"], ["adapter.kind=bottleneck"], ["model.cut={front=0,back=1}"],
    ["model.cut={front=0,back=0}"], ["train.accumulate=2"],
])  # fmt: skip
def test_the_first_step_is_counted_and_is_what_the_formula_says(
    folder: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the one product by which fused attention makes its scores anew in the backward pass; the head is exact."""
    monkeypatch.setattr(layers, "SMALL_WIDTH", 0)  # Else modules as small as these run in another, quicker way: see the next test.
    result = train(folder / "run.toml", out=folder / "out", overrides=overrides)
    edges = {edge["name"]: edge for edge in json.loads((result.run_dir / "summary.json").read_text())["edges"]}
    assert edges["away"]["first_step_flops"] is None
    assert edges["away"]["steps"] == 4
    steps = first_steps(result.run_dir)
    blocks = {"here": 2, "split": 0 if "model.cut={front=0,back=0}" in overrides else 1}
    for name, num_blocks in blocks.items():
        flops, tokens = edges[name]["first_step_flops"], steps[name]["num_tokens"]
        rows = 2 * (2 if "train.accumulate=2" in overrides else 1)
        scores_anew = num_blocks * 2 * rows * (tokens // rows) ** 2 * WIDTH
        assert flops["counted_head"] == flops["formula_head"] > 0
        assert flops["counted"] - scores_anew == flops["formula"] > 0
    parts = result.summary.edge_compute
    firsts = [edges[name]["first_step_flops"]["formula"] for name in blocks]
    assert sum(firsts) * 4 == parts.adapter_flops + parts.block_flops, "every step is like the first, and there are four"


def test_small_modules_are_counted_as_they_run(folder: Path) -> None:
    """In fp32 a small module runs with its adapter's product formed, which are other products than the formula's."""
    result = train(folder / "run.toml", out=folder / "out")
    edge, rank, num_tokens = result.summary.edges[0], 2, first_steps(result.run_dir)["here"]["num_tokens"]
    more = 2 * 2 * num_tokens * (num_tokens // 2) * WIDTH  # scores anew, in two blocks
    for module in read_shapes(str(folder / "base")).modules:
        lowest, weights, sizes = (module.block, module.stage) == (0, 0), module.d_in * module.d_out, module.d_in + module.d_out
        more += 2 * weights * (num_tokens + rank * (3 if lowest else 4))  # the gradient of W + B A, that sum, and gradients of B and A
        more -= 2 * num_tokens * rank * (3 * sizes - (module.d_in if lowest else 0))
    flops = edge.first_step_flops
    assert flops is not None
    assert flops.counted == flops.formula + more
    assert flops.counted_head == flops.formula_head


def test_an_edge_that_did_no_step_has_nothing_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = LocalTrainer.fit

    def fails(trainer: LocalTrainer, *arguments: Any) -> Update:
        if trainer.edge == "here":
            raise AtollError("the disk is full")
        return fit(trainer, *arguments)

    monkeypatch.setattr(LocalTrainer, "fit", fails)
    here, split, _ = train(folder / "run.toml", out=folder / "out").summary.edges
    assert (here.steps, here.first_step_flops, here.dropped_rounds) == (0, None, 2)
    assert split.first_step_flops is not None
