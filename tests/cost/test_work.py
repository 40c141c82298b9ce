"""Work adds up field by field, and survives its way through a Flower message."""

from __future__ import annotations

from atoll.cost.formulas import Flops
from atoll.cost.traffic import WireBytes
from atoll.cost.work import Work
from atoll.federated.flower import MetricRecord

STEP = Work(Flops(1, 2, 3), WireBytes(4, 5, 6), Flops(7, 8, 9), WireBytes(10, 11, 12), 13, 14, 15, 16)


def test_every_number_is_added_up() -> None:
    once, twice = STEP.to_numbers(), (STEP + STEP).to_numbers()
    assert sorted(once.values()) == list(range(1, 17))
    assert twice == {name: 2 * value for name, value in once.items()}
    assert STEP + Work() == STEP


def test_what_was_sent_is_what_is_read() -> None:
    assert Work.from_numbers(MetricRecord({**STEP.to_numbers(), "num_examples": 99})) == STEP
