"""What goes wrong on the way changes nothing of the result, and nothing for others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from atoll.base.head import token_losses_N
from atoll.commands.edge import edge
from atoll.errors import HostLostError, HostRefusedError
from atoll.jobs.split import HostAccess
from atoll.remote_blocks import find_placeholder
from atoll.runs.events import Event, HostLost, StepDone
from atoll.split.counted_stream import CountedStream, Transport
from atoll.split.cut import Cut
from atoll.split.device.client import Client
from atoll.split.host.compute_queue import ComputeQueue
from atoll.split.transport import FRAMES_ON_THEIR_WAY, Outbox, ThreadTransport, lost
from atoll.training.trainer import FitPlan, StepReport, TrainState, Update
from atoll.wire import protocol_pb2 as pb
from atoll.wire.dialogue import Dialogue
from atoll.wire.frames import Message, Packer

from tests.conftest import random_model, write_job
from tests.pieces import Steps, adapters, stream
from tests.run_files import ONE_ROUND
from tests.split.conftest import BLOCKS, device_trainer, served, thread_host

PLAN = FitPlan(4, 2, False)
CUT = Cut(1, 0)


class Breaking:
    """A transport that is lost when so many frames were read."""

    def __init__(self, inner: Transport, after_reads: int) -> None:
        self.inner, self.left = inner, after_reads

    def write(self, frame: bytes) -> None:
        self.inner.write(frame)

    def read(self) -> bytes:
        self.left -= 1
        if self.left < 0:
            self.inner.close()
            raise lost("cut off by the test")
        return self.inner.read()

    def close(self) -> None:
        self.inner.close()


def run(transport: Callable[[], Transport], mode: str = "factored", patience: float = 30.0) -> tuple[Update, Client, list[StepReport]]:
    trainer, client = device_trainer("llama", CUT, transport, mode=mode, patience=patience)
    reports: list[StepReport] = []
    start = TrainState(adapters(random_model("llama", BLOCKS)), {}, 0)
    return trainer.fit(start, stream(), PLAN, reports.append), client, reports


@pytest.mark.parametrize("mode", ["dense", "factored", "lent", "lent, recomputed"])
@pytest.mark.parametrize("after_reads", [1, 2, 3, 6, 11, 16, 40])
def test_a_lost_host_changes_no_bit(mode: str, after_reads: int) -> None:
    """Before the first answer, within the forward pass, within the backward pass, and between micro-batches of one step."""
    mode, _, recomputes = mode.partition(", ")
    connect = thread_host(served(random_model("llama", BLOCKS), recomputes=bool(recomputes)))
    after_reads = min(after_reads, 15) if mode == "lent" else after_reads  # It hears two messages of an exchange, and no more.
    opened: list[Transport] = []

    def unlucky() -> Transport:
        opened.append(Breaking(connect(), after_reads) if not opened else connect())
        return opened[-1]

    wanted, *_ = run(connect, mode)
    got, _, reports = run(unlucky, mode)
    assert len(opened) == 2
    assert got.state.adapter.digest() == wanted.state.adapter.digest()
    assert got.reports == wanted.reports
    assert [report.step for report in reports] == [0, 1, 2, 3]  # each step once


def test_patience_ends() -> None:
    connect = thread_host(served(random_model("llama", BLOCKS)))
    told: list[str] = []

    def never() -> Transport:
        return Breaking(connect(), 2)

    trainer, client = device_trainer("llama", CUT, never, patience=0.6)
    client.on_lost = told.append
    with pytest.raises(HostLostError):
        trainer.fit(TrainState(adapters(random_model("llama", BLOCKS)), {}, 0), stream(), PLAN, Steps([]))
    assert told == ["cut off by the test; trying again for 1 s"], "the same is not told again with every try"


def test_a_silent_device_holds_up_nobody() -> None:
    """One device stops in the middle of an exchange, with the host waiting for it; another trains to the end meanwhile."""
    host = served(random_model("llama", BLOCKS))
    reached, release = threading.Event(), threading.Event()

    class Silent(Breaking):
        def read(self) -> bytes:
            self.left -= 1
            if self.left < 0:
                reached.set()
                release.wait(60)
                raise lost("the test is over")
            return self.inner.read()

    def silent() -> None:
        with pytest.raises(HostLostError):
            run(lambda: Silent(thread_host(host)(), 3), patience=0.0)

    thread = threading.Thread(target=silent)
    thread.start()
    assert reached.wait(60)
    update, *_ = run(thread_host(host))
    release.set()
    thread.join(60)
    assert len(update.reports) == PLAN.num_steps


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([b"\xff" * 40], "frame"),
        ([pb.Bye()], None),
        ([pb.Forward(exchange=0, rows=1, positions=1)], "dialogue"),
        ([pb.Hello(protocol=99)], "unfit"),
    ],
    ids=["garbage", "bye at once", "no hello", "another protocol"],
)
def test_what_is_refused_ends_one_session_only(messages: list[object], code: str | None) -> None:
    host = served(random_model("llama", BLOCKS))
    near = thread_host(host)()
    packer = Packer()
    for message in messages:
        for frame in [message] if isinstance(message, bytes) else packer.frames(Message(message)):
            near.write(frame)
    if code is None:
        with pytest.raises(HostLostError):
            near.read()
    else:
        dialogue = Dialogue("device")
        dialogue.sent(Message(pb.Hello()))
        assert CountedStream(dialogue, near, "fp32").receive().body.code == code
    update, *_ = run(thread_host(host))
    assert len(update.reports) == PLAN.num_steps


def test_both_ends_of_a_thread_transport_close() -> None:
    near, far = ThreadTransport.pair()
    near.write(b"x")
    near.close()
    assert far.read() == b"x"
    with pytest.raises(HostLostError):
        far.read()


def start_host(folder: Path, port: int, *options: str) -> tuple[subprocess.Popen[str], int]:
    """A host of its own process, once it listens, and its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "atoll", "host", "--model", str(folder), "--listen", f"127.0.0.1:{port}", *options],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    words = process.stdout.readline().split()
    return process, int(words[words.index("on") + 1].rpartition(":")[2])


