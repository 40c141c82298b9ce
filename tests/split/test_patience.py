"""What a device tells its user while its host is lost, and how long it tries."""

from __future__ import annotations

from itertools import pairwise

import pytest

from atoll.errors import FrameError, HostLostError
from atoll.split.device import patience as patient
from atoll.split.device.client import Client
from atoll.split.transport import lost
from atoll.units import format_wait
from atoll.wire import protocol_pb2 as pb
from atoll.wire.handshake import refusal_error

FULL = pb.Refusal(code="busy", field="tenant_sessions", host_value="at most 1", device_value="one more", do="come again")


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def told_of(problems: list[HostLostError | FrameError], seconds: float) -> tuple[list[tuple[float, str]], float]:
    """When what was told of a host that fails like this, the last for ever; and when the device gave up."""
    clock, told = Time(), list[tuple[float, str]]()
    client = Client("test", None, None, seconds, clock, clock.sleep)  # type: ignore[arg-type]
    client.on_lost = lambda line: told.append((clock.now, line))
    left = iter([*problems, *[problems[-1]] * 1000])

    def attempt() -> None:
        raise next(left)

    with pytest.raises((HostLostError, FrameError)):
        client.retrying(attempt)
    return told, clock.now


def test_a_full_host_is_told_at_once_and_then_now_and_then_with_the_time_that_is_left() -> None:
    told, ended = told_of([refusal_error(FULL, "test")], 120.0)
    assert 112 <= ended <= 120
    assert told[0] == (0.0, (
        "the host takes no session now: all sessions that this tenant may have are in use (tenant_sessions): one more; at most 1; "
        "come again; trying again for 2 min 00 s"
    ))  # fmt: skip
    assert 3 <= len(told) <= 5
    for (before, _), (now, line) in pairwise(told):
        assert now - before >= patient.TELL_SECONDS
        assert line.startswith("still: the host takes no session now: all sessions that this tenant may have are in use (tenant_sessions)")
        assert line.endswith(f"for {format_wait(120 - now)}")


def test_another_reason_is_told_at_once() -> None:
    told, _ = told_of([lost("nobody listens there"), lost("nobody listens there"), refusal_error(FULL, "test"), lost("gone")], 20.0)
    begin = ["nobody listens there", "the host takes no session now", "gone"]
    assert [line.partition(";")[0].partition(":")[0] for _, line in told] == begin


def test_nothing_is_told_of_a_host_that_is_not_tried_again() -> None:
    late = refusal_error(pb.Refusal(code="busy", field="tenant_bytes", retry_seconds=3600.0), "test")
    assert told_of([late], 120.0) == ([], 0.0)
    assert told_of([lost("gone")], 0.0) == ([], 0.0)


@pytest.mark.parametrize(("seconds", "text"), [
    (0.01, "1 s"), (59.2, "1 min 00 s"), (3598, "59 min 58 s"), (3599.5, "1 h 00 min"), (7180, "2 h 00 min"), (86400, "24 h 00 min"),
])  # fmt: skip
def test_waits_are_rounded_up(seconds: float, text: str) -> None:
    assert format_wait(seconds) == text
