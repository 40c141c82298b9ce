"""Requested targets become full module names, or an error that helps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.adapters.targets import GROUPS, resolve_targets
from atoll.errors import TargetError
from atoll.shapes import ModuleKind, ModuleShape


def module(name: str, kind: ModuleKind, block: int) -> ModuleShape:
    return ModuleShape(name, 8, 8, kind, block)


LLAMA = tuple(
    module(f"model.layers.{block}.{inner}", kind, block)
    for block in range(2)
    for inner, kind in (("self_attn.q_proj", "attention"), ("self_attn.v_proj", "attention"), ("mlp.up_proj", "mlp"), ("odd.one", "other"))
)
GPT2 = tuple(
    module(f"transformer.h.{block}.{inner}", kind, block)
    for block in range(2)
    for inner, kind in (("attn.c_attn", "attention"), ("attn.c_proj", "attention"), ("mlp.c_fc", "mlp"), ("mlp.c_proj", "mlp"))
)


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ("q_proj", ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        (["v_proj", "q_proj"], ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"]),
        (["attention", "q_proj"], ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"]),
        ("mlp", ["0.mlp.up_proj", "1.mlp.up_proj"]),
        ("model.layers.1.mlp.up_proj", ["1.mlp.up_proj"]),
        ("1.mlp.up_proj", ["1.mlp.up_proj"]),
        ("all-linear", [m.name.removeprefix("model.layers.") for m in LLAMA]),
    ],
)
def test_names_endings_and_groups(requested: str | list[str], expected: list[str]) -> None:
    assert resolve_targets(requested, LLAMA) == tuple(f"model.layers.{name}" for name in expected)


def test_an_ending_tells_equal_last_names_apart() -> None:
    assert len(resolve_targets("c_proj", GPT2)) == 4
    assert resolve_targets("attn.c_proj", GPT2) == ("transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj")


def test_an_ending_begins_at_a_dot() -> None:
    with pytest.raises(TargetError):
        resolve_targets("proj", LLAMA)


@pytest.mark.parametrize(
    ("requested", "modules", "words"),
    [
        ("q_porj", LLAMA, "q_proj"),
        (["q_proj", "atention"], LLAMA, "attention"),
        ("q_proj", GPT2, "c_proj"),
        ("lm_head", LLAMA, "frozen"),
        ("model.embed_tokens", LLAMA, "frozen"),
        ("zzzzzz", LLAMA, "all-linear"),
        ([], LLAMA, "all-linear"),
        ("", LLAMA, "all-linear"),
        ("q_proj", (), "all-linear"),
    ],
)
def test_a_request_without_a_match_says_what_to_write(requested: str | list[str], modules: tuple[ModuleShape, ...], words: str) -> None:
    with pytest.raises(TargetError) as caught:
        resolve_targets(requested, modules)
    assert words in caught.value.do
    assert all(group in caught.value.expected for group in GROUPS)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["q_proj", "v_proj", "up_proj", *GROUPS]), min_size=1))
def test_the_order_is_the_models_and_nothing_comes_twice(requested: list[str]) -> None:
    names = resolve_targets(requested, LLAMA)
    positions = [[m.name for m in LLAMA].index(name) for name in names]
    assert positions == sorted(set(positions))
