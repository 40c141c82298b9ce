"""Bytes over a local socket: any size, streams that end, and a server that goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from atoll.fleet.links.sockets import LocalClient, LocalServer


def counted(question: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from (str(number).encode() for number in range(int(question)))


def folder_of(server: LocalServer) -> Path:
    return Path(server.address.removeprefix("unix:")).parent


@pytest.fixture
def server() -> Iterator[LocalServer]:
    answers = {"Back": lambda question: question[::-1], "Fails": lambda question: bytes(question[len(question)])}
    found = LocalServer("space", answers, {"Count": counted})
    yield found
    found.close()


def test_answers_of_any_size(server: LocalServer) -> None:
    with LocalClient(server.address, "space") as client:
        for data in (b"", b"abc", bytes(range(256)) * 40_000):
            assert client.ask("Back", data) == data[::-1]


def test_a_stream_ends(server: LocalServer) -> None:
    with LocalClient(server.address, "space") as client:
        assert list(client.stream("Count", b"3")) == [b"0", b"1", b"2"]
        assert list(client.stream("Count", b"0")) == []


def test_what_fails_there_fails_here_and_the_server_goes_on(server: LocalServer) -> None:
    with LocalClient(server.address, "space") as client:
        for method in ("Fails", "Missing"):
            with pytest.raises(grpc.RpcError):
                client.ask(method, b"a")
        assert client.ask("Back", b"ab") == b"ba"


def test_the_socket_is_this_users_alone_and_gone_at_the_end(server: LocalServer) -> None:
    folder = folder_of(server)
    assert folder.stat().st_mode & 0o077 == 0
    server.close()
    server.close()
    assert not folder.exists()
    with LocalClient(server.address, "space") as client, pytest.raises(grpc.RpcError) as raised:
        client.ask("Back", b"ab")
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def test_a_stream_is_told_that_its_server_went() -> None:
    begun, asked = threading.Event(), threading.Event()

    def waits(question: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield b"first"
        context.add_callback(asked.set)
        begun.set()
        asked.wait(10)

    server = LocalServer("space", {}, {"Wait": waits})
    with LocalClient(server.address, "space") as client:
        stream = client.stream("Wait", b"")
        assert next(stream) == b"first"
        assert begun.wait(10)
        server.close()
        with pytest.raises(grpc.RpcError):
            next(stream)
    assert asked.wait(10)


def test_a_server_that_is_not_there_yet_is_waited_for(server: LocalServer) -> None:
    with LocalClient(server.address, "space") as client:
        assert client.ask("Back", b"ab", timeout=10, wait=True) == b"ba"
    server.close()
    with LocalClient(server.address, "space") as client:
        begin = time.monotonic()
        with pytest.raises(grpc.RpcError) as raised:
            client.ask("Back", b"ab", timeout=0.3, wait=True)
    assert time.monotonic() - begin >= 0.3
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
