"""Several hosts behind one address: a plain TCP proxy leads to the next host when the first is gone, and the device goes on by itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from atoll.commands.edge import edge
from atoll.jobs.split import HostAccess
from atoll.runs.events import Event, HostLost, StepDone
from atoll.split.certificates import DeviceTls, make_certificates

from tests.conftest import write_job
from tests.run_files import ONE_ROUND


class Balancer:
    """Carries bytes of every connection to the first of its hosts that takes it, and reads none of them."""

    def __init__(self, ports: list[int]) -> None:
        self._ports = ports
        self.taken: list[int] = []
        """The host of each connection."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = self._connect()
                if far is None:
                    near.close()
                    continue
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=_carry, args=(source, sink), daemon=True).start()

    def _connect(self) -> socket.socket | None:
        for number, port in enumerate(self._ports):
            with suppress(OSError):
                far = socket.create_connection(("127.0.0.1", port))
                self.taken.append(number)
                return far
        return None


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    source.close()


@contextmanager
def hosts(folder: Path, options: list[str], count: int = 2) -> Iterator[list[tuple[subprocess.Popen[str], int]]]:
    """Hosts of one base, each a process of its own, and their ports."""
    command = [sys.executable, "-m", "atoll", "host", "--model", str(folder / "base"), "--listen", "127.0.0.1:0", *options]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        for _ in range(count)
    ]
    try:
        found = []
        for process in processes:
            assert process.stdout is not None
            found.append((process, int(process.stdout.readline().split("127.0.0.1:")[1].split()[0])))
        yield found
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "TLS"])
def test_a_device_goes_on_at_another_host_to_the_same_bits(tmp_path: Path, secured: bool) -> None:
    """The first host's process is killed by the system within a step. With TLS both hosts have the one certificate of the one name."""
    write_job(tmp_path, ONE_ROUND, {}, count=40)
    options, tls = list[str](), DeviceTls(None, None, None)
    if secured:
        made = make_certificates(tmp_path / "tls", ["127.0.0.1"], ["north"])
        options = ["--tls-cert", str(made.host.cert), "--tls-key", str(made.host.key), "--client-ca", str(made.host.client_ca)]
        tls = made.devices["north"]
    with hosts(tmp_path, options) as running:
        undisturbed = edge(tmp_path / "run.toml", HostAccess(f"127.0.0.1:{running[1][1]}", tls), out=tmp_path / "a")
        balancer = Balancer([port for _, port in running])
        first, events = running[0][0], list[Event]()

        def kill(event: Event) -> None:
            if isinstance(event, StepDone) and event.step == 3:
                first.kill()
                first.wait()

        disturbed = edge(tmp_path / "run.toml", HostAccess(f"127.0.0.1:{balancer.port}", tls), out=tmp_path / "b",
                         observers=(kill, events.append))  # fmt: skip
        balancer.close()
    assert (balancer.taken[0], balancer.taken[-1]) == (0, 1)
    assert any(isinstance(event, HostLost) for event in events)
    files = [(result.adapter / "adapter_model.safetensors").read_bytes() for result in (undisturbed, disturbed)]
    assert files[0] == files[1]
