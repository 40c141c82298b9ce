"""What `atoll doctor` says of this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import pytest
from packaging.requirements import Requirement

from atoll.commands import doctor as examination
from atoll.commands.doctor import Check, DoctorReport


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
