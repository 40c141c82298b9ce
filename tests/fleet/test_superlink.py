"""The coordinator's port: what a stranger, another fleet's edge and an edge of this one get there, and that no code of theirs is run."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from atoll.federated.flower import Array, ArrayRecord, ConfigRecord, Message, RecordDict, assume_identity
from atoll.fleet.files import CoordinatorFolder, EdgeFolder
from atoll.fleet.front.limits import PATHS
from atoll.fleet.init import init
from atoll.fleet.links import flower
from atoll.fleet.links.flower import EdgeLink, LocalSuperLink
from atoll.fleet.links.frames import PROBLEM, Frame, unpacked
from atoll.fleet.links.node import serve
from atoll.fleet.links.relay import FleetGrid
from atoll.fleet.links.way import open_way
from atoll.fleet.members import remove
from atoll.fleet.processes import free_port
from atoll.fleet.superlink import SuperLink
from atoll.split.authority.issuer import Issuer, write_all
from atoll.split.certificates import DeviceTls

from tests.fleet.stranger import app_that_leaves, called_with, five_requests, in_background
from tests.run_files import DEMO, PAIR, run_text

RUN = run_text({}, PAIR, DEMO)
SECONDS = 60.0


@pytest.fixture(autouse=True)
def identity() -> None:
    """Flower asks who makes a message."""
    assume_identity(1, 0)


def two_fleets(folder: Path) -> Path:
    """Folders of a coordinator and two edges; beside them those of a fleet that is none of theirs."""
    (folder / "run.toml").write_text(RUN)
    init(folder / "run.toml", folder / "fleet", f"127.0.0.1:{free_port()}")
    init(folder / "run.toml", folder / "foreign", f"127.0.0.1:{free_port()}")
    write_all(folder / "foreign", Issuer.opened(folder / "fleet/ca.pem", folder / "fleet/ca.key").device("guest", "guest"))
    return folder / "fleet"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fleet that most tests are about."""
    return two_fleets(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(scope="module")
def link(fleet: Path) -> Iterator[SuperLink]:
    """SuperLink and the front before it."""
    with SuperLink(CoordinatorFolder(fleet / "coordinator"), print) as found:
        yield found


def shown(fleet: Path) -> dict[str, DeviceTls]:
    """Certificates with which somebody may come; all believe the fleet's authority."""
    ca, foreign, edge = fleet / "ca.pem", EdgeFolder(fleet.parent / "foreign/edges/north"), EdgeFolder(fleet / "edges/north")
    coordinator, guest = CoordinatorFolder(fleet / "coordinator"), fleet.parent / "foreign"
    return {
        "none": DeviceTls(ca, None, None), "another fleet's": DeviceTls(ca, foreign.cert, foreign.key),
        "the coordinator's": DeviceTls(ca, coordinator.cert, coordinator.key),
        "of a name that is no edge": DeviceTls(ca, guest / "guest.pem", guest / "guest.key"),
        "an edge's": DeviceTls(ca, edge.cert, edge.key),
    }  # fmt: skip


def outcome(client: httpx.Client, address: str, path: str, body: bytes) -> object:
    """The answer's status, or "closed" where there is none."""
    try:
        return client.post(f"https://{address}{path}", content=body).status_code
    except httpx.TransportError:
        return "closed"


@pytest.mark.parametrize("has_begun", [False, True], ids=["before", "in a run"])
def test_a_strangers_requests_are_refused(has_begun: bool, link: SuperLink, fleet: Path, tmp_path: Path) -> None:
    nodes = link.nodes()
    if has_begun and link._keeper is None:
        link.carry()
    left, address = tmp_path / "left", CoordinatorFolder(fleet / "coordinator").read().address
    app = app_that_leaves(left, tmp_path / "app")
    for who, tls in shown(fleet).items():
        with called_with(tls) as client:
            found = {path: outcome(client, address, path, body) for path, body in five_requests(app).items()}
        assert set(found.values()) == {404 if who == "an edge's" else "closed"}, who
    assert not left.exists()
    assert link.nodes() == nodes


def test_an_edge_gets_to_what_an_edge_needs_and_to_nothing_else(link: SuperLink, fleet: Path) -> None:
    """Every path that SuperLink has, by Flower's own list, and those of its pages."""
    of_pages = ["/", "/docs", "/openapi.json", "/health", "/v1/fleet/../control/list-nodes", "/v1/fleet//pull-messages"]
    paths = [path for _, path in PROTOBUF_REQUEST_TYPES] + of_pages
    address = CoordinatorFolder(fleet / "coordinator").read().address
    with called_with(shown(fleet)["an edge's"]) as client:
        found = {path: outcome(client, address, path, b"") for path in paths}
        assert {path for path, status in found.items() if status != 404} == set(PATHS)
        assert {found[path] for path in PATHS} == {401}, "without a node's key"
        assert client.get(f"https://{address}/v1/fleet/pull-messages").status_code == 404
    assert set(PATHS) <= {path for path in paths if path.startswith("/v1/fleet/")}


def test_superlink_is_open_to_its_own_user_alone_and_starts_nothing(link: SuperLink) -> None:
    process = psutil.Process(link._link.pid)
    assert not process.net_connections("inet")
    assert not process.children()
    assert link._socket.parent.stat().st_mode & 0o077 == 0
    assert link._socket.parent.stat().st_uid == os.getuid()


def test_a_question_of_any_size_goes_to_an_edge_and_its_answer_back(link: SuperLink, fleet: Path) -> None:
    """Larger than one of Flower's objects, and than any one request may be."""
    nodes = link.nodes()
    if link._keeper is None:
        link.carry()
    data = os.urandom(18 << 20)
    sent = RecordDict({"arrays": ArrayRecord({"a": Array("uint8", (len(data),), "raw", data)})})
    node = next(number for number, name in nodes.items() if name == "south")

    def echo(question: bytes) -> bytes:
        frame = Frame.from_bytes(question)
        return frame.answered(frame.content).to_bytes()

    with in_background(serve, EdgeFolder(fleet / "edges/south"), echo, print):
        (reply,) = FleetGrid(link.relay, nodes).send_and_receive([Message(sent, node, "train", group_id="1")], timeout=SECONDS)
    assert reply.content.array_records["arrays"]["a"].data == data


def test_no_code_that_came_over_the_network_is_run(tmp_path: Path) -> None:
    """Somebody who has taken over a coordinator starts a run of an app of theirs, and sends its message to an edge."""
    left, asked, fleet = tmp_path / "left", list[bytes](), two_fleets(tmp_path)
    app_that_leaves(left, tmp_path / "app")
    message = RecordDict({"run": ConfigRecord({"code": "import os"})})
    with SuperLink(CoordinatorFolder(fleet / "coordinator"), print) as link, LocalSuperLink(link._socket) as control:
        node = next(number for number, name in link.nodes().items() if name == "north")

        def answer(question: bytes) -> bytes:
            asked.append(question)
            return Frame.from_bytes(question).answered().to_bytes()

        replies, numbers = list[Message](), list[str]()
        with control.begin(tmp_path / "app") as run, in_background(serve, EdgeFolder(fleet / "edges/north"), answer, print):

            def has_answered() -> bool:
                """Asked until it is there: of a node that is not yet, Flower itself says so."""
                numbers.extend(run.push_messages([Message(message, node, "train", group_id="1")]))
                replies.extend(reply for reply in run.pull_messages(numbers) if not reply.has_error())
                return bool(replies)

            until(has_answered)
        assert not psutil.Process(link._link.pid).children()
    assert "did not write" in str(unpacked(replies[0].content).config_records[PROBLEM]["page"])
    assert not asked
    assert not left.exists()
    assert not list(fleet.rglob("foreign"))


def test_an_edge_without_its_key_is_no_node(link: SuperLink, fleet: Path) -> None:
    """A certificate of the fleet is not enough: SuperLink asks for a key that it knows."""
    link.nodes()
    edge, other = EdgeFolder(fleet / "edges/north"), EdgeFolder(fleet.parent / "foreign/edges/north")
    address = edge.read().superlink
    tls = DeviceTls(edge.ca, edge.cert, edge.key)
    with open_way(address, tls) as way, pytest.raises(httpx.HTTPStatusError) as caught, EdgeLink(address, way, other.node_key):
        pass
    assert caught.value.response.status_code == 412


def test_half_an_answer_holds_up_nobody_else(link: SuperLink, fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """North says that it answers, and sends no part of it; south is heard meanwhile, and north is asked again."""
    nodes = link.nodes()
    if link._keeper is None:
        link.carry()
    cut = queue.SimpleQueue[str]()

    def cuts_short(objects: dict[str, object], send: object, object_ids_to_push: set[str]) -> None:
        if threading.current_thread().name == "north" and cut.empty():
            cut.put("north")
            return
        push_objects(objects, send, object_ids_to_push=object_ids_to_push)

    push_objects = flower.push_objects
    monkeypatch.setattr(flower, "push_objects", cuts_short)

    def echo(question: bytes) -> bytes:
        frame = Frame.from_bytes(question)
        return frame.answered(frame.content).to_bytes()

    def north(stop: threading.Event) -> None:
        threading.current_thread().name = "north"
        serve(EdgeFolder(fleet / "edges/north"), echo, print, stop)

    content = RecordDict({"a": ConfigRecord({"b": 1})})
    with in_background(north), in_background(serve, EdgeFolder(fleet / "edges/south"), echo, print):
        questions = [Message(content, node, "train", group_id="1") for node in nodes]
        replies = FleetGrid(link.relay, nodes).send_and_receive(questions, timeout=SECONDS)
        assert [nodes[reply.metadata.src_node_id] for reply in replies] == ["south", "north"]
    assert not cut.empty()


def test_an_edge_that_is_removed_is_out_while_its_coordinator_runs(tmp_path: Path) -> None:
    fleet, said = two_fleets(tmp_path), queue.SimpleQueue[str]()
    with SuperLink(CoordinatorFolder(fleet / "coordinator"), said.put) as link:
        link.nodes()
        link.carry()
        edge, heard = EdgeFolder(fleet / "edges/north"), queue.SimpleQueue[str]()
        tls = (edge.cert.read_bytes(), edge.key.read_bytes(), edge.node_key.read_bytes(), edge.edge_json.read_bytes())
        with in_background(serve, edge, lambda data: Frame.from_bytes(data).answered().to_bytes(), heard.put):
            with LocalSuperLink(link._socket) as control:
                until(lambda: "north" in online(control))
            remove(fleet, "north")
            assert "of the fleet no more" in heard.get(timeout=SECONDS)
        assert said.get(timeout=SECONDS) == "north is of the fleet no more"
        for path, content in zip((edge.cert, edge.key, edge.node_key, edge.edge_json), tls, strict=True):
            path.write_bytes(content)  # As its own machine still has them.
        (edge.path / "ca.pem").write_bytes((fleet / "ca.pem").read_bytes())
        with in_background(serve, edge, lambda data: data, heard.put):
            assert "hung up" in heard.get(timeout=SECONDS)
        with LocalSuperLink(link._socket) as control:
            assert online(control) == set()


def online(control: LocalSuperLink) -> set[str]:
    """The edges that are there."""
    return {node.name for node in control._control.ListNodes(ListNodesRequest()).nodes_info if node.status == "online"}


class Proxy:
    """Takes CONNECT, and nothing else, and knows one name that nobody else does."""

    def __init__(self, name: str, port: int) -> None:
        self.asked, self._name, self._port = list[str](), name, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            self.asked.append(near.recv(65536).decode().splitlines()[0])
            assert self.asked[-1] == f"CONNECT {self._name}:{self._port} HTTP/1.1"
            with socket.create_connection(("127.0.0.1", self._port)) as far:
                near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=_carry, args=(far, near), daemon=True)
                back.start()
                _carry(near, far)
                back.join()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def test_edges_reach_their_coordinator_through_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With certificates on both sides all the way: the proxy carries what it cannot read, to a name that only it can resolve."""
    (tmp_path / "run.toml").write_text(RUN)
    port = free_port()
    init(tmp_path / "run.toml", tmp_path / "fleet", f"coordinator.test:{port}")
    coordinator, edge = CoordinatorFolder(tmp_path / "fleet/coordinator"), EdgeFolder(tmp_path / "fleet/edges/north")
    coordinator.fleet_json.write_text(coordinator.fleet_json.read_text().replace("coordinator.test", "127.0.0.1"))
    proxy, heard = Proxy("coordinator.test", port), list[str]()
    monkeypatch.setenv("https_proxy", proxy.address)
    for name in ("HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with SuperLink(coordinator, print) as link:
        nodes = link.nodes()
        link.carry()
        node = next(number for number, name in nodes.items() if name == "north")
        content, grid = RecordDict({"a": ConfigRecord({"b": 1})}), FleetGrid(link.relay, nodes)
        with in_background(serve, edge, lambda data: Frame.from_bytes(data).answered(content).to_bytes(), heard.append):
            questions = [Message(content, node, "train", group_id="1")]
            (reply,) = grid.send_and_receive(questions, timeout=SECONDS)
        assert reply.content.config_records["a"]["b"] == 1
        assert set(proxy.asked) == {f"CONNECT coordinator.test:{port} HTTP/1.1"}
        assert heard == ["this edge leaves: the coordinator was told"]
    proxy.close()


def until(check: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(600):
        if check():
            return
        pause.wait(0.1)
    raise AssertionError("it did not come to that")
