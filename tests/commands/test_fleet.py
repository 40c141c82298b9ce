"""A run whose edges stand in a fleet file, opened again when the file is gone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import atoll
from atoll.config.load import load
from atoll.jobs.results.config import run_config
from atoll.runs.layout import RunDirectory

from tests.conftest import save_model_folder
from tests.run_files import Sections, write_run

FLEET = '[[edge]]\nname = "north"\ndata = "north.csv"\nprofile = "north.json"\n[[edge]]\nname = "south"\ndata = "../south.csv"\n'


def test_a_run_of_a_fleet_trains_on_the_fleets_files_and_is_opened_without_it(tmp_path: Path) -> None:
    save_model_folder(tmp_path / "base", "llama")
    (tmp_path / "fleets").mkdir()
    for name, rows in (("fleets/north", 4), ("south", 6), ("held-out", 2)):
        (tmp_path / f"{name}.csv").write_text("a\n" + "w1 w2 w3 w4\n" * rows)
    (tmp_path / "fleets" / "north.json").write_text(json.dumps({"version": 1, "flops": 1e9, "memory": 10**10}))
    (tmp_path / "fleets" / "two.toml").write_text(FLEET)
    sections: Sections = {
        "run": {"rounds": 1, "fleet": "fleets/two.toml"}, "data": {"train": None, "eval": "held-out.csv", "text": "{a}"},
        "adapter": {"targets": "attention"}, "train": {"local_steps": 1},
    }  # fmt: skip
    config = write_run(tmp_path, sections, {})
    loaded = load(config)
    result = atoll.train(config, out=tmp_path / "run")
    events = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
    assert {event["edge"]: event["num_rows"] for event in events if event["event"] == "data_loaded"} == {"north": 4, "south": 6, "": 2}
    shutil.rmtree(tmp_path / "fleets")
    again = run_config(RunDirectory.open(result.run_dir))
    assert again.config == loaded.config
    assert (again.config.edge[0].flops, again.config.edge[0].memory) == (1e9, 10**10)
    assert atoll.evaluate(run_dir=result.run_dir, overrides=["evaluate.batch_size=1"])
