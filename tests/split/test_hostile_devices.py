"""A device that asks for more than is its own, or says what it should not: it is refused, and others are served meanwhile."""

from __future__ import annotations

import resource
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import nn

from atoll.base.load import load_base
from atoll.commands.host import allow_open_files
from atoll.errors import HostLostError, HostRefusedError
from atoll.jobs import split as jobs
from atoll.split.certificates import Made, make_certificates
from atoll.split.counted_stream import CountedStream
from atoll.split.cut import Cut
from atoll.split.device.base_part import fetch_part
from atoll.split.host import server
from atoll.split.host.base_part import PartLimit
from atoll.split.host.session import HostSession, SessionFigures
from atoll.split.host.tenants import HostLimits
from atoll.split.transport import SERVICE, ClientTransport, ThreadTransport, fetch_status
from atoll.wire import protocol_pb2 as pb
from atoll.wire.dialogue import Dialogue
from atoll.wire.frames import Message, Packer

from tests.conftest import random_model, save_model_folder
from tests.split.conftest import BLOCKS, served
from tests.split.running import PATIENCE_SECONDS, PLAIN, channel_to, llama_host, running, session_on, wait_until

TENANTS = ("north", "south")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_certificates(tmp_path_factory.mktemp("tls"), [], TENANTS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of six blocks."""
    folder = tmp_path_factory.mktemp("base")
    save_model_folder(folder, "llama")
    random_model("llama", 6).save_pretrained(folder)
    return folder


def six_blocks(base: Path) -> Any:
    host = served(random_model("llama", 6))
    facts = host.facts(Cut(0, 0))
    return replace(host, source=str(base), facts=lambda cut: facts)


# Parts.


def test_two_calls_do_not_bring_the_whole_base(base: Path, made: Made, tmp_path: Path) -> None:
    """All blocks but one from the front, then the last one from the back: every block would have left the host."""
    with running(six_blocks(base), tls=made.host) as host, channel_to(host, made.devices["north"]) as channel:
        for cut in (Cut(5, 0), Cut(0, 5), Cut(2, 2), Cut(2**32 - 1, 2**32 - 1)):
            with pytest.raises(HostRefusedError, match="cut does not fit") as caught:
                fetch_part(channel, cut, tmp_path / "part")
            assert "3 blocks at most" in caught.value.expected
            assert "--max-part" in caught.value.do
        fetch_part(channel, Cut(2, 0), tmp_path / "first")
        with pytest.raises(HostRefusedError, match="cut does not fit") as caught:
            fetch_part(channel, Cut(0, 1), tmp_path / "part")
        assert "front = 2, back = 0" in caught.value.expected
        fetch_part(channel, Cut(2, 0), tmp_path / "again")
        fetch_part(channel, Cut(1, 0), tmp_path / "less")
        assert not (tmp_path / "part").exists()
        with channel_to(host, made.devices["south"]) as other:  # Each tenant for itself.
            fetch_part(other, Cut(0, 1), tmp_path / "south")


def test_the_sum_of_parts_is_that_of_a_hosts_life_and_not_of_a_connection(base: Path, made: Made, tmp_path: Path) -> None:
    with running(six_blocks(base), tls=made.host, max_part=Cut(2, 1)) as host:
        for number, cut in enumerate((Cut(2, 0), Cut(0, 1), Cut(2, 1), Cut(0, 0))):
            with channel_to(host, made.devices["north"]) as channel:
                fetch_part(channel, cut, tmp_path / str(number))
        for cut in (Cut(3, 0), Cut(0, 2)):
            with channel_to(host, made.devices["north"]) as channel, pytest.raises(HostRefusedError) as caught:
                fetch_part(channel, cut, tmp_path / "part")
            assert caught.value.expected == "front = 2, back = 1 at most"


def test_what_a_tenant_may_fetch_of_twelve_blocks() -> None:
    """The review's two calls, front 11 and then back 1; and in every order of calls what was granted is never more than one cut of six."""
    limit = PartLimit(12, None)
    assert limit.grant("north", Cut(11, 0)) is not None
    assert limit.grant("north", Cut(0, 1)) is None
    cuts = [Cut(front, back) for front in range(13) for back in range(13)]
    for first in cuts:
        limit, fetched = PartLimit(12, None), Cut(0, 0)
        for cut in (first, *cuts, *reversed(cuts)):
            if limit.grant("north", cut) is None:
                fetched = Cut(max(fetched.front, cut.front), max(fetched.back, cut.back))
        assert fetched.front + fetched.back <= 6


# Streams and sessions.


def silent_streams(channel: grpc.Channel, count: int, method: str = "Train") -> tuple[list[Any], threading.Event]:
    """Calls that never say a word."""
    release = threading.Event()

    def silence() -> Iterator[bytes]:
        release.wait(PATIENCE_SECONDS)
        yield from ()

    return [channel.stream_stream(f"/{SERVICE}/{method}")(silence()) for _ in range(count)], release


def test_sixty_silent_streams_of_one_tenant_shut_nobody_out(made: Made) -> None:
    with running(llama_host(), 4, made.host, max_tenant_sessions=1) as host, ExitStack() as stack:
        # A connection carries so many at a time; a tenant may have several.
        hostile = [stack.enter_context(channel_to(host, made.devices["north"])) for _ in range(2)]
        honest = stack.enter_context(channel_to(host, made.devices["south"]))
        for channel in hostile:
            _, release = silent_streams(channel, 30)
            stack.callback(release.set)
        wait_until(lambda: bool(host.account.sessions("north")))
        for _ in range(15):
            with session_on(honest):
                assert len(host.account.sessions("north")) <= 1
            assert fetch_status(honest, PATIENCE_SECONDS).max_sessions == 4


def test_silent_calls_of_status_keep_no_slot_from_others(made: Made) -> None:
    with running(llama_host(), tls=made.host) as host, ExitStack() as stack:
        hostile, honest = (stack.enter_context(channel_to(host, made.devices[tenant])) for tenant in TENANTS)
        _, release = silent_streams(hostile, 30, "Status")
        stack.callback(release.set)
        for _ in range(5):
            assert fetch_status(honest, PATIENCE_SECONDS).protocol


def test_callers_without_certificates_leave_room_for_status_too(made: Made) -> None:
    with running(llama_host(), 2) as host, channel_to(host) as channel:
        _, release = silent_streams(channel, 30)
        wait_until(lambda: host.account.totals().sessions == 2)
        assert fetch_status(channel, PATIENCE_SECONDS).sessions == 2
        release.set()


def test_a_silent_connection_is_hung_up_on_before_it_is_one(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither TLS nor HTTP/2 is begun; gRPC itself would wait for two minutes."""
    options = dict(server.SERVER_OPTIONS) | {"grpc.server_handshake_timeout_ms": 300}
    assert options.keys() == dict(server.SERVER_OPTIONS).keys()
    monkeypatch.setattr(server, "SERVER_OPTIONS", tuple(options.items()))
    for tls in (made.host, PLAIN):
        with running(llama_host(), tls=tls) as host, socket.create_connection(("127.0.0.1", host.port), PATIENCE_SECONDS) as connection:
            while connection.recv(1000):
                pass


def test_a_host_may_have_as_many_connections_as_the_system_lets_it() -> None:
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, most), most))
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))


# What a session says.


def first_answer(*messages: Any, host: Any = None) -> Message:
    """What a host answers to these messages, and that its session ends by itself."""
    near, far = ThreadTransport.pair()
    figures = SessionFigures("s", "")
    session = HostSession(host or served(random_model("llama", BLOCKS)), CountedStream(Dialogue("host"), far, "fp32"), figures)
    thread = threading.Thread(target=session.run, daemon=True)
    thread.start()
    packer, dialogue = Packer(), Dialogue("device")
    dialogue.sent(Message(pb.Hello(max_tokens=1)))
    for message in messages:
        for frame in packer.frames(message if isinstance(message, Message) else Message(message)):
            near.write(frame)
    stream = CountedStream(dialogue, near, "fp32")
    try:
        answer = stream.receive()
    finally:
        thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    return answer


@pytest.mark.parametrize("kind", [field.name for field in pb.Message.DESCRIPTOR.oneofs_by_name["body"].fields])
def test_any_first_message_but_a_greeting_is_a_refusal_and_a_goodbye_is_one(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    field = pb.Message.DESCRIPTOR.oneofs_by_name["body"].fields
    body = getattr(pb, next(one.message_type.name for one in field if one.name == kind))()
    if kind == "bye":
        with pytest.raises(HostLostError):
            first_answer(body)
    else:
        assert first_answer(body).body.code == ("unfit" if kind == "hello" else "dialogue")
    assert not [warning for warning in recwarn if "thread" in str(warning.message)], "a traceback in a thread"


class Broken(nn.Module):
    def __init__(self, kind: type[BaseException]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, *args: object, **kwargs: object) -> None:
        raise self.kind("a kernel that fails\x1b[2J")


@pytest.mark.parametrize("kind", [RuntimeError, MemoryError, OSError, StopIteration, BaseException, SystemExit, GeneratorExit])
def test_a_fault_of_the_hosts_own_is_told_and_logged_and_ends_one_session(
    kind: type[BaseException], recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    broken = llama_host()
    blocks: Any = broken.base.model.get_submodule("model.layers")
    blocks[1] = Broken(kind)
    with running(broken) as host, channel_to(host) as channel:
        with session_on(channel) as session:
            session.stream.send(pb.Forward(rows=1, positions=2), [torch.zeros(2, 32)])
            assert session.stream.receive().body.code == "failed"
        wait_until(lambda: host.account.totals().sessions == 0)
        assert host.account.totals().refused == {"failed": 1}
        with session_on(channel):
            pass
    assert "a kernel that fails\\x1b[2J" in caplog.text
    assert not [warning for warning in recwarn if "thread" in str(warning.message)]


def test_one_token_does_not_pay_for_four_thousand_positions() -> None:
    with running(llama_host()) as host, channel_to(host) as channel, session_on(channel) as session:
        session.stream.dialogue.sent = lambda message: None  # type: ignore[method-assign]
        session.stream.send(pb.Forward(rows=1, positions=512, lengths=[1]), [torch.zeros(1, 32)])
        session.stream.dialogue.state = "hidden"
        refusal = session.stream.receive().body
        assert refusal.code == "dialogue"
        assert "row lengths" in refusal.field
        wait_until(lambda: host.account.totals().sessions == 0)
        assert host.account.totals().exchanges == 0


def test_positions_and_compute_are_counted_for_the_tenant(made: Made) -> None:
    with running(llama_host(), tls=made.host) as host, channel_to(host, made.devices["north"]) as channel, session_on(channel) as session:
        session.stream.send(pb.Forward(rows=2, positions=5, lengths=[5, 1]), [torch.zeros(6, 32)])
        session.stream.receive()
        wait_until(lambda: host.account.totals_by_tenant()["north"].exchanges == 1)
        totals = host.account.totals_by_tenant()["north"]
        assert (totals.tokens, totals.positions) == (6, 10)
        assert totals.compute_seconds > 0


def test_goodbye_within_an_exchange_is_no_refusal() -> None:
    with running(llama_host()) as host, channel_to(host) as channel, session_on(channel) as session:
        session.stream.send(pb.Forward(rows=1, positions=2, train=True), [torch.zeros(2, 32)])
        assert session.stream.receive().kind == "hidden"
        session.stream.send(pb.Bye())
        wait_until(lambda: host.account.totals().sessions == 0)
        assert not host.account.totals().refused


def test_the_base_is_not_read_for_a_bogus_greeting(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And for each cut once, however often and by however many it is asked for."""
    read: list[Cut] = []
    monkeypatch.setattr(jobs, "part_digest", lambda source, front, back: read.append(Cut(front, back)) or "digest")
    host = jobs.serve(load_base(str(base)), str(base), "fp32", 32, HostLimits())
    assert first_answer(pb.Hello(protocol=99, cut_front=1, cut_back=2), host=host).body.field == "protocol"
    assert first_answer(pb.Hello(protocol=3, cut_front=4, cut_back=2), host=host).body.field == "tokenizer_digest"
    assert not read
    hello = pb.Hello(
        protocol=3, base_digest="other", tokenizer_digest=host.facts(Cut(0, 0)).tokenizer_digest, cut_front=1, adapter_kind="lora",
        wire_mode="dense", codec="fp32", precision="fp32", max_tokens=1,
    )  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: first_answer(hello, host=host).body.field, range(8)))
    assert answers == ["base_digest"] * 8
    assert read == [Cut(1, 0)]


