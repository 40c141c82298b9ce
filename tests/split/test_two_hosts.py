"""Two hosts behind one name: where one is killed within a step, the other goes on, to the same bits."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll.commands.edge import edge
from atoll.jobs.split import HostAccess
from atoll.runs.events import Event, HostLost, StepDone

from tests.conftest import write_job
from tests.run_files import ONE_ROUND
from tests.split.test_faults import start_host

PIECE_BYTES = 4096


class OneName:
    """A port behind which hosts stand in a row: whoever calls gets the first that listens. Tells of every piece that a host sends."""

    def __init__(self, ports: list[int], on_piece: Callable[[], None]) -> None:
        self._ports, self._on_piece = ports, on_piece
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = self._first()
            if far is None:
                near.close()
                continue
            threading.Thread(target=self._carry, args=(near, far, lambda: None), daemon=True).start()
            threading.Thread(target=self._carry, args=(far, near, self._on_piece), daemon=True).start()

    def _first(self) -> socket.socket | None:
        for port in self._ports:
            try:
                return socket.create_connection(("127.0.0.1", port))
            except OSError:
                continue
        return None

    def _carry(self, source: socket.socket, sink: socket.socket, on_piece: Callable[[], None]) -> None:
        try:
            while piece := source.recv(PIECE_BYTES):
                on_piece()
                sink.sendall(piece)
        except OSError:
            pass
        for end in (source, sink):
            end.close()


@pytest.mark.parametrize("options", [(), ("--recompute",)], ids=["held", "recomputed"])
def test_another_host_of_the_same_name_goes_on(options: tuple[str, ...], tmp_path: Path) -> None:
    sections = {**ONE_ROUND, "wire": {"mode": "lent"}, "adapter": {"dropout": 0.1}}
    sections["train"] = {**ONE_ROUND["train"], "accumulate": 2}  # type: ignore[dict-item]
    write_job(tmp_path, sections, {}, count=40)
    hosts: list[tuple[subprocess.Popen[str], int]] = []
    steps: list[int] = []
    pieces: list[int] = []

    def kill_in_a_step() -> None:
        """With the second piece after the third step: the first answers of a step are from within it."""
        if len(steps) == 3:
            pieces.append(1)
        if len(pieces) == 2 and hosts[0][0].poll() is None:
            hosts[0][0].kill()
            hosts[0][0].wait()

    def counted(event: Event) -> None:
        steps.extend([event.step] if isinstance(event, StepDone) else [])

    try:
        hosts += [start_host(tmp_path / "base", 0, *options) for _ in range(2)]
        name = OneName([port for _, port in hosts], kill_in_a_step)
        calm = edge(tmp_path / "run.toml", HostAccess(f"127.0.0.1:{hosts[1][1]}"), out=tmp_path / "a")
        events: list[Event] = []
        access = HostAccess(f"127.0.0.1:{name.port}")
        disturbed = edge(tmp_path / "run.toml", access, out=tmp_path / "b", observers=(events.append, counted))
        name.close()
    finally:
        for host, _ in hosts:
            host.kill()
            host.wait()
    assert any(isinstance(event, HostLost) for event in events)
    assert steps == list(range(8))
    first, second = ((result.adapter / "adapter_model.safetensors").read_bytes() for result in (calm, disturbed))
    assert first == second
