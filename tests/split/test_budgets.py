"""What tenants may use in a time: the bucket of tokens against exact fractions, periods of bytes, and the file that says so."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest

from atoll.errors import AtollError, HostLostError, ManyErrors
from atoll.split.host.limits.budgets import Account, Bucket, Budgets, Over
from atoll.split.host.limits.file import read_tenants
from atoll.split.host.limits.rules import ByteLimit, TenantLimits, parse_byte_limit
from atoll.split.host.tenants import HostLimits
from atoll.split.transport import lost

from tests.split.running import PATIENCE_SECONDS, wait_until


@dataclass
class Clock:
    """Time that passes only when somebody waits."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def hold(self, over: Over) -> None:
        self.now += over.seconds


def account(clock: Callable[[], float], **limits: object) -> Account:
    return Account("north", TenantLimits(**limits), clock)  # type: ignore[arg-type]


def exact_starts(arrivals: list[tuple[Fraction, int]], rate: Fraction, burst: Fraction) -> list[Fraction]:
    """When each may begin, one after the other: as soon as there is what it asks for, or all that there can be."""
    level, at, starts = burst, Fraction(0), []
    for arrival, num_tokens in arrivals:
        begin = max(arrival, at)
        level = min(burst, level + rate * (begin - at))
        need = min(Fraction(num_tokens), burst)
        if level < need:
            begin, level = begin + (need - level) / rate, need
        level, at = level - num_tokens, begin
        starts.append(begin)
    return starts


# Tokens.


@pytest.mark.parametrize("seed", range(20))
def test_the_bucket_is_that_of_exact_fractions(seed: int) -> None:
    numbers = random.Random(seed)
    rate, burst = numbers.choice([7, 100, 2500]), numbers.choice([1, 50, 3000])
    arrivals, at = [], Fraction(0)
    for _ in range(50):
        at += Fraction(numbers.choice([0, 0, 1, 3, 40]), 8)
        arrivals.append((at, numbers.choice([1, burst, burst + 1, 5 * burst, numbers.randint(1, 4000)])))
    wanted = exact_starts(arrivals, Fraction(rate), Fraction(burst))
    clock, starts = Clock(), []
    one = account(clock, tokens_per_second=float(rate), burst=burst)
    for arrival, num_tokens in arrivals:
        clock.now = max(clock.now, float(arrival))
        assert one.admit(num_tokens, clock.hold) is None
        starts.append(clock.now)
    assert starts == pytest.approx([float(start) for start in wanted], abs=1e-6)
    # In no time more than what is at once, what comes in that time, and what one exchange is larger than the bucket.
    largest = max(num_tokens for _, num_tokens in arrivals)
    for first in range(50):
        for last in range(first, 50):
            used = sum(num_tokens for _, num_tokens in arrivals[first : last + 1])
            assert used <= max(burst, largest) + largest + rate * (starts[last] - starts[first]) + 1e-3


@pytest.mark.parametrize("seed", range(20))
def test_those_in_line_know_when_their_turn_comes(seed: int) -> None:
    numbers = random.Random(seed)
    line = [numbers.randint(1, 300) for _ in range(10)]
    together, now = Bucket(10.0, 100.0, 0.0), 0.0
    foretold = [together.wait_seconds(line[: place + 1], 0.0) for place in range(10)]
    found, alone = [], Bucket(10.0, 100.0, 0.0)
    for num_tokens in line:
        now += alone.wait_seconds([num_tokens], now)
        alone.take(num_tokens, now)
        found.append(now)
    assert foretold == pytest.approx(found)


def test_exactly_what_there_is_goes_at_once_and_one_more_waits() -> None:
    clock = Clock()
    one = account(clock, tokens_per_second=10.0, burst=100)
    assert one.admit(100, clock.hold) is None
    assert clock.now == 0
    assert one.admit(1, clock.hold) is None
    assert clock.now == pytest.approx(0.1)
    clock.now = 1000.0  # Nothing is saved beyond the bucket.
    assert one.use().tokens_left == 100
    assert one.admit(101, clock.hold) is None
    assert clock.now == 1000.0
    assert one.use().tokens_left == -1
    assert one.admit(101, clock.hold) is None
    assert clock.now == pytest.approx(1010.1)
    assert one.use().held_seconds == pytest.approx(10.2)


def test_without_a_word_on_it_the_bucket_holds_ten_seconds() -> None:
    clock = Clock()
    one = account(clock, tokens_per_second=10.0)
    for _ in range(10):
        assert one.admit(10, clock.hold) is None
    assert clock.now == 0
    assert one.admit(10, clock.hold) is None
    assert clock.now == pytest.approx(1.0)


def test_without_limits_nothing_is_held_or_kept() -> None:
    clock = Clock()
    one = account(clock)
    one.add_bytes(2**40)
    assert one.admit(2**30, clock.hold) is None
    assert (clock.now, one.over_bytes(), one.use().num_bytes) == (0, None, 0)


