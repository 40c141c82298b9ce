"""The audit log of a host: who asked for what, one JSON object a line, only ever added to, and nobody else's to read."""

from __future__ import annotations

import json
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atoll.errors import HostLostError, HostRefusedError, OutputError
from atoll.split.certificates import Made, make_certificates
from atoll.split.cut import Cut
from atoll.split.device.base_part import fetch_part
from atoll.split.host import host_account
from atoll.split.host.audit import Audit, in_words
from atoll.split.transport import ClientTransport, fetch_status
from atoll.wire import protocol_pb2 as pb
from atoll.wire.frames import Message, Packer
from atoll.wire.handshake import PROTOCOL

from tests.conftest import random_model, save_model_folder
from tests.split.conftest import BLOCKS
from tests.split.running import PATIENCE_SECONDS, channel_to, llama_host, running, session_on, wait_until

DOCS = Path(__file__).resolve().parents[2] / "docs" / "host.md"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_certificates(tmp_path_factory.mktemp("tls"), [], ["north", "south"])


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_everything_a_device_asks_for_is_a_line(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_account, "ROOM_SECONDS", 0.05)
    save_model_folder(tmp_path / "base", "llama")
    random_model("llama", BLOCKS).save_pretrained(tmp_path / "base")
    file, served = tmp_path / "audit.jsonl", replace(llama_host(), source=str(tmp_path / "base"))
    with (
        running(served, tls=made.host, max_tenant_sessions=1, max_part=Cut(1, 0), audit=file) as host,
        channel_to(host, made.devices["north"]) as channel,
    ):
        with session_on(channel) as session:
            session.stream.send(pb.Forward(rows=2, positions=3, lengths=[3, 1]), [torch.zeros(4, 32)])
            session.stream.receive()
            with pytest.raises(HostLostError), session_on(channel):
                pass
        fetch_part(channel, Cut(1, 0), tmp_path / "part")
        with pytest.raises(HostRefusedError):
            fetch_part(channel, Cut(1, 1), tmp_path / "more")
        wait_until(lambda: host.account.totals().sessions == 0)
        greet(channel, pb.Hello(protocol=99, atoll_version="x\n\x1b[2J", cut_front=1))
        fetch_status(channel, PATIENCE_SECONDS)
        wait_until(lambda: host.account.totals().sessions == 0)
    found = lines(file)
    assert sorted(line["event"] for line in found) == sorted([
        "host started", "session opened", "session refused", "session ended", "part", "part", "session opened", "session ended", "status",
        "host stopped",
    ])  # fmt: skip
    assert all(line["tenant"] == "north" and line["peer"].startswith("ipv") for line in found if not line["event"].startswith("host"))
    by_event = {event: [line for line in found if line["event"] == event] for event in {line["event"] for line in found}}
    assert (by_event["session refused"][0]["code"], by_event["session refused"][0]["field"]) == ("busy", "tenant_sessions")
    first, second = by_event["session ended"]
    assert (first["tokens"], first["positions"], first["exchanges"], first["front"], first["back"]) == (4, 6, 1, 0, 0)
    assert first["compute_seconds"] > 0
    assert "code" not in first
    assert (second["code"], second["field"], second["front"]) == ("unfit", "protocol", 1)
    whole, refused = by_event["part"]
    assert (whole["front"], whole["back"], whole["whole"]) == (1, 0, True)
    assert whole["bytes"] > sum(one.stat().st_size for one in (tmp_path / "part").iterdir())
    assert (refused["back"], refused["whole"]) == (1, False)
    assert (refused["code"], refused["field"]) == ("unfit", "cut")
    assert refused["why"] == "asked: front = 1, back = 1; here: front = 1, back = 0 at most"
    assert by_event["session refused"][0]["why"] == "asked: one more; here: at most 1"
    assert second["why"] == f"asked: 99; here: {PROTOCOL}"
    assert told_by_the_docs(found)
    assert file.read_text().replace("\n", "").isprintable()


