"""An app run lasts as long as its coordinator, whatever else is made in that process."""

from __future__ import annotations

from pathlib import Path

from atoll.federated.flower import ConfigRecord, Message, RecordDict
from atoll.fleet.files import CoordinatorFolder, EdgeFolder
from atoll.fleet.init import init
from atoll.fleet.links.frames import Frame
from atoll.fleet.links.node import serve
from atoll.fleet.links.relay import FleetGrid
from atoll.fleet.processes import free_port
from atoll.fleet.superlink import SuperLink

from tests.fleet.stranger import in_background
from tests.run_files import DEMO, PAIR, run_text

SECONDS = 60.0


def test_a_phase_that_begins_takes_nothing_from_the_app_run(tmp_path: Path) -> None:
    """Each phase makes a grid of its own, and with it says anew who in this process makes messages."""
    (tmp_path / "run.toml").write_text(run_text({}, PAIR, DEMO))
    init(tmp_path / "run.toml", tmp_path / "fleet", f"127.0.0.1:{free_port()}")
    content = RecordDict({"a": ConfigRecord({"b": 1})})
    with SuperLink(CoordinatorFolder(tmp_path / "fleet" / "coordinator"), print) as link:
        nodes = link.nodes()
        link.carry()
        begun = link._carrier
        edge = EdgeFolder(tmp_path / "fleet" / "edges" / "north")
        node = next(number for number, name in nodes.items() if name == "north")
        with in_background(serve, edge, lambda data: Frame.from_bytes(data).answered(content).to_bytes(), print):
            for _ in range(3):
                grid = FleetGrid(link.relay, nodes)
                (reply,) = grid.send_and_receive([Message(content, node, "train", group_id="1")], timeout=SECONDS)
                assert reply.content.config_records["a"]["b"] == 1
        assert link._carrier is begun
        assert begun is not None
        assert begun.is_alive()