def test_a_device_that_leaves_while_it_waits_takes_nothing_and_lets_the_next_go() -> None:
    clock = Clock()
    one = account(clock, tokens_per_second=10.0, burst=10)
    assert one.admit(10, clock.hold) is None

    def leave(over: Over) -> None:
        raise lost("the device is gone")

    with pytest.raises(HostLostError):
        one.admit(10, leave)
    assert one.admit(10, clock.hold) is None
    assert clock.now == pytest.approx(1.0)


def test_sessions_of_one_tenant_go_in_their_order_however_small_the_later_one() -> None:
    clock = Clock()
    one = account(clock, tokens_per_second=1.0, burst=100)
    assert one.admit(100, clock.hold) is None
    go = threading.Event()

    def wait(over: Over) -> None:
        assert go.wait(PATIENCE_SECONDS)

    with ThreadPoolExecutor(2) as pool:
        large = pool.submit(one.admit, 80, wait)
        wait_until(lambda: len(one._line) == 1)
        small = pool.submit(one.admit, 1, wait)
        wait_until(lambda: len(one._line) == 2)
        clock.now = 80.0  # Enough for either, and not for both.
        go.set()
        assert large.result(PATIENCE_SECONDS) is None
        assert not small.done()
        clock.now = 81.0
        assert small.result(PATIENCE_SECONDS) is None
    assert one.use().tokens_left == 0


def test_what_is_told_of_a_wait() -> None:
    clock, told = Clock(), list[Over]()

    def hold(over: Over) -> None:
        told.append(over)
        clock.hold(over)

    one = account(clock, tokens_per_second=10.0, burst=100)
    for _ in range(2):
        assert one.admit(100, hold) is None
    (over,) = told
    assert (over.field, over.limit) == ("tenant_tokens", "10 tokens a second with padding, 100 at once")
    assert over.wait().seconds == over.seconds == pytest.approx(10)
    assert "reconnect" in over.do


# Bytes.


def test_bytes_to_the_last_one_and_a_new_period() -> None:
    clock = Clock(5.0)
    one = account(clock, bytes=ByteLimit(1000, "hour"))
    one.add_bytes(999)
    assert one.over_bytes() is None
    clock.now = 100.0
    one.add_bytes(1)
    over = one.over_bytes()
    assert over is not None
    refusal = over.refusal()
    assert (refusal.code, refusal.field, refusal.retry_seconds) == ("busy", "tenant_bytes", 3505.0)
    assert refusal.host_value == "at most 1 kB/hour, of all devices with the same certificate name together"
    assert refusal.device_value == "1 kB (1000 bytes) used"
    assert refusal.do == "come again in 58 min 25 s"
    clock.now = 3604.5  # Whoever comes a moment before is told so.
    assert one.over_bytes() is not None
    assert one.over_bytes().do == "come again in 1 s"  # type: ignore[union-attr]
    clock.now = 3605.0
    assert one.over_bytes() is None
    assert one.use().num_bytes == 0
    clock.now = 9000.0  # The next hour begins with its first byte.
    one.add_bytes(1000)
    assert one.over_bytes().seconds == 3600.0  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(20))
