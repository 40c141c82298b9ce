"""Whose key counts at a SuperLink that outlives its runs: that in the coordinator's folder, whatever was there before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from atoll.errors import HostLostError
from atoll.fleet.check import check_fleet
from atoll.fleet.files import CoordinatorFolder, EdgeFolder
from atoll.fleet.init import init
from atoll.fleet.links.flower import EdgeLink
from atoll.fleet.links.way import open_way
from atoll.fleet.members import add, remove, renew
from atoll.fleet.processes import free_port
from atoll.fleet.superlink import SuperLink
from atoll.split.certificates import DeviceTls

from tests.run_files import DEMO, PAIR, run_text

KEPT = ("client.pem", "client.key", "node.key", "node.pub", "ca.pem", "edge.json")


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """Folders of a coordinator that has run once, and of two edges."""
    (tmp_path / "run.toml").write_text(run_text({}, PAIR, DEMO))
    init(tmp_path / "run.toml", tmp_path / "fleet", f"127.0.0.1:{free_port()}")
    with opened(tmp_path / "fleet") as link:
        assert set(link.nodes().values()) == {"north", "south"}
    return tmp_path / "fleet"


def opened(fleet: Path) -> SuperLink:
    return SuperLink(CoordinatorFolder(fleet / "coordinator"), print)


def is_let_in(fleet: Path, name: str, key: Path | None = None, certificate: Path | None = None) -> bool:
    """Whether the edge, or whoever comes with this key of a node and the certificate in this folder, gets to be a node."""
    edge = EdgeFolder(fleet / "edges" / name)
    shown = EdgeFolder(certificate or edge.path)
    tls = DeviceTls(edge.ca, shown.cert, shown.key)
    try:
        with open_way(edge.read().superlink, tls) as way, EdgeLink(edge.read().superlink, way, key or edge.node_key):
            return True
    except (httpx.HTTPStatusError, httpx.TransportError):
        return False


def says_ok(fleet: Path, name: str) -> bool:
    """Whether doctor thinks that the edge would be let in."""
    checks = {check.name: check for check in check_fleet(fleet).checks}
    return checks[f"edges/{name} SuperLink"].status == "ok"


def twice(fleet: Path) -> None:
    for _ in range(2):
        remove(fleet, "north")
        add(fleet, "north")


def with_a_run_between(fleet: Path) -> None:
    remove(fleet, "north")
    with opened(fleet) as link:
        assert set(link.nodes().values()) == {"south"}
    add(fleet, "north")


@pytest.mark.parametrize("change", [
    lambda fleet: renew(fleet), lambda fleet: renew(fleet, "north"), lambda fleet: (remove(fleet, "north"), add(fleet, "north")),
    twice, with_a_run_between,
], ids=["all renewed", "renewed", "removed and added", "twice", "with a run between"])  # fmt: skip
def test_an_edge_is_let_in_after(change: Callable[[Path], object], fleet: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(fleet / "edges" / "north", old)
    change(fleet)
    has_new_key = (old / "node.key").read_bytes() != (fleet / "edges" / "north" / "node.key").read_bytes()
    with opened(fleet) as link:
        assert set(link.nodes().values()) == {"north", "south"}
        assert says_ok(fleet, "north")
        assert is_let_in(fleet, "north")
        assert is_let_in(fleet, "south")
        assert is_let_in(fleet, "north", old / "node.key") is not has_new_key, "under the new certificate, too"
        assert is_let_in(fleet, "north", old / "node.key", old) is not has_new_key


def test_one_that_is_added_while_the_coordinator_runs_is_let_in_by_the_next(fleet: Path) -> None:
    with opened(fleet) as link:
        link.nodes()
        remove(fleet, "north")
        add(fleet, "north")
        assert not is_let_in(fleet, "north")
        assert not says_ok(fleet, "north")
    with opened(fleet) as link:
        link.nodes()
        assert says_ok(fleet, "north")
        assert is_let_in(fleet, "north")


def test_a_fleet_that_is_brought_back_from_a_copy_is_let_in(fleet: Path, tmp_path: Path) -> None:
    """A key that SuperLink was told to forget is the edge's again."""
    shutil.copytree(fleet / "coordinator" / "nodes", tmp_path / "nodes")
    shutil.copytree(fleet / "edges" / "north", tmp_path / "north")
    remove(fleet, "north")
    add(fleet, "north")
    with opened(fleet) as link:
        link.nodes()
    shutil.copytree(tmp_path / "nodes", fleet / "coordinator" / "nodes", dirs_exist_ok=True)
    new, key = EdgeFolder(fleet / "edges" / "north"), EdgeFolder(tmp_path / "north").node_key
    with opened(fleet) as link:
        assert set(link.nodes().values()) == {"north", "south"}
        assert is_let_in(fleet, "north", key)
        assert not is_let_in(fleet, "north", new.node_key)


def test_an_edge_whose_key_is_taken_out_of_the_folder_stays_out(fleet: Path) -> None:
    """As documented for a fleet whose ca.key is lost: in every run from then on."""
    (fleet / "coordinator" / "nodes" / "north.pub").unlink()
    for _ in range(2):
        with opened(fleet) as link:
            assert set(link.nodes().values()) == {"south"}
            assert not is_let_in(fleet, "north")


def test_two_edges_with_one_key_are_refused(fleet: Path) -> None:
    nodes = fleet / "coordinator" / "nodes"
    shutil.copy(nodes / "south.pub", nodes / "north.pub")
    with opened(fleet) as link, pytest.raises(HostLostError, match="cannot be registered"):
        link.nodes()
    assert "north.pub and south.pub" in "".join(check.found for check in check_fleet(fleet).checks if check.status == "fail")
