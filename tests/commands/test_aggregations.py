"""Whole runs by every rule of [federated] aggregation: what they leave behind is one standard adapter."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import atoll
from atoll.adapters.attach import attached
from atoll.adapters.peft_files import load_adapter
from atoll.errors import ConflictError
from atoll.jobs.job import prepare
from atoll.jobs.split import HostAccess

from tests.conftest import save_model_folder
from tests.run_files import Sections, write_run

SECTIONS: Sections = {
    "run": {"rounds": 3, "compare": ["local-only"]}, "adapter": {"rank": 4},
    "data": {"train": "train.csv", "eval": "eval.csv", "prompt": "{a}", "completion": "{b}"}, "train": {"batch_size": 4, "local_steps": 6},
}  # fmt: skip
IDS = torch.arange(24).view(2, 12) * 3 % 96


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("job")
    save_model_folder(folder / "base", request.param)
    dice = random.Random(0)
    for name, count in (("train", 32), ("eval", 8)):
        words = [dice.randrange(40) for _ in range(count)]
        (folder / f"{name}.csv").write_text("a,b\n" + "".join(f"w{word} w{word + 1},w90 w{word}\n" for word in words))
    write_run(folder, SECTIONS, {"north": {}, "south": {"rank": 2}})
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, atoll.RunResult]:
    """One run by each rule."""
    rules = ("exact-svd", "delta-svd", "stack", "zero-pad", "residual")
    return {rule: atoll.train(folder / "run.toml", out=folder / rule, overrides=(f"federated.aggregation={rule}",)) for rule in rules}


def test_every_rule_learns_and_its_adapter_loads_in_peft(folder: Path, runs: dict[str, atoll.RunResult]) -> None:
    for rule, result in runs.items():
        scores = result.summary.eval
        assert scores.adapted is not None
        assert scores.base is not None
        assert scores.adapted["loss"] < scores.base["loss"], rule
        model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
        state = load_adapter(result.adapter)
        with torch.no_grad():
            with attached(model, state):
                ours = model(IDS).logits
            theirs = PeftModel.from_pretrained(model, result.adapter).eval()(IDS).logits
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
        checkpoint = load_adapter(result.run_dir / "checkpoints" / "round-0003")
        assert checkpoint.digest() == state.digest()
        assert atoll.evaluate(run_dir=result.run_dir)["adapted"] == scores.adapted


def test_what_rules_cost_and_hold_differs(runs: dict[str, atoll.RunResult]) -> None:
    ranks = {rule: set(load_adapter(result.adapter).ranks.values()) for rule, result in runs.items()}
    assert ranks["exact-svd"] == ranks["delta-svd"] == ranks["zero-pad"] == {4}
    assert min(ranks["stack"] | ranks["residual"]) > 4
    down = {rule: result.summary.traffic.down_bytes for rule, result in runs.items()}
    assert down["exact-svd"] == down["zero-pad"] < min(down["stack"], down["residual"])
    assert len({result.summary.traffic.up_bytes for result in runs.values()}) == 1


def test_every_edge_alone_is_plain_training_under_every_rule(runs: dict[str, atoll.RunResult]) -> None:
    alone = {load_adapter(result.run_dir / "edges" / "north" / "adapter").digest() for result in runs.values()}
    assert len(alone) == 1


@pytest.mark.parametrize("rule", ["stack", "residual"])
def test_a_host_for_an_edge_that_says_nothing_is_refused_before_the_run(rule: str, folder: Path) -> None:
    with pytest.raises(ConflictError, match="which a host cannot hold") as caught:
        prepare(folder / "run.toml", (f"federated.aggregation={rule}",), HostAccess("127.0.0.1:1"))
    assert "north, south" in caught.value.got


def test_the_share_that_is_missed_is_an_event(runs: dict[str, atoll.RunResult]) -> None:
    shares = {}
    for rule, result in runs.items():
        events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
        rounds = [event for event in events if event["event"] == "round_finished" and event["phase"] == "federated"]
        shares[rule] = [event["discarded_share"] for event in rounds]
    assert all(share > 0 for rule in ("exact-svd", "zero-pad") for share in shares[rule])
    assert all(share == 0 for rule in ("stack", "residual") for share in shares[rule])
    assert shares["exact-svd"][0] < shares["zero-pad"][0], "no other adapter of its rank misses less"
