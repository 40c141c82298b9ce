"""A device gets its part of the base from the host, whole and checked; a host that sends anything else leaves no trace."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from atoll.base.headers import CONFIG, INDEX, PART, WEIGHTS
from atoll.base.part import PartFile, part_files
from atoll.errors import FrameError, HostLostError, HostRefusedError, OutputError
from atoll.split.certificates import make_certificates
from atoll.split.cut import Cut
from atoll.split.device import base_part as device_parts
from atoll.split.device.base_part import fetch_part
from atoll.split.host import base_part as host_parts
from atoll.split.transport import SERVICE
from atoll.wire import protocol_pb2 as pb
from atoll.wire.encoding import Encoded, raw
from atoll.wire.frames import CHUNK_BYTES, Message, Packer
from atoll.wire.handshake import PROTOCOL

from tests.conftest import random_model, save_model_folder
from tests.pieces import write_part
from tests.split.conftest import BLOCKS
from tests.split.running import PATIENCE_SECONDS, channel_to, llama_host, running, wait_until

CUT = Cut(1, 1)
FILES = {CONFIG: b"{}", WEIGHTS: bytes(1000), PART: b"{}", "vocab.txt": b""}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of three blocks; one of its files is empty."""
    folder = tmp_path_factory.mktemp("base")
    save_model_folder(folder, "llama")
    random_model("llama", BLOCKS).save_pretrained(folder)
    (folder / "vocab.txt").touch()
    return folder


@pytest.fixture
def channel(base: Path) -> Iterator[grpc.Channel]:
    """To a host of this base."""
    with running(replace(llama_host(), source=str(base))) as host, channel_to(host) as channel:
        yield channel


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def request(protocol: int = PROTOCOL, cut: Cut = CUT) -> bytes:
    return pb.PartRequest(protocol=protocol, cut_front=cut.front, cut_back=cut.back).SerializeToString()


def call(channel: grpc.Channel, asked: bytes) -> Any:
    return channel.unary_stream(f"/{SERVICE}/Part")(asked)


def test_the_part_that_arrives_is_the_part(base: Path, channel: grpc.Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_parts, "CHUNK_BYTES", 1000)  # Many pieces for each file.
    write_part(str(base), CUT.front, CUT.back, tmp_path / "written")
    fetch_part(channel, CUT, tmp_path / "new" / "deep" / "part")
    assert contents(tmp_path / "new" / "deep" / "part") == contents(tmp_path / "written")
    assert contents(tmp_path / "written")["vocab.txt"] == b""
    assert [file.name for file in (tmp_path / "new" / "deep").iterdir()] == ["part"]