def test_what_was_too_much_is_taken_from_the_next_periods(seed: int) -> None:
    """Against a count hour by hour: whoever comes when it is told to is let in, not a moment before, and over all hours has its limit."""
    numbers, clock = random.Random(seed), Clock(7.0)
    one, begun, moved = account(clock, bytes=ByteLimit(1000, "hour")), 7.0, 0
    for _ in range(30):
        assert one.over_bytes() is None
        num_bytes = numbers.choice([1, 999, 1000, 1001, 2000, 5500, numbers.randint(1, 4000)])
        one.add_bytes(num_bytes)
        moved += num_bytes
        over = one.over_bytes()
        if over is not None:
            clock.now += over.seconds - 0.5
            assert one.over_bytes() is not None
            clock.now += 0.5
        assert moved < 1000 * ((clock.now - begun) // 3600 + 1)
        assert one.use().num_bytes == moved - 1000 * ((clock.now - begun) // 3600) or one.use().num_bytes == 0


def test_bytes_that_are_used_up_forbid_an_exchange_that_waits() -> None:
    clock = Clock()
    one = account(clock, tokens_per_second=1.0, burst=1, bytes=ByteLimit(10, "day"))
    assert one.admit(1, clock.hold) is None

    def meanwhile(over: Over) -> None:
        one.add_bytes(10)

    over = one.admit(1, meanwhile)
    assert over is not None
    assert over.field == "tenant_bytes"
    assert over.do == "come again in 24 h 00 min"
    clock.now = 1.0
    assert one.use().tokens_left == 1, "nothing was taken"


def test_no_tenant_uses_what_is_anothers() -> None:
    clock = Clock()
    usual = TenantLimits(tokens_per_second=10.0, bytes=ByteLimit(100, "day"))
    limits = {"south": TenantLimits(tokens_per_second=1000.0)}
    budgets = Budgets(lambda tenant: limits.get(tenant, usual), clock)
    assert budgets.of("north").admit(100, clock.hold) is None
    budgets.of("north").add_bytes(100)
    assert budgets.of("north") is budgets.of("north"), "another session or connection is the same account"
    assert budgets.of("north").over_bytes() is not None
    for tenant in ("south", "west", ""):
        budgets.of(tenant).add_bytes(99)
        assert budgets.of(tenant).admit(100, clock.hold) is None
    assert clock.now == 0
    assert {tenant: use.num_bytes for tenant, use in budgets.uses(None).items()} == {"": 99, "north": 100, "south": 0, "west": 99}
    assert list(budgets.uses("north")) == ["north"]


# What people write.


@pytest.mark.parametrize(
    ("text", "limit"),
    [("20 GB/day", ByteLimit(20 * 10**9, "day")), ("1MiB per hour", ByteLimit(2**20, "hour")), ("1B/day", ByteLimit(1, "day"))],
)
def test_bytes_in_a_period(text: str, limit: ByteLimit) -> None:
    assert parse_byte_limit(text) == limit
    assert parse_byte_limit(limit.to_text()) == limit


@pytest.mark.parametrize(
    "text", ["", "20 GB", "/day", "0 B/day", "20 GB/week", "many/day", "20/day", "-1 GB/day", "1e400 GB/day", "0.1 B/hour"]
)
def test_bytes_in_no_period(text: str) -> None:
    with pytest.raises(ValueError, match="20 GB/day"):
        parse_byte_limit(text)


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "tenants.toml").write_text(text)
    return tmp_path / "tenants.toml"


def test_the_file_says_what_differs_from_the_usual(tmp_path: Path) -> None:
    usual = TenantLimits(2, 100.0, None, ByteLimit(10, "day"))
    file = written(tmp_path, """
        [tenant.north]
        sessions = 4
        tokens_per_second = 2000
        burst = 40000
        bytes = "20 GB/day"
        idle = "5 min"
        silence = 3600
        [tenant."south & sons"]
        tokens_per_second = 0.5
        [tenant.west]
        burst = 7
    """)  # fmt: skip
    found = read_tenants(file, usual)
    assert found == {
        "north": TenantLimits(4, 2000.0, 40000, ByteLimit(20 * 10**9, "day"), 300.0, 3600.0),
        "south & sons": TenantLimits(2, 0.5, None, ByteLimit(10, "day")),
        "west": TenantLimits(2, 100.0, 7, ByteLimit(10, "day")),
    }
    limits = HostLimits(max_tenant_sessions=2, tenant_tokens_per_second=100.0, tenant_bytes=ByteLimit(10, "day"), tenants=found)
    assert (limits.of("north"), limits.of("east")) == (found["north"], usual)
    assert "4 sessions, 2000 tokens/s (at once 40000), 20 GB/day, idle for 300 s" in found["north"].to_text()


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("", "C103", "no tenants"),
        ("[tenant.north", "C101", "TOML"),
        ("sessions = 1\n[tenant.a]", "C102", "stands outside"),
        ("[tenants.north]\nsessions = 1", "C102", "did you mean [tenant.NAME]"),
        ("[tenant.north]\nsesions = 1", "C102", "did you mean sessions"),
        ("[tenant]\nnorth = 3", "C103", "must be a section"),
        ("tenant = 3", "C103", "no tenants"),
        ("[tenant.north]\nsessions = 0", "C103", "sessions cannot be 0"),
        ("[tenant.north]\nsessions = true", "C103", "sessions cannot be true"),
        ("[tenant.north]\ntokens_per_second = 0", "C103", "tokens_per_second cannot be 0"),
        ("[tenant.north]\ntokens_per_second = nan", "C103", "tokens_per_second"),
        ("[tenant.north]\ntokens_per_second = inf", "C103", "tokens_per_second"),
        ("[tenant.north]\nburst = 10", "C103", "burst needs a rate"),
        ('[tenant.north]\nbytes = "20 GB"', "C103", "20 GB/day"),
        ("[tenant.north]\nbytes = 20", "C103", "bytes cannot be 20"),
        ('[tenant.north]\nidle = "soon"', "C103", "idle"),
        ('[tenant." north"]\nsessions = 1', "C103", "cannot name a tenant so"),
        (f"[tenant.{'n' * 65}]\nsessions = 1", "C103", "cannot name a tenant so"),
    ],
)
def test_a_file_that_is_wrong_is_a_page(tmp_path: Path, text: str, code: str, says: str) -> None:
    with pytest.raises(AtollError) as caught:
        read_tenants(written(tmp_path, text), TenantLimits())
    assert caught.value.code == code
    assert says in caught.value.page()
    assert "tenants.toml" in caught.value.where


def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ManyErrors) as caught:
        read_tenants(written(tmp_path, "[tenant.north]\nsessions = 0\nbytes = 1\n[tenant.south]\nidel = 3"), TenantLimits())
    assert len(caught.value.errors) == 3


def test_the_file_in_the_documents_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```toml\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert read_tenants(written(tmp_path, text), TenantLimits(sessions=2)) == {
        "north": TenantLimits(4, 2000.0, 40000, ByteLimit(20 * 10**9, "day"), 300.0, 3600.0),
        "south & sons": TenantLimits(2, None, None, ByteLimit(500 * 10**6, "hour")),
    }


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AtollError) as caught:
        read_tenants(tmp_path / "none.toml", TenantLimits())
    assert caught.value.code == "C101"
