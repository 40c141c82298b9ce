"""`atoll fleet add`, `renew` and `remove`, and `atoll host certify`, as typed."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.run_files import DEMO, PAIR, run_text

RUN = run_text({}, PAIR, DEMO)


def test_members_come_and_go(tmp_path: Path, atoll: Callable[..., object]) -> None:
    run, fleet = tmp_path / "run.toml", str(tmp_path / "fleet")
    run.write_text(RUN)
    assert atoll("fleet", "init", str(run), "--out", fleet, "--address", "127.0.0.1:7440").status == 0
    run.write_text(RUN + '[[edge]]\nname = "east"\n')
    key = (tmp_path / "fleet" / "ca.key").rename(tmp_path / "kept.key")
    done = atoll("fleet", "add", "east", "--fleet", fleet, "--config", str(run), "--ca-key", str(key))
    assert (done.status, done.err) == (0, "")
    assert re.search(r"^  edges/east +the whole folder$", done.out, flags=re.MULTILINE)
    assert "renewed until" in atoll("fleet", "renew", "--fleet", fleet, "--ca-key", str(key)).out
    assert "renewed until" in atoll("fleet", "renew", "east", "--fleet", fleet, "--ca-key", str(key)).out
    done = atoll("fleet", "remove", "east", "--fleet", fleet, "--ca-key", str(key))
    assert "east is of this fleet no more: 3 certificates revoked" in done.out
    refused = atoll("fleet", "remove", "east", "--fleet", fleet, "--ca-key", str(key))
    assert (refused.status, refused.out) == (2, "")
    done = atoll("host", "certify", "guest", "--dir", fleet, "--ca-key", str(key))
    assert done.status == 0
    assert (tmp_path / "fleet" / "tenant-guest.pem").exists()
    done = atoll("host", "revoke", "guest", "--dir", fleet, "--ca-key", str(key))
    assert done.status == 0
    assert "guest is out" in done.out
    assert not (tmp_path / "fleet" / "tenant-guest.pem").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_edge_ends_when_asked_to_in_the_middle_of_a_round(
    number: signal.Signals, atoll: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, passed = signal.getsignal(signal.SIGTERM), list[str]()
    # A shell starts what it puts in the background with SIGINT ignored, the tests too.
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)

    def trains(*arguments: object, **options: object) -> None:
        signal.raise_signal(number)
        passed.append("the round goes on")

    monkeypatch.setattr("atoll.fleet.join.join", trains)
    try:
        done = atoll("fleet", "join", "anywhere")
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupted)
    assert (done.status, done.out, done.err, passed) == (0, "", "", [])
