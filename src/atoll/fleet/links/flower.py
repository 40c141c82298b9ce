"""What a fleet takes from Flower beside its messages: SuperLink's application, and clients of its APIs. No app of Flower's is ever run.

Most of it is internal in Flower 1.41. tests/fleet/test_superlink.py fails when a new version moves it.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.app.message import remove_content_from_message
from flwr.cli.build import build_fab_from_disk
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL, Status
from flwr.common.serde import message_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import (
    UnexpectedObjectContentError,
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from atoll.federated.flower import Error, Message, RecordDict
from atoll.federated.grid import numbered, sent_by

DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)
"""What taking apart raises that another machine put together wrongly."""
FAILURES = (httpx.HTTPError, ObjectPullError, ObjectPushError, UnexpectedObjectContentError, *DAMAGE)
"""What a call of these clients raises."""
_HERE = "http://superlink"
_OFFLINE, _UNREGISTERED = NodeStatus.OFFLINE, NodeStatus.UNREGISTERED
_BEAT_SECONDS = HEARTBEAT_MIN_INTERVAL / 2
"""An edge that was killed is taken for gone after two intervals, and can come back then."""
_LEAVING_INTERVAL = HEARTBEAT_MIN_INTERVAL + 1
"""Of the last heartbeat of a node that leaves: SuperLink keeps it, and has no other field for a goodbye."""
_NO_INTERVAL, _GOODBYE_SECONDS = 0, 5.0
_CUT_SHORT = 1
"""Code of the error in place of a reply that does not come whole."""
_Client = TypeVar("_Client", bound=ProtobufClient)


def superlink_app() -> Any:
    """SuperLink's application, for uvicorn; FLWR_DATABASE names its database. Nothing in it runs an app, and no node registers itself."""
    from flwr.superlink.main import create_app  # Only this one process needs it.

    app = create_app()
    app.state.enable_supernode_auth = True
    return app


def public_key(path: Path) -> bytes:
    """A node's public key, as SuperLink keeps it.

    Raises: ValueError for a file that holds none; OSError.
    """
    try:
        key = load_ssh_public_key(path.read_bytes())
    except UnsupportedAlgorithm as problem:
        raise ValueError(f"{path.name} is no public key of a node") from problem
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError(f"{path.name} is no public key of a node")
    return public_key_to_bytes(key)


@dataclass(frozen=True, slots=True)
class KnownNode:
    """A node whose key SuperLink believes."""

    number: int
    edge: str
    key: bytes
    has_left: bool
    """Whether it said goodbye, and has not come again."""


