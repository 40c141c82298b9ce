"""Adapters on real modules, held against PEFT in both directions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from atoll.adapters.attach import attached
from atoll.adapters.peft_files import load_adapter, save_adapter
from atoll.adapters.places import module_size
from atoll.adapters.state import AdapterState, ModuleAdapter

from tests.conftest import random_model

IDS = torch.arange(24).view(2, 12) * 3 % 96


def random_state(model: PreTrainedModel, kind: str = "lora") -> AdapterState:
    """Adapters on every linear module but the head, of different ranks and scalings."""
    g = torch.Generator().manual_seed(1)
    names = [n for n, m in model.named_modules() if module_size(m) and m is not model.get_output_embeddings()]
    modules = {}
    for number, name in enumerate(names):
        rank, (inputs, outputs) = 1 + number % 3, module_size(model.get_submodule(name)) or (0, 0)
        down, up = torch.randn(rank, inputs, generator=g), torch.randn(outputs, rank, generator=g)
        modules[name] = ModuleAdapter(down * 0.2, up * 0.2, 0.5 + number % 2)
    return AdapterState(kind, modules)  # type: ignore[arg-type]


def is_transposed(model: PreTrainedModel) -> bool:
    return any(isinstance(m, Conv1D) for m in model.modules())


def test_what_we_save_peft_loads_with_equal_logits(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    state = random_state(model)
    with torch.no_grad():
        plain = model(IDS).logits
        with attached(model, state):
            ours = model(IDS).logits
        save_adapter(state, tmp_path, base_name="x", transposed=is_transposed(model))
        theirs = PeftModel.from_pretrained(random_model(family), tmp_path).eval()(IDS).logits
        again = model(IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3, "the adapter must do something"
    assert torch.equal(again, plain), "taking the adapter off restores the base"
    assert load_adapter(tmp_path).digest() == state.digest()


def test_what_peft_saves_is_our_start(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", rank_pattern={r"layers\.0.*": 2, "h.0.mlp.c_proj": 3},
                        alpha_pattern={r"layers\.1.*": 5}, task_type="CAUSAL_LM", use_rslora=family == "llama",
                        fan_in_fan_out=is_transposed(model))  # fmt: skip
    peft_model = get_peft_model(random_model(family), config).eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    peft_model.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs = peft_model(IDS).logits
        with attached(model, load_adapter(tmp_path)):
            torch.testing.assert_close(model(IDS).logits, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_those_of_the_plain_formula(kind: str, dropout: float, family_model: PreTrainedModel) -> None:
    """The fused forward and backward against autograd through y = Wx + s B f(A x), written out."""
    state = random_state(family_model, kind)
    with attached(family_model, state, dropout=dropout) as adapters:  # eval mode: no dropout happens
        family_model(IDS).logits.sin().sum().backward()
        fused = adapters.flats[0].grad.clone()
    leaves = {n: (a.down_RI.clone().requires_grad_(), a.up_OR.clone().requires_grad_()) for n, a in state.modules.items()}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def add(_module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
            down, up = leaves[name]
            u = args[0] @ down.T
            return output + state.modules[name].scaling * (u.relu() if kind == "bottleneck" else u) @ up.T

        return add

    hooks = [family_model.get_submodule(name).register_forward_hook(hook(name)) for name in leaves]
    family_model(IDS).logits.sin().sum().backward()
    for handle in hooks:
        handle.remove()
    plain = torch.cat([leaf.grad.flatten() for pair in leaves.values() for leaf in pair if leaf.grad is not None])
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training_only() -> None:
    model = random_model("llama")
    with torch.no_grad(), attached(model, random_state(model), dropout=0.5) as adapters:
        torch.manual_seed(0)
        still = model(IDS).logits
        adapters.train(True)
        assert not torch.equal(model(IDS).logits, still)
        adapters.train(False)
        assert torch.equal(model(IDS).logits, still)


def test_bottleneck_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    state = random_state(random_model("llama"), "bottleneck")
    save_adapter(state, tmp_path, base_name="x")
    assert load_adapter(tmp_path).digest() == state.digest()
