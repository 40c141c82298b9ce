"""What a host tells of itself, how it bears several tenants at once, and how it ends sessions."""

from __future__ import annotations

import socket
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from atoll.adapters.state import AdapterState
from atoll.base.load import Base, load_base
from atoll.config.schema import Train
from atoll.errors import HostLostError, TransportError
from atoll.heap import give_freed_pages_back
from atoll.jobs.split import serve
from atoll.split import transport
from atoll.split.certificates import make_certificates
from atoll.split.cut import Cut
from atoll.split.device.client import Client
from atoll.split.host import host_account as accounts
from atoll.split.host import metrics
from atoll.split.host.host_account import HostAccount, TokenRate
from atoll.split.host.metrics import serve_metrics
from atoll.split.host.server import Host
from atoll.split.host.session import SessionFigures
from atoll.split.host.tenants import HostLimits
from atoll.split.transport import FRAMES_ON_THEIR_WAY, SERVICE, ClientTransport, ServerTransport, fetch_status
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, TrainState, Update
from atoll.wire import protocol_pb2 as pb

from tests.conftest import random_model
from tests.pieces import Steps, adapters, stream
from tests.split.conftest import BLOCKS, device_trainer
from tests.split.running import PATIENCE_SECONDS, channel_to, llama_host, running, session_on, wait_until
from tests.split.test_split_equals_local import difference

STEPS = 6
PLAN = FitPlan(STEPS, 1, False)
CUT = Cut(1, 0)
TENANTS = {"north": 4, "south": 2}
"""Their ranks."""


def local(edge: str, start: AdapterState) -> Update:
    """What training without a host gives."""
    base = Base("llama", random_model("llama", BLOCKS), None, False)  # type: ignore[arg-type]
    trainer = LocalTrainer(base, Train(learning_rate=2e-3), STEPS, 0.0, 0, edge)
    return trainer.fit(TrainState(start, {}, 0), stream(edge), PLAN, Steps([]))


def device(channel: grpc.Channel, edge: str = "north") -> tuple[LocalTrainer, Client]:
    """A trainer whose middle blocks are in the host at the other end of the channel."""
    return device_trainer("llama", CUT, lambda: ClientTransport(channel, PATIENCE_SECONDS), edge=edge, total_steps=STEPS)


def train(trainer: LocalTrainer, edge: str = "north") -> Update:
    """A few steps from fresh adapters of the tenant's rank."""
    start = adapters(random_model("llama", BLOCKS), rank=TENANTS[edge])
    return trainer.fit(TrainState(start, {}, 0), stream(edge), PLAN, Steps([]))


def end(client: Client) -> None:
    """Say goodbye."""
    assert client.blocks is not None
    client.blocks.end()


