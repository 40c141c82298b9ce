"""Requests of somebody who has found the coordinator's port, and an app of theirs that leaves a file wherever any part of it is run."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest, UnregisterNodeFleetRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from atoll.split.certificates import DeviceTls


def app_that_leaves(path: Path, folder: Path) -> bytes:
    """A Flower app whose import, ServerApp and ClientApp each write to `path`."""
    (folder / "foreign").mkdir(parents=True)
    (folder / "LICENSE").write_text("none")
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "foreign"\nversion = "1.0.0"\nlicense = { file = "LICENSE" }\ndependencies = []\n\n[tool.flwr.app]\n'
        'publisher = "stranger"\n\n[tool.flwr.app.components]\nserverapp = "foreign.apps:server"\nclientapp = "foreign.apps:client"\n'
    )
    (folder / "foreign" / "__init__.py").write_text("")
    leave = f"open({str(path)!r}, 'a').write"
    (folder / "foreign" / "apps.py").write_text(
        f"from flwr.clientapp import ClientApp\nfrom flwr.serverapp import ServerApp\n{leave}('imported')\n"
        f"server, client = ServerApp(), ClientApp()\n\n@server.main()\ndef main(grid, context):\n    {leave}('served')\n\n"
        f"@client.train()\ndef train(message, context):\n    {leave}('trained')\n"
    )
    return build_fab_from_disk(folder)


def five_requests(app: bytes) -> dict[str, bytes]:
    """What was seen to work before there was a front: path, and body."""
    return {
        "/v1/control/list-nodes": ListNodesRequest().SerializeToString(),
        "/v1/control/register-node": RegisterNodeRequest(public_key=b"any").SerializeToString(),
        "/v1/control/start-run": StartRunRequest(fab=Fab(content=app)).SerializeToString(),
        "/v1/runtime/acquire-task": AcquireTaskRequest(supported_task_types=["flwr-serverapp"]).SerializeToString(),
        "/v1/fleet/register-node": RegisterNodeFleetRequest(public_key=b"any").SerializeToString(),
        "/v1/fleet/unregister-node": UnregisterNodeFleetRequest(node_id=1).SerializeToString(),
    }


def called_with(tls: DeviceTls) -> httpx.Client:
    """A client that shows this certificate, if any, and believes this authority."""
    context = ssl.create_default_context(cafile=tls.ca)
    if tls.cert is not None:
        context.load_cert_chain(tls.cert, tls.key)
    return httpx.Client(verify=context, trust_env=False, timeout=30, headers={"content-type": PROTOBUF_MEDIA_TYPE})


@contextmanager
def in_background(run: object, *arguments: object) -> Iterator[threading.Event]:
    """A function that runs until its last argument, an event, is set, as it is at the end of this context."""
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(*arguments, stop), daemon=True)  # type: ignore[arg-type]
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()
