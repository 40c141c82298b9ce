"""The byte formula against what a legal session really carries."""

from __future__ import annotations

import doctest
import itertools
import subprocess
import sys

import pytest

from atoll.registry.parts import names
from atoll.wire import byte_formulas
from atoll.wire.byte_formulas import split_bytes

from tests.wire.talk import D_MODEL, NUM_TOKENS, SIZES, WANTED, Talk


def test_the_worked_examples_hold() -> None:
    assert doctest.testmod(byte_formulas).failed == 0
    assert doctest.testmod(byte_formulas).attempted > 3


@pytest.mark.parametrize(("mode", "codec", "front"), list(itertools.product(("dense", "factored", "lent"), names("codec"), (False, True))))
def test_the_formula_is_what_an_exchange_carries(mode: str, codec: str, front: bool) -> None:
    talk = Talk(mode, codec, front)
    for has_factors, ends_step in itertools.product((False, True), (False, True) if mode == "lent" else (True,)):
        carried = dict.fromkeys(("device", "host"), 0)
        for sender, message in talk.exchange(0, train=True, has_factors=has_factors, ends_step=ends_step):
            carried[sender] += sum(tensor.num_bytes for tensor in message.tensors)
        groups = [[SIZES[name] for name in group] for group in talk.groups]
        foretold = split_bytes(
            groups, D_MODEL, NUM_TOKENS, len(WANTED), codec, mode,
            shared=True, lowest_needs_input_gradient=front, front_gradient=front, has_factors=has_factors, ends_step=ends_step,
            adapter_codec=talk.adapter_codec,
        )  # fmt: skip
        assert foretold == (carried["device"], carried["host"])


def test_sharing_saves_the_copies_of_x_and_dx() -> None:
    """Three modules on one input: two copies of x less down, and of dx less up."""

    def count(shared: bool) -> tuple[int, int]:
        return split_bytes([[(8, 8, 2)] * 3], 8, 10, 10, "fp32", "dense", shared=shared, lowest_needs_input_gradient=True,
                           front_gradient=False, has_factors=False)  # fmt: skip

    up, down = ((apart - together) for apart, together in zip(count(False), count(True), strict=True))
    assert (up, down) == (2 * 10 * 8 * 4, 2 * 10 * 8 * 4)


def test_planning_can_count_without_torch() -> None:
    script = "import sys, atoll.wire.byte_formulas; sys.exit(any(name in sys.modules for name in ('torch', 'google.protobuf', 'xxhash')))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
