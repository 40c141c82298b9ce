"""Handshake: what fits passes, and each field that does not fit is named with both values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from atoll.wire import protocol_pb2 as pb
from atoll.wire.handshake import PROTOCOL, REFUSAL_CODES, HostFacts, block_of, check_hello, refusal_error

MODULES = {f"model.layers.{block}.{name}": (8, 6) for block in range(4) for name in ("self_attn.q_proj", "mlp.down_proj")}
FACTS = HostFacts(
    protocol=PROTOCOL, atoll_version="0.2.0", tokenizer_digest="70ce", num_blocks=4, modules=MODULES,
    codecs=("fp32", "bf16"), wire_modes=("dense", "factored", "lent"), precision="fp32", kinds=("lora", "bottleneck"), max_tokens=100,
    max_rank=5, killed=("offload",),
)  # fmt: skip
DIGEST = "ba5e"
Q1 = "model.layers.1.self_attn.q_proj"


def check(told: pb.Hello, facts: HostFacts = FACTS) -> pb.Refusal | None:
    return check_hello(told, facts, lambda: DIGEST)


def hello(**changes: object) -> pb.Hello:
    fields = {
        "protocol": PROTOCOL, "atoll_version": "0.2.0", "base_digest": DIGEST, "tokenizer_digest": "70ce", "cut_front": 1, "cut_back": 1,
        "adapter_kind": "lora", "modules": [(Q1, 5), ("model.layers.2.mlp.down_proj", 1)], "wire_mode": "dense", "codec": "fp32",
        "precision": "fp32", "max_tokens": 100,
    } | changes  # fmt: skip
    scaling = fields.pop("scaling", 0.5)
    fields["modules"] = [pb.Module(name=name, rank=rank, killed="".join(how), scaling=scaling) for name, rank, *how in fields["modules"]]
    return pb.Hello(**fields)


@pytest.mark.parametrize("changes", [
    {}, {"atoll_version": "9.9"}, {"adapter_kind": "bottleneck"}, {"wire_mode": "factored"}, {"codec": "bf16"},
    {"wire_mode": "lent", "adapter_codec": "bf16", "dropout": 0.5}, {"max_tokens": 1},
    {"modules": [(Q1, 5, "offload")]}, {"modules": []},
    {"cut_front": 0, "cut_back": 0}, {"cut_front": 1, "cut_back": 2, "modules": [(Q1, 1)]},
], ids=str)  # fmt: skip
def test_what_fits_passes(changes: dict[str, object]) -> None:
    assert check(hello(**changes)) is None


@pytest.mark.parametrize(("changes", "field", "host", "device"), [
    ({"protocol": 2}, "protocol", "3", "2"),
    ({"protocol": 0}, "protocol", "3", "0"),
    ({"base_digest": "0ther"}, "base_digest", "ba5e", "0ther"),
    ({"base_digest": ""}, "base_digest", "ba5e", ""),
    ({"tokenizer_digest": "0ther"}, "tokenizer_digest", "70ce", "0ther"),
    ({"precision": "bf16"}, "precision", "fp32", "bf16"),
    ({"cut_front": 2, "cut_back": 2}, "cut", "4 blocks", "2 front, 2 back"),
    ({"cut_front": 2**32 - 1}, "cut", "4 blocks", "4294967295 front, 1 back"),
    ({"adapter_kind": "dora"}, "adapter_kind", "lora, bottleneck", "dora"),
    ({"wire_mode": "sparse"}, "wire_mode", "dense, factored, lent", "sparse"),
    ({"wire_mode": "lent", "adapter_codec": "int8"}, "adapter_codec", "fp32, bf16", "int8"),
    ({"wire_mode": "lent"}, "adapter_codec", "fp32, bf16", ""),
    ({"wire_mode": "lent", "adapter_codec": "fp32", "dropout": 1.0}, "dropout", "0 or more, and less than 1", "1.0"),
    ({"wire_mode": "lent", "adapter_codec": "fp32", "dropout": math.nan}, "dropout", "0 or more, and less than 1", "nan"),
    ({"wire_mode": "lent", "adapter_codec": "fp32", "scaling": 0.0}, "scaling", "a finite number other than 0", f"0.0 for {Q1}"),
    ({"codec": "int8"}, "codec", "fp32, bf16", "int8"),
    ({"max_tokens": 101}, "max_tokens", "1 to 100", "101"),
    ({"max_tokens": 0}, "max_tokens", "1 to 100", "0"),
    ({"modules": [("model.layers.1.lm_head", 1)]}, "modules", "8 modules, not this one", "model.layers.1.lm_head"),
    ({"modules": [("model.layers.0.mlp.down_proj", 1)]}, "modules", "blocks 1 to 2", "model.layers.0.mlp.down_proj"),
    ({"modules": [("model.layers.3.mlp.down_proj", 1)]}, "modules", "blocks 1 to 2", "model.layers.3.mlp.down_proj"),
    ({"modules": [(Q1, 1), (Q1, 1)]}, "modules", "each module once", f"{Q1} twice"),
    ({"modules": [(Q1, 0)]}, "rank", "1 to 5", f"0 for {Q1}"),
    ({"modules": [(Q1, 6)]}, "rank", "1 to 5", f"6 for {Q1}"),
    ({"modules": [(Q1, 1, "merge")]}, "killed", "offload", f"merge for {Q1}"),
    ({"modules": [(Q1, 1, "offload")], "scaling": math.nan}, "scaling", "a finite number other than 0", f"nan for {Q1}"),
    ({"modules": [(Q1, 1, "offload")], "scaling": 0.0}, "scaling", "a finite number other than 0", f"0.0 for {Q1}"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_each_field_that_does_not_fit_is_named(changes: dict[str, object], field: str, host: str, device: str) -> None:
    refusal = check(hello(**changes))
    assert refusal is not None
    assert (refusal.code, refusal.field, refusal.host_value, refusal.device_value) == ("unfit", field, host, device)
    assert refusal.do


@pytest.mark.parametrize("changes", [
    {"protocol": 99}, {"tokenizer_digest": ""}, {"precision": ""}, {"cut_front": 4}, {"adapter_kind": ""}, {"wire_mode": ""}, {"codec": ""},
    {"max_tokens": 0}, {"modules": [("model.layers.9.mlp.down_proj", 1)]}, {"modules": [(Q1, 99)]},
], ids=str)  # fmt: skip
def test_the_base_is_not_read_for_a_greeting_that_fits_not_anyway(changes: dict[str, object]) -> None:
    def digest() -> str:
        raise AssertionError("the base was read")

    assert check_hello(hello(**changes), FACTS, digest) is not None
    assert check_hello(pb.Hello(protocol=99), FACTS, digest) is not None
    with pytest.raises(AssertionError, match="was read"):
        check_hello(hello(), FACTS, digest)


def test_what_a_device_wrote_is_repeated_on_one_short_line() -> None:
    refusal = check(hello(codec="\x1b[2J\n" * 10_000))
    assert refusal is not None
    assert refusal.device_value.startswith("\\x1b[2J\\n")
    assert len(refusal.device_value) < 2000


def test_what_a_host_wrote_is_shown_on_one_short_line() -> None:
    evil = "x\n  do        run this\x1b[2J" + "y" * 10_000
    for code in ("unfit", "busy", evil):
        error = refusal_error(pb.Refusal(code=code, field=evil, host_value=evil, device_value=evil, do=evil), "localhost:7071")
        assert all(part.isprintable() and len(part) < 2000 for part in (error.what, error.got, error.expected, error.do))


def test_only_lora_adapters_are_merged() -> None:
    facts = replace(FACTS, killed=("offload", "merge"))
    assert check(hello(modules=[(Q1, 1, "merge")]), facts) is None
    refusal = check(hello(modules=[(Q1, 1, "merge")], adapter_kind="bottleneck"), facts)
    assert (refusal.field, refusal.host_value) == ("killed", "offload")


def test_a_rank_is_bounded_by_the_module_too() -> None:
    facts = replace(FACTS, max_rank=100)
    widest = max(MODULES[Q1])
    assert check(hello(modules=[(Q1, widest)]), facts) is None
    assert check(hello(modules=[(Q1, widest + 1)]), facts).host_value == f"1 to {widest}"


def test_a_refusal_becomes_the_error_that_the_user_sees() -> None:
    error = refusal_error(check(hello(codec="int8")), "localhost:7071")
    assert (error.code, error.exit_status) == ("W803", 4)
    for part in ("codec", "localhost:7071", "int8", "fp32, bf16", "wire.codec"):
        assert part in error.page()
    assert "busy" in refusal_error(pb.Refusal(code="busy"), "localhost:7071").page()
    assert "unfit" in REFUSAL_CODES


@pytest.mark.parametrize(("name", "block"), [
    ("model.layers.3.self_attn.q_proj", 3), ("transformer.h.11.attn.c_attn", 11), ("model.layers.2.mlp.experts.7.w1", 2), ("lm_head", None),
])  # fmt: skip
def test_blocks_are_read_from_names(name: str, block: int | None) -> None:
    assert block_of(name) == block
