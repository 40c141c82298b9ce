"""The front by itself, before something that is no SuperLink: what gets through, how much of it, and who is cut off."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import uvicorn
from cryptography import x509
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from atoll.fleet.files import CoordinatorFolder, EdgeFolder, split_address
from atoll.fleet.front.__main__ import Sparing
from atoll.fleet.front.admission import Admission
from atoll.fleet.front.gate import Gate
from atoll.fleet.front.limits import PATHS, Limits
from atoll.fleet.front.listener import Listener, tls_of
from atoll.fleet.init import init
from atoll.fleet.processes import free_port
from atoll.split.authority.issuer import Issuer, write_all
from atoll.split.certificates import DeviceTls
from atoll.split.host.audit import Audit

from tests.fleet.stranger import called_with
from tests.run_files import DEMO, PAIR, run_text

RUN = run_text({}, PAIR, DEMO)
PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-object"
PATIENCE_SECONDS = 60.0


class Behind:
    """What stands in SuperLink's place: it keeps what it is asked, and answers once it may."""

    def __init__(self) -> None:
        self.asked: queue.SimpleQueue[tuple[str, dict[str, str], bytes]] = queue.SimpleQueue()
        self.may_answer = threading.Event()
        self.may_answer.set()

    async def answer(self, request: Request) -> PlainTextResponse:
        """What came."""
        body = await request.body()
        self.asked.put((str(request.url.path), dict(request.headers), body))
        await asyncio.to_thread(self.may_answer.wait, PATIENCE_SECONDS)
        return PlainTextResponse(f"{len(body)} bytes", headers={"x-superlink": "secret"})


class Front:
    """A front in a thread, with limits of its own, and what stands behind it."""

    def __init__(self, fleet: Path, socket_path: Path, limits: Limits) -> None:
        self.fleet, self.behind, self._limits, self._path = fleet, Behind(), limits, socket_path
        self.folder = CoordinatorFolder(fleet / "coordinator")
        self.address, self.audit = self.folder.read().address, socket_path.with_name("audit.jsonl")
        app = Starlette(routes=[Route("/{rest:path}", self.behind.answer, methods=["POST", "GET"])])
        self._server = uvicorn.Server(uvicorn.Config(app, uds=str(socket_path), log_level="error", lifespan="off", ws="none"))
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._server.run, self._run)]
        self._loop, self._stop = asyncio.new_event_loop(), asyncio.Event()
        self._listening = socket.create_server(split_address(self.address, ""))

    def __enter__(self) -> Front:
        for thread in self._threads:
            thread.start()
        while not self._server.started:
            assert self._threads[0].is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *error: object) -> None:
        self.behind.may_answer.set()
        self._server.should_exit = True
        self._loop.call_soon_threadsafe(self._stop.set)
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
        self._listening.close()

    def _run(self) -> None:
        admission = Admission(self.folder)
        audit = Audit(self.audit)
        gate = Gate(self._path, admission, self._limits, audit)

        async def serve() -> None:
            serving = asyncio.create_task(Listener(gate, tls_of(self.folder), admission, self._limits, audit).serve(self._listening))
            await self._stop.wait()
            serving.cancel()
            await asyncio.wait([serving])
            await gate.close()

        self._loop.run_until_complete(serve())
        self._loop.close()

    def client(self, edge: str = "north") -> httpx.Client:
        """Of this edge."""
        folder = EdgeFolder(self.fleet / "edges" / edge)
        return called_with(DeviceTls(folder.ca, folder.cert, folder.key))

    def connected(self) -> ssl.SSLSocket:
        """A connection of north's, over which any bytes can be sent."""
        folder = EdgeFolder(self.fleet / "edges/north")
        context = ssl.create_default_context(cafile=folder.ca)
        context.load_cert_chain(folder.cert, folder.key)
        plain = socket.create_connection(split_address(self.address, ""), PATIENCE_SECONDS)
        return context.wrap_socket(plain, server_hostname="127.0.0.1")

    def post(self, client: httpx.Client, path: str = PULL, content: object = b"") -> httpx.Response:
        """The answer to one request."""
        return client.post(f"https://{self.address}{path}", content=content)  # type: ignore[arg-type]


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(RUN)
    init(tmp_path / "run.toml", tmp_path / "fleet", f"127.0.0.1:{free_port()}")
    return tmp_path / "fleet"


@pytest.fixture
def opened(fleet: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Limits], Front]]:
    fronts: list[Front] = []

    def start(limits: Limits) -> Front:
        fronts.append(Front(fleet, tmp_path_factory.mktemp("s") / "s", limits).__enter__())
        return fronts[-1]

    yield start
    for front in fronts:
        front.__exit__()


