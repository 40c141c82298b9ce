"""fleet.json and edge.json: what is written is read, and what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.config.load import load
from atoll.errors import FleetFolderError
from atoll.fleet.files import (
    CoordinatorFolder,
    EdgeFile,
    EdgeFolder,
    FleetFile,
    json_text,
    split_address,
)
from atoll.fleet.named import named_by_coordinator, named_by_edge

ADDRESSES = st.tuples(
    st.one_of(
        st.ip_addresses(v=4).filter(lambda ip: not ip.is_unspecified).map(str),
        st.ip_addresses(v=6).filter(lambda ip: not ip.is_unspecified).map(lambda ip: f"[{ip}]"),
        st.from_regex(r"[a-z][a-z0-9-]{0,10}(\.[a-z]{2,5})?", fullmatch=True),
    ),
    st.integers(1, 65535),
).map(lambda parts: f"{parts[0]}:{parts[1]}")


@given(ADDRESSES)
def test_an_address_is_its_host_and_port(address: str) -> None:
    host, port = split_address(address, "here")
    assert address == (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    fleet, edge = FleetFile("h:1", ("a", "b")), EdgeFile("a", "h:1", None)
    (tmp_path / "fleet.json").write_text(json_text(fleet))
    (tmp_path / "edge.json").write_text(json_text(edge))
    assert (CoordinatorFolder(tmp_path).read(), EdgeFolder(tmp_path).read()) == (fleet, edge)
    behind = FleetFile("h:1", ("a", "b"), "/run/atoll/superlink")
    (tmp_path / "fleet.json").write_text(json_text(behind))
    assert CoordinatorFolder(tmp_path).read() == behind


@pytest.mark.parametrize(("text", "says"), [
    (None, "no file fleet.json"), ("{", "Expecting"), ("[]", "no object"), ('{"format": 2}', "format 2"),
    ('{"address": "h:1"}', "format null"),
    ('{"format": 1, "address": "h:1"}', "the keys address"), ('{"format": 1, "address": "h:1", "edges": ["a"], "x": 1}', "edges, x"),
    ('{"format": 1, "address": "h:1", "edges": []}', "edges = []"), ('{"format": 1, "address": "h:1", "edges": "a"}', 'edges = "a"'),
    ('{"format": 1, "address": "h:1", "edges": [1]}', "edges = [1]"), ('{"format": 1, "address": 1, "edges": ["a"]}', "address = 1"),
    ('{"format": 1, "address": "h", "edges": ["a"]}', 'address = "h"'),
    ('{"format": 1, "address": "h:1", "edges": ["a"], "socket": 1}', "socket = 1"),
])  # fmt: skip
def test_a_fleet_file_that_is_not_right(text: str | None, says: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "fleet.json").write_text(text)
    with pytest.raises(FleetFolderError) as caught:
        CoordinatorFolder(tmp_path).read()
    assert says in caught.value.got
    assert caught.value.do


@pytest.mark.parametrize(("key", "value"), [("name", ""), ("name", 1), ("superlink", "h"), ("superlink", None), ("host", "h"), ("host", 1)])
def test_an_edge_file_that_is_not_right(key: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "edge.json").write_text(json.dumps({"format": 1, "name": "a", "superlink": "h:1", "host": "h:2", key: value}))
    with pytest.raises(FleetFolderError) as caught:
        EdgeFolder(tmp_path).read()
    assert f"{key} = " in caught.value.got


def test_a_file_that_is_no_text_is_said_to_be_damaged(tmp_path: Path) -> None:
    (tmp_path / "edge.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FleetFolderError, match="damaged"):
        EdgeFolder(tmp_path).read()


def test_what_run_toml_names(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "fleet").mkdir()
    (tmp_path / "fleet" / "p.json").write_text('{"version": 1}')
    (tmp_path / "fleet" / "all.toml").write_text('[[edge]]\nname = "a"\ndata = "a.csv"\nprofile = "p.json"\n[[edge]]\nname = "b"\n')
    (tmp_path / "run.toml").write_text(
        '[run]\nfleet = "fleet/all.toml"\n[model]\nbase = "base"\n[data]\ntrain = "org/rows"\neval = "eval.csv"\ntext = "{t}"\n'
        '[plan]\npolicy = "fedpipe"\nimportance_file = "old/importance.json"\n[adapter]\nstart = "old/adapter"\n'
    )
    loaded = load(tmp_path / "run.toml")
    shared = [("fleet file", tmp_path / "fleet/all.toml"), ("profile", tmp_path / "fleet/p.json"), ("base", tmp_path / "base")]
    own = [("start adapter", tmp_path / "old/adapter"), ("importance", tmp_path / "old/importance.json")]
    assert [(one.what, one.path) for one in named_by_coordinator(loaded)] == [*shared, *own, ("held-out rows", tmp_path / "eval.csv")]
    assert [(one.what, one.path) for one in named_by_edge(loaded, "a")] == [*shared, ("rows", tmp_path / "fleet/a.csv")]
    assert [(one.what, one.value, one.path) for one in named_by_edge(loaded, "b")][-1] == ("all edges' rows", "org/rows", None)