def test_a_killed_and_restarted_host_changes_no_bit(tmp_path: Path) -> None:
    """The host's process is killed by the system within a step and started again; data, adapters and optimizer never left the device."""
    write_job(tmp_path, ONE_ROUND, {}, count=40)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start_host(tmp_path / "base", port)[0]]

    def kill(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3 and len(processes) == 1:
            processes[0].kill()
            processes[0].wait()
            threading.Timer(0.5, lambda: processes.append(start_host(tmp_path / "base", port)[0])).start()

    try:
        access = HostAccess(f"127.0.0.1:{port}")
        undisturbed = edge(tmp_path / "run.toml", access, out=tmp_path / "a")
        events: list[Event] = []
        disturbed = edge(tmp_path / "run.toml", access, out=tmp_path / "b", observers=(kill, events.append))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert any(isinstance(event, HostLost) for event in events)
    files = [(result.adapter / "adapter_model.safetensors").read_bytes() for result in (undisturbed, disturbed)]
    assert files[0] == files[1]


def test_scoring_waits_for_the_host_too() -> None:
    """An exchange without a backward pass leaves nothing behind, and is had again on a new session."""
    connect = thread_host(served(random_model("llama", BLOCKS)))
    opened: list[Transport] = []

    def unlucky() -> Transport:
        opened.append(Breaking(connect(), 3) if not opened else connect())
        return opened[-1]

    trainer, _ = device_trainer("llama", CUT, unlucky, patience=30.0)
    losses_N = token_losses_N(trainer.base.model, stream().batch(0))
    assert torch.allclose(losses_N, token_losses_N(random_model("llama", BLOCKS), stream().batch(0)), atol=1e-5)
    losses_N = token_losses_N(trainer.base.model, stream().batch(1))
    losses_N = token_losses_N(trainer.base.model, stream().batch(2))
    assert len(opened) == 2
    assert torch.isfinite(losses_N).all()


def test_a_writer_gives_its_turn_away_while_nobody_takes_its_frames() -> None:
    outbox, compute_queue = Outbox(), ComputeQueue()
    for number in range(FRAMES_ON_THEIR_WAY):
        outbox.put(bytes([number]), nullcontext)
    waits, done = threading.Event(), threading.Event()

    def write() -> None:
        with compute_queue.session("north") as turns:

            @contextmanager
            def waiting() -> Iterator[None]:
                with turns.release():
                    waits.set()
                    yield

            with turns.slot():
                outbox.put(b"last", waiting)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    assert waits.wait(30)
    with compute_queue.session("north") as turns, turns.slot():  # Another session computes meanwhile.
        assert not done.is_set()
    outbox.close()
    assert list(outbox)[:2] == [b"\x00", b"\x01"]
    thread.join(30)


def test_a_full_outbox_of_a_lost_session_ends_the_writer() -> None:
    outbox = Outbox()
    for _ in range(FRAMES_ON_THEIR_WAY):
        outbox.put(b"x", nullcontext)
    threading.Timer(0.1, outbox.close).start()
    with pytest.raises(HostLostError):
        outbox.put(b"one more", nullcontext)


def test_rows_longer_than_the_base_can_read_are_refused_and_the_host_lives() -> None:
    host = served(random_model("gpt2", BLOCKS))
    trainer, _ = device_trainer("gpt2", CUT, thread_host(host))
    blocks = find_placeholder(trainer.base.model)
    assert blocks is not None
    with pytest.raises(HostRefusedError, match="positions"), torch.no_grad():
        blocks(torch.zeros(1, 200, 32))
    short, _ = device_trainer("gpt2", CUT, thread_host(host))
    assert torch.isfinite(token_losses_N(short.base.model, stream().batch(0))).all()
