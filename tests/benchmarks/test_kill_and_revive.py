"""The comparison of module choices goes on after a stop, and what it keeps counts on other machines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import atoll
from atoll.runs.events import Event
from sides import kr_runs, kr_table
from sides.kr_runs import Results, Spec

SPEC = Spec("demo", "all", ("select.policy=all",), 1e-3, 0, "dev")


def write(work: Path, base: str = "tiny", more: str = "") -> Path:
    """A task of two rounds on what is built in."""
    work.mkdir(exist_ok=True)
    path = work / "demo.toml"
    path.write_text(
        f'[run]\nrounds = 2\n[model]\nbase = "{base}"\n[data]\ntrain = "demo"\neval = "demo"\nprompt = "{{mr}} ->"\n'
        'completion = " {ref}"\n'
        f"train_rows = 8\neval_rows = 2\n{more}[train]\nlocal_steps = 1\nbatch_size = 2\n[evaluate]\nevery = 1\n"
        '[[edge]]\nname = "device"\nmode = "split"\n'
    )
    return path


def test_a_run_that_was_stopped_goes_on_and_comes_to_the_same(tmp_path: Path) -> None:
    config, key = write(tmp_path), SPEC.key(tmp_path)
    whole = kr_runs.perform(SPEC, tmp_path, key)

    def stop(event: Event) -> None:
        if event.kind() == "checkpoint_written":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atoll.train(config, out=tmp_path / "runs" / key, overrides=SPEC.all_overrides, observers=[stop])
    resumed = kr_runs.perform(SPEC, tmp_path, key)
    assert (whole["times_resumed"], resumed["times_resumed"]) == (0, 1)
    assert [point["steps"] for point in whole["curve"]] == [0, 1, 2]
    # It was stopped before the score that was due was there, and has opened another session with its host.
    assert resumed["curve"] == [whole["curve"][0], whole["curve"][2]]
    assert resumed["traffic"]["formula_shared_bytes"] == whole["traffic"]["formula_shared_bytes"]
    same = ("scores", "steps", "train_loss", "edge_compute", "active_share")
    assert {name: resumed[name] for name in same} == {name: whole[name] for name in same}
    assert not (tmp_path / "runs" / key).exists()


def test_a_run_that_cannot_go_on_begins_again(tmp_path: Path) -> None:
    write(tmp_path)
    key = SPEC.key(tmp_path)
    (tmp_path / "runs" / key).mkdir(parents=True)
    (tmp_path / "runs" / key / "config.json").write_text("{")
    assert kr_runs.perform(SPEC, tmp_path, key)["times_resumed"] == 0


def test_a_key_names_what_was_asked_and_not_where_the_base_lies(tmp_path: Path) -> None:
    write(tmp_path / "here", "/some/where/model")
    write(tmp_path / "there", "/else/model", "max_length = 256\n")
    write(tmp_path / "other", "/else/model2")
    here, there, other = (SPEC.key(tmp_path / name) for name in ("here", "there", "other"))
    assert here == there != other
    assert len({here, *(replace(SPEC, **change).key(tmp_path / "here") for change in ({"seed": 1}, {"learning_rate": 2e-3}))}) == 3


def test_what_is_kept_is_not_done_again_and_is_what_tables_are_made_of(tmp_path: Path) -> None:
    write(tmp_path)
    record = kr_runs.perform(SPEC, tmp_path, SPEC.key(tmp_path)) | {"task": "e2e", "part": "test"}
    tested = [record | {"scores": {"loss": 2.0 - rate, "bleu": 1.0}, "learning_rate": rate, "key": str(rate)} for rate in (0.25, 0.5)]
    config = {
        "model": "SmolLM2-135M", "modules": 90, "steps": 2, "epochs": 1, "batch_size": 2, "rank": 8, "cut": "", "seeds": [0],
        "rates": [0.25, 0.5], "chosen_rates": {"e2e": {"all": 0.5}},
    }  # fmt: skip
    kr_table.write(tmp_path, {"e2e": tested}, config, aloud=False)
    name = kr_table.name_of("SmolLM2-135M", 2)
    text, kept = (tmp_path / f"{name}.md").read_text(), kr_table.results.read_runs(tmp_path, name)
    assert "| all | 0.5 | 1 | 1.500 |" in text
    assert "| dev loss after steps | 0 | 1 | 2 |" in text
    assert "| all | 0.25 |" not in text
    assert [one["key"] for one in Results(tmp_path / "none", kept["e2e"]).records.values()] == ["0.25", "0.5"]
    kr_table.write(tmp_path, kept, config, aloud=False)
    assert (tmp_path / f"{name}.md").read_text() == text
    assert json.loads(json.dumps(kr_table.results.read_runs(tmp_path, name))) == kept
