"""Where a model's blocks are, which projections share an input, and what stands in for a block, for every family."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from atoll.base.blocks import Skip, blocks_path, hear_hidden_states_only, is_projection, sizes_of, trace
from atoll.base.families import FAMILIES as KNOWN
from atoll.errors import ArchitectureError

from tests.conftest import FAMILIES, random_model

ROPE = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)  # fmt: skip
GROUPS: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), ROPE),
    "gpt2": (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    "opt": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    "bloom": (("self_attention.query_key_value",), ("self_attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
    "gpt_neox": (("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
}


def empty_model(family: str) -> PreTrainedModel:
    """Weights on the meta device, buffers real."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_groups_of_every_family(family: str, family_model: PreTrainedModel) -> None:
    found = trace(family_model)
    path = blocks_path(family_model)
    expected = [tuple(f"{path}.{block}.{inner}" for inner in group) for block in (0, 1) for group in GROUPS[family]]
    assert found.groups == tuple(expected)
    assert found.returns_tuple == (family == "bloom")
    assert path == KNOWN[family].blocks


def test_a_model_without_weights_gives_the_same_and_stays_as_it_was(family: str, family_model: PreTrainedModel) -> None:
    model = empty_model(family)
    buffers, number = dict(model.named_buffers()), hooks(model)
    assert trace(model) == trace(family_model)
    after = dict(model.named_buffers())
    assert after.keys() == buffers.keys()
    assert all(after[name] is buffer for name, buffer in buffers.items())
    assert hooks(model) == number
    assert all(parameter.is_meta for parameter in model.parameters())
    assert trace(model.to("meta")) == trace(family_model)


SCALED: dict[str, dict[str, object]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("scaling", sorted(SCALED))
def test_rotary_tables_that_grow_with_the_row_are_no_hindrance(scaling: str) -> None:
    config = AutoConfig.for_model("llama", **FAMILIES["llama"] | {"rope_scaling": SCALED[scaling], "max_position_embeddings": 2})
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    buffers = dict(model.named_buffers())
    assert trace(model) == trace(random_model("llama"))
    assert model.model.rotary_emb.rope_type == scaling
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


@pytest.mark.parametrize("training", [True, False])
def test_trace_leaves_a_real_model_as_it_was(training: bool) -> None:
    model = random_model("opt").train(training)
    model.config.dropout = model.model.decoder.layerdrop = 1.0  # blocks left out, were it not in eval mode meanwhile
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert len(trace(model).groups) == 8
    assert all(module.training == training for module in model.modules())
    assert hooks(model) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sizes_are_those_of_the_projections(family_model: PreTrainedModel) -> None:
    projections = {name: module for name, module in family_model.named_modules() if is_projection(module)}
    names = {name for group in trace(family_model).groups for name in group}
    assert set(projections) - names <= {"lm_head"}
    for name in names:
        x = torch.zeros(1, sizes_of(projections[name])[0])
        assert projections[name](x).shape[1] == sizes_of(projections[name])[1]


def test_a_model_of_skipped_blocks_is_its_embedding_and_last_norm(family: str, family_model: PreTrainedModel) -> None:
    blocks: Any = family_model.get_submodule(blocks_path(family_model))
    returns_tuple = trace(family_model).returns_tuple
    into_first: list[torch.Tensor] = []
    skipped = [Skip(returns_tuple) for _ in blocks]
    for number, skip in enumerate(skipped):
        blocks[number] = skip
    blocks[0].register_forward_pre_hook(lambda _m, args: into_first.append(args[0]))
    norm = [module for _, module in family_model.base_model.named_modules() if "Norm" in type(module).__name__][-1]
    out = family_model.base_model(input_ids=torch.arange(12).view(2, 6), use_cache=False).last_hidden_state
    torch.testing.assert_close(out, norm(into_first[0]))


def test_skip_takes_its_input_by_name_too() -> None:
    h = torch.ones(1, 2, 3)
    assert Skip(False)(hidden_states=h, attention_mask=None) is h
    assert Skip(True)(h, 1, 2, alibi=3) == (h, None)


def test_a_stand_in_hears_the_hidden_states_only() -> None:
    block = nn.Identity()
    hear_hidden_states_only(block)
    with pytest.raises(KeyError):
        block(something_else=1)
    assert block(5, position_ids=3) == 5


class Strange(nn.Module):
    """No family that we know: a short list of blocks with a long list of experts in each."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="strange")
        self.few = nn.ModuleList(nn.Identity() for _ in range(min(num_blocks, 1)))
        self.blocks = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(nn.Identity() for _ in range(9))}) for _ in range(num_blocks))

    def get_decoder(self) -> nn.Module:
        return self


def test_blocks_of_an_unknown_family_are_the_longest_list() -> None:
    assert blocks_path(Strange(3)) == "blocks"  # type: ignore[arg-type]
    config = AutoConfig.for_model(
        "stablelm", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=64
    )
    model = AutoModelForCausalLM.from_config(config)
    assert "stablelm" not in KNOWN
    assert blocks_path(model) == "model.layers"
    assert [tuple(name.rpartition(".")[2] for name in group) for group in trace(model).groups[:2]] == [
        ("q_proj", "k_proj", "v_proj"), ("o_proj",),
    ]  # fmt: skip


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="taken apart"):
        blocks_path(Strange(0))  # type: ignore[arg-type]


def test_a_projection_that_runs_twice_is_refused() -> None:
    model = random_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(ArchitectureError, match="taken apart") as caught:
        trace(model)
    assert "twice" in caught.value.got


def test_a_pass_that_fails_is_an_error_of_the_model() -> None:
    model = random_model("llama")
    model.model.layers[1].self_attn.k_proj = nn.Linear(31, 16)
    with pytest.raises(ArchitectureError, match="taken apart") as caught:
        trace(model)
    assert "fails" in caught.value.got
    assert hooks(model) == 0
