"""Parts of somebody else's in whole runs: named in run.toml, loaded from its folder, and doing what they say."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import pytest

import atoll
from atoll.errors import PartError, TrustError
from atoll.runs.events import read_events

from tests.jobs.conftest import Workplace
from tests.registry.parts import was_imported, write_part

TWO = {"north": {}, "south": {}}


def test_a_policy_chooses_and_has_options_of_its_own(place: Workplace) -> None:
    name = write_part(place.folder, "policy", "runs_policy")
    done = place.train(TWO, {"select": {"policy": name}, f'options."{name}"': {"count": 2}})
    chosen = done.events("modules_chosen")
    assert {(event["policy"], len(event["active"])) for event in chosen} == {(name, 2)}
    assert [edge.active_share for edge in done.result.summary.edges] == pytest.approx([2 / 8] * 2)


def test_an_aggregation_rule_makes_the_common_adapter(place: Workplace) -> None:
    """Edges with as many rows: equal votes are what the built-in rule takes, to the same bits."""
    name = write_part(place.folder, "aggregation", "runs_rule")
    equal, ours = place.train(TWO, {"federated": {"aggregation": name}}, "theirs"), place.train(TWO, {}, "ours")
    assert was_imported(place.folder)
    assert equal.weights == ours.weights


def test_a_planner_says_the_ranks(place: Workplace) -> None:
    done = place.train(TWO, {"plan": {"policy": write_part(place.folder, "planner", "runs_planner")}})
    assert {rank for edge in done.result.summary.edges for rank in edge.ranks.values()} == {2}


def test_an_importance_score_is_what_is_planned_by(place: Workplace) -> None:
    name = write_part(place.folder, "importance", "runs_importance")
    done = place.train(TWO, {"plan": {"policy": "fedpipe", "importance": name, "warmup_steps": 1, "ranks": [2, 4]}})
    assert {(event["importance"], min(event["scores"].values()) > 0) for event in done.events("importance_found")} == {(name, True)}


def test_a_codec_carries_hidden_states(place: Workplace) -> None:
    name = write_part(place.folder, "codec", "runs_codec")
    sections = {"run": {"placement": "split"}}
    theirs, ours = (
        place.train({"north": {}}, {**sections, "wire": {"codec": codec, "mode": "factored"}}, codec[:4]) for codec in (name, "bf16")
    )
    traffic = theirs.result.summary.traffic
    assert traffic.formula_shared_bytes == ours.result.summary.traffic.formula_shared_bytes, "as many bytes as bf16"
    assert theirs.weights != ours.weights


def test_a_reader_reads_files(place: Workplace) -> None:
    name = write_part(place.folder, "reader", "runs_reader")
    (place.folder / "rows.pairs").write_text("".join(f"w{n % 40} => w{(n * 3) % 40}\n" for n in range(24)))
    data = {"train": "rows.pairs", "eval": "rows.pairs", "prompt": "{q}", "completion": " {a}", "reader": name}
    done = place.train({"north": {}}, {"data": data})
    assert [(event["role"], event["num_rows"]) for event in done.events("data_loaded")] == [("train", 24), ("eval", 4)]


def test_a_metric_scores(place: Workplace) -> None:
    name = write_part(place.folder, "metric", "runs_metric")
    done = place.train({"north": {}}, {"evaluate": {"metrics": [name, "exact_match"], "generate_rows": 2, "max_new_tokens": 4}})
    assert set(done.result.summary.eval.adapted) >= {"loss", "length", "exact_match"}


def test_a_tracker_hears_what_the_log_keeps_and_one_that_fails_takes_nothing_away(place: Workplace) -> None:
    name = write_part(place.folder, "tracker", "runs_tracker")
    done = place.train({"north": {}}, {"track": {"to": [name, name.replace("Log", "Falls")]}})
    told = (done.result.run_dir / "tracked.txt").read_text().splitlines()
    kinds = [event["event"] for event in read_events(done.result.run_dir / "events.jsonl")]
    assert told[0] == "start run 0"
    assert told[-1] == "finish complete"
    assert told[1:-1] == kinds
    assert [event["advice"] for event in done.events("advised") if "tracker" in str(event["advice"])] == [
        "the tracker runs_tracker:Falls failed and is told no more: RuntimeError: no network"
    ]


def test_a_transform_changes_what_leaves_an_edge(place: Workplace) -> None:
    """One edge whose numbers are all halved, beside one whose are not."""
    name = write_part(place.folder, "transform", "runs_transform")
    plain, halved = place.train({"north": {}}, {"run": {"rounds": 1}}, "plain"), place.train(
        {"north": {}}, {"run": {"rounds": 1}, "privacy": {"transforms": [name]}}, "halved"
    )  # fmt: skip
    assert plain.weights != halved.weights
    again = place.train({"north": {}}, {"run": {"rounds": 1}, "privacy": {"transforms": [name]}}, "again")
    assert halved.weights == again.weights


def test_a_transform_that_makes_something_else_sends_nothing(place: Workplace) -> None:
    name = write_part(place.folder, "transform", "runs_broken")
    file = place.folder / "runs_broken.py"
    file.write_text(file.read_text().replace("update.scale(0.5)", "None"))
    with pytest.raises(PartError, match="runs_broken"):
        place.train({"north": {}}, {"privacy": {"transforms": [name]}})


_GROWS = "class Halves:\n    grows = True\n    def stages(self, config):\n        return [(0, 9)]"


@pytest.mark.parametrize(("kind", "old", "new", "said"), [
    ("policy", "return [module.name for module in pool[: self.count]]", "return None", "choose of the policy {} gave None"),
    ("policy", "return Schedule.at_start()", "return None", "schedule of the policy {} gave None"),
    ("policy", "        return None", "        return 'loudness'", "measures of the policy {} gave 'loudness'"),
    ("policy", "        return None", "        return 'gradient'", "measures of the policy {} gave "),
    ("planner", "return planned_at", "return None and planned_at", "plan of the planner {} gave None"),
    ("planner", "max(1, rank // 2)", "0.5", "rank 0.5 for"),
    ("planner", "class Halves:", _GROWS, "stages of the planner {} gave [(0, 9)]"),
    ("importance", "return self.up.data, self.down.data", "return self.down.data, self.up.data", "factors of the importance {} gave [(4, "),
    ("importance", "return self.total", "return None", "score of the importance {} gave None"),
    ("aggregation", "return Votes(module)", "return None", "begin of the aggregation {} gave None"),
    ("aggregation", "def finish(self)", "def finish(self, more)", "begin of the aggregation {} gave <runs_wrong_"),
    ("aggregation", "return self.module.cut", "return None and self.module.cut", "finish of the aggregation {} gave None"),
    ("codec", "return 2 * math.prod(shape)", "return None", "num_bytes of the codec {} gave None"),
    ("codec", "        return values.clamp", "        return None and values.clamp", "encode of the codec {} gave None"),
])  # fmt: skip
def test_what_a_part_gives_is_its_own_mistake_and_no_bug(
    kind: str, old: str, new: str, said: str, place: Workplace, request: pytest.FixtureRequest
) -> None:
    module = f"runs_wrong_{kind}_{zlib.crc32(request.node.callspec.id.encode()):x}"
    name = write_part(place.folder, kind, module)
    file = place.folder / f"{module}.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    sections: Mapping[str, Mapping[str, object]] = {
        "policy": {"select": {"policy": name}}, "planner": {"plan": {"policy": name, "ranks": [2]}},
        "aggregation": {"federated": {"aggregation": name}},
        "importance": {"plan": {"policy": "fedpipe", "importance": name, "warmup_steps": 1, "ranks": [2, 4]}},
        "codec": {"run": {"placement": "split"}, "wire": {"codec": name}},
    }[kind]  # fmt: skip
    with pytest.raises(PartError) as caught:
        place.train({"north": {}}, sections)
    assert said.format(name) in caught.value.page()


def test_a_policy_that_chooses_nothing_is_named(place: Workplace) -> None:
    name = write_part(place.folder, "policy", "runs_empty")
    with pytest.raises(PartError, match="chose what cannot be active"):
        place.train({"north": {}}, {"select": {"policy": name}, f'options."{name}"': {"count": 0}})


@pytest.mark.parametrize("command", ["resume", "evaluate", "load", "generate", "merge"])
def test_a_run_that_names_code_is_opened_only_by_who_trusts_it(command: str, place: Workplace) -> None:
    """Somebody else's run folder: the module that it names is there, and nothing imports it."""
    done = place.train({"north": {}}, {"data": {"eval": "rows.csv"}})
    module = f"stranger_{command}"
    name = write_part(place.folder, "metric", module)
    config = done.result.run_dir / "config.json"
    noted = json.loads(config.read_text())
    noted["config"]["evaluate"]["metrics"] = [name]
    config.write_text(json.dumps(noted))
    run_dir = done.result.run_dir
    opened = {
        "resume": lambda trust: atoll.resume(run_dir, trust=trust), "load": lambda trust: atoll.load(run_dir, trust=trust),
        "evaluate": lambda trust: atoll.evaluate(run_dir=run_dir, trust=trust, overrides=["evaluate.max_new_tokens=2"]),
        "generate": lambda trust: atoll.generate(run_dir, "w1", trust=trust, max_new_tokens=1),
        "merge": lambda trust: atoll.merge(run_dir, out=place.folder / "merged", trust=trust),
    }[command]  # fmt: skip
    with pytest.raises(TrustError) as caught:
        opened(False)
    assert name in caught.value.got
    assert not was_imported(place.folder)
    opened(True)


