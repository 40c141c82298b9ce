"""Bytes between processes of one machine: gRPC on a Unix socket in a folder that only this user can open."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
RELAY, RESIDENT = "atoll.Relay", "atoll.Resident"
"""Name spaces of the coordinator's socket and of an edge's."""
Answer = Callable[[bytes], bytes]
Stream = Callable[[bytes, grpc.ServicerContext], Iterator[bytes]]


class LocalServer:
    """Serves methods of one name space on a socket of its own."""

    def __init__(self, space: str, answers: Mapping[str, Answer], streams: Mapping[str, Stream] | None = None, *, threads: int = 8) -> None:
        # A socket's path holds about a hundred characters, so it cannot lie in the user's folders. mkdtemp makes it the user's alone.
        self._folder = Path(tempfile.mkdtemp(prefix="atoll-"))
        self.address = f"unix:{self._folder / 'socket'}"
        handlers = {name: grpc.unary_unary_rpc_method_handler(_answering(answer)) for name, answer in answers.items()}
        handlers |= {name: grpc.unary_stream_rpc_method_handler(stream) for name, stream in (streams or {}).items()}
        self._server = grpc.server(ThreadPoolExecutor(threads, thread_name_prefix=f"atoll-{space}"), options=_OPTIONS)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(space, handlers),))
        self._server.add_insecure_port(self.address)
        self._server.start()

    def close(self) -> None:
        """Stop at once; may be called twice."""
        self._server.stop(0).wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _answering(answer: Answer) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    return lambda question, context: answer(question)


class LocalClient:
    """Calls a server's methods; a context, at whose end the connection is closed."""

    def __init__(self, address: str, space: str) -> None:
        self._channel, self._space = grpc.insecure_channel(address, options=_OPTIONS), space

    def __enter__(self) -> LocalClient:
        return self

    def __exit__(self, *error: object) -> None:
        self._channel.close()

    def ask(self, method: str, question: bytes, *, timeout: float | None = None, wait: bool = False) -> bytes:
        """The answer. With `wait`, a server that is not there yet is waited for.

        Raises: grpc.RpcError where there is none within `timeout` seconds, or the server is gone.
        """
        call = self._channel.unary_unary(f"/{self._space}/{method}")
        answer: bytes = call(question, timeout=timeout, wait_for_ready=wait)
        return answer

    def stream(self, method: str, question: bytes) -> Iterator[bytes]:
        """What the server says, until it ends or is gone.

        Raises: grpc.RpcError while it is read, where the server is gone.
        """
        said: Iterator[bytes] = self._channel.unary_stream(f"/{self._space}/{method}")(question)
        return said
