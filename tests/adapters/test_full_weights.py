"""Full weights: their algebra, and what they do on real modules, held against plain PyTorch and PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from atoll.adapters.attach import attached, merge_into
from atoll.adapters.fresh import fresh_adapters, fresh_full_weights
from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.peft_files import load_adapter, save_adapter
from atoll.adapters.places import module_size
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.errors import AdapterFitError

from tests.adapters.test_peft import IDS, is_transposed
from tests.conftest import random_model


def changes(seed: int, size: tuple[int, int] = (7, 5), bias: bool = False) -> FullWeightDelta:
    g = torch.Generator().manual_seed(seed)
    return FullWeightDelta(torch.randn(size[1], size[0], generator=g), torch.randn(size[1], generator=g) if bias else None)


def random_whole(model: PreTrainedModel, *, biases: bool = False) -> AdapterState:
    """A change of every linear module but the head."""
    names = [n for n, m in model.named_modules() if module_size(m) and m is not model.get_output_embeddings()]
    whole = {}
    for number, name in enumerate(names):
        module = model.get_submodule(name)
        change = changes(number, module_size(module) or (0, 0), biases and module.bias is not None)
        whole[name] = change.of(tuple(tensor * 0.1 for tensor in change.tensors))
    return AdapterState("lora", {}, whole)


@given(st.integers(0, 10**6), st.booleans(), st.floats(-3, 3))
@settings(max_examples=20, deadline=None)
def test_sum_and_multiple_are_those_of_the_numbers(seed: int, bias: bool, factor: float) -> None:
    a, b = (AdapterState("lora", {}, {"m": changes(seed + n, bias=bias)}) for n in (0, 1))
    for total, x, y in zip((a + b).full_weights["m"].tensors, a.full_weights["m"].tensors, b.full_weights["m"].tensors, strict=True):
        torch.testing.assert_close(total, x + y)
    torch.testing.assert_close(a.scale(factor).full_weights["m"].change_OI, factor * a.full_weights["m"].change_OI)
    assert (a + AdapterState("lora", {}, {"n": changes(9)})).full_weights.keys() == {"m", "n"}
    assert a.num_parameters == 35 + 5 * bias
    assert a.truncate(1).digest() == a.compacted().digest() == a.digest()


def test_adapters_and_whole_weights_stand_side_by_side() -> None:
    pairs = fresh_adapters("lora", {"a": (7, 5)}, {"a": 2}, alpha=8, seed=0)
    both = pairs + fresh_full_weights({"b": (7, 5)}, ["b"])
    assert both.ranks == {"a": 2, "b": 5}
    assert list(both.parts) == ["a", "b"]
    assert both.digest() != pairs.digest()
    assert both.truncate(1).full_weights.keys() == {"b"}
    assert both.is_finite()
    assert not (both + AdapterState("lora", {}, {"c": FullWeightDelta(torch.full((2, 2), torch.nan))})).is_finite()


def test_the_digest_sees_weight_bias_and_name() -> None:
    change = changes(0, bias=True)
    assert change.bias_O is not None
    others = [
        change, FullWeightDelta(change.change_OI), FullWeightDelta(change.change_OI, change.bias_O + 1),
        FullWeightDelta(change.change_OI + 1),
    ]  # fmt: skip
    states = [AdapterState("lora", {}, {"m": one}) for one in others] + [AdapterState("lora", {}, {"n": change})]
    assert len({state.digest() for state in states}) == 5


def test_what_does_not_fit_is_refused() -> None:
    adapter = ModuleAdapter(torch.zeros(2, 7), torch.zeros(5, 2), 1.0)
    with pytest.raises(AdapterFitError, match="has an adapter, and its full weight is trained"):
        AdapterState("lora", {"m": adapter}, {"m": changes(0)})
    with pytest.raises(AdapterFitError, match="different size"):
        AdapterState("lora", {}, {"m": changes(0)}) + AdapterState("lora", {}, {"m": changes(0, (8, 5))})
    with pytest.raises(AdapterFitError, match="do not fit each other"):
        FullWeightDelta(torch.zeros(5, 7), torch.zeros(7))
    with pytest.raises(AdapterFitError, match="no change of a weight"):
        AdapterState("bottleneck", {"m": adapter}).as_full_weights()


def test_products_become_whole_changes() -> None:
    state = AdapterState("lora", {"m": ModuleAdapter(torch.randn(2, 7), torch.randn(5, 2), 0.5)}, {"n": changes(0)})
    whole = state.as_full_weights()
    assert not whole.modules
    torch.testing.assert_close(whole.full_weights["m"].change_OI.double(), state.modules["m"].delta_OI(), rtol=1e-6, atol=1e-6)
    assert torch.equal(whole.full_weights["n"].change_OI, state.full_weights["n"].change_OI)


@pytest.mark.parametrize("biases", [False, True])
def test_forward_and_gradients_are_those_of_changed_weights(family_model: PreTrainedModel, biases: bool) -> None:
    """The fused layer against the base with its weights really changed, and autograd through them."""
    state = random_whole(family_model, biases=biases)
    with attached(family_model, state) as adapters:
        ours = family_model(IDS).logits
        ours.sin().sum().backward()
        fused = adapters.flats[0].grad.clone()
        copied = adapters.state()
    assert copied.digest() == state.digest()
    merge_into(family_model, state)
    leaves = []
    for name, change in state.full_weights.items():
        module = family_model.get_submodule(name)
        leaves += [module.weight, module.bias][: len(change.tensors)]
    for leaf in leaves:
        leaf.requires_grad_()
    plain = family_model(IDS).logits
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    plain.sin().sum().backward()
    transposed = is_transposed(family_model)
    grads = torch.cat([(leaf.grad.T if transposed and leaf.ndim == 2 else leaf.grad).flatten() for leaf in leaves])
    torch.testing.assert_close(fused, grads, rtol=1e-4, atol=1e-4)


def test_a_change_too_small_for_bf16_counts_once_it_is_large_enough() -> None:
    """As with master weights: the sum is rounded, and not what was learned."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).to(torch.bfloat16).requires_grad_(False)
    model[0].weight.fill_(1.0)
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    for size, seen in ((1e-3, 4.0), (8e-3, 4 + 4 * 2**-7)):
        with torch.no_grad(), attached(model, AdapterState("lora", {}, {"0": FullWeightDelta(torch.full((4, 4), size))})) as adapters:
            assert float(model(x)[0, 0]) == seen
            assert torch.equal(adapters.state().full_weights["0"].change_OI, torch.full((4, 4), size))
            assert adapters.full_weights["0"].change_OI.dtype == torch.float32


