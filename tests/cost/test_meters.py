"""Meters read what really happened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from atoll.cost import meters
from atoll.cost.meters import PeakMemory, resident_bytes, resident_peak_bytes

BLOCK_BYTES = 64 * 2**20


def test_the_peak_sees_a_block_that_is_gone_again() -> None:
    with PeakMemory() as without:
        pass
    with PeakMemory() as peak:
        torch.ones(BLOCK_BYTES // 4)
    assert peak.num_bytes - without.num_bytes >= 0.8 * BLOCK_BYTES


def test_what_is_held_now_comes_and_goes() -> None:
    before = resident_bytes()
    block = torch.ones(BLOCK_BYTES // 4)
    held = resident_bytes()
    del block
    assert held - before >= 0.8 * BLOCK_BYTES
    assert held - resident_bytes() >= 0.8 * BLOCK_BYTES


def test_the_peak_is_set_back() -> None:
    torch.ones(4 * BLOCK_BYTES // 4)
    before = resident_peak_bytes()
    with PeakMemory() as peak:
        pass
    assert peak.num_bytes <= before - BLOCK_BYTES or not os.access(meters._CLEAR_REFS, os.W_OK)


def test_a_kernel_that_refuses_leaves_the_peak_since_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(meters, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    monkeypatch.setattr(meters, "_STATUS", tmp_path / "absent" / "status")
    with PeakMemory() as peak:
        pass
    assert peak.num_bytes > 10 * 2**20
