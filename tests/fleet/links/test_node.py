"""What an edge makes of messages, whatever they hold, and which way it takes to its coordinator."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest

from atoll.errors import TransportError
from atoll.federated.flower import Array, ArrayRecord, ConfigRecord, Message, RecordDict, assume_identity
from atoll.federated.grid import numbered
from atoll.fleet.links.frames import PROBLEM, Frame, packed, unpacked
from atoll.fleet.links.node import _Trouble, answered
from atoll.fleet.links.way import open_way, proxy_to, said
from atoll.split.authority.issuer import Issuer, write_all
from atoll.split.certificates import DeviceTls

CONTENT = RecordDict({"question": ConfigRecord({"text": "ü"})})
NO_CERTIFICATE = DeviceTls(None, None, None)


@pytest.fixture(autouse=True)
def identity() -> None:
    assume_identity(1, 0)


@pytest.fixture(autouse=True)
def no_proxy_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def message(kind: str, content: RecordDict) -> Message:
    return numbered(Message(content, 7, kind, group_id="3"), "flower-1")


def page(reply: Message) -> str:
    return str(unpacked(reply.content).config_records[PROBLEM]["page"])


@pytest.mark.parametrize("kind", ["train", "query", "query.capabilities"])
def test_a_question_is_answered_and_its_answer_names_it(kind: str) -> None:
    def answer(data: bytes) -> bytes:
        question = Frame.from_bytes(data)
        assert (question.node, question.kind, question.group) == (7, kind, "3")
        return question.answered(question.content).to_bytes()

    reply = answered(message(kind, packed(CONTENT)), answer)
    assert unpacked(reply.content).config_records["question"]["text"] == "ü"
    assert reply.metadata.reply_to_message_id == "flower-1"


def test_that_a_run_is_over_is_no_error() -> None:
    """Its coordinator ends, and what the edge says of that says what it means."""
    told: list[str] = []
    stop = threading.Event()
    stop.set()  # Nothing is waited for.
    trouble = _Trouble("big:7440", told.append, stop)
    trouble.wait(httpx.ConnectError("refused"))
    trouble.over()
    trouble.wait(httpx.ConnectError("refused"))
    trouble.wait(httpx.ConnectError("refused"))
    once = "big:7440 cannot be reached: refused; it is tried again"
    assert told == [once, f"the run is over, or its coordinator away; {once}"]


def test_a_coordinator_that_goes_as_it_said_is_no_word_worth_and_one_that_hangs_up_is() -> None:
    told: list[str] = []
    stop = threading.Event()
    stop.set()
    trouble = _Trouble("big:7440", told.append, stop)
    trouble.over()
    trouble.is_expected = True
    for problem in (httpx.RemoteProtocolError("Server disconnected"), *[httpx.ConnectError("refused")] * 3):
        trouble.wait(problem)
    assert not told
    trouble.wait(httpx.RemoteProtocolError("Server disconnected"))
    assert "it hung up" in told[0], "as on a certificate that was revoked since"
    trouble.wait(httpx.HTTPStatusError("", request=httpx.Request("POST", "https://a"), response=httpx.Response(412)))
    assert "does not know this edge's key" in told[1]


def test_what_went_wrong_crosses_as_an_answer() -> None:
    reply = answered(message("train", packed(CONTENT)), lambda data: Frame.from_bytes(data).answered(problem="error D201").to_bytes())
    assert not reply.has_error()
    assert page(reply) == "error D201"


DEEP = b'{"a": {"config": {"b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}}\n"


@pytest.mark.parametrize("content", [
    RecordDict({"other": ConfigRecord({"a": 1})}), RecordDict(),
    RecordDict({"atoll.records": ArrayRecord({"atoll.records": Array("uint8", (len(DEEP),), "x", DEEP)})}),
])  # fmt: skip
def test_a_message_that_atoll_did_not_write_is_answered_and_goes_no_further(content: RecordDict) -> None:
    def answer(data: bytes) -> bytes:
        raise AssertionError("nobody is asked")

    assert "error W802" in page(answered(message("train", content), answer))


@pytest.mark.parametrize("kind", [KeyError, OverflowError, RecursionError, TypeError, ValueError])
def test_a_question_that_breaks_its_reader_breaks_no_edge(kind: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    """What the exception says may quote a row: it stays on the edge."""

    def answer(data: bytes) -> bytes:
        raise kind("John Doe, born 1970")

    told = page(answered(message("train", packed(CONTENT)), answer))
    assert kind.__name__ in told
    assert "John Doe" not in told
    assert "John Doe" in caplog.text


@pytest.mark.parametrize(("environment", "address", "proxy"), [
    ({}, "coordinator.example:7440", None),
    ({"https_proxy": "http://proxy:3128"}, "coordinator.example:7440", "http://proxy:3128"),
    ({"HTTPS_PROXY": "http://proxy:3128"}, "10.0.0.5:7440", "http://proxy:3128"),
    ({"all_proxy": "http://proxy:3128"}, "coordinator.example:7440", "http://proxy:3128"),
    ({"http_proxy": "http://proxy:3128"}, "coordinator.example:7440", None),
    ({"https_proxy": "http://proxy:3128", "no_proxy": "other.example,.example"}, "coordinator.example:7440", None),
    ({"https_proxy": "http://proxy:3128", "no_proxy": "coordinator.example:7440"}, "coordinator.example:7440", None),
    ({"https_proxy": "http://proxy:3128", "no_proxy": "*"}, "coordinator.example:7440", None),
    *(({"https_proxy": "http://proxy:3128"}, address, None) for address in ("127.0.0.1:7440", "localhost:7440", "[::1]:7440")),
])  # fmt: skip
def test_the_proxy_of_the_environment_is_used_but_on_loopback(
    environment: dict[str, str], address: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_to(address) == proxy
    open_way(address, NO_CERTIFICATE).close()


def test_a_proxy_is_named_and_its_password_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://me:secret@proxy.example:3128")
    text = said("coordinator.example:7440", httpx.ProxyError("407 Proxy Authentication Required"))
    through = "through the proxy proxy.example:3128 (https_proxy)"
    assert text == f"coordinator.example:7440 cannot be reached {through}: 407 Proxy Authentication Required"
    monkeypatch.setenv("https_proxy", "socks9://me:secret@proxy.example:3128")
    with pytest.raises(TransportError, match="proxy that cannot be used") as caught:
        open_way("coordinator.example:7440", NO_CERTIFICATE)
    assert "secret" not in caught.value.page()


def test_answers_of_the_front_are_said_in_words() -> None:
    request = httpx.Request("POST", "https://coordinator.example:7440/")
    for status, words in ((403, "revoked"), (412, "does not know this edge's key"), (418, "answers 418")):
        problem = httpx.HTTPStatusError("", request=request, response=httpx.Response(status))
        assert words in said("coordinator.example:7440", problem)
    assert "something else: ValueError" in said("coordinator.example:7440", ValueError("no protobuf"))


def test_certificates_that_are_none_are_refused(tmp_path: Path) -> None:
    write_all(tmp_path, {**Issuer("any").own("ca"), **Issuer("other").device("client", "north")})
    (tmp_path / "client.key").write_text("none")
    damaged = DeviceTls(tmp_path / "ca.pem", tmp_path / "client.pem", tmp_path / "client.key")
    for tls in (damaged, DeviceTls(tmp_path / "no.pem", None, None)):
        with pytest.raises(TransportError, match="cannot be used"):
            open_way("coordinator.example:7440", tls)