@pytest.fixture
def front(opened: Callable[[Limits], Front]) -> Front:
    return opened(Limits())


def ends(connection: socket.socket) -> bool:
    """Whether the other side hangs up."""
    connection.settimeout(PATIENCE_SECONDS)
    try:
        while connection.recv(4096):
            pass
    except (ConnectionError, ssl.SSLError):
        pass
    except TimeoutError:
        return False
    return True


def test_a_request_and_its_answer_pass_without_anything_else_of_their_heads(front: Front) -> None:
    head = {"flwr-public-key": "key", "flwr-signature": "s", "flwr-timestamp": "t", "authorization": "x", "x-forwarded-for": "1.2.3.4"}
    with front.client() as client:
        answer = client.post(f"https://{front.address}{PULL}?path=/v1/control/list-nodes", content=b"body", headers=head)
    path, headers, body = front.behind.asked.get(timeout=PATIENCE_SECONDS)
    assert (path, body, answer.text) == (PULL, b"body", "4 bytes")
    assert {name: headers[name] for name in ("flwr-public-key", "flwr-signature", "flwr-timestamp")} == dict(list(head.items())[:3])
    assert not {"authorization", "x-forwarded-for"} & set(headers)
    assert "x-superlink" not in answer.headers
    assert front.behind.asked.empty()


def pieces(size: int) -> Iterator[bytes]:
    """A body whose length is told by nobody."""
    for _ in range(size >> 16):
        yield bytes(1 << 16)


@pytest.mark.parametrize("path", [PULL, PUSH])
@pytest.mark.parametrize("told", [True, False], ids=["length told", "in pieces"])
def test_a_body_may_be_as_large_as_its_path_needs(path: str, told: bool, front: Front) -> None:
    limit = PATHS[path]
    with front.client() as client:
        assert front.post(client, path, bytes(limit) if told else pieces(limit)).text == f"{limit} bytes"
        front.behind.asked.get(timeout=PATIENCE_SECONDS)
        with contextlib.suppress(httpx.TransportError):  # It may be cut off while it is still being sent.
            assert front.post(client, path, bytes(200 << 20) if told else pieces(200 << 20)).status_code == 413
        assert front.behind.asked.empty()
        assert front.post(client).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: a\r\n", b"POST " + b"a" * 100_000])
def test_a_head_that_does_not_end_is_cut_off(sent: bytes, opened: Callable[[Limits], Front]) -> None:
    with opened(replace(Limits(), head_seconds=0.3)).connected() as connection:
        with contextlib.suppress(OSError):  # It may be cut off while it is still being sent.
            connection.sendall(sent)
        assert ends(connection)


def test_a_second_head_that_does_not_end_is_cut_off_too(opened: Callable[[Limits], Front]) -> None:
    with opened(replace(Limits(), head_seconds=2.0)).connected() as connection:
        connection.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.sendall(b"POST /v1")
        assert ends(connection)


def test_a_body_that_stops_is_cut_off(opened: Callable[[Limits], Front]) -> None:
    front = opened(replace(Limits(), idle_seconds=2.0))
    with front.connected() as connection:
        connection.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nbody")
        assert ends(connection)
    assert front.behind.asked.empty()


def test_an_answer_that_is_not_to_come_is_given_up(opened: Callable[[Limits], Front]) -> None:
    front = opened(replace(Limits(), request_seconds=0.5))
    front.behind.may_answer.clear()
    with front.client() as client, pytest.raises(httpx.TransportError):
        front.post(client)


def test_who_shows_no_certificate_in_time_is_cut_off(opened: Callable[[Limits], Front]) -> None:
    front = opened(replace(Limits(), handshake_seconds=0.3))
    with socket.create_connection(split_address(front.address, "")) as silent:
        assert ends(silent)


def test_connections_that_say_nothing_do_not_keep_edges_out(opened: Callable[[Limits], Front]) -> None:
    front = opened(replace(Limits(), handshakes=3, handshake_seconds=PATIENCE_SECONDS))
    silent = [socket.create_connection(split_address(front.address, "")) for _ in range(8)]
    with front.client() as client:
        assert front.post(client).status_code == 200
    assert all(ends(connection) for connection in silent[:5])
    for connection in silent:
        connection.close()