class LocalSuperLink:
    """SuperLink's Control API, over the Unix socket that only this user can open; a context, at whose end the connection is closed."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._control = _through(ControlHttpClient(_HERE, verify=False), _local(socket))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._control.close()

    def nodes(self) -> list[KnownNode]:
        """All that are registered.

        Raises: FAILURES.
        """
        found = self._control.ListNodes(ListNodesRequest()).nodes_info
        return [
            KnownNode(node.node_id, node.name, node.public_key, node.status == _OFFLINE and node.heartbeat_interval == _LEAVING_INTERVAL)
            for node in found
            if node.status != _UNREGISTERED
        ]

    def register(self, edge: str, key: bytes) -> int:
        """The id of the node with this public key, from now on; a key that was believed once, and then no more, is not taken again.

        Raises: FAILURES.
        """
        return int(self._control.RegisterNode(RegisterNodeRequest(public_key=key, name=edge)).node_id)

    def unregister(self, node: int) -> None:
        """Believe this node's key no more.

        Raises: FAILURES.
        """
        self._control.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def begin(self, app: Path) -> AppRun:
        """An app run in place of all earlier ones, whose messages are deleted; `app` is the Flower app that it is in name.

        Raises: FAILURES.
        """
        for run in self._control.ListRuns(ListRunsRequest()).run_dict.values():
            if run.status.status != Status.FINISHED:
                self._control.StopRun(StopRunRequest(run_id=run.run_id))
        content = build_fab_from_disk(app)
        fab = Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)
        run_id = self._control.StartRun(StartRunRequest(fab=fab)).run_id
        return AppRun(self._socket, run_id, lambda: self._control.StopRun(StopRunRequest(run_id=run_id)))


class AppRun:
    """An app run in which this process is the ServerApp, so that no other is started for it; it pushes and pulls messages as Flower's grid.

    Unlike Flower's own, it waits for no reply whose sender has not sent all of it: that one would hold up all others.
    """

    def __init__(self, socket: Path, run_id: int, stop: Callable[[], object]) -> None:
        self._stop, self._ended = stop, threading.Event()
        with _through(RuntimeHttpClient(_HERE, verify=False, interceptors=[_version()]), _local(socket)) as client:
            acquired = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
        if acquired.task.run_id != run_id:
            raise RuntimeError(f"SuperLink hands out run {acquired.task.run_id}, and not {run_id}, which was just started")
        token = RuntimeTokenHttpInterceptor(acquired.token)
        self._client = _through(RuntimeHttpClient(_HERE, verify=False, interceptors=[_version(), token]), _local(socket))
        given = self._client.PullTaskInput(PullTaskInputRequest())
        # As Flower's own processes do: messages from here are of this run.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, given.run.run_id, given.context.node_id
        self._run_id, self._node = run_id, Node(node_id=given.context.node_id)
        self._coming: dict[str, _Coming] = {}
        self._beats = threading.Thread(target=self._beat, name="atoll-app-run", daemon=True)

    def __enter__(self) -> Self:
        self._beats.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._beats.join()
        with contextlib.suppress(httpx.HTTPError):  # Where SuperLink is gone, whoever begins the next run ends this one.
            self._stop()
        self._client.close()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Their numbers; an empty one where SuperLink does not take the message.

        Raises: FAILURES.
        """
        return [self._pushed(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that have come whole, of which memory holds one at a time; one that comes no more comes as an error.

        Raises: FAILURES.
        """
        found = self._client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        for told, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            ids = list(dict.fromkeys(one.object_id for one in iterate_object_tree(tree)))
            self._coming[tree.object_id] = _Coming(told.metadata.reply_to_message_id, ids, ids[-1])
        for number, coming in list(self._coming.items()):
            if (reply := self._whole(number, coming)) is not None:
                del self._coming[number]
                yield reply

    def _pushed(self, message: Message) -> str:
        # Whoever makes a grid in this process changes who it is that makes messages.
        told, tree, objects = _deflated(sent_by(message, self._run_id, self._node.node_id))
        taken = self._client.PushMessages(PushAppMessagesRequest(messages_list=[told], message_object_trees=[tree]))
        send = make_push_object_fn_protobuf(self._client.PushObject, self._node, self._run_id, taken.session_id)
        with no_object_id_recompute():
            push_objects(objects, send, object_ids_to_push=set(taken.objects_to_push))
        return next(iter(taken.message_ids), "")

    def _whole(self, number: str, coming: _Coming) -> Message | None:
        """A reply of which all has come by now, or that comes no more. What was missing is looked for first, so that little comes twice."""
        contents: dict[str, bytes] = {}
        for object_id in sorted(coming.ids, key=lambda one: one != coming.missing):
            got = self._client.PullObject(PullObjectRequest(node=self._node, run_id=self._run_id, object_id=object_id))
            if not got.object_available:
                coming.missing = object_id
                return None if got.object_found else _lost(coming.question)  # SuperLink forgets one that is not sent on.
            contents[object_id] = got.object_content
        asked = ConfirmMessageReceivedRequest(node=self._node, run_id=self._run_id, message_object_id=number)
        self._client.ConfirmMessageReceived(asked)
        try:
            reply = inflate_object_from_contents(number, contents)
        except (UnexpectedObjectContentError, *DAMAGE):
            return _lost(coming.question)
        if not isinstance(reply, Message) or not reply.has_content():
            return _lost(coming.question)
        # SuperLink has seen to it that who answers was asked; what the reply itself says of that, it says unseen.
        return Message(reply.content, reply_to=_asked(coming.question))

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(httpx.HTTPError):  # Whoever pushes and pulls notices it.
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())


@dataclass(slots=True)
class _Coming:
    """A reply of which a part may still be on its way."""

    question: str
    ids: list[str]
    missing: str
    """What is sent last, or was seen to be missing."""


def _lost(question: str) -> Message:
    """In place of a reply that was cut short, or says of itself that there is none."""
    return Message(Error(_CUT_SHORT, "the reply did not come whole"), reply_to=_asked(question))


def _asked(question: str) -> Message:
    return numbered(Message(RecordDict(), 0, "train"), question)


def _deflated(message: Message) -> tuple[Any, Any, dict[str, Any]]:
    """A message without its content, the tree of its objects, and the objects."""
    numbered(message, message.object_id)
    with no_object_id_recompute():
        return message_to_proto(remove_content_from_message(message)), get_object_tree(message), get_all_nested_objects(message)


class EdgeLink:
    """An edge's node at a SuperLink, over the Fleet API alone: no app is asked for, and none could be run. Within the context of `http`."""

    def __init__(self, address: str, http: httpx.Client, key: Path) -> None:
        private = load_ssh_private_key(key.read_bytes(), password=None)
        if not isinstance(private, ec.EllipticCurvePrivateKey):
            raise ValueError(f"{key.name} is no private key of a node")
        self._public, self._node, self._ended = public_key_to_bytes(private.public_key()), Node(), threading.Event()
        signs = NodeAuthHttpInterceptor(private, private.public_key())
        self._client = _through(FleetHttpClient(f"https://{address}", verify=False, interceptors=[signs]), http)
        self._beats = threading.Thread(target=self._beat, name="atoll-edge-link", daemon=True)

    def __enter__(self) -> Self:
        """Raises: FAILURES."""
        asked = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        self._node = Node(node_id=self._client.ActivateNode(asked).node_id)
        self._beats.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        with contextlib.suppress(httpx.HTTPError, ValueError):  # Unheard, it is taken for gone after a while.
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))

    def say_goodbye(self) -> bool:
        """Have the coordinator know that this node leaves of its own will, and will not answer what is open; whether it was heard."""
        self._ended.set()
        self._beats.join(_GOODBYE_SECONDS)  # A beat after this would take the goodbye back.
        last = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=_LEAVING_INTERVAL)
        with contextlib.suppress(httpx.HTTPError, ValueError):
            return bool(self._client.SendNodeHeartbeat(last).success)
        return False

    def is_known(self) -> bool:
        """Whether SuperLink has this node's key; changes nothing there, as what is asked for cannot be had.

        Raises: FAILURES for other answers.
        """
        try:
            self._client.ActivateNode(ActivateNodeRequest(public_key=self._public, heartbeat_interval=_NO_INTERVAL))
        except httpx.HTTPStatusError as problem:
            if problem.response.status_code in (httpx.codes.BAD_REQUEST, httpx.codes.PRECONDITION_FAILED):
                return problem.response.status_code == httpx.codes.BAD_REQUEST
            raise
        raise RuntimeError("SuperLink takes a heartbeat without an interval")

    def pull(self) -> Message | None:
        """The next message to this node, whole; None: there is none.

        Raises: FAILURES.
        """
        found = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not found.messages_list:
            return None
        (told, *_), (tree, *_) = found.messages_list, found.message_object_trees
        run_id = told.metadata.run_id
        message = pull_and_inflate_object_from_tree(
            tree, make_pull_object_fn_protobuf(self._client.PullObject, self._node, run_id),
            make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, self._node, run_id), return_type=Message,
        )  # fmt: skip
        return numbered(message, tree.object_id)

    def push(self, reply: Message, seconds: float) -> None:
        """Send the reply to a message, which it took so long to make; where a part of it was sent before, the rest.

        Raises: FAILURES.
        """
        told, tree, objects = _deflated(reply)
        taken = self._client.PushMessages(PushMessagesRequest(
            node=self._node, messages_list=[told], message_object_trees=[tree], clientapp_runtime_list=[seconds],
        ))  # fmt: skip
        send = make_push_object_fn_protobuf(self._client.PushObject, self._node, reply.metadata.run_id, taken.session_id)
        with no_object_id_recompute():
            push_objects(objects, send, object_ids_to_push=set(taken.objects_to_push))

    def _beat(self) -> None:
        beat = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        while not self._ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(httpx.HTTPError, ValueError):  # Whoever pulls notices it.
                self._client.SendNodeHeartbeat(beat)


def _version() -> RuntimeVersionHttpInterceptor:
    return RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")


def _local(socket: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(socket), retries=2), timeout=60.0)


def _through(client: _Client, http: httpx.Client) -> _Client:
    """The client, with this in place of a connection of its own, which would know no socket and no client certificate."""
    client._client.close()
    client._client = http
    return client