def told_by_the_docs(found: list[dict[str, Any]]) -> bool:
    """Whether the line of jq in docs/host.md would show every refusal, with all that it names; only a call has neither code nor field."""
    (line,) = [line for line in DOCS.read_text().splitlines() if line.startswith("jq -c")]
    shown = re.search(r"\| \{(.*)\}'", line)
    assert shown is not None
    names, events = shown[1].split(", "), re.findall(r'event == "([^"]*)"', line)
    chosen = [one for one in found if one["event"] in events or one.get("code")]
    assert len(chosen) >= 3
    for one in chosen:
        wanted = [name for name in names if not (one["event"] == "call refused" and name in ("code", "field"))]
        assert all(one.get(name) is not None for name in wanted), one
        assert one["why"], one
    return True


@pytest.mark.parametrize(("change", "why"), [
    ({"tokenizer_digest": "f" * 64}, "asked: another one; here: the host's"),
    ({"base_digest": "f" * 64}, "asked: another one; here: the host's"),
    ({"precision": "fp8\n\x1b[2J"}, "asked: fp8\\n\\x1b[2J; here: fp32"), ({"max_tokens": 10**6}, "asked: 1000000; here: 1 to 4096"),
])  # fmt: skip
def test_why_a_device_did_not_fit_is_in_the_log_without_digests(change: dict[str, Any], why: str, tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    with running(llama_host(), audit=file) as host, channel_to(host) as channel:
        with pytest.raises(HostRefusedError), session_on(channel, **change):
            pass
        wait_until(lambda: host.account.totals().sessions == 0)
    (ended,) = [line for line in lines(file) if line["event"] == "session ended"]
    assert (ended["code"], ended["field"], ended["why"]) == ("unfit", next(iter(change)), why)
    assert "f" * 64 not in file.read_text()


def test_what_ended_is_told_in_words() -> None:
    assert in_words({"session": "1-a", "sent_bytes": 3, "field": "", "why": "asked: 2"}) == "session 1-a, sent bytes 3, why asked: 2"


def greet(channel: Any, hello: pb.Hello) -> None:
    transport = ClientTransport(channel, PATIENCE_SECONDS)
    for frame in Packer().frames(Message(hello)):
        transport.write(frame)
    transport.read()
    transport.close()


def test_lines_are_added_to_what_is_there_and_are_private(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    file.write_text('{"event": "before"}\n')
    file.chmod(0o644)
    for _ in range(2):
        audit = Audit(file)
        audit.note("part", "north", "ipv4:127.0.0.1:1", {"bytes": 3})
        audit.close()
    assert [line["event"] for line in lines(file)] == ["before", "part", "part"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    """As logrotate does."""
    file, audit = tmp_path / "audit.jsonl", Audit(tmp_path / "audit.jsonl")
    audit.note("part", "north", "", {})
    file.rename(tmp_path / "audit.jsonl.1")
    audit.note("part", "south", "", {})
    audit.close()
    assert [line["tenant"] for line in lines(tmp_path / "audit.jsonl.1")] == ["north"]
    assert [line["tenant"] for line in lines(file)] == ["south"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_what_can_be_repeated_without_end_is_counted(tmp_path: Path) -> None:
    now = [0.0]
    audit = Audit(tmp_path / "audit.jsonl", lambda: now[0])
    for second in range(3):
        now[0] = float(second)
        for tenant in ("north", "south"):
            for _ in range(1000):
                audit.note("call refused", tenant, "", {})
    audit.note("part", "north", "", {})
    audit.note("part", "north", "", {})
    audit.close()
    found = lines(tmp_path / "audit.jsonl")
    assert [line.get("times", 1) for line in found if line["event"] == "call refused" and line["tenant"] == "north"] == [1, 1000, 1000]
    assert len([line for line in found if line["event"] == "part"]) == 2


def test_calls_that_are_too_many_are_lines(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    with running(llama_host(), 4, made.host, max_tenant_sessions=1, audit=file) as host, channel_to(host, made.devices["north"]) as channel:
        silent = [ClientTransport(channel, PATIENCE_SECONDS) for _ in range(12)]
        wait_until(lambda: any(line["event"] == "call refused" for line in lines(file)))
        for one in silent:
            one.close()
    refused = next(line for line in lines(file) if line["event"] == "call refused")
    assert (refused["tenant"], refused["method"]) == ("north", "Train")


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for file in (tmp_path / "none" / "audit.jsonl", tmp_path, tmp_path / "link"):
        with pytest.raises(OutputError, match="audit log") as caught:
            Audit(file)
        assert caught.value.where == str(file)
    assert not (tmp_path / "elsewhere").exists()
