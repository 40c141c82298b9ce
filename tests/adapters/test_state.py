"""The algebra of adapter states."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.low_rank import aligned, row_length, singular_factors
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.errors import AdapterFitError


def lora(seed: int, rank: int = 3, size: tuple[int, int] = (7, 5), scaling: float = 2.0) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    adapter = ModuleAdapter(torch.randn(rank, size[0], generator=g), torch.randn(size[1], rank, generator=g), scaling)
    return AdapterState("lora", {"m": adapter})


def delta(state: AdapterState) -> torch.Tensor:
    return state.modules["m"].delta_OI()


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6), st.floats(-3, 3))
@settings(max_examples=30, deadline=None)
def test_sum_and_multiple_are_those_of_the_dense_change(seed: int, r1: int, r2: int, factor: float) -> None:
    a, b = lora(seed, r1, scaling=0.5), lora(seed + 1, r2, scaling=4.0)
    torch.testing.assert_close(delta(a + b), delta(a) + delta(b), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(delta(a.scale(factor)), factor * delta(a), rtol=1e-5, atol=1e-5)
    assert (a + b).ranks == {"m": r1 + r2}


@given(st.integers(0, 10**6), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_truncation_error_is_the_discarded_singular_values(seed: int, rank: int) -> None:
    state = lora(seed, 5)
    values = torch.linalg.svdvals(delta(state))
    error = (delta(state) - delta(state.truncate(rank))).norm()
    torch.testing.assert_close(error, values[rank:].norm(), rtol=1e-4, atol=1e-5)


def test_truncation_to_the_same_rank_changes_no_bit() -> None:
    assert lora(0).truncate(3).digest() == lora(0).digest()
    assert lora(0).truncate({"m": 9}).digest() == lora(0).digest()


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_a_compacted_state_is_the_same_change_at_no_higher_rank_than_it_has(seed: int, rank: int, true_rank: int) -> None:
    """Columns that repeat others add no rank."""
    adapter = lora(seed, true_rank).modules["m"]
    columns = torch.arange(rank) % true_rank
    state = AdapterState("lora", {"m": ModuleAdapter(adapter.down_RI[columns], adapter.up_OR[:, columns], -0.5)})
    compact = state.compacted()
    torch.testing.assert_close(delta(compact), delta(state), rtol=1e-5, atol=1e-5)
    if rank <= 5:
        assert compact.digest() == state.digest()
    else:
        assert compact.ranks["m"] == min(5, rank, true_rank)
    assert compact.modules["m"].scaling == -0.5


def test_zeros_are_compacted_to_one_column() -> None:
    zeros = AdapterState("lora", {"m": ModuleAdapter(torch.zeros(9, 7), torch.zeros(5, 9), 1.0)})
    assert zeros.compacted().ranks == {"m": 1}


def test_digest_sees_every_part() -> None:
    state = lora(0)
    adapter = state.modules["m"]
    nudged = adapter.up_OR.clone()
    nudged[0, 0] = torch.nextafter(nudged[0, 0], torch.tensor(9.0))
    others = [
        AdapterState("bottleneck", state.modules),
        AdapterState("lora", {"n": adapter}),
        AdapterState("lora", {"m": ModuleAdapter(adapter.down_RI, adapter.up_OR, 2.5)}),
        AdapterState("lora", {"m": ModuleAdapter(adapter.down_RI, nudged, 2.0)}),
    ]
    assert len({state.digest(), *(other.digest() for other in others)}) == 5
    assert lora(0).digest() == state.digest()


def test_modules_of_one_state_only_are_kept_in_a_sum() -> None:
    other = AdapterState("lora", {"n": lora(1).modules["m"]})
    assert set((lora(0) + other).modules) == {"m", "n"}


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AdapterFitError, match="different size"):
        lora(0) + lora(0, size=(8, 5))
    with pytest.raises(AdapterFitError, match="different kinds"):
        lora(0) + AdapterState("bottleneck", lora(0).modules)
    with pytest.raises(AdapterFitError, match="cannot be truncated"):
        AdapterState("bottleneck", lora(0).modules).truncate(1)
    with pytest.raises(AdapterFitError, match="no other factors"):
        AdapterState("bottleneck", lora(0, 6).modules).compacted()
    with pytest.raises(AdapterFitError, match="do not fit each other"):
        ModuleAdapter(torch.zeros(3, 7), torch.zeros(5, 2), 1.0)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 6), st.floats(0.1, 10.0))
@settings(max_examples=30, deadline=None)
def test_alignment_keeps_the_product_and_approaches_the_reference(seed: int, rank: int, reference_rank: int, length: float) -> None:
    adapter = lora(seed, 4).modules["m"]
    reference = torch.randn(reference_rank, 7, generator=torch.Generator().manual_seed(seed))
    factors = singular_factors(adapter.up_OR, adapter.down_RI)
    up, down = aligned(factors, reference, rank, length)
    best = (factors.up_OR[:, :rank] * factors.values_R[:rank]) @ factors.down_RI[:rank]
    torch.testing.assert_close(up @ down, best, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(down @ down.T, torch.eye(rank).double() * length**2, rtol=1e-6, atol=1e-6)


def test_alignment_recovers_a_rotated_pair() -> None:
    orthonormal = torch.linalg.qr(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).double())[0].T
    up = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)).double())[0]
    found_up, found_down = aligned(singular_factors(up @ rotation.T, rotation @ orthonormal), orthonormal, 3, row_length(orthonormal))
    torch.testing.assert_close(found_down, orthonormal)
    torch.testing.assert_close(found_up, up)


def test_fresh_adapters_change_nothing_and_do_not_depend_on_their_company() -> None:
    sizes = {"a": (7, 5), "b": (4, 9)}
    both = fresh_adapters("lora", sizes, {"a": 2, "b": 3}, alpha=16, seed=1)
    alone = fresh_adapters("lora", sizes, {"b": 3}, alpha=16, seed=1)
    assert torch.equal(both.modules["b"].down_RI, alone.modules["b"].down_RI)
    assert all(adapter.delta_OI().abs().max() == 0 for adapter in both.modules.values())
    assert both.modules["a"].scaling == 8.0
    assert both.modules["a"].down_RI.abs().max() <= 7**-0.5
    assert both.digest() != fresh_adapters("lora", sizes, {"a": 2, "b": 3}, alpha=16, seed=2).digest()
