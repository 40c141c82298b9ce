"""Dynamic batching: lent micro-batches that wait go through the shared blocks together, each row with the adapters of its own device.

Only passes that leave nothing behind are joined, so where hosts make the forward pass again in the backward pass. What a device gets then
depends, in the last bits, on who else waits.

Shape suffixes: B rows, T positions, N real tokens, D width, I inputs and O outputs of a module.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from atoll.adapters.layers import LowRankPair
from atoll.remote_blocks import Layout
from atoll.split.cut import Cut
from atoll.split.host.blocks.middle import Middle, Pass
from atoll.split.host.compute_queue import Turns


@dataclass(slots=True, eq=False)
class Job:
    """One micro-batch's forward pass or, with a gradient, its backward pass; and what came of it."""

    cut: Cut
    h_ND: Tensor
    asked: Pass
    pairs: Mapping[str, LowRankPair]
    """The session's adapters by module, trained and killed."""
    turns: Turns
    g_ND: Tensor | None = None
    hidden_ND: Tensor | None = None
    front_ND: Tensor | None = None
    """Of a backward pass, where it was asked for."""
    is_taken: bool = False
    failed: bool = False
    """Whether it is to be computed alone after all."""
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def num_rows(self) -> int:
        """Rows of the micro-batch."""
        return len(self.asked.layout.lengths)

    def joins(self, other: Job) -> bool:
        """Whether both can be in one pass."""
        return self.cut == other.cut and (self.g_ND is None) == (other.g_ND is None)


class Batcher:
    """The jobs that wait. `new_middle` makes a way through the shared blocks without adapters, which pauses as it is told."""

    def __init__(self, new_middle: Callable[[Cut, Callable[[], None]], Middle], max_positions: int) -> None:
        self._new_middle, self._max_positions = new_middle, max_positions
        self._lock = threading.Lock()
        self._waiting: list[Job] = []

    def add(self, job: Job) -> None:
        """Whoever computes next may take this one along."""
        with self._lock:
            self._waiting.append(job)

    def remove(self, job: Job) -> None:
        """Nobody shall take it; for one that was never run."""
        with self._lock:
            if job in self._waiting:
                self._waiting.remove(job)

    def run(self, job: Job) -> bool:
        """Within a slot: compute it with others that wait, or wait for whoever took it along; False: it is to be computed alone."""
        with self._lock:
            jobs = [] if job.is_taken else self._take(job)
        if len(jobs) == 1:
            return False
        if jobs:
            self._lead(job, jobs)
        elif not job.ended.is_set():
            with job.turns.release():
                job.ended.wait()
        return not job.failed

    def _take(self, job: Job) -> list[Job]:
        """The job and those that can go with it, in the order in which they came, as many as the host takes positions."""
        jobs, rows, positions = [job], job.num_rows, job.asked.positions
        for other in self._waiting:
            longest = max(positions, other.asked.positions)
            if other is not job and other.joins(job) and (rows + other.num_rows) * longest <= self._max_positions:
                jobs.append(other)
                rows, positions = rows + other.num_rows, longest
        for one in jobs:
            one.is_taken = True
            self._waiting.remove(one)
        return jobs

    def _lead(self, leader: Job, jobs: Sequence[Job]) -> None:
        before, failed = leader.turns.spent(), True
        try:
            self._compute(leader, jobs)
            failed = False
        except RuntimeError:  # Such as memory that is not there for all of them: then each by itself.
            pass
        finally:
            rows, spent = sum(one.num_rows for one in jobs), leader.turns.spent() - before
            for one in jobs:
                one.failed = failed
                if one is not leader:
                    leader.turns.give_part(one.turns, spent * one.num_rows / rows)
                one.ended.set()

    def _compute(self, leader: Job, jobs: Sequence[Job]) -> None:
        middle = self._new_middle(leader.cut, leader.turns.pause)
        try:
            _install(middle.view, jobs)
            tokens = [len(one.h_ND) for one in jobs]
            hidden_ND, _ = middle.forward(torch.cat([one.h_ND for one in jobs]), _joined(jobs))
            if leader.g_ND is None:
                for one, part_ND in zip(jobs, hidden_ND.split([_num_wanted(one) for one in jobs]), strict=True):
                    one.hidden_ND = part_ND
                return
            with _all_or_none([matrix for one in jobs for pair in one.pairs.values() for matrix in (pair.down_RI, pair.up_OR)]):
                front_ND = middle.backward(torch.cat([one.g_ND for one in jobs if one.g_ND is not None]))
            if front_ND is not None:
                for one, part_ND in zip(jobs, front_ND.split(tokens), strict=True):
                    one.front_ND = part_ND if one.asked.front_gradient else None
        finally:
            middle.close()