def figures(address: str) -> dict[str, float]:
    """The page's samples, by name and label."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE_SECONDS) as page:
        text = page.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {" ".join((sample.name, *sample.labels.values())): sample.value for sample in samples}


def test_status_is_what_the_host_serves() -> None:
    served = llama_host()
    facts = served.facts(Cut(0, 0))
    with running(served, max_sessions=3) as host, channel_to(host) as channel:
        status = fetch_status(channel, PATIENCE_SECONDS)
        assert status.base_digest == served.base_digest(Cut(0, 0)) == "base"
        for name in ("protocol", "atoll_version", "tokenizer_digest", "num_blocks", "precision", "max_tokens", "max_rank"):
            assert getattr(status, name) == getattr(facts, name) != 0, name
        assert tuple(status.codecs) == facts.codecs
        assert tuple(status.wire_modes) == facts.wire_modes
        assert tuple(status.adapter_kinds) == facts.kinds
        assert (status.bits, status.max_sessions, status.sessions, status.tokens, len(status.open)) == (32, 3, 0, 0, 0)
        assert status.tokens_per_second == 0
        assert status.uptime_seconds > 0
        assert status.resident_bytes > 50 * 2**20


def test_status_counts_what_crossed() -> None:
    with running(llama_host()) as host, channel_to(host) as channel:
        trainer, client = device(channel)
        update = train(trainer)
        wait_until(lambda: bool(host.status().open) and host.status().open[0].exchanges == STEPS)
        status = fetch_status(channel, PATIENCE_SECONDS)
        (session,) = status.open
        assert session.tokens == status.tokens == sum(report.num_tokens for report in update.reports)
        batches = [stream().batch(step) for step in range(STEPS)]
        assert session.positions == sum(batch.input_ids_BT.numel() for batch in batches) > session.tokens
        assert 0 < session.compute_seconds < session.seconds
        assert (session.received_bytes, session.sent_bytes) == (client.account.sent.total(), client.account.received.total())
        assert status.tokens_per_second > 0
        assert status.sessions == 1
        assert 0 < session.seconds < status.uptime_seconds
        end(client)
        wait_until(lambda: host.status().sessions == 0)
        assert (host.status().tokens, len(host.status().open)) == (status.tokens, 0)


def test_two_tenants_at_once_get_what_each_gets_alone(tmp_path: Path) -> None:
    made = make_certificates(tmp_path, [], list(TENANTS))
    both = threading.Barrier(2)
    starts = {edge: adapters(random_model("llama", BLOCKS), rank=rank) for edge, rank in TENANTS.items()}
    with running(llama_host(), tls=made.host) as host, ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        channels = {edge: stack.enter_context(channel_to(host, made.devices[edge])) for edge in TENANTS}
        # Made here, one after the other: a random model seeds a generator that all threads share.
        devices = {edge: device(channel, edge) for edge, channel in channels.items()}

        def tenant(edge: str) -> Update:
            trainer, _ = devices[edge]
            update = trainer.fit(TrainState(starts[edge], {}, 0), stream(edge), PLAN, lambda step: None)
            both.wait(PATIENCE_SECONDS)  # Both have a session until both are done.
            return update

        updates = dict(zip(TENANTS, pool.map(tenant, TENANTS), strict=True))
        for edge, channel in channels.items():
            assert [session.tenant for session in fetch_status(channel, PATIENCE_SECONDS).open] == [edge]
        assert sorted(session.tenant for session in host.status().open) == sorted(TENANTS)
        for _, client in devices.values():
            end(client)
    for edge, update in updates.items():
        assert difference(local(edge, starts[edge]).state.adapter, update.state.adapter) < 1e-5
        assert difference(starts[edge], update.state.adapter) > 1e-2
    assert host.account.totals().tokens == sum(report.num_tokens for update in updates.values() for report in update.reports)


def test_one_session_too_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "ROOM_SECONDS", 0.05)
    with running(llama_host(), max_sessions=2) as host, channel_to(host) as channel:
        with session_on(channel), session_on(channel):
            with pytest.raises(HostLostError, match="sessions") as caught, session_on(channel):
                pass
            assert caught.value.expected == "at most 2"
            assert "who runs the host may allow more" in caught.value.do
            assert host.account.totals().refused == {"busy": 1}
            assert fetch_status(channel, PATIENCE_SECONDS).sessions == 2
        with session_on(channel):  # One ended, so there is room.
            pass
        assert host.account.totals().refused == {"busy": 1}


def test_a_tenant_beyond_its_limit_is_refused_and_others_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "ROOM_SECONDS", 0.05)
    made = make_certificates(tmp_path, [], list(TENANTS))
    with running(llama_host(), 4, made.host, max_tenant_sessions=2) as host, ExitStack() as stack:
        north, south = (stack.enter_context(channel_to(host, made.devices[tenant])) for tenant in TENANTS)
        again = stack.enter_context(channel_to(host, made.devices["north"]))  # Another connection is the same tenant.
        with session_on(north):
            with session_on(again):
                for channel in (north, again):
                    with pytest.raises(HostLostError, match="tenant_sessions") as caught, session_on(channel):
                        pass
                assert (caught.value.got, caught.value.expected) == ("one more", "at most 2")
                assert "who runs the host may allow more" in caught.value.do
                with session_on(south), session_on(south):
                    assert [session.tenant for session in host.status().open] == ["north", "north", "south", "south"]
                    with pytest.raises(HostLostError, match="tenant_sessions"), session_on(south):
                        pass
            with session_on(north):  # One ended, so there is room.
                pass
        assert host.account.totals().refused == {"busy": 3}


def test_room_for_one_tenant_is_given_though_another_waits_for_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """North, at its limit, and south, for which the host is full, wait in this order; a session of south's ends."""
    monkeypatch.setattr(accounts, "ROOM_SECONDS", PATIENCE_SECONDS)
    account = HostAccount(HostLimits(max_sessions=2, max_tenant_sessions=1))
    first, second = account.open("north"), account.open("south")
    assert isinstance(first, SessionFigures) and isinstance(second, SessionFigures)  # noqa: PT018
    waiting: list[object] = account._room._waiters  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as pool:
        north = pool.submit(account.open, "north")
        wait_until(lambda: len(waiting) == 1)
        west = pool.submit(account.open, "west")
        wait_until(lambda: len(waiting) == 2)
        account.end(second, "")
        assert west.result() in account.sessions("west")
        assert not north.done()
        account.end(first, "")
        assert north.result() in account.sessions("north")
    assert not account.totals().refused


