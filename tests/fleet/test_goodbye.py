"""An edge that is stopped by its owner says so: no round waits for it, and it takes part again when it is started again."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.fleet.loopback import COORDINATOR, LoopbackFleet
from tests.run_files import DEMO, PAIR, merged, run_text

PATIENCE = 240


def events(fleet: LoopbackFleet, kind: str) -> list[dict[str, object]]:
    file = fleet.run_dir / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == kind]


def said(fleet: LoopbackFleet, who: str) -> str:
    return (fleet.folder / f"{who}.log").read_text()


def test_a_round_goes_on_without_an_edge_that_says_goodbye_and_the_next_with_it(tmp_path: Path) -> None:
    """In a run whose rounds would wait an hour for it."""
    config = tmp_path / "run.toml"
    little = merged(DEMO, {"run": {"rounds": 5}, "data": {"train_rows": 40}, "federated": {"min_edges": 1}})
    config.write_text(run_text(little, PAIR, {"train": {"batch_size": 2, "local_steps": 2}}))
    with LoopbackFleet(tmp_path, config, ["north", "south"], has_host=False) as fleet:
        fleet.start_all()
        north, south = (fleet.processes[name] for name in fleet.edges)
        assert fleet.wait_until(lambda: bool(events(fleet, "round_finished")), PATIENCE)
        north.send_signal(signal.SIGSTOP)  # So that the round does not end before south is there again.
        south.send_signal(signal.SIGINT)
        assert south.wait(PATIENCE) == 0
        assert fleet.wait_until(lambda: "south left" in said(fleet, COORDINATOR), PATIENCE)
        assert fleet.wait_until(lambda: any(line["edge"] == "south" for line in events(fleet, "edge_dropped")), PATIENCE)
        fleet.start("south")
        assert fleet.wait_until(lambda: "south is there again" in said(fleet, COORDINATOR), PATIENCE)
        north.send_signal(signal.SIGCONT)
        fleet.wait(PATIENCE)
        for name in fleet.edges:
            fleet.processes[name].send_signal(signal.SIGTERM)
            assert fleet.processes[name].wait(PATIENCE) == 0
            assert "the run is complete: 5 rounds" in said(fleet, name)
        assert "the coordinator was told" in said(fleet, "south")
        assert "the app run" not in said(fleet, COORDINATOR)
    (dropped,) = [line for line in events(fleet, "edge_dropped") if line["edge"] == "south"]
    assert "left of its own will" in str(dropped["reason"])
    with_south = [line["round"] for line in events(fleet, "round_finished") if "south" in line["edges"]]  # type: ignore[operator]
    assert with_south == [one for one in (1, 2, 3, 4, 5) if one != dropped["round"]]
    summary = json.loads((fleet.run_dir / "summary.json").read_text())
    assert {edge["name"]: edge["dropped_rounds"] for edge in summary["edges"]} == {"north": 0, "south": 1}
