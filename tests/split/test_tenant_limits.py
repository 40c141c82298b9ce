"""Limits of tenants at a host that listens: a device is slowed or sent away with the time to come again, and others notice nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import torch
from google.protobuf.descriptor import FieldDescriptor

from atoll.commands.hosts.status import status
from atoll.errors import HostLostError
from atoll.report.hosts import status_table
from atoll.split import transport
from atoll.split.certificates import HostAccess, Made, make_certificates
from atoll.split.counted_stream import CountedStream
from atoll.split.cut import Cut
from atoll.split.device.base_part import fetch_part
from atoll.split.device.blocks import Session
from atoll.split.device.client import Client
from atoll.split.device.link import measure_link
from atoll.split.host import server
from atoll.split.host.limits.rules import ByteLimit, TenantLimits
from atoll.split.host.metrics import serve_metrics
from atoll.split.host.server import Host
from atoll.split.host.session import HostSession, Served, SessionFigures
from atoll.split.host.tenants import HostLimits
from atoll.split.transport import SERVICE, ClientTransport, ServerTransport, fetch_status
from atoll.training.trainer import FitPlan, TrainState, Update
from atoll.wire import protocol_pb2 as pb
from atoll.wire.dialogue import Dialogue
from atoll.wire.frames import Message, Packer

from tests.conftest import random_model
from tests.pieces import Steps, adapters, stream
from tests.split.conftest import BLOCKS, device_trainer
from tests.split.running import PATIENCE_SECONDS, channel_to, llama_host, running, session_on, wait_until
from tests.split.test_status import STEPS, TENANTS, figures

DAY = 86_400.0
HOUR = 3600.0


@dataclass
class Clock:
    """The host's and the device's time; `sleep` is the device's."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_certificates(tmp_path_factory.mktemp("tls"), [], list(TENANTS))


@contextmanager
def limited(made: Made, clock: Clock, served: Served | None = None, audit: Path | None = None, **of_tenant: TenantLimits) -> Iterator[Host]:
    with running(served or llama_host(), tls=made.host, limits=HostLimits(tenants=of_tenant), clock=clock, audit=audit) as host:
        yield host


def exchange(session: Session, *, rows: int = 1, positions: int = 2) -> str:
    """An evaluation; the kind of the answer."""
    number = session.stream.dialogue.exchange
    session.stream.send(pb.Forward(exchange=number, rows=rows, positions=positions), [torch.zeros(rows * positions, 32)])
    return session.stream.receive().kind


def training(channel: grpc.Channel, clock: Clock, patience: float, edge: str = "north", mode: str = "dense") -> tuple[Update, Client]:
    trainer, client = device_trainer(
        "llama", Cut(1, 0), lambda: ClientTransport(channel, PATIENCE_SECONDS), mode=mode, edge=edge, patience=patience
    )
    client._clock, client._sleep = clock, clock.sleep
    start = adapters(random_model("llama", BLOCKS), rank=TENANTS[edge])
    try:
        return trainer.fit(TrainState(start, {}, 0), stream(edge), FitPlan(STEPS, 1, False), Steps([])), client
    finally:
        client.end()


# Bytes.


