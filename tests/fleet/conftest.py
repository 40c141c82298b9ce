"""A fleet's folders as `atoll fleet init` writes them: north has its own rows, south trains against a host, west may."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.fleet.init import init
from atoll.fleet.processes import free_port

RUN = """
[run]
placement = "local"

[data]
train = "all.csv"
eval = "held/out.csv"
prompt = "{q}"
completion = "{a}"

[[edge]]
name = "north"
data = "north.csv"
profile = "north.json"

[[edge]]
name = "south"
mode = "split"
data = "south.csv"

[[edge]]
name = "west"
"""
PROFILE = '{"version": 1, "memory": 8000000000}'


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    """The config, with the one file beside it that reading it opens."""
    (tmp_path / "north.json").write_text(PROFILE)
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


@pytest.fixture
def folder(run_toml: Path, tmp_path: Path) -> Path:
    """The whole fleet's folder; nobody listens at its addresses."""
    init(run_toml, tmp_path / "fleet", f"127.0.0.1:{free_port()}", [f"gpu=127.0.0.1:{free_port()}"])
    return tmp_path / "fleet"
