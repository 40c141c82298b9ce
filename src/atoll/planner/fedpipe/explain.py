"""Why an edge does what it does: which limit binds, what more of it would buy, and what is missing where nothing fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from atoll.planner.fedpipe.search import SECOND_MACHINE, Decision, EdgeSearch, Place, Shortage
from atoll.planner.request import EdgeRequest
from atoll.units import counted, format_bytes, format_seconds

MORE_BYTES, MORE_SECONDS = 10**9, 10.0
"""The steps whose price is told."""

Binding = Literal["none", "memory", "deadline", "memory, deadline"]


@dataclass(frozen=True, slots=True)
class Price:
    """What a step more of one limit would buy."""

    limit: Literal["memory", "deadline"]
    more: float
    """Bytes, or seconds."""
    mode: Literal["local", "split"]
    bits: int
    batch_size: int
    objective: float

    def in_words(self, now: Decision, worth: float) -> str:
        """The difference to what is planned now, which is worth so much."""
        changes = [f"{_mode(now.place)} to {self.mode}"] if self.mode != _mode(now.place) else []
        changes += [f"{now.place.bits} to {self.bits} bits"] if self.bits != now.place.bits and self.mode == "local" else []
        changes += [f"batch {now.setting.batch_size} to {self.batch_size}"] if self.batch_size != now.setting.batch_size else []
        if round(self.objective, 3) != round(worth, 3):
            changes.append(f"worth {worth:.1%} to {self.objective:.1%}")
        more = format_bytes(self.more) if self.limit == "memory" else format_seconds(self.more)
        return f"{more} more: {', '.join(changes) or 'nothing'}"


def binding(search: EdgeSearch, asked: EdgeRequest, now: Decision) -> Binding:
    """The limits without which the decision would be another."""
    bound = [
        limit for limit, more, without in _changes(asked)
        # Where a step more changes something, the limit binds; where it does not, the next step might.
        if any(_differs(search, search.decide(wider, now), now) for wider in (more, without))
    ]  # fmt: skip
    return ", ".join(bound) or "none"  # type: ignore[return-value]


def prices(search: EdgeSearch, asked: EdgeRequest, now: Decision, bound: Binding) -> tuple[Price, ...]:
    """What a step more of every limit that binds would buy."""
    found: list[Price] = []
    for limit, more, _ in _changes(asked):
        one = search.decide(more, now) if limit in bound else None
        if one is not None:
            step = MORE_BYTES if limit == "memory" else MORE_SECONDS
            found.append(Price(limit, step, _mode(one.place), one.place.bits, one.setting.batch_size, search.worth(one)))
    return tuple(found)


def _changes(asked: EdgeRequest) -> Iterator[tuple[Literal["memory", "deadline"], EdgeRequest, EdgeRequest]]:
    """Every limit there is, with what is asked where there is a step more of it, and where there is none."""
    if asked.edge.memory is not None:
        yield "memory", _with_memory(asked, asked.edge.memory + MORE_BYTES), _with_memory(asked, None)
    if asked.deadline is not None and asked.is_timed:
        yield "deadline", dataclasses.replace(asked, deadline=asked.deadline + MORE_SECONDS), dataclasses.replace(asked, deadline=None)


def why(search: EdgeSearch, asked: EdgeRequest, now: Decision, bound: Binding, priced: Sequence[Price]) -> str:
    """One line for people."""
    setting = now.setting
    ranks = sorted(set(setting.ranks.values()))
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    worth, places = search.worth(now), search.places(asked.edge)
    here = [place for place in places if not place.split]
    wider = (here if now.place.split else here[: here.index(now.place)])[-1:]
    hosts = [place for place in places if place.split and not now.place.split]
    # What is worth more than this no host can better.
    rivals = [[place] for place in wider] + [hosts] * (bool(hosts) and worth < SECOND_MACHINE * search.hosted)
    parts = [
        ", as ".join(filter(None, [
            _where(now.place, setting.remote_blocks), " and ".join(_rival(search, asked, rival) for rival in rivals),
        ])),
        f"rank {span} on {len(setting.ranks)} of {counted(len(search.pool), 'weight')}, worth {worth:.1%} of the largest ranks on all"
        + f" (a host counts for {now.left:.3g})" * now.place.split,
    ]
    if len(search.adapted) < len(search.pool):
        parts.append(f"only {counted(len(search.adapted), 'weight')}, those of the top blocks, may be adapted")
    if setting.gradient_checkpointing:
        parts.append("gradient checkpointing makes room")
    if search.config.plan.warms_up and search.warm_up(asked.edge, now.place) is None:
        parts.append("memory holds no warm-up, so that its rows have no say in what matters")
    if asked.edge.flops is None and (asked.deadline is not None or asked.edge.bandwidth or asked.edge.latency):
        parts.append("it declares no flops: no time here counts its computing")
    parts += [f"{bound} {'bind' if ',' in bound else 'binds'}"] if bound != "none" else ["no limit binds"]
    parts += [price.in_words(now, worth) for price in priced]
    return "; ".join(parts)


def missing_at(search: EdgeSearch, asked: EdgeRequest, places: Sequence[Place]) -> str:
    """What the places lack: of a host, in the mode in which that is least time."""
    here = [place for place in places if not place.split]
    hosts = [search.shortage(asked, place) for place in places if place.split]
    least = sorted(hosts, key=lambda shortage: shortage.seconds or 0.0)[:1]
    return "; ".join(missing(shortage) for shortage in [*(search.shortage(asked, place) for place in here), *least])


def missing(shortage: Shortage) -> str:
    """What one place lacks."""
    lacks = [f"{format_bytes(shortage.memory_bytes)} more memory"] if shortage.memory_bytes is not None else []
    lacks += [f"{format_seconds(shortage.seconds)} more time"] if shortage.seconds is not None else []
    where = "a host for its blocks" if shortage.place.split else f"{shortage.place.bits} bits here"
    return f"{where} would need at least {' and '.join(lacks) or 'both limits to be wider'}"


def _rival(search: EdgeSearch, asked: EdgeRequest, places: Sequence[Place]) -> str:
    rival = search.best_of(asked, places)
    if rival is None:
        return missing_at(search, asked, places)
    return f"{'a host' if rival.place.split else f'{rival.place.bits} bits here'} would be worth {search.worth(rival):.1%}"


def _differs(search: EdgeSearch, one: Decision | None, now: Decision) -> bool:
    assert one is not None, "fewer limits leave at least what there is"
    without = now.setting.gradient_checkpointing and not one.setting.gradient_checkpointing
    better = search.worth(one) > search.worth(now) * (1 + 1e-9) or one.setting.batch_size > now.setting.batch_size
    return one.place != now.place or better or without


def _with_memory(asked: EdgeRequest, memory_bytes: int | None) -> EdgeRequest:
    return dataclasses.replace(asked, edge=asked.edge.model_copy(update={"memory": memory_bytes}))


def _mode(place: Place) -> Literal["local", "split"]:
    return "split" if place.split else "local"


def _where(place: Place, remote_blocks: range) -> str:
    if not place.split:
        return f"the whole base here in {place.bits} bits"
    return f"blocks {remote_blocks.start} to {remote_blocks.stop - 1} in the host" if remote_blocks else "split, with all blocks here"