def test_another_protocol_is_refused_with_a_page(channel: grpc.Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        next(call(channel, request(protocol=PROTOCOL + 1)))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "different versions" in refused.value.details()
    assert f"expected  {PROTOCOL}" in refused.value.details()
    monkeypatch.setattr(device_parts, "PROTOCOL", PROTOCOL + 1)
    with pytest.raises(HostLostError) as caught:
        fetch_part(channel, CUT, tmp_path / "new" / "part")
    assert "different versions" in caught.value.got
    assert not list(tmp_path.iterdir())


def test_a_cut_that_cannot_be_is_refused(base: Path, tmp_path: Path) -> None:
    host = replace(llama_host(), source=str(base))
    with running(host, max_part=Cut(9, 9)) as host, channel_to(host) as channel, pytest.raises(HostLostError) as caught:
        fetch_part(channel, Cut(2, 1), tmp_path / "part")
    assert "the cut leaves no block to the host" in caught.value.got
    assert not list(tmp_path.iterdir())


def test_a_host_whose_files_cannot_be_read_says_so(channel: grpc.Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first file, and after some of them have crossed."""
    here = tmp_path / "device"

    def fails(*_: object) -> Any:
        raise OSError(5, "Input/output error", "/secret/folder")

    def breaks(source: str, front: int, back: int) -> tuple[PartFile, ...]:
        (first, *_), reads = part_files(source, front, back), itertools.count()
        # The digest is made of the first reading, the frames of the second.
        return first, PartFile(WEIGHTS, 1000, lambda: iter((bytes(1000),)) if next(reads) == 0 else fails())

    for fault in (fails, breaks):
        with monkeypatch.context() as patch:
            patch.setattr(host_parts, "part_files", fault)
            with pytest.raises(HostRefusedError, match="part of the base") as caught:
                fetch_part(channel, CUT, here / "part")
        assert caught.value.got == "Input/output error"
        assert "the host's log" in caught.value.do
        assert "secret" not in caught.value.page()
        assert not here.exists()


def large_part(source: str, front: int, back: int) -> tuple[PartFile, ...]:
    """More than the sockets' memory between host and device."""
    return tuple(file_of(name, data) for name, data in (FILES | {WEIGHTS: bytes(32 * CHUNK_BYTES)}).items())


def file_of(name: str, data: bytes) -> PartFile:
    return PartFile(name, len(data), lambda: iter((data,)))


def test_so_many_devices_at_once_and_no_more(channel: grpc.Channel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_parts, "part_files", large_part)
    slow = [call(channel, request()) for _ in range(host_parts.AT_ONCE)]
    for one in slow:
        next(one)
    with pytest.raises(HostLostError, match="lost") as caught:
        fetch_part(channel, CUT, tmp_path / "part")
    assert "too many calls of Part" in caught.value.got
    assert "later" in caught.value.do
    assert not list(tmp_path.iterdir())
    for one in slow:
        one.cancel()
    wait_until(lambda: fetched(channel, tmp_path / "part"))


def test_a_tenant_that_fetches_slowly_leaves_room_for_others(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_parts, "part_files", large_part)
    made = make_certificates(tmp_path / "tls", [], ["north", "south"])
    host = replace(llama_host(), source=str(base))
    with running(host, tls=made.host) as host, channel_to(host, made.devices["north"]) as north:
        slow = [call(north, request()) for _ in range(host_parts.AT_ONCE)]
        refused = 0
        for one in slow:
            try:
                next(one)
            except grpc.RpcError as problem:
                refused += problem.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused == host_parts.AT_ONCE - host_parts.AT_ONCE_OF_TENANT
        with channel_to(host, made.devices["south"]) as south:
            assert fetched(south, tmp_path / "part")
        for one in slow:
            one.cancel()


@pytest.mark.parametrize(("stall", "slowest", "pause"), [(0.2, 1.0, 2.0), (1.0, 2.0**40, 0.1)], ids=["a frame", "all told"])
def test_a_device_that_does_not_read_loses_its_place(
    stall: float, slowest: float, pause: float, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it leaves one frame where it is for too long, or takes one now and then."""
    monkeypatch.setattr(host_parts, "part_files", large_part)
    monkeypatch.setattr(host_parts, "STALL_SECONDS", stall)
    monkeypatch.setattr(host_parts, "SLOWEST_BYTES_PER_SECOND", slowest)
    monkeypatch.setattr("atoll.split.host.server.AT_ONCE", 1)
    with running(replace(llama_host(), source=str(base))) as host, channel_to(host) as channel:
        idle, gone = call(channel, request()), threading.Event()
        idle.add_callback(gone.set)
        with pytest.raises(grpc.RpcError) as caught:
            [gone.wait(pause) for _ in idle]
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        wait_until(lambda: fetched(channel, tmp_path / "part"))


@pytest.mark.parametrize("said", [b"", b"\xff"], ids=["nothing", "garbage"])
def test_a_call_without_a_request_keeps_no_place(said: bytes, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC itself waits for the request of such a method in a thread, without end."""
    monkeypatch.setattr(host_parts, "STALL_SECONDS", 0.2)
    release = threading.Event()

    def requests() -> Iterator[bytes]:
        if said:
            yield said
        release.wait(PATIENCE_SECONDS)

    with running(replace(llama_host(), source=str(base))) as host, channel_to(host) as channel:
        silent = channel.stream_stream(f"/{SERVICE}/Part")(requests())
        with pytest.raises(grpc.RpcError) as caught:
            next(silent)
        assert caught.value.code() is (grpc.StatusCode.INVALID_ARGUMENT if said else grpc.StatusCode.CANCELLED)
        release.set()


def fetched(channel: grpc.Channel, folder: Path) -> bool:
    """Whether the host had room for this."""
    with suppress(HostLostError):
        fetch_part(channel, CUT, folder)
        return True
    return False


def piece(name: str, data: bytes, offset: int = 0, tensors: tuple[Encoded, ...] | None = None, **said: Any) -> Message:
    """A piece of a file, of which the host says what is true where it is not told otherwise."""
    truth: dict[str, Any] = {"size": offset + len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return Message(pb.FilePart(name=name, offset=offset, **truth | said), (raw(data),) if tensors is None else tensors)


def part() -> list[Message]:
    """All that a device needs."""
    return [piece(name, data) for name, data in FILES.items()]


@contextmanager
def hostile(answer: Callable[[Any], Iterator[bytes]]) -> Iterator[grpc.Channel]:
    """A channel to a host that says what it likes."""
    server = grpc.server(ThreadPoolExecutor(1))
    handlers = {"Part": grpc.unary_stream_rpc_method_handler(lambda asked, context: answer(context))}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        server.stop(0).wait()


def frames(messages: list[Message]) -> Iterator[bytes]:
    packer = Packer()
    for message in messages:
        yield from packer.frames(message)


def refused(messages: list[Message], tmp_path: Path) -> FrameError:
    """Why the device refused this; it kept nothing of it."""
    with hostile(lambda _: frames(messages)) as channel, pytest.raises(FrameError) as caught:
        fetch_part(channel, CUT, tmp_path / "new" / "part")
    assert not list(tmp_path.iterdir())
    return caught.value


def test_an_honest_host_is_believed(tmp_path: Path) -> None:
    """All that the hostile ones below do otherwise is right here."""
    halves = [piece("vocab.json", b"wo", size=4, sha256=hashlib.sha256(b"word").hexdigest()),
              piece("vocab.json", b"rd", 2, sha256=hashlib.sha256(b"word").hexdigest())]  # fmt: skip
    with hostile(lambda _: frames(part() + halves)) as channel:
        fetch_part(channel, CUT, tmp_path / "part")
    assert contents(tmp_path / "part") == FILES | {"vocab.json": b"word"}


NAMES = ("../config.json", "/etc/passwd", "", ".", "..", "run.py", "pytorch_model.bin", INDEX, "CONFIG.JSON", "config.json\n", "\x1b[2J")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_file_that_is_not_a_bases_is_refused(name: str, tmp_path: Path) -> None:
    problem = refused([*part(), piece(name, b"x")], tmp_path)
    assert "does not belong" in problem.what
    assert problem.got == ascii(name)


HOSTILE: dict[str, tuple[list[Message], str]] = {
    "another message": ([Message(pb.Bye())], "does not belong"),
    "no tensors": ([piece(CONFIG, b"{}", tensors=())], "plain bytes"),
    "two tensors": ([piece(CONFIG, b"{}", tensors=(raw(b"{"), raw(b"}")))], "plain bytes"),
    "numbers": ([piece(CONFIG, b"{}  ", tensors=(Encoded("fp32", (1,), b"{}  "),))], "plain bytes"),
    "too many bytes": ([piece(CONFIG, b"{}", size=1)], "larger than announced"),
    "more bytes later": ([piece(CONFIG, b"{}"), piece(CONFIG, b" ", 2, size=2, sha256=hashlib.sha256(b"{}").hexdigest())], "larger than"),
    "two sizes": ([piece(CONFIG, b"{}", size=3), piece(CONFIG, b" ", 2, size=4, sha256=hashlib.sha256(b"{}").hexdigest())], "two sizes"),
    "two digests": ([piece(CONFIG, b"{}", size=3), piece(CONFIG, b" ", 2)], "two sizes or digests"),
    "a gap": ([*part(), piece("vocab.json", b"{}", 1)], "a piece"),
    "twice the same": ([*part(), *[piece("vocab.json", b"{}", size=4, sha256=hashlib.sha256(b"{}{}").hexdigest())] * 2], "a piece"),
    "nothing, again and again": ([piece(CONFIG, b"", size=2)], "an empty piece"),
    "an empty file twice": ([piece("vocab.txt", b""), piece("vocab.txt", b"")], "an empty piece"),
    "larger than the disk": ([piece(WEIGHTS, b"x", size=2**60)], "free disk"),
    "larger than any disk": ([piece(WEIGHTS, b"x", size=2**64 - 1)], "free disk"),
    "cut off": ([*part(), piece("vocab.json", b"{}", size=3)], "cut off"),
    "an empty file that is not": ([*part()[:-1], piece("vocab.txt", b"", size=0), piece("merges.txt", b"x", size=2)], "cut off"),
    "another digest": ([*part(), piece("vocab.json", b"{}", sha256=hashlib.sha256(b"").hexdigest())], "damaged"),
    "no digest": ([*part(), piece("vocab.json", b"{}", sha256="")], "damaged"),
    "no files": ([], "missing"),
    "no weights": ([piece(CONFIG, b"{}"), piece(PART, b"{}")], "missing"),
}


@pytest.mark.parametrize("case", sorted(HOSTILE))
def test_a_hostile_host_is_refused_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    messages, words = HOSTILE[case]
    problem = refused(messages, tmp_path)
    assert words in problem.what
    assert all((problem.where, problem.do))


def test_sizes_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = sum(len(data) for data in FILES.values())
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    with hostile(lambda _: frames(part())) as channel:
        fetch_part(channel, CUT, tmp_path / "kept" / "part")
    (tmp_path / "other").mkdir()
    assert f"at most {free} bytes" in refused([*part(), piece("vocab.json", b"x")], tmp_path / "other").expected


def test_frames_that_are_none_are_refused(tmp_path: Path) -> None:
    packer = Packer(chunk_bytes=500)
    whole = [frame for message in part() for frame in packer.frames(message)]
    cut_off = list(packer.frames(piece("vocab.json", bytes(1000))))[:-1]
    for more, words in (([b"no frame"], "frame"), (cut_off, "last message is cut off")):
        with hostile(lambda _, more=more: iter(whole + more)) as channel, pytest.raises(FrameError) as caught:  # type: ignore[misc]
            fetch_part(channel, CUT, tmp_path / "part")
        assert words in caught.value.what
        assert not list(tmp_path.iterdir())


def test_a_message_larger_than_a_piece_is_refused(tmp_path: Path) -> None:
    assert "too large" in refused([piece(WEIGHTS, bytes(3 * CHUNK_BYTES))], tmp_path).what


@pytest.mark.parametrize("num_files", [0, 2])
def test_a_silent_host_is_left(num_files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_parts, "SILENCE_SECONDS", 0.2)
    left = threading.Event()

    def falls_silent(context: Any) -> Iterator[bytes]:
        context.add_callback(left.set)
        yield from frames(part()[:num_files])
        left.wait(PATIENCE_SECONDS)

    with hostile(falls_silent) as channel:
        with pytest.raises(HostLostError, match="lost") as caught:
            fetch_part(channel, CUT, tmp_path / "new" / "part")
        assert caught.value.got == "silence for 0.2 s"
        assert left.wait(PATIENCE_SECONDS)
    assert not list(tmp_path.iterdir())


def test_a_host_that_is_refused_is_hung_up_on(tmp_path: Path) -> None:
    gone = threading.Event()

    def goes_on(context: Any) -> Iterator[bytes]:
        context.add_callback(gone.set)
        yield from frames([piece("run.py", b"x")])
        gone.wait(2 * PATIENCE_SECONDS)

    with hostile(goes_on) as channel:
        with pytest.raises(FrameError) as caught:
            fetch_part(channel, CUT, tmp_path / "part")
        assert caught.tb is not None  # It holds the call, which else would end with the last reference.
        assert gone.wait(PATIENCE_SECONDS)


def test_a_host_that_breaks_off_is_lost(tmp_path: Path) -> None:
    def breaks(context: Any) -> Iterator[bytes]:
        yield from frames(part()[:2])
        context.abort(grpc.StatusCode.INTERNAL, "a fault")

    with hostile(breaks) as channel, pytest.raises(HostLostError) as caught:
        fetch_part(channel, CUT, tmp_path / "new" / "part")
    assert "a fault" in caught.value.got
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "full", tmp_path / "file", tmp_path / "file" / "part"):
        with hostile(lambda _: frames(part())) as channel, pytest.raises(OutputError) as caught:
            fetch_part(channel, CUT, folder)
        assert caught.value.where == str(folder)
        assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "full", "mine"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path.open

    def full(self: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if self.name == WEIGHTS:
            raise OSError(28, "No space left on device")
        return plain(self, mode, *rest, **named)

    monkeypatch.setattr(Path, "open", full)
    with hostile(lambda _: frames(part())) as channel, pytest.raises(OutputError) as caught:
        fetch_part(channel, CUT, tmp_path / "new" / "part")
    assert "No space left" in caught.value.got
    assert not list(tmp_path.iterdir())
