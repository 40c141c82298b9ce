"""deploy/nginx.conf in place of Atoll's own front: the same paths, and a fleet behind it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from atoll.federated.flower import ConfigRecord, Message, RecordDict, assume_identity
from atoll.fleet.files import CoordinatorFolder, EdgeFolder
from atoll.fleet.front.limits import PATHS
from atoll.fleet.init import init
from atoll.fleet.links.frames import Frame
from atoll.fleet.links.node import serve
from atoll.fleet.links.relay import FleetGrid
from atoll.fleet.processes import free_port
from atoll.fleet.superlink import SuperLink
from atoll.split.certificates import DeviceTls

from tests.fleet.stranger import app_that_leaves, called_with, five_requests, in_background
from tests.run_files import DEMO, PAIR, run_text

CONF = Path(__file__).resolve().parents[2] / "deploy" / "nginx.conf"
RUN = run_text({}, PAIR, DEMO)
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def sizes(text: str) -> dict[str, int]:
    """The paths that are passed on, with the largest body of each."""
    (usual,) = re.findall(r"^        client_max_body_size (\d+)m;", text, flags=re.MULTILINE)
    found = {}
    for path, block in re.findall(r"location = (\S+) \{(.*)\}$", text, flags=re.MULTILINE):
        assert "limit_except POST { deny all; }" in block
        own = re.search(r"client_max_body_size (\d+)m;", block)
        found[path] = int(own[1] if own else usual) << 20
    return found


def test_it_passes_what_atolls_front_passes() -> None:
    assert sizes(CONF.read_text()) == PATHS


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_a_fleet_behind_nginx(tmp_path: Path) -> None:
    port, place = free_port(), tmp_path / "run"
    place.mkdir(mode=0o700)
    (tmp_path / "run.toml").write_text(RUN)
    init(tmp_path / "run.toml", tmp_path / "fleet", f"127.0.0.1:{port}")
    coordinator, edge = CoordinatorFolder(tmp_path / "fleet/coordinator"), EdgeFolder(tmp_path / "fleet/edges/north")
    coordinator.fleet_json.write_text(json.dumps({**json.loads(coordinator.fleet_json.read_text()), "socket": str(place / "superlink")}))
    text = CONF.read_text().replace("/run/atoll", str(place)).replace(" /fleet/", f" {coordinator.path}/")
    text = text.replace("listen 7440", f"listen 127.0.0.1:{port}")
    # In front, as this user alone, and without a log of the system's.
    conf = f"daemon off; master_process off; error_log {place}/errors.log;\n{text}".replace("worker_processes auto;\n", "")
    (tmp_path / "nginx.conf").write_text(conf)
    assume_identity(1, 0)
    with SuperLink(coordinator, print) as link:
        assert link._front is None
        server = subprocess.Popen([str(NGINX), "-e", f"{place}/errors.log", "-c", str(tmp_path / "nginx.conf")])
        try:
            nodes = link.nodes()
            link.carry()
            content = RecordDict({"a": ConfigRecord({"b": 1})})
            node = next(number for number, name in nodes.items() if name == "north")
            with in_background(serve, edge, lambda data: Frame.from_bytes(data).answered(content).to_bytes(), print):
                grid = FleetGrid(link.relay, nodes)
                (reply,) = grid.send_and_receive([Message(content, node, "train", group_id="1")], timeout=60)
            assert reply.content.config_records["a"]["b"] == 1
            requests = five_requests(app_that_leaves(tmp_path / "left", tmp_path / "app"))
            with called_with(DeviceTls(edge.ca, edge.cert, edge.key)) as client:
                address = coordinator.read().address
                assert {client.post(f"https://{address}{path}", content=body).status_code for path, body in requests.items()} == {404}
                assert client.post(f"https://{address}/v1/fleet/push-object", content=bytes(9 << 20)).status_code == 413
            with called_with(DeviceTls(edge.ca, None, None)) as client:
                found = {outcome(client, f"https://{address}{path}", body) for path, body in requests.items()}
            assert found <= {400, "closed"}, "nginx says so, and passes nothing on"
            assert not (tmp_path / "left").exists()
        finally:
            server.terminate()
            server.wait(30)


def outcome(client: httpx.Client, url: str, body: bytes) -> object:
    try:
        return client.post(url, content=body).status_code
    except httpx.TransportError:
        return "closed"
