"""A fleet's folders as `atoll fleet init` writes them: north has its own rows, south trains against a host, west may."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.fleet.init import init
from atoll.fleet.processes import free_port

from tests.run_files import Sections, write_run

SECTIONS: Sections = {
    "run": {"placement": "local"}, "data": {"train": "all.csv", "eval": "held/out.csv", "prompt": "{q}", "completion": "{a}"}
}  # fmt: skip
EDGES: Sections = {"north": {"data": "north.csv", "profile": "north.json"}, "south": {"mode": "split", "data": "south.csv"}, "west": {}}
PROFILE = '{"version": 1, "memory": 8000000000}'


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    """The config, with the one file beside it that reading it opens."""
    (tmp_path / "north.json").write_text(PROFILE)
    return write_run(tmp_path, SECTIONS, EDGES, over={})


@pytest.fixture
def folder(run_toml: Path, tmp_path: Path) -> Path:
    """The whole fleet's folder; nobody listens at its addresses."""
    init(run_toml, tmp_path / "fleet", f"127.0.0.1:{free_port()}", [f"gpu=127.0.0.1:{free_port()}"])
    return tmp_path / "fleet"
