"""examples/hospitals.toml: five kinds of machine in one federation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from atoll.commands.plan import plan
from atoll.commands.train import train
from atoll.embedded import tiny_path

HOSPITALS = Path(__file__).resolve().parents[2] / "examples" / "hospitals.toml"
SHORT = (
    "run.rounds=1", "train.local_steps=2", "plan.steps=asked", "plan.warmup_steps=2", "data.train_rows=120", "data.eval_rows=6",
    "evaluate.metrics=[]",
)  # fmt: skip


def test_the_plan_has_an_edge_for_each_kind_of_machine_and_says_why() -> None:
    fleet = plan(HOSPITALS)
    assert {edge.name: (edge.mode, edge.bits) for edge in fleet.edges} == {
        "university": ("local", 16), "city": ("local", 8), "county": ("local", 4), "village": ("split", 32),
    }  # fmt: skip
    assert "8 bits, as 16 bits here would be worth" in fleet.edge("city").why
    assert "4 bits, as 8 bits here would be worth" in fleet.edge("county").why
    assert "host" not in fleet.edge("county").why, "it may not use one"
    assert (fleet.edge("village").wire_mode, fleet.edge("village").wire_why[:6]) == ("lent", "lent: ")
    assert [edge.name for edge in fleet.edges if "memory holds no warm-up" in edge.why] == ["village"]
    assert "32 steps where 12 are asked, until the deadline" in fleet.edge("university").why
    assert "4 bits here would need at least" in fleet.edge("village").why
    (ambulance,) = fleet.left_out
    assert ambulance.name == "ambulance"
    assert ambulance.why.count("more memory") == 4


def test_four_edges_train_and_one_adapter_comes_out(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    result = train(HOSPITALS, out=tmp_path / "run", overrides=SHORT)
    summary = result.summary
    assert [(edge.name, edge.mode, edge.steps) for edge in summary.edges] == [
        ("university", "local", 2), ("city", "local", 2), ("county", "local", 2), ("village", "split", 2),
    ]  # fmt: skip
    # Where rounds are not filled, recomputing has no price, and city has room for 16 bits.
    assert [edge.bits for edge in summary.edges if edge.name != "city"] == [16, 4, 32]
    assert [edge.name for edge in summary.left_out] == ["ambulance"]
    events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["edge"] for event in events if "no say in the importance" in str(event.get("advice"))] == ["village"]
    assert summary.eval.homogeneous is not None
    assert summary.eval.homogeneous.edges == ("university",)
    assert summary.seconds.simulated is not None
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_path()), str(result.adapter))
    assert any(torch.any(value != 0) for name, value in model.named_parameters() if "lora_B" in name)