class Lane:
    """One session's way to compute: alone, or with others that wait. `announce` comes before the slot that `forward` and `backward` need.

    `batcher` None, or a pass that draws, is packed or checkpointed: always alone.
    """

    def __init__(self, middle: Middle, cut: Cut, pairs: Mapping[str, LowRankPair], turns: Turns, batcher: Batcher | None) -> None:
        self._middle, self._cut, self._pairs, self._turns, self._batcher = middle, cut, pairs, turns, batcher
        self._job: Job | None = None
        self._entered = False

    def announce(self, h_ND: Tensor, asked: Pass) -> None:
        """A forward pass is about to be asked for."""
        is_plain = not (asked.generator or asked.checkpoint) and asked.layout.position_ids_BT is None
        if self._batcher is not None and asked.train and is_plain:
            self._job = Job(self._cut, h_ND, asked, self._pairs, self._turns)
            self._batcher.add(self._job)

    def announce_backward(self, g_ND: Tensor) -> None:
        """The backward pass of the last forward pass is about to be asked for."""
        if self._batcher is not None and self._job is not None:
            before = self._job
            self._job = Job(before.cut, before.h_ND, before.asked, before.pairs, before.turns, g_ND)
            self._batcher.add(self._job)

    def forward(self, h_ND: Tensor, asked: Pass) -> tuple[Tensor, bytes]:
        """As `Middle.forward`."""
        self._entered = not self._joined()
        if self._entered:
            return self._middle.forward(h_ND, asked)
        assert self._job is not None
        assert self._job.hidden_ND is not None
        return self._job.hidden_ND, b""

    def backward(self, g_ND: Tensor) -> Tensor | None:
        """As `Middle.backward`."""
        if self._joined():
            assert self._job is not None
            return self._job.front_ND
        if not self._entered:
            assert self._job is not None
            self._middle.enter(self._job.h_ND, self._job.asked)
        return self._middle.backward(g_ND)

    def clear(self) -> None:
        """Forget the last pass, also where it was never computed."""
        if self._batcher is not None and self._job is not None:
            self._batcher.remove(self._job)
        self._job = None
        self._middle.clear()

    def _joined(self) -> bool:
        return self._batcher is not None and self._job is not None and self._batcher.run(self._job)


class _RowsOwn(nn.Module):
    """A module of the base for the rows of several devices: one product for all, and to each device's rows what its own pair adds."""

    def __init__(self, base: nn.Module, pairs: Sequence[LowRankPair | None], num_rows: Sequence[int]) -> None:
        super().__init__()
        self.base, self.num_rows = base, list(num_rows)
        self.pairs: Sequence[LowRankPair | None] = tuple(pairs)

    @property
    def weight(self) -> Tensor:
        """The base's weight: some families look at a projection's weight (its dtype or device) from outside."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Shapes: (B, T, inputs) to (B, T, outputs)."""
        parts = zip(self.base(x_BTI).split(self.num_rows), x_BTI.split(self.num_rows), self.pairs, strict=True)
        return torch.cat([y if pair is None else y + pair.high(pair.low(x)) for y, x, pair in parts])


@contextmanager
def _all_or_none(matrices: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients that come about inside are added to those before, in one go; none of them where it fails."""
    before = [matrix.grad for matrix in matrices]
    for matrix in matrices:
        matrix.grad = None
    try:
        yield
    except BaseException:
        for matrix, grad in zip(matrices, before, strict=True):
            matrix.grad = grad
        raise
    for matrix, grad in zip(matrices, before, strict=True):
        if grad is not None:
            matrix.grad = grad if matrix.grad is None else grad + matrix.grad


def _install(view: nn.Module, jobs: Sequence[Job]) -> None:
    for name in dict.fromkeys(name for one in jobs for name in one.pairs):
        pairs = [one.pairs.get(name) for one in jobs]
        view.set_submodule(name, _RowsOwn(view.get_submodule(name), pairs, [one.num_rows for one in jobs]))


def _num_wanted(job: Job) -> int:
    wanted_N = job.asked.layout.wanted_N
    return len(job.h_ND) if wanted_N is None else len(wanted_N)


def _joined(jobs: Sequence[Job]) -> Pass:
    """What is asked of all rows together, each padded to the longest."""
    longest = max(one.asked.positions for one in jobs)
    wanted, rows_before = [], 0
    for one in jobs:
        width, layout = one.asked.positions, one.asked.layout
        at_N = layout.wanted_N
        if at_N is None:
            at_N = torch.cat([torch.arange(row * width, row * width + length) for row, length in enumerate(layout.lengths)])
        wanted.append((at_N.cpu() // width + rows_before) * longest + at_N.cpu() % width)
        rows_before += one.num_rows
    lengths = tuple(length for one in jobs for length in one.asked.layout.lengths)
    trains = jobs[0].g_ND is not None
    return Pass(Layout(lengths, torch.cat(wanted)), longest, trains, trains and any(one.asked.front_gradient for one in jobs))
