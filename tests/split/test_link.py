"""A link, timed by a clock of the test's own, against a real host."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.internal.encoder import _VarintBytes

from atoll.base.load import load_base
from atoll.errors import HostLostError
from atoll.jobs.split import serve
from atoll.split.device import link
from atoll.split.device.link import CALLS, LARGEST_UPLOAD_BYTES, SMALLEST_UPLOAD_BYTES, Link, measure_link
from atoll.split.host.tenants import HostLimits
from atoll.wire import protocol_pb2 as pb

from tests.split.running import channel_to, llama_host, running


@pytest.fixture(scope="module")
def tiny_channel() -> Iterator[grpc.Channel]:
    """A channel to a host of the tiny base."""
    with running(serve(load_base("tiny"), "tiny", "fp32", 32, HostLimits())) as host, channel_to(host) as channel:
        yield channel


def test_both_directions_and_the_way_of_a_call_are_measured(tiny_channel: grpc.Channel) -> None:
    found = measure_link(tiny_channel, itertools.count(0.0).__next__)
    assert found.round_trip_seconds == (1.0,) * CALLS
    assert found.latency_seconds == 0.5
    assert found.note == ""
    assert found.down_bits_per_second is not None
    assert found.bits_per_second == min(found.up_bits_per_second, found.down_bits_per_second)


def test_a_real_clock_gives_numbers_too(tiny_channel: grpc.Channel) -> None:
    found = measure_link(tiny_channel)
    assert found.latency_seconds > 0
    assert found.bits_per_second > 0


def test_uploads_grow_until_the_link_takes_a_while(tiny_channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    now = itertools.count()

    def padded(_channel: grpc.Channel, num_bytes: int):  # type: ignore[no-untyped-def]
        return lambda: sizes.append(num_bytes)

    def clock() -> float:  # two looks for each call: the second one later by what a link of 8 Mbit/s takes
        return sizes[-1] / 1e6 + 0.02 if next(now) % 2 else 0.0

    monkeypatch.setattr(link, "_padded", padded)
    assert link._upload(tiny_channel, clock, 0.02) == pytest.approx(8e6)
    assert sizes == [2**16, 2**17, 2**18, 2**18, 2**18, 2**18]
    sizes.clear()
    assert link._upload(tiny_channel, lambda: 0.0, 0.0) == 8 * LARGEST_UPLOAD_BYTES / 1e-6
    assert sizes[0] == SMALLEST_UPLOAD_BYTES
    assert max(sizes) == LARGEST_UPLOAD_BYTES


@pytest.mark.parametrize("num_bytes", [0, 1, 127, 128, 300, 2**21])
def test_padding_is_a_field_that_the_host_passes_over(num_bytes: int, tiny_channel: grpc.Channel) -> None:
    assert link._varint(num_bytes) == _VarintBytes(num_bytes)
    padded = link._PADDING_TAG + link._varint(num_bytes) + bytes(num_bytes)
    request = pb.StatusRequest.FromString(padded)
    assert request.ListFields() == []
    assert request.SerializeToString() == padded
    link._padded(tiny_channel, num_bytes)()


def test_a_host_that_does_not_hand_out_its_base_leaves_that_direction_open() -> None:
    with running(llama_host()) as host, channel_to(host) as channel:
        found = measure_link(channel)
    assert found.down_bits_per_second is None
    assert found.note.startswith("the host did not send its base: ")
    assert found.bits_per_second == found.up_bits_per_second


def test_no_host_is_an_error() -> None:
    with grpc.insecure_channel("127.0.0.1:1") as channel, pytest.raises(HostLostError, match="lost"):
        measure_link(channel)


def test_the_slower_direction_and_half_the_way_there_and_back_count() -> None:
    found = Link((0.04, 0.02, 0.06), 1e6, 8e6)
    assert (found.latency_seconds, found.bits_per_second) == (0.02, 1e6)
    assert Link((0.04,), 9e6, 8e6).bits_per_second == 8e6
