"""What `atoll doctor` says of this machine."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from atoll.base.load import load_base
from atoll.commands import doctor as examination
from atoll.commands.doctor import Check, DoctorReport
from atoll.config.fleet import read_profile
from atoll.config.load import load_config
from atoll.jobs.split import serve
from atoll.split.host.tenants import HostLimits
from atoll.training import speed

from tests.conftest import save_model_folder
from tests.split.running import running


def test_a_line_for_each_thing_looked_at(atoll: Callable[..., object]) -> None:
    outcome = atoll("doctor")
    assert outcome.status == 0, outcome.out
    for name in ("python", "torch", "transformers", "memory", "disk", "OMP_WAIT_POLICY", "hub", "threads", "gpu", "speed"):
        assert f"  {name} " in outcome.out


def test_json_has_every_check(atoll: Callable[..., object]) -> None:
    value = json.loads(atoll("doctor", "--json").out)
    assert value["well"] is True
    assert all(check["status"] in ("ok", "warn") and set(check) == {"name", "status", "found", "do"} for check in value["checks"])


def test_what_would_fail_is_a_status_and_says_what_to_do(atoll: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    report = DoctorReport((Check("python", "ok", "3.11"), Check("torch", "fail", "not installed", "pip install torch")))
    monkeypatch.setattr(examination, "doctor", lambda: report)
    outcome = atoll("doctor")
    assert outcome.status == 1
    assert outcome.out.splitlines() == [
        "ok    python           3.11",
        "FAIL  torch            not installed",
        " " * 23 + "-> pip install torch",
    ]


@pytest.mark.parametrize(
    ("wanted", "status", "do"),
    [
        ("pytest>=1", "ok", ""),
        ("pytest<1", "warn", "pip install 'pytest<1'"),
        ("no-such-library>=2", "fail", "pip install 'no-such-library>=2'"),
    ],
)
def test_a_library_is_held_against_its_range(wanted: str, status: str, do: str) -> None:
    check = examination._library(Requirement(wanted))
    assert (check.status, check.do) == (status, do)


def test_spinning_threads_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "OMP_WAIT_POLICY", "active")
    assert examination._waiting().status == "warn"


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark of as few steps as there can be."""
    monkeypatch.setattr(speed, "MEASURED_SECONDS", 0.0)


def test_a_profile_is_what_an_edge_of_run_toml_has(atoll: Callable[..., object], soon: None, tmp_path: Path) -> None:
    outcome = atoll("doctor", "--profile", "north.json")
    assert (outcome.status, outcome.err) == (0, "")
    assert [line.split()[0] for line in outcome.out.splitlines()] == ["memory", "speed", "link", "wrote", "next:"]
    (tmp_path / "run.toml").write_text('[[edge]]\nname = "north"\nprofile = "north.json"\n')
    (edge,) = load_config(tmp_path / "run.toml").edge
    written = json.loads((tmp_path / "north.json").read_text())
    assert (edge.memory, edge.flops, edge.bandwidth, edge.latency) == (written["memory"], written["flops"], None, None)
    assert written["flops"] == pytest.approx(
        written["measured"]["speed"]["step_flops"] / statistics.median(written["measured"]["speed"]["step_seconds"])
    )
    assert sorted(os.listdir(tmp_path)) == ["north.json", "run.toml"]


def test_where_a_base_goes_to_an_accelerator_its_memory_is_the_profile(
    atoll: Callable[..., object], soon: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examination, "_accelerator_bytes", lambda: 23 * 10**9)
    outcome = atoll("doctor", "--profile", "north.json")
    assert "23 GB (free on the accelerator, beside its context; the machine's own: " in outcome.out
    (tmp_path / "run.toml").write_text('[[edge]]\nname = "north"\nprofile = "north.json"\n')
    (edge,) = load_config(tmp_path / "run.toml").edge
    assert (edge.memory, edge.process_memory) == (23 * 10**9, 0)


def test_a_profile_with_a_host_has_the_link_too_and_replaces_the_one_before(
    atoll: Callable[..., object], soon: None, tmp_path: Path
) -> None:
    save_model_folder(tmp_path / "base", "llama")
    (tmp_path / "north.json").write_text("an old one")
    with running(serve(load_base("tiny"), "tiny", "fp32", 32, HostLimits())) as host:
        outcome = atoll("doctor", "--profile", "north.json", "--base", "base", "--host", f"127.0.0.1:{host.port}", "--json")
    assert (outcome.status, json.loads(outcome.out)) == (0, json.loads((tmp_path / "north.json").read_text()))
    profile = read_profile(tmp_path / "north.json", "")
    assert profile.bandwidth is not None
    assert profile.latency is not None
    assert profile.measured["base"] == "base"
    link = profile.measured["link"]
    assert profile.bandwidth == min(link["up_bits_per_second"], link["down_bits_per_second"])
    assert profile.latency == statistics.median(link["round_trip_seconds"]) / 2


def test_a_profile_that_cannot_be_measured_or_written_leaves_nothing(atoll: Callable[..., object], soon: None, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for arguments, status, code in (
        (("folder",), 2, "R502"),
        (("absent/north.json",), 2, "R502"),
        (("north.json", "--base", "./absent"), 2, "B301"),
        (("north.json", "--host", "127.0.0.1:1"), 4, "W804"),
        (("north.json", "--host", "example.org:1"), 2, "C108"),
    ):
        outcome = atoll("doctor", "--profile", *arguments)
        assert (outcome.status, outcome.out) == (status, "")
        assert outcome.err.startswith(f"error {code}")
    assert os.listdir(tmp_path) == ["folder"]
