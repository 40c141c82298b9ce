"""A third clinic joins a federation that runs, and one leaves it for good: to the bits of one process with the same members."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

from atoll.commands.train import train_job
from atoll.fleet.members import remove
from atoll.jobs.backends.in_process import InProcessBackend
from atoll.jobs.backends.members import with_newcomer, without
from atoll.jobs.job import Job, prepare

from tests.fleet.loopback import COORDINATOR, LoopbackFleet

PATIENCE = 240
NAMES = ["north", "south", "west"]
RUN = """
[run]
name = "clinics"
rounds = 6
[model]
base = "tiny"
[data]
train = "demo"
prompt = "{mr} ->"
completion = " {ref}"
max_length = 64
train_rows = 60
eval_rows = 8
[adapter]
rank = 4
targets = "attention"
[train]
learning_rate = 3e-3
batch_size = 4
local_steps = 2
[federated]
min_edges = 1
round_timeout = "45 s"
[[edge]]
name = "north"
[[edge]]
name = "south"
[[edge]]
name = "west"
"""


class Simulated(InProcessBackend):
    """Edges in this process, of which some come and go as is said by the first round with, or without, them."""

    def __init__(self, whole: Job, comes: dict[str, int], goes: dict[str, int], job: Job, edges: object, phase: str, log: object) -> None:
        here = whole.edges if phase == "federated" else edges
        super().__init__(job, here, phase, log)  # type: ignore[arg-type]
        self.whole, self.comes, self.goes, self.members = whole, comes, goes, {edge.name for edge in edges}  # type: ignore[attr-defined]

    @property
    def nodes(self) -> dict[int, str]:
        return {node: name for node, name in super().nodes.items() if name in self.members}

    def changed(self, job: Job, number: int) -> Job | None:
        found = job
        for name in [name for name, first in self.goes.items() if first == number]:
            found = without(found, name, number)
        for edge in self.whole.edges:
            if self.comes.get(edge.name) == number:
                own = next(one for one in self.whole.config.edge if one.name == edge.name)
                wider = with_newcomer(found, own, edge, [one.name for one in self.whole.config.edge])
                assert isinstance(wider, Job), wider
                found = wider
        self.members = {edge.name for edge in found.edges}
        return None if found is job else found


def simulated(config: Path, out: Path, comes: dict[str, int], goes: dict[str, int]) -> Path:
    whole = prepare(config)
    job = whole
    for name in comes:
        job = without(job, name, 1)
    return train_job(replace(job, start=whole.start), out, (), partial(Simulated, whole, comes, goes)).run_dir


def events(run: Path, kind: str) -> list[dict[str, object]]:
    file = run / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line for line in map(json.loads, lines) if line["event"] == kind]


def test_one_joins_a_running_federation_and_one_leaves_for_good(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(RUN)
    with LoopbackFleet(tmp_path, config, ["north", "south"], has_host=False) as fleet:
        fleet.start_all()
        south = fleet.processes["south"]
        assert fleet.wait_until(lambda: bool(events(fleet.run_dir, "round_finished")), PATIENCE)
        south.send_signal(signal.SIGSTOP)  # So that no round ends before the newcomer has answered.
        fleet.start("west")
        asked = tmp_path / "fleet" / "edges" / "west" / "audit.jsonl"
        assert fleet.wait_until(lambda: asked.exists() and "query.capabilities" in asked.read_text(), PATIENCE)
        south.send_signal(signal.SIGCONT)
        assert fleet.wait_until(lambda: any("west" in line["edges"] for line in events(fleet.run_dir, "round_finished")), PATIENCE)
        south.send_signal(signal.SIGSTOP)
        remove(tmp_path / "fleet", "south")
        fleet.wait(PATIENCE)
        south.send_signal(signal.SIGCONT)
        said = fleet.said()
    by_round = {int(str(line["round"])): line["edges"] for line in events(fleet.run_dir, "round_finished")}
    comes = min(number for number, edges in by_round.items() if "west" in edges)  # type: ignore[operator]
    goes = 1 + max(number for number, edges in by_round.items() if "south" in edges)  # type: ignore[operator]
    assert 1 < comes < goes <= 6, said
    dropped = [line for line in events(fleet.run_dir, "edge_dropped") if "of the fleet no more" not in str(line["reason"])]
    assert all(line["edge"] == "south" for line in dropped), "a stopped process may miss a round"
    missed = {int(str(line["round"])) for line in dropped}
    assert not missed, f"this machine was too slow for the test's patience: {missed}"
    run = simulated(config, tmp_path / "here", {"west": comes}, {"south": goes})
    weights = Path("adapter") / "adapter_model.safetensors"
    assert (fleet.run_dir / weights).read_bytes() == (run / weights).read_bytes()
    advice = [str(line["advice"]) for line in events(fleet.run_dir, "advised")]
    assert f"it takes part from round {comes} on" in advice
    assert any(one.startswith("it left for good") for one in advice) or goes == 6
    summary = json.loads((fleet.run_dir / "summary.json").read_text())
    assert {edge["name"]: edge["first_round"] for edge in summary["edges"] if edge["name"] != "south"} == {"north": 1, "west": comes}
    plan = json.loads((fleet.run_dir / "plan.json").read_text())
    assert {edge["name"] for edge in plan["edges"]} >= {"north", "west"}
    assert COORDINATOR in fleet.processes