def test_a_part_that_is_typed_is_looked_for_where_the_run_says_and_so_needs_trust_too(place: Workplace) -> None:
    run_dir = place.train({"north": {}}, {"data": {"eval": "rows.csv"}}).result.run_dir
    typed = [f'evaluate.metrics=["{write_part(place.folder, "metric", "typed_later")}"]', "evaluate.max_new_tokens=2"]
    with pytest.raises(TrustError):
        atoll.evaluate(run_dir=run_dir, overrides=typed)
    assert not was_imported(place.folder)
    assert "length" in atoll.evaluate(run_dir=run_dir, overrides=typed, trust=True)["adapted"]


@pytest.mark.parametrize("command", ["load", "generate", "merge"])
def test_what_is_not_needed_any_more_is_not_imported(command: str, place: Workplace) -> None:
    name = write_part(place.folder, "metric", f"needed_{command}")
    run_dir = place.train({"north": {}}, {"evaluate": {"metrics": [name], "generate_rows": 1, "max_new_tokens": 1}}).result.run_dir
    (place.folder / f"needed_{command}.py").unlink()
    {
        "load": lambda: atoll.load(run_dir, trust=True), "generate": lambda: atoll.generate(run_dir, "w1", trust=True, max_new_tokens=1),
        "merge": lambda: atoll.merge(run_dir, out=place.folder / "merged", trust=True),
    }[command]()  # fmt: skip


def test_a_run_with_parts_of_ones_own_goes_on_with_them(place: Workplace, tmp_path: Path) -> None:
    name = write_part(place.folder, "aggregation", "resumed_rule")
    whole = place.train(TWO, {"federated": {"aggregation": name}}, "whole")
    import shutil

    cut = shutil.copytree(whole.result.run_dir, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints" / "round-0002")
    summary = json.loads((cut / "summary.json").read_text())
    (cut / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    result = atoll.resume(cut, trust=True)
    assert (result.adapter / "adapter_model.safetensors").read_bytes() == whole.weights


def test_two_files_of_one_name_are_not_mixed_up(place: Workplace, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    name = write_part(place.folder, "metric", "twice")
    place.train({"north": {}}, {"evaluate": {"metrics": [name], "generate_rows": 1, "max_new_tokens": 1}})
    write_part(other, "metric", "twice")
    (other / "run.toml").write_text(f'[data]\ntrain = "demo"\n[evaluate]\nmetrics = ["{name}"]\n')
    with pytest.raises(PartError, match="two modules have the same name"):
        atoll.plan(other / "run.toml")
