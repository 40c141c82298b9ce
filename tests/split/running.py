"""A real host on a loopback port, and sessions on it."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc

from atoll.split.authority.revocation import Revoked
from atoll.split.certificates import DeviceTls, HostTls, open_channel, server_credentials
from atoll.split.cut import Cut
from atoll.split.device.blocks import Given
from atoll.split.device.client import Client, Terms
from atoll.split.device.exchange import Session
from atoll.split.host.audit import Audit
from atoll.split.host.server import Host
from atoll.split.host.session import Served
from atoll.split.host.tenants import HostLimits
from atoll.split.transport import ClientTransport
from atoll.wire import protocol_pb2 as pb

from tests.conftest import random_model
from tests.split.conftest import BLOCKS, served

PLAIN, OPEN = HostTls(None, None, None), DeviceTls(None, None, None)
LOOPBACK = "127.0.0.1:0"
PATIENCE_SECONDS = 10.0
"""A test that waits so long has failed."""


def llama_host(idle_seconds: float = 60.0, exchange_seconds: float = 60.0) -> Served:
    """A host of a tiny llama, with its facts worked out before anybody trains: they are read off the model's own run."""
    host = served(random_model("llama", BLOCKS))
    facts = functools.cache(host.facts)
    for front in range(BLOCKS):
        facts(Cut(front, 0))
    return replace(host, facts=facts, idle_seconds=idle_seconds, exchange_seconds=exchange_seconds)


@contextmanager
def running(
    host: Served, max_sessions: int = 4, tls: HostTls = PLAIN, max_tenant_sessions: int | None = None, max_part: Cut | None = None,
    audit: Path | None = None, limits: HostLimits | None = None, clock: Callable[[], float] = time.monotonic,
) -> Iterator[Host]:  # fmt: skip
    """The host, served; when it has stopped, none of its threads is left, nor of its devices."""
    before = set(threading.enumerate())
    limits = limits or HostLimits(max_sessions=max_sessions, max_tenant_sessions=max_tenant_sessions, max_part=max_part)
    revoked = Revoked(tls.revoked, tls.client_ca) if tls.revoked and tls.client_ca else None
    running = Host(host, limits, LOOPBACK, server_credentials(LOOPBACK, tls, insecure=False), Audit(audit), revoked, clock)
    running.start()
    try:
        yield running
    finally:
        running.stop()
    wait_until(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("atoll-")])


@contextmanager
def channel_to(host: Host, tls: DeviceTls = OPEN) -> Iterator[grpc.Channel]:
    """A channel to a running host."""
    channel = open_channel(f"127.0.0.1:{host.port}", tls, insecure=False)
    try:
        yield channel
    finally:
        channel.close()


@contextmanager
def session_on(channel: grpc.Channel, **change: Any) -> Iterator[Session]:
    """An open session without adapters, of a device that says this otherwise."""
    terms = replace(Terms("test", "base", "tokenizer", Cut(0, 0), "lora", "dense", "fp32", "fp32", 512, 32), **change)
    session = Client("test", terms, lambda: ClientTransport(channel, PATIENCE_SECONDS), 0.0).connect(Given({}, {}, False))
    try:
        yield session
    finally:
        if session.stream.transport._call.is_active() and not session.stream.dialogue.closed:  # type: ignore[attr-defined]
            session.stream.send(pb.Bye())
        session.stream.transport.close()


def wait_until(happened: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < until, "it does not happen"
        time.sleep(0.01)
