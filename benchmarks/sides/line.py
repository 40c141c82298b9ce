"""The rate of the line: bytes over a bare gRPC stream between two processes, in frames of the split protocol's size."""

from __future__ import annotations

import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import grpc

FRAME_BYTES = 2**20
OPTIONS = (("grpc.max_receive_message_length", 4 * 2**20), ("grpc.max_send_message_length", 4 * 2**20))


class Line:
    """A bare stream to another process. `seconds` moves so many bytes up, then so many down, and times both together."""

    def __enter__(self) -> Line:
        self._process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._channel = grpc.insecure_channel(f"127.0.0.1:{int(self._process.stdout.readline())}", options=OPTIONS)
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._call: Any = self._channel.stream_stream("/line/Move")(iter(self._out.get, None))
        self.seconds(FRAME_BYTES, FRAME_BYTES)
        return self

    def seconds(self, up_bytes: int, down_bytes: int) -> float:
        """Time for both directions, one after the other."""
        start = time.perf_counter()
        frames = [b"\0" * min(FRAME_BYTES, up_bytes - at) for at in range(0, up_bytes, FRAME_BYTES)]
        self._out.put(f"{len(frames)} {down_bytes}".encode())
        for frame in frames:
            self._out.put(frame)
        got = 0
        while got < down_bytes:
            got += len(next(self._call))
        return time.perf_counter() - start

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._out.put(None)
        self._channel.close()
        self._process.terminate()
        self._process.wait()


def _move(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
    for request in requests:
        num_frames, down_bytes = map(int, request.split())
        for _ in range(num_frames):
            next(requests)
        for at in range(0, down_bytes, FRAME_BYTES):
            yield b"\0" * min(FRAME_BYTES, down_bytes - at)


if __name__ == "__main__":
    server = grpc.server(ThreadPoolExecutor(2), options=OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(_move)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("line", {"Move": handler}),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    server.wait_for_termination()
