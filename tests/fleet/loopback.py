"""Every process of a fleet on this machine, each of which can be killed and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from atoll.fleet.init import init
from atoll.fleet.processes import free_port

COORDINATOR, HOST, SUPERLINK, FRONT = "coordinator", "host", "superlink_app", "atoll.fleet.front"
_ATOLL = (sys.executable, "-m", "atoll")


class LoopbackFleet:
    """A coordinator, edges and, if `has_host`, a host. A context, at whose end all are ended."""

    def __init__(self, folder: Path, run_toml: Path, edges: list[str], *, has_host: bool) -> None:
        self.folder, self.run_dir, self._config = folder, folder / "run", run_toml
        self._host = f"127.0.0.1:{free_port()}" if has_host else None
        init(run_toml, folder / "fleet", f"127.0.0.1:{free_port()}", [f"{HOST}={self._host}"] if has_host else [])
        self.edges = edges
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> LoopbackFleet:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start_all(self) -> None:
        """Start every process."""
        for name in [*([HOST] if self._host else []), COORDINATOR, *self.edges]:
            self.start(name)

    def start(self, name: str) -> None:
        """Start one; a coordinator goes on with the run if there is one."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*_ATOLL, *self._arguments(name)], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            )  # fmt: skip

    def _arguments(self, name: str) -> list[str]:
        fleet = self.folder / "fleet"
        if name == HOST:
            assert self._host is not None
            folder = fleet / "hosts" / HOST
            secured = ["--tls-cert", str(folder / "host.pem"), "--tls-key", str(folder / "host.key"), "--client-ca", str(folder / "ca.pem")]
            secured += ["--crl", str(folder / "revoked.pem")]
            return ["host", "--model", "tiny", "--listen", self._host, *secured]
        if name != COORDINATOR:
            return ["fleet", "join", str(fleet / "edges" / name), "--config", str(self._config)]
        place = ["--engine", "flower", "--fleet", str(fleet / "coordinator")]
        if (self.run_dir / "config.json").exists():
            return ["resume", str(self.run_dir), *place]
        return ["train", str(self._config), *place, "--out", str(self.run_dir)]

    def kill(self, name: str) -> None:
        """End one as by pulling a plug; SUPERLINK and FRONT are processes of the coordinator's, which starts them again."""
        if name in (SUPERLINK, FRONT):
            for pid in self._children(self.processes[COORDINATOR].pid, name):
                os.kill(pid, signal.SIGKILL)
            return
        self.processes[name].kill()
        self.processes[name].wait()

    @staticmethod
    def _children(parent: int, words: str) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                stat, line = (path / "stat").read_text(), (path / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue  # It ended meanwhile.
            if int(stat.rpartition(")")[2].split()[1]) == parent and words in line:
                found.append(int(path.name))
        return found

    @property
    def num_events(self) -> int:
        """Lines of all event logs: of the coordinator and of the edges."""
        logs = [self.run_dir / "events.jsonl", *(self.folder / "fleet" / "edges" / edge / "events.jsonl" for edge in self.edges)]
        return sum(log.read_bytes().count(b"\n") for log in logs if log.exists())

    def wait_until(self, reached: Callable[[], bool], seconds: float) -> bool:
        """Whether something comes true before the run ends, and in time."""
        deadline = time.monotonic() + seconds
        while not reached():
            if self.processes[COORDINATOR].poll() is not None:
                return False
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)
        return True

    def wait(self, seconds: float) -> None:
        """Until the run is complete."""
        deadline = time.monotonic() + seconds
        while self.processes[COORDINATOR].poll() is None:
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)
        assert self.processes[COORDINATOR].returncode == 0, self.said()
        assert json.loads((self.run_dir / "summary.json").read_text())["status"] == "complete"

    def said(self) -> str:
        """The ends of all logs, for a test that fails."""
        logs = sorted(self.folder.glob("*.log")) + sorted(self.folder.glob("fleet/**/*.log"))
        return "\n".join(f"== {log.relative_to(self.folder)}\n" + log.read_text(errors="replace")[-1500:] for log in logs)