def test_one_edge_has_so_many_connections_and_the_next_one_as_many(opened: Callable[[Limits], Front]) -> None:
    front = opened(replace(Limits(), edge_connections=2))
    with front.connected(), front.connected(), front.connected() as third:
        assert ends(third)
        with front.client("south") as client:
            assert front.post(client).status_code == 200


def test_one_edge_has_so_many_requests_at_once(opened: Callable[[Limits], Front]) -> None:
    front = opened(replace(Limits(), edge_requests=1))
    front.behind.may_answer.clear()
    answers: queue.SimpleQueue[int] = queue.SimpleQueue()
    with front.client() as first, front.client() as second, front.client("south") as south:
        waiting = threading.Thread(target=lambda: answers.put(front.post(first).status_code))
        waiting.start()
        front.behind.asked.get(timeout=PATIENCE_SECONDS)
        assert front.post(second).status_code == 503
        front.behind.may_answer.set()
        assert front.post(south).status_code == 200
        assert answers.get(timeout=PATIENCE_SECONDS) == 200
        waiting.join()
        assert front.post(second).status_code == 200


def revoke(front: Front) -> None:
    certificate = EdgeFolder(front.fleet / "edges/north").cert
    issuer = Issuer.opened(front.fleet / "ca.pem", front.fleet / "ca.key")
    stage = front.folder.revoked.with_suffix(".stage")
    stage.write_bytes(issuer.revoked([x509.load_pem_x509_certificate(certificate.read_bytes()).serial_number]))
    stage.replace(front.folder.revoked)


def forget(front: Front) -> None:
    front.folder.node_public("north").unlink()


def damage(front: Front) -> None:
    front.folder.revoked.write_bytes(Issuer("another").revoked(()))


def lose(front: Front) -> None:
    front.folder.revoked.unlink()


@pytest.mark.parametrize("do", [revoke, forget, damage, lose])
def test_what_is_revoked_is_kept_out_at_once(do: Callable[[Front], None], front: Front) -> None:
    """On a connection that is open, and on a new one; the other edge goes on, unless the list itself is not to be believed."""
    with front.client() as client, front.client("south") as other:
        assert front.post(client).status_code == front.post(other).status_code == 200
        do(front)
        assert front.post(client).status_code == 403
        with pytest.raises(httpx.TransportError):
            front.post(client)
        assert front.post(other).status_code == (403 if do in (damage, lose) else 200)


def test_who_came_and_what_was_refused_is_in_the_audit_log(front: Front) -> None:
    with front.client() as client, front.client("south") as other:
        assert front.post(client).status_code == 200
        assert front.post(other, "/v1/control/list-nodes").status_code == 404
    with socket.create_connection(split_address(front.address, "")) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert ends(stranger)
    revoke(front)
    with front.client() as client, contextlib.suppress(httpx.TransportError):
        front.post(client)

    def lines() -> list[dict[str, object]]:
        return [json.loads(line) for line in front.audit.read_text().splitlines()]

    while len(lines()) < 5:
        time.sleep(0.01)
    found = [(line["event"], line["tenant"], line.get("why", line.get("status"))) for line in lines()]
    assert sorted(found, key=str) == sorted([
        ("let in", "north", None), ("let in", "south", None), ("request refused", "south", "not open to edges"),
        ("handshake refused", "", None), ("not let in", "north", "its certificate is revoked"),
    ], key=str)  # fmt: skip
    assert all(str(line["peer"]).startswith("127.0.0.1:") for line in lines() if line["event"] != "request refused")


def test_a_log_grows_by_so_many_lines_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now, record, sparing = [1000.0], logging.makeLogRecord({}), Sparing()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    assert sum(sparing.filter(record) for _ in range(1000)) == 120
    now[0] += 60
    assert sparing.filter(record)


@pytest.mark.parametrize("name", ["guest", "../north", "north\n", "", "north\0", "a" * 65])
def test_a_name_that_no_edge_has(name: str, front: Front, tmp_path: Path) -> None:
    try:
        files = Issuer.opened(front.fleet / "ca.pem", front.fleet / "ca.key").device("odd", name)
    except ValueError:
        pytest.skip("no certificate can carry it")
    write_all(tmp_path / "odd", files)
    odd = DeviceTls(front.fleet / "ca.pem", tmp_path / "odd/odd.pem", tmp_path / "odd/odd.key")
    with called_with(odd) as client, pytest.raises(httpx.TransportError):
        front.post(client)
    assert front.behind.asked.empty()


def test_without_a_superlink_behind_it_the_front_says_so(front: Front) -> None:
    front._path.unlink()
    with front.client() as client:
        assert front.post(client).status_code == 503