def test_the_first_word_of_a_stream_of_garbage_is_a_refusal() -> None:
    with running(llama_host()) as host, channel_to(host) as channel:
        for word in (b"", b"\xff" * 40, bytes(2**21)):
            transport = ClientTransport(channel, PATIENCE_SECONDS)
            transport.write(word)
            assert b"frame" in transport.read()
            transport.close()
        assert fetch_status(channel, PATIENCE_SECONDS).sessions == 0


def test_the_request_of_a_status_may_be_garbage() -> None:
    with running(llama_host()) as host, channel_to(host) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{SERVICE}/Status")(b"\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert fetch_status(channel, PATIENCE_SECONDS).protocol


def test_a_part_of_the_dialogue_that_only_the_engine_can_check() -> None:
    """Sizes of tensors that the dialogue cannot know, one after the other: refusals, and none of them a failure of the host."""
    for shapes in ([(2, 31)], [(2, 33)], [(2, 1)]):
        with running(llama_host()) as host, channel_to(host) as channel, session_on(channel) as session:
            session.stream.send(pb.Forward(rows=1, positions=2), [torch.zeros(shape) for shape in shapes])
            assert session.stream.receive().body.code == "dialogue"
            wait_until(lambda host=host: host.account.totals().sessions == 0)  # type: ignore[misc]
            assert host.account.totals().refused == {"dialogue": 1}