def test_a_device_may_end_its_session_and_open_another_at_once() -> None:
    with running(llama_host(), max_sessions=1) as host, channel_to(host) as channel:
        for _ in range(20):
            with session_on(channel):
                pass
        assert not host.account.totals().refused


def test_a_full_host_waits_a_little_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "ROOM_SECONDS", PATIENCE_SECONDS)
    account = HostAccount(HostLimits(max_sessions=1))
    first = account.open("north")
    assert isinstance(first, SessionFigures)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(account.open, "south")
        wait_until(lambda: second.done() or bool(account._room._waiters))  # type: ignore[attr-defined]
        account.end(first, "")
        assert second.result() in account.sessions("south")
    assert not account.totals().refused


def test_refusals_are_counted_by_code() -> None:
    with running(llama_host()) as host, channel_to(host) as channel:
        transport = ClientTransport(channel, PATIENCE_SECONDS)
        transport.write(b"no frame")
        assert b"frame" in transport.read()
        transport.close()
        wait_until(lambda: host.account.totals().sessions == 0)
        assert host.account.totals().refused == {"frame": 1}


def test_a_silent_device_loses_its_session_and_the_host_lives_on() -> None:
    with running(llama_host(idle_seconds=0.6)) as host, channel_to(host) as channel:
        with session_on(channel) as session:
            with pytest.raises(HostLostError, match="lost") as caught:
                session.stream.transport.read()
            assert "silent for longer than it allows" in caught.value.got
        wait_until(lambda: host.account.totals().sessions == 0)
        assert host.account.totals().refused == {"idle": 1}
        trainer, client = device(channel)
        train(trainer)
        end(client)


def test_a_device_that_keeps_an_exchange_waiting_loses_its_session() -> None:
    """It greets and sends a Forward, within what a device may be silent, and then no more."""
    with running(llama_host(exchange_seconds=0.3)) as host, channel_to(host) as channel, session_on(channel) as session:
        session.stream.send(pb.Forward(exchange=0, rows=1, positions=2, train=True), [torch.zeros(2, 32)])
        assert session.stream.receive().kind == "hidden"
        with pytest.raises(HostLostError, match="lost") as caught:
            session.stream.transport.read()
        assert "slow or silent for longer than it allows" in caught.value.got
        wait_until(lambda: host.account.totals().sessions == 0)
        assert host.account.totals().refused == {"idle": 1}


def test_a_frame_now_and_then_keeps_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait is as long as a device may be silent; all together they are too long. Time is the test's own."""
    now, ended = [0.0], threading.Event()
    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def frames() -> Iterator[bytes]:
        for number in range(4):
            now[0] += 8
            yield bytes([number])
        now[0] += 8
        assert ended.wait(PATIENCE_SECONDS), "nobody ends it"
        raise ValueError("the call has ended")

    slow = ServerTransport(frames(), ended.set, 10.0)
    for number, left in enumerate((27.0, 19.0, 11.0, 3.0)):
        slow.left_seconds = 35.0 if number == 0 else slow.left_seconds
        assert slow.read() == bytes([number])
        assert slow.left_seconds == left
    with pytest.raises(HostLostError):
        slow.read()
    assert slow.silent
    slow.close()