def test_a_tenant_that_moved_its_bytes_comes_again_when_it_is_told_to_and_trains_to_the_same_bits(made: Made) -> None:
    clock = Clock()
    with limited(made, clock) as host, channel_to(host, made.devices["north"]) as channel:
        alone, client = training(channel, clock, 0.0)
        moved = client.account.sent.total() + client.account.received.total()
    limit = TenantLimits(bytes=ByteLimit(moved // 2, "hour"))
    with limited(made, clock, north=limit) as host, channel_to(host, made.devices["north"]) as channel:
        reasons: list[str] = []
        begun = clock.now
        trainer, client = device_trainer("llama", Cut(1, 0), lambda: ClientTransport(channel, PATIENCE_SECONDS), patience=2 * HOUR)
        client._clock, client._sleep, client.on_lost = clock, clock.sleep, reasons.append
        start = adapters(random_model("llama", BLOCKS), rank=TENANTS["north"])
        update = trainer.fit(TrainState(start, {}, 0), stream("north"), FitPlan(STEPS, 1, False), Steps([]))
        client.end()
        assert update.state.adapter.digest() == alone.state.adapter.digest()
        assert clock.slept
        assert all(HOUR - 1 < seconds <= HOUR for seconds in clock.slept)
        assert clock.now == begun + sum(clock.slept)
        assert all("tenant_bytes" in reason and "come again in 1 h 00 min" in reason for reason in reasons)
        wait_until(lambda: host.account.totals().sessions == 0)
        assert host.account.totals().refused["busy"] == len(reasons)


def test_a_device_with_too_little_patience_ends_with_the_limit_and_the_time(made: Made) -> None:
    clock = Clock()
    limit = TenantLimits(bytes=ByteLimit(5000, "hour"))
    with limited(made, clock, north=limit) as host, channel_to(host, made.devices["north"]) as channel:
        clock.now = 100.0
        with pytest.raises(HostLostError) as caught:
            training(channel, clock, 120.0)
        page = caught.value.page()
        assert "W804" in page
        assert "this tenant has moved as many bytes as it may (tenant_bytes)" in page
        assert "at most 5 kB/hour, of all devices with the same certificate name together" in page
        assert "bytes) used" in page
        assert "come again in 1 h 00 min" in page
        assert caught.value.retry_seconds == HOUR
        assert not clock.slept, "it would be in vain"


def test_another_session_or_connection_gets_no_other_bytes(made: Made) -> None:
    clock = Clock()
    with limited(made, clock, north=TenantLimits(bytes=ByteLimit(3000, "day"))) as host, ExitStack() as stack:
        first, again = (stack.enter_context(channel_to(host, made.devices["north"])) for _ in range(2))
        other = stack.enter_context(channel_to(host, made.devices["south"]))
        with session_on(first) as session, session_on(again) as second:
            while host.budgets.of("north").over_bytes() is None:
                assert exchange(session) == "hidden"
            assert exchange(second) == "refusal"  # What has begun by then is told at its next exchange.
        for channel in (first, again, first):
            with pytest.raises(HostLostError, match="tenant_bytes") as caught, session_on(channel):
                pass
            assert caught.value.retry_seconds == DAY
        with session_on(other) as session:
            for _ in range(50):
                assert exchange(session) == "hidden"
        clock.now += DAY
        with session_on(again) as session:
            assert exchange(session) == "hidden"


def test_every_byte_of_every_method_counts(made: Made) -> None:
    """Frames of a session to the last one, of a part, and of what pads a question for the status."""
    clock = Clock()
    with limited(made, clock, north=TenantLimits(bytes=ByteLimit(10**9, "day"))) as host, ExitStack() as stack:
        channel = stack.enter_context(channel_to(host, made.devices["north"]))
        _, client = training(channel, clock, 0.0)
        wait_until(lambda: host.account.totals().sessions == 0)
        crossed = client.account.sent.total() + client.account.received.total()
        assert host.budgets.of("north").use().num_bytes == crossed
        channel.unary_unary(f"/{SERVICE}/Status")(b"\xfa\x7f\xe8\x07" + bytes(1000), timeout=PATIENCE_SECONDS)
        assert crossed + 1000 < host.budgets.of("north").use().num_bytes < crossed + 2000


def test_no_part_and_no_padded_status_beyond_the_limit_and_the_plain_status_tells_of_it(made: Made, tmp_path: Path) -> None:
    clock = Clock()
    with limited(made, clock, north=TenantLimits(bytes=ByteLimit(100, "day"))) as host, ExitStack() as stack:
        channel = stack.enter_context(channel_to(host, made.devices["north"]))
        with session_on(channel):
            pass
        with pytest.raises(HostLostError, match="tenant_bytes") as caught:
            fetch_part(channel, Cut(0, 0), tmp_path / "part")
        assert "come again in" in caught.value.do
        assert not (tmp_path / "part").exists()
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(f"/{SERVICE}/Status")(b"\xfa\x7f\x0a" + bytes(10), timeout=PATIENCE_SECONDS)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
        assert "tenant_bytes" in refused.value.details()  # type: ignore[attr-defined]
        with pytest.raises(HostLostError) as caught:
            measure_link(channel)
        assert "tenant_bytes" in caught.value.got
        assert "come again in" in caught.value.got
        (tenant,) = fetch_status(channel, PATIENCE_SECONDS).tenants
        assert (tenant.tenant, tenant.max_bytes, tenant.period_seconds) == ("north", 100, DAY)
        assert tenant.bytes > 100


def test_a_device_that_does_not_wait_gets_nothing_but_the_same_answer(made: Made, tmp_path: Path) -> None:
    clock = Clock()
    limit = TenantLimits(bytes=ByteLimit(50_000, "day"))
    with limited(made, clock, audit=tmp_path / "audit.jsonl", north=limit) as host, ExitStack() as stack:
        hostile, honest = (stack.enter_context(channel_to(host, made.devices[tenant])) for tenant in TENANTS)
        with session_on(hostile) as session:
            while host.budgets.of("north").over_bytes() is None:
                exchange(session, rows=4, positions=10)
        for number in range(40):
            with pytest.raises(HostLostError, match="tenant_bytes") as caught, session_on(hostile):
                pass
            assert caught.value.retry_seconds == DAY
            if number % 10 == 0:
                with session_on(honest) as session:
                    assert exchange(session) == "hidden"
        wait_until(lambda: host.account.totals().sessions == 0)
        assert host.budgets.of("north").use().num_bytes < 100_000, "what asking costs counts as well"
        assert host.account.totals_by_tenant()["north"].refused == {"busy": 40}
        assert not host.account.totals_by_tenant()["south"].refused
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    refused = [line for line in lines if line["event"] == "session refused"]
    assert (refused[0]["field"], refused[0]["tenant"]) == ("tenant_bytes", "north")
    assert len(refused) < 40, "one line a second"


# Tokens a second.


def test_a_device_is_slowed_and_not_sent_away(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes only where the host says that it holds the device back."""
    monkeypatch.setattr(server, "HOLD_SECONDS", 0.01)
    clock, waits = Clock(), list[pb.Wait]()
    limit = TenantLimits(tokens_per_second=10.0, burst=20)

    def held(wait: pb.Wait, is_first: bool) -> None:
        if is_first:  # Others were on their way before time passed.
            waits.append(wait)
            clock.now += wait.seconds

    with limited(made, clock, north=limit) as host, ExitStack() as stack:
        north, south = (stack.enter_context(channel_to(host, made.devices[tenant])) for tenant in TENANTS)
        with session_on(north) as session, session_on(south) as other:
            session.stream.on_wait = held
            for _ in range(3):
                assert exchange(session, rows=2, positions=10) == "hidden"
            assert len(waits) == 2
            assert clock.now == pytest.approx(4.0)
            assert waits[0].field == "tenant_tokens"
            assert waits[0].host_value == "10 tokens a second with padding, 20 at once"
            assert waits[0].device_value.startswith("20 tokens now")
            assert waits[0].seconds == pytest.approx(2.0)
            for _ in range(50):  # Another tenant has its own.
                assert exchange(other, rows=2, positions=10) == "hidden"
            assert clock.now == pytest.approx(4.0)
            tenant = next(one for one in host.status("north").tenants)
            assert (tenant.max_tokens_per_second, tenant.burst_tokens, tenant.sessions) == (10.0, 20.0, 1)
            assert tenant.tokens_left == pytest.approx(0.0, abs=1e-5)
            assert tenant.held_seconds == pytest.approx(4.0)
        assert not host.account.totals().refused


def test_padding_counts_as_tokens(made: Made) -> None:
    clock = Clock()
    with limited(made, clock, north=TenantLimits(tokens_per_second=1.0, burst=100)) as host, ExitStack() as stack:
        channel = stack.enter_context(channel_to(host, made.devices["north"]))
        with session_on(channel) as session:
            session.stream.send(pb.Forward(rows=4, positions=20, lengths=[20, 1, 1, 1]), [torch.zeros(23, 32)])
            assert session.stream.receive().kind == "hidden"
            assert host.budgets.of("north").use().tokens_left == 20


@pytest.mark.parametrize("mode", ["dense", "factored", "lent"])
def test_training_that_is_slowed_comes_to_the_same_bits(mode: str, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HOLD_SECONDS", 0.01)
    clock = Clock()
    with limited(made, clock) as host, channel_to(host, made.devices["north"]) as channel:
        alone, _ = training(channel, clock, 0.0, mode=mode)
    held = Client._be_held

    def be_held(client: Client, wait: pb.Wait, is_first: bool) -> None:
        held(client, wait, is_first)
        clock.now += wait.seconds if is_first else 0.0

    monkeypatch.setattr(Client, "_be_held", be_held)
    told: list[str] = []
    init = Client.__init__

    def made_to_tell(client: Client, *arguments: object) -> None:
        init(client, *arguments)  # type: ignore[arg-type]
        client.on_held = told.append

    monkeypatch.setattr(Client, "__init__", made_to_tell)
    with limited(made, clock, north=TenantLimits(tokens_per_second=10.0)) as host, channel_to(host, made.devices["north"]) as channel:
        slowed, client = training(channel, clock, HOUR, mode=mode)
    assert slowed.state.adapter.digest() == alone.state.adapter.digest()
    assert not clock.slept, "the session lives"
    assert client.account.received["wait"] > 0
    why = "this tenant has used up its tokens a second (tenant_tokens); 10 tokens a second with padding, 100 at once"
    assert told == [f"the host holds this device back: {why}"]
    assert host.budgets.of("north").use().held_seconds > 1


def test_a_device_that_would_wait_for_longer_than_its_patience_says_so(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HOLD_SECONDS", 0.01)
    clock = Clock()
    with limited(made, clock, north=TenantLimits(tokens_per_second=0.01)) as host, channel_to(host, made.devices["north"]) as channel:
        with pytest.raises(HostLostError) as caught:
            training(channel, clock, 120.0)
        page = caught.value.page()
        assert "this tenant has used up its tokens a second (tenant_tokens)" in page
        assert "0.01 tokens a second with padding" in page
        assert "reconnect be longer than" in page
        wait_until(lambda: host.account.totals().sessions == 0)  # Whoever leaves keeps no session that waits.


def test_patience_ends_with_a_host_that_says_a_moment_more_for_ever() -> None:
    clock = Clock()
    _, client = device_trainer("llama", Cut(1, 0), lambda: pytest.fail("no session"), patience=60.0)
    client._clock = clock
    for number, clock.now in enumerate((0.0, 30.0, 58.0)):
        client._be_held(pb.Wait(seconds=2.0), number == 0)
    clock.now = 59.0
    with pytest.raises(HostLostError):
        client._be_held(pb.Wait(seconds=2.0), False)
    client._be_held(pb.Wait(seconds=2.0), True)  # Another wait.
    for seconds in (float("nan"), -5.0, 0.0):
        client._be_held(pb.Wait(seconds=seconds), True)
    for seconds in (60.1, float("inf")):
        with pytest.raises(HostLostError):
            client._be_held(pb.Wait(seconds=seconds), True)


def test_a_moment_needs_no_patience() -> None:
    clock = Clock()
    _, client = device_trainer("llama", Cut(1, 0), lambda: pytest.fail("no session"), patience=0.0)
    client._clock = clock
    client._be_held(pb.Wait(seconds=7.9), True)
    with pytest.raises(HostLostError):
        client._be_held(pb.Wait(seconds=8.1), True)


@pytest.mark.parametrize("said", [float("nan"), -1.0, 0.0])
def test_a_time_that_is_none_is_as_if_nothing_was_said(said: float) -> None:
    assert retries(said) == [0.25, 0.5, 1.0, 2.0]


def test_a_time_to_come_again_is_kept_where_patience_lasts() -> None:
    assert retries(4.5) == [4.5]
    assert retries(5.0) == [5.0]
    assert retries(5.001) == []
    assert retries(float("inf")) == []


def retries(said: float) -> list[float]:
    """How long a device of 5 s of patience sleeps before each try, where a host says this each time."""
    clock = Clock()
    _, client = device_trainer("llama", Cut(1, 0), lambda: pytest.fail("no session"), patience=5.0)
    client._clock, client._sleep = clock, clock.sleep

    def refused() -> None:
        from atoll.wire.handshake import refusal_error

        raise refusal_error(pb.Refusal(code="busy", field="tenant_bytes", retry_seconds=said), "test")

    with pytest.raises(HostLostError):
        client.retrying(refused)
    return clock.slept


# Sessions and silence.


def test_sessions_by_name(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atoll.split.host.host_account.ROOM_SECONDS", 0.05)
    clock = Clock()
    with limited(made, clock, north=TenantLimits(sessions=1)) as host, ExitStack() as stack:
        north, south = (stack.enter_context(channel_to(host, made.devices[tenant])) for tenant in TENANTS)
        with session_on(north), session_on(south), session_on(south):
            with pytest.raises(HostLostError, match="tenant_sessions") as caught, session_on(north):
                pass
            assert (caught.value.expected, caught.value.retry_seconds) == ("at most 1", 0.0)
            assert "who runs the host may allow more" in caught.value.do
            assert "--" not in caught.value.page(), "what a customer cannot do"
            assert "a silent one does after 10 min 00 s" in caught.value.do
        with session_on(north):
            pass


def test_a_tenant_with_less_patience_shown_to_it(made: Made) -> None:
    clock = Clock()
    with limited(made, clock, north=TenantLimits(idle_seconds=0.6)) as host, ExitStack() as stack:
        north, south = (stack.enter_context(channel_to(host, made.devices[tenant])) for tenant in TENANTS)
        with session_on(south) as other:
            with session_on(north) as session, pytest.raises(HostLostError, match="lost"):
                session.stream.transport.read()
            wait_until(lambda: host.account.totals_by_tenant()["north"].refused == {"idle": 1})
            assert exchange(other) == "hidden"


def trickling(monkeypatch: pytest.MonkeyPatch, pause: float, served: Served) -> tuple[int, str]:
    """A device that lets so many seconds pass before each exchange of one token; exchanges until it loses its session, and why."""
    now, ended = [0.0], threading.Event()
    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=lambda: now[0]))
    packer = Packer()
    hello = pb.Hello(
        protocol=served.facts(Cut(0, 0)).protocol, base_digest="base", tokenizer_digest="tokenizer", adapter_kind="lora", wire_mode="dense",
        codec="fp32", precision="fp32", max_tokens=64,
    )  # fmt: skip
    from atoll.wire.encoding import encode

    def frames() -> Iterator[bytes]:
        yield from packer.frames(Message(hello))
        for number in range(1000):
            message = Message(pb.Forward(exchange=number, rows=1, positions=1), (encode(torch.zeros(1, 32), "fp32"),))
            (frame,) = packer.frames(message)
            now[0] += pause
            if device.left_seconds < pause:
                assert ended.wait(PATIENCE_SECONDS), "nobody ends it"
                raise ValueError("the call has ended")
            yield frame

    device = ServerTransport(frames(), ended.set, 10.0)
    shown = SessionFigures("s", "")

    def read() -> None:
        for _ in device.outbox:
            pass

    reader = threading.Thread(target=read)
    reader.start()
    HostSession(served, CountedStream(Dialogue("host"), device, "fp32"), shown).run()
    reader.join(PATIENCE_SECONDS)
    return shown.num_exchanges, "silent" if device.silent else shown.refusal.code if shown.refusal else ""


def test_one_exchange_every_ten_minutes_keeps_no_session_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comes before the session would be idle; what it was silent for in all is what ends it, to the second."""
    served = replace(llama_host(), idle_seconds=600.0, silence_seconds=14_400.0)
    assert trickling(monkeypatch, 599.0, served) == (24, "silent")
    assert trickling(monkeypatch, 600.0, served) == (24, "silent")
    assert trickling(monkeypatch, 601.0, served) == (0, "silent")


def test_metrics_by_tenant_say_what_is_used(made: Made) -> None:
    clock = Clock()
    limit = TenantLimits(bytes=ByteLimit(10**6, "day"), tokens_per_second=1000.0)
    with limited(made, clock, north=limit) as host, ExitStack() as stack:
        north, south = (stack.enter_context(channel_to(host, made.devices[tenant])) for tenant in TENANTS)
        for channel in (north, south):
            with session_on(channel) as session:
                assert exchange(session) == "hidden"
        wait_until(lambda: host.account.totals().sessions == 0)
        page = figures(serve_metrics(host, ":0", tenants=True))
        assert page["atoll_host_tenant_period_bytes north"] == host.budgets.of("north").use().num_bytes > 0
        assert page["atoll_host_tenant_period_bytes_limit north"] == 10**6
        assert page["atoll_host_tenant_held_seconds_total north"] == 0
        assert "atoll_host_tenant_period_bytes south" not in page
        assert not [name for name in figures(serve_metrics(host, ":0")) if "north" in name]
        assert [one.tenant for one in host.status().tenants] == ["north", "south"]
        assert [one.tenant for one in fetch_status(south, PATIENCE_SECONDS).tenants] == ["south"]


def test_what_a_program_gets_is_numbers_and_the_times_are_those_of_the_refusal(made: Made) -> None:
    """The same numbers in what the host says and in JSON; and one time to come again, in status, refusal and table."""
    clock = Clock()
    with limited(made, clock, north=TenantLimits(bytes=ByteLimit(5000, "hour"))) as host:
        host.budgets.of("north").add_bytes(12_000)
        clock.now += 2.0
        told = status(HostAccess(f"127.0.0.1:{host.port}", made.devices["north"]))
        over = host.budgets.of("north").over_bytes()
        assert over is not None
        reply = host.status("north")
    (tenant,) = told["tenants"]  # type: ignore[misc]
    assert tenant["again_seconds"] == over.seconds == 2 * 3600 - 2.0  # type: ignore[index]
    assert tenant["free_seconds"] == 3 * 3600 - 2.0  # type: ignore[index]
    again = over.do.removeprefix("come again in ")
    assert f"; come again in {again}" in dict(status_table(told).notes)["limits of north"]  # type: ignore[arg-type]
    numbers = [(told, reply), *zip(told["tenants"], reply.tenants, strict=True)]  # type: ignore[call-overload]
    for shown, message in numbers:
        for one in message.DESCRIPTOR.fields:
            if one.cpp_type in (FieldDescriptor.CPPTYPE_UINT64, FieldDescriptor.CPPTYPE_INT64):
                assert type(shown[one.name]) is int, one.name
    assert tenant["bytes"] >= 12_000  # type: ignore[index]