def test_the_peft_folder_gives_the_same_logits_and_loses_no_bit(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    state = random_whole(model)
    with torch.no_grad(), attached(model, state):
        ours = model(IDS).logits
    save_adapter(state, tmp_path, base_name="x", transposed=is_transposed(model))
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(random_model(family), tmp_path).eval()(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert load_adapter(tmp_path).digest() == state.digest()


def test_a_pair_of_full_rank_is_no_whole_weight(tmp_path: Path) -> None:
    """Only where one side is the identity; else training would go on with something else than was saved."""
    adapter = ModuleAdapter(torch.randn(5, 7), torch.randn(5, 5), 1.0)
    save_adapter(AdapterState("lora", {"m": adapter}), tmp_path, base_name="x")
    assert load_adapter(tmp_path).modules.keys() == {"m"}


def test_quantized_and_missing_modules_are_refused() -> None:
    model = random_model("llama")
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(AdapterFitError, match="does not fit"), attached(model, AdapterState("lora", {}, {name: changes(0)})):
        pass
    biased = AdapterState("lora", {}, {name: changes(0, (32, 32), bias=True)})
    with pytest.raises(AdapterFitError, match="cannot be trained"), attached(model, biased):
        pass
    assert type(model.get_submodule(name)) is nn.Linear, "the base is as before"