def test_a_host_that_stops_ends_its_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("atoll.split.host.server.STOP_SECONDS", 0.1)
    with running(llama_host()) as host, channel_to(host) as channel, session_on(channel) as session:
        host.stop()
        with pytest.raises(HostLostError):
            session.stream.transport.read()
        assert host.account.totals().sessions == 0


def test_a_writer_does_not_wait_for_a_host_that_is_gone() -> None:
    gone = threading.Event()

    def never_reads(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        gone.wait(PATIENCE_SECONDS)
        yield from ()

    server = grpc.server(ThreadPoolExecutor(1))
    handlers = {"Train": grpc.stream_stream_rpc_method_handler(never_reads)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        transport = ClientTransport(channel, PATIENCE_SECONDS)
        writes: list[int] = []

        def write() -> None:
            while True:
                transport.write(bytes(2**20))
                writes.append(1)

        with ThreadPoolExecutor(1) as pool:
            writer = pool.submit(write)
            try:
                wait_until(lambda: len(writes) > FRAMES_ON_THEIR_WAY and transport._outbox._frames.full())
                server.stop(0)
                gone.set()
                with pytest.raises(HostLostError):
                    writer.result(PATIENCE_SECONDS)
            finally:
                gone.set()
                server.stop(0)
                transport.close()


def test_a_session_tidies_before_each_wait_for_its_device() -> None:
    tidied: list[int] = []
    with running(replace(llama_host(), while_waiting=lambda: tidied.append(1))) as host, channel_to(host) as channel:
        trainer, client = device(channel)
        train(trainer)
        wait_until(lambda: len(tidied) == 2 * STEPS)  # For the gradient, and for the next exchange.
        end(client)


def test_a_host_that_recomputes_gives_freed_pages_back() -> None:
    base = load_base("tiny")
    for recomputes in (True, False):
        host = serve(base, "tiny", "fp32", 32, HostLimits(recomputes=recomputes))
        assert (host.while_waiting is give_freed_pages_back) == recomputes


def test_the_metrics_page_holds_the_hosts_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "ROOM_SECONDS", 0.05)
    with running(llama_host(), max_sessions=1) as host, channel_to(host) as channel:
        address = serve_metrics(host, ":0")
        assert address.startswith("127.0.0.1:")
        empty = figures(address)
        assert empty["atoll_host_tokens_total"] == empty["atoll_host_sessions"] == 0
        trainer, client = device(channel)
        update = train(trainer)
        wait_until(lambda: host.account.totals().exchanges == STEPS)
        with pytest.raises(HostLostError), session_on(channel):
            pass
        page = figures(address)
        assert page.pop("atoll_host_resident_bytes") > 50 * 2**20
        assert page.pop("atoll_host_compute_seconds_total") > page.pop("atoll_host_wait_seconds_total") > 0
        assert page.pop("atoll_host_positions_total") > page["atoll_host_tokens_total"]
        assert page == {
            "atoll_host_sessions": 1,
            "atoll_host_cache_bytes": 0,
            "atoll_host_tokens_total": sum(report.num_tokens for report in update.reports),
            "atoll_host_exchanges_total": STEPS,
            "atoll_host_bytes_total sent": client.account.received.total(),
            "atoll_host_bytes_total received": client.account.sent.total(),
            "atoll_host_refused_total busy": 1,
        }
        end(client)
        wait_until(lambda: host.account.totals().sessions == 0)
        after = figures(address)
        assert after["atoll_host_tokens_total"] == page["atoll_host_tokens_total"]
        assert after["atoll_host_bytes_total received"] > page["atoll_host_bytes_total received"], "the goodbye"
    with pytest.raises(OSError):  # The page ends with the host.
        figures(address)


def test_tenants_are_named_on_the_page_only_where_the_operator_asks(tmp_path: Path) -> None:
    made = make_certificates(tmp_path, [], list(TENANTS))
    with running(llama_host(), tls=made.host) as host, channel_to(host, made.devices["north"]) as channel:
        plain, named = serve_metrics(host, ":0"), serve_metrics(host, ":0", tenants=True)
        with session_on(channel):
            assert not [name for name in figures(plain) if "north" in name or "tenant" in name]
            assert figures(named)["atoll_host_tenant_sessions north"] == 1
        wait_until(lambda: figures(named)["atoll_host_tenant_sessions north"] == 0)
        assert figures(named)["atoll_host_tenant_bytes_total received north"] > 0
        assert {name.rpartition(" ")[2] for name in figures(named) if "tenant" in name} == {"north"}


def test_slow_readers_of_the_page_take_no_threads_and_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some never ask, some ask and never read, and one more than there may be is hung up on."""
    monkeypatch.setattr(metrics, "READER_SECONDS", 1.0)
    with running(llama_host()) as host, ExitStack() as stack:
        name, _, port = serve_metrics(host, ":0").rpartition(":")
        threads = threading.active_count()
        slow = [stack.enter_context(socket.create_connection((name, int(port)), PATIENCE_SECONDS)) for _ in range(metrics.READERS)]
        for number, connection in enumerate(slow):
            connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n" if number % 2 else b"GET /met")
        wait_until(lambda: _refused(name, int(port)))
        assert threading.active_count() == threads
        for connection in slow:
            with suppress(ConnectionError):
                while connection.recv(1000):
                    pass
        wait_until(lambda: not _refused(name, int(port)))
        assert figures(f"{name}:{port}")["atoll_host_sessions"] == 0


def _refused(name: str, port: int) -> bool:
    try:
        figures(f"{name}:{port}")
    except OSError:
        return True
    return False


@pytest.mark.parametrize("question", [
    b"\r\n\r\n", b"POST / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(2**15), b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 2**12,
], ids=["nothing", "another method", "TLS", "too long"])  # fmt: skip
def test_other_questions_get_no_page(question: bytes) -> None:
    with running(llama_host()) as host:
        name, _, port = serve_metrics(host, ":0").rpartition(":")
        answer = b""
        with socket.create_connection((name, int(port)), PATIENCE_SECONDS) as connection, suppress(ConnectionError):
            connection.sendall(question)
            while more := connection.recv(1000):
                answer += more
        assert b"atoll_host" not in answer
        assert figures(f"{name}:{port}")["atoll_host_sessions"] == 0


def test_a_metrics_address_of_no_use() -> None:
    with running(llama_host()) as host:
        taken = serve_metrics(host, "127.0.0.1:0")
        for address in (taken, "127.0.0.1:http", "127.0.0.1:70000", "192.0.2.1:0", "127.0.0.1"):
            with pytest.raises(TransportError, match="metrics") as caught:
                serve_metrics(host, address)
            assert caught.value.where == address


def test_the_rate_is_over_the_last_minute() -> None:
    now = [1000.0]
    rate = TokenRate(lambda: now[0])
    assert rate.per_second() == 0
    rate.add(30)
    assert rate.per_second() == 30  # Within the first second.
    now[0] += 10
    rate.add(20)
    rate.add(10)
    assert rate.per_second() == 6
    now[0] += 49
    assert rate.per_second() == pytest.approx(60 / 59)
    now[0] += 1.5
    assert rate.per_second() == pytest.approx(30 / 60)
    now[0] += 1000
    assert rate.per_second() == 0


def test_a_host_that_does_not_answer_is_told_as_lost() -> None:
    with running(llama_host()) as host:
        port = host.port
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(HostLostError, match="lost") as caught:
        fetch_status(channel, PATIENCE_SECONDS)
    assert "nobody listens there" in caught.value.got


@pytest.mark.parametrize(("listen", "got"), [
    ("127.0.0.1:{}", "address already in use"), ("192.0.2.1:{}", "cannot assign requested address"),
])  # fmt: skip
def test_a_place_where_no_host_can_listen_is_one_page(listen: str, got: str, capfd: pytest.CaptureFixture[str]) -> None:
    with running(llama_host()) as host:
        with pytest.raises(TransportError, match="cannot listen there") as caught:
            Host(llama_host(), HostLimits(), listen.format(host.port), None)
        assert caught.value.got == got
    assert not capfd.readouterr().err
