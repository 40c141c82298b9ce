"""Tenants that share one processor, in simulated time: whoever has had least goes first, and nobody pays for another's long turns."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from atoll.split.host.compute_queue import ComputeQueue
from atoll.split.host.fair_share import FairShare

from tests.split.running import PATIENCE_SECONDS, wait_until

SECONDS = 200.0


@dataclass(frozen=True)
class Device:
    """Exchanges, one after the other: so many turns, an answer of the device after each, and its own work after the last."""

    turns: int
    turn: float
    answer: float
    work: float
    pauses: int = 1
    """A turn is cut into so many pieces, between which others may go."""

    def asks(self) -> Iterator[tuple[float, float | None, bool]]:
        """Length of the next piece; seconds until the piece after it is asked for, None: at once; whether the exchange goes on."""
        for number in itertools.cycle(range(self.turns)):
            for _ in range(self.pauses - 1):
                yield self.turn / self.pauses, None, True
            last = number == self.turns - 1
            yield self.turn / self.pauses, self.work if last else self.answer, not last


def simulate(devices: dict[str, list[Device]], seconds: float = SECONDS) -> dict[str, float]:
    """Seconds that an exchange of each tenant took, work of its own included."""
    share, now, free_at = FairShare(), 0.0, 0.0
    asks = {(tenant, at): device.asks() for tenant, many in devices.items() for at, device in enumerate(many)}
    back = dict.fromkeys(asks, 0.0)
    lines: dict[str, list[tuple[str, int]]] = {tenant: [] for tenant in devices}
    done = dict.fromkeys(devices, 0)
    holder: tuple[str, int] | None = None
    current: tuple[float, float | None, bool] = (0.0, None, True)
    for one in asks:
        share.enter(one[0])
    until: float | None = None
    while now < seconds:
        for one in [one for one, at in back.items() if at <= now]:
            del back[one]
            lines[one[0]].append(one)
            share.arrive(one[0], now)
        if holder is not None and free_at <= now:
            tenant, (_, away, within) = holder[0], current
            share.end(tenant, now, within=within)
            if away is None:
                lines[tenant].insert(0, holder)
                share.arrive(tenant, now)
            else:
                back[holder] = now + away
                done[tenant] += not within
            holder = None
        until = None
        if holder is None and any(lines.values()):
            chosen, wait = share.choose(now)
            if chosen is not None:
                holder = lines[chosen].pop(0)
                current = next(asks[holder])
                share.begin(chosen, now)
                free_at = now + current[0]
            else:
                assert wait is not None
                until = now + wait
        now = min([*back.values(), *([free_at] if holder is not None else []), *([until] if until is not None else [])])
    return {tenant: len(devices[tenant]) * seconds / max(count, 1) for tenant, count in done.items()}


HONEST = Device(turns=14, turn=0.004, answer=0.005, work=0.15)
"""Seven groups there and back: 0.06 s of compute in an exchange of 0.27 s."""
PADDED = Device(turns=2, turn=12.0, answer=0.001, work=0.0, pauses=12)
"""Thousands of positions and no adapter: a second for a block."""


def test_a_tenant_of_long_turns_costs_another_one_no_more_than_half() -> None:
    alone = simulate({"north": [HONEST]})["north"]
    assert alone == pytest.approx(14 * 0.004 + 13 * 0.005 + 0.15, rel=0.01)
    for hostile in ([PADDED], [PADDED] * 8):
        assert simulate({"north": [HONEST], "south": hostile})["north"] < 2.1 * alone


def test_short_and_long_turns_by_turns_gain_nothing() -> None:
    """Many cheap exchanges that are to look harmless, then a costly one."""
    alone = simulate({"north": [HONEST]})["north"]

    class Sly(Device):
        def asks(self) -> Iterator[tuple[float, float | None, bool]]:
            while True:
                for _ in range(50):
                    yield 0.0005, 0.0005, False
                yield 2.0, 0.0005, False

    assert simulate({"north": [HONEST], "south": [Sly(1, 0, 0, 0)]})["north"] < 2.1 * alone


def test_one_of_sixteen_that_does_its_worst_takes_a_sixteenth() -> None:
    honest = {f"tenant{number}": [HONEST] for number in range(15)}
    together = simulate(honest)
    beside = simulate(honest | {"worst": [PADDED] * 4})
    assert max(beside[tenant] / together[tenant] for tenant in honest) < 1.25


def test_devices_that_are_alike_lose_no_time_to_waiting_for_each_other() -> None:
    """The processor is never kept for one of them while another could use it for as long."""
    alike = {f"tenant{number}": [Device(turns=10, turn=0.02, answer=0.01, work=0.02)] for number in range(4)}
    took = simulate(alike)
    assert max(took.values()) == pytest.approx(4 * 10 * 0.02, rel=0.05)


def test_a_tenants_many_sessions_get_one_share() -> None:
    busy = Device(turns=1, turn=0.1, answer=0.0, work=0.0)
    took = simulate({"north": [busy], "south": [busy] * 9})
    assert took["north"] == pytest.approx(0.2, rel=0.05)
    assert took["south"] == pytest.approx(9 * 0.2, rel=0.05)


def test_nobody_saves_up_turns() -> None:
    """North sleeps for a long time; when it is back it gets its share from then on, and not what it slept through."""
    share = FairShare()
    for tenant in ("north", "south"):
        share.enter(tenant)
    now = 0.0

    def turn(tenant: str) -> None:
        nonlocal now
        share.begin(tenant, now)
        now += 1.0
        share.end(tenant, now, within=True)

    share.arrive("north", now)
    turn("north")
    for _ in range(1000):
        share.arrive("south", now)
        turn("south")
    share.arrive("north", now)
    share.arrive("south", now)
    order = []
    for _ in range(6):
        tenant, _ = share.choose(now)
        assert tenant is not None
        order.append(tenant)
        turn(tenant)
        share.arrive(tenant, now)
    assert order.count("north") <= 4


def test_nobody_waits_for_a_tenant_that_has_left() -> None:
    share = FairShare()
    for tenant in ("north", "south"):
        share.enter(tenant)
    share.arrive("north", 0.0)
    share.begin("north", 0.0)
    share.end("north", 0.01, within=True)
    share.arrive("south", 0.01)
    share.begin("south", 0.01)
    share.arrive("north", 1.0)
    share.end("south", 5.0, within=True)
    share.begin("north", 5.0)
    share.end("north", 5.01, within=True)
    share.arrive("south", 5.01)
    assert share.choose(5.01)[0] is None, "north is behind, and usually back within a second"
    share.leave("north")
    assert share.choose(5.01) == ("south", None)


def test_first_come_first_served_within_a_tenant() -> None:
    queue, order = ComputeQueue(), []
    with queue.session("north") as first, ThreadPoolExecutor(4) as pool:

        def compute(number: int) -> None:
            with queue.session("north") as turns, turns.slot():
                order.append(number)

        with first.slot():
            for number in range(4):
                pool.submit(compute, number)
                wait_until(lambda number=number: len(queue.lines["north"]) == number + 1)  # type: ignore[misc]
    assert order == [0, 1, 2, 3]


def test_a_pause_lets_another_tenant_go_first_and_none_of_the_same() -> None:
    queue, order, went = ComputeQueue(), [], threading.Event()
    with queue.session("north") as long, ThreadPoolExecutor(2) as pool:

        def compute(tenant: str) -> None:
            with queue.session(tenant) as turns, turns.slot():
                order.append(tenant)
                went.set()

        with long.slot():
            pool.submit(compute, "north")
            wait_until(lambda: len(queue.lines["north"]) == 1)
            long.pause()  # Nobody else is here.
            pool.submit(compute, "south")
            wait_until(lambda: len(queue.lines["south"]) == 1)
            long.pause()
            assert went.wait(PATIENCE_SECONDS)
            order.append("long")
    assert order == ["south", "long", "north"]


def test_time_is_counted_for_the_session_that_took_it() -> None:
    now = [0.0]
    queue = ComputeQueue(clock=lambda: now[0])
    with queue.session("north") as turns, queue.session("south") as others:
        with turns.slot():
            now[0] += 2.0
            with turns.release():
                now[0] += 5.0
            now[0] += 1.0
            turns.pause()
            now[0] += 1.0
        with others.slot():
            now[0] += 7.0
        assert (turns.seconds, others.seconds) == (4.0, 7.0)


def test_what_an_accelerator_still_does_is_waited_for_before_a_turn_ends() -> None:
    now, begun = [0.0], [0.0]

    def settle() -> None:
        now[0] += begun[0]
        begun[0] = 0.0

    queue = ComputeQueue(settle, lambda: now[0])
    with queue.session("north") as turns, queue.session("south"), turns.slot():
        begun[0] = 3.0
        turns.pause()
        assert turns.seconds == 3.0
