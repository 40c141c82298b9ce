"""examples/extend: a policy and an aggregation rule from files beside run.toml, trained."""

from __future__ import annotations

from pathlib import Path

import pytest

import atoll
from atoll.runs.events import read_events

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "extend" / "run.toml"
SHORT = [
    "run.rounds=1", "train.local_steps=6", "select.observe_steps=2", "select.every=6", "data.train_rows=65", "data.partition=iid",
    "data.eval_rows=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> atoll.RunResult:
    return atoll.train(EXAMPLE, out=tmp_path_factory.mktemp("extend") / "run", overrides=SHORT)


def test_the_policy_keeps_so_many_modules_of_every_block(result: atoll.RunResult) -> None:
    chosen = [event for event in read_events(result.run_dir / "events.jsonl") if event["event"] == "modules_chosen"]
    active = [event["active"] for event in chosen if event["reason"] == "choice"]
    assert active
    for names in active:
        blocks = [name.split(".")[2] for name in names]  # type: ignore[union-attr]
        assert {blocks.count(block) for block in blocks} == {2}


def test_the_rule_gives_edges_of_unequal_data_equal_votes(result: atoll.RunResult, tmp_path: Path) -> None:
    weighed = atoll.train(EXAMPLE, out=tmp_path / "run", overrides=[*SHORT, "federated.aggregation=exact-svd"])
    ours, theirs = ((one.adapter / "adapter_model.safetensors").read_bytes() for one in (weighed, result))
    counts = {edge.name: edge.steps for edge in result.summary.edges}
    assert counts == {"hospital": 6, "pharmacy": 6}
    assert ours != theirs


def test_what_ships_in_its_place_is_one_word(tmp_path: Path) -> None:
    """The same file with names that ship: nothing else has to change."""
    plain = [*SHORT, "select.policy=kill-and-revive", "federated.aggregation=exact-svd"]
    with pytest.raises(atoll.errors.UnknownKeyError, match="of a part that this run does not name"):
        atoll.train(EXAMPLE, out=tmp_path / "run", overrides=plain)
