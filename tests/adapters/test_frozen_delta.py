"""A frozen delta under what is trained, against the model with it merged into its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from atoll.adapters import layers
from atoll.adapters.attach import attached, merge_into
from atoll.adapters.killed import Killed
from atoll.adapters.peft_files import load_adapter, save_adapter
from atoll.adapters.places import module_size
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.base.load import load_base
from atoll.errors import AdapterFitError
from atoll.remote_blocks import RemoteBlocksPlaceholder

from tests.adapters.test_peft import IDS, is_transposed, random_state
from tests.conftest import random_model, save_model_folder


def frozen_state(model: PreTrainedModel, rank: int = 5) -> AdapterState:
    """A frozen delta on every module: of its own rank and scaling."""
    g = torch.Generator().manual_seed(7)
    modules = {}
    for name, adapter in random_state(model).modules.items():
        inputs, outputs = adapter.size
        down, up = torch.randn(rank, inputs, generator=g), torch.randn(outputs, rank, generator=g)
        modules[name] = ModuleAdapter(down * 0.2, up * 0.1, 1.5)
    return AdapterState("lora", modules)


def only(state: AdapterState, keep: Callable[[int], bool]) -> AdapterState:
    return AdapterState(state.kind, {name: one for number, (name, one) in enumerate(state.modules.items()) if keep(number)})


def pass_through(model: PreTrainedModel, state: AdapterState, frozen_delta: AdapterState | None, killed: Killed | None = None,
                 dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A loss, its gradient by the adapters, and by what enters the blocks."""
    x_BTD = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with attached(model, state, killed=killed, frozen_delta=frozen_delta, dropout=dropout) as adapters:
        adapters.train(dropout > 0)
        torch.manual_seed(0)
        loss = model(inputs_embeds=x_BTD).logits.sin().sum()
        loss.backward()
        assert x_BTD.grad is not None
        grads = [flat.grad.clone() for flat in adapters.flats]
    return loss.detach(), torch.cat(grads), x_BTD.grad


def close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float = 2e-4) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("small", [64, 0])
@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_it_is_the_model_with_merged_weights(family: str, kind: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients of the adapters and of what enters; some modules have both parts, some one, and none keeps anything."""
    monkeypatch.setattr(layers, "SMALL_WIDTH", small)
    model, merged = random_model(family), random_model(family)
    state, frozen_delta = only(random_state(model, kind), lambda n: n % 3 != 0), only(frozen_state(model), lambda n: n % 4 != 1)
    merge_into(merged, frozen_delta)
    with torch.no_grad():
        plain = model(IDS).logits
    close(pass_through(model, state, frozen_delta), pass_through(merged, state, None))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain), "taking it off restores the base"
        assert (merged(IDS).logits - plain).abs().max() > 1e-2, "the frozen delta must do something"
    assert not any(isinstance(module, layers.LowRankPair) for module in model.modules())


@pytest.mark.parametrize("how", ["offload", "skip", "merge"])
def test_killed_modules_keep_the_frozen_delta(family: str, how: str) -> None:
    model, merged = random_model(family), random_model(family)
    state, frozen_delta = random_state(model), frozen_state(model)
    merge_into(merged, frozen_delta)
    killed = Killed(tuple(list(state.modules)[::2]), how)  # type: ignore[arg-type]
    close(pass_through(model, state, frozen_delta, killed), pass_through(merged, state, None, killed))


def test_dropout_falls_on_what_is_trained_alone() -> None:
    model, merged = random_model("llama"), random_model("llama")
    state, frozen_delta = random_state(model), frozen_state(model)
    merge_into(merged, frozen_delta)
    close(pass_through(model, state, frozen_delta, dropout=0.3), pass_through(merged, state, None, dropout=0.3))


@contextmanager
def hooked(model: PreTrainedModel, state: AdapterState) -> Iterator[None]:
    """The same change by hooks, for modules whose weights cannot be merged."""

    def adds(adapter: ModuleAdapter) -> Callable[..., Tensor]:
        delta_OI = adapter.delta_OI().float()
        return lambda _module, args, output: output + args[0] @ delta_OI.T

    hooks = [model.get_submodule(name).register_forward_hook(adds(adapter)) for name, adapter in state.modules.items()]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("family_of", ["llama", "gpt2"])
def test_it_lies_under_adapters_of_a_quantized_base(bits: Literal[16, 8, 4], family_of: str, tmp_path: Path) -> None:
    save_model_folder(tmp_path, family_of)
    model = load_base(str(tmp_path), bits=bits).model
    state, frozen_delta = random_state(model), frozen_state(model)
    ours = pass_through(model, state, frozen_delta)
    with hooked(model, frozen_delta):
        theirs = pass_through(model, state, None)
    close(ours, theirs, 2e-2 if bits == 8 else 2e-3)
    without = pass_through(model, state, None)
    assert (ours[1] - without[1]).norm() > 0.1 * ours[1].norm()


def test_in_bf16_it_is_added_in_the_bases_precision() -> None:
    model = random_model("llama").to(torch.bfloat16)
    state, frozen_delta = random_state(model), frozen_state(model)
    with torch.no_grad(), attached(model, state, frozen_delta=frozen_delta):
        ours = model(IDS).logits.float()
        fp32 = random_model("llama")
        with attached(fp32, state, frozen_delta=frozen_delta):
            assert (ours - fp32(IDS).logits).norm() < 0.05 * ours.norm()


def test_a_part_of_another_size_or_of_a_module_in_a_host_is_refused() -> None:
    model = random_model("llama")
    state, frozen_delta = random_state(model), frozen_state(model)
    name, other = next((a, b) for a in state.modules for b in state.modules if state.modules[a].size != state.modules[b].size)
    for trained in (state, AdapterState("lora", {})):
        wrong = AdapterState("lora", {name: frozen_delta.modules[other]})
        with pytest.raises(AdapterFitError, match="does not fit"), attached(model, trained, frozen_delta=wrong):
            pass
        assert type(model.get_submodule(name)) is nn.Linear
    away = nn.Sequential(nn.Linear(2, 2), RemoteBlocksPlaceholder({name: state.modules[name].size}))
    refused = pytest.raises(AdapterFitError, match="runs in a host")
    with refused as caught, attached(away, AdapterState("lora", {}), frozen_delta=frozen_delta):
        pass
    assert "zero-pad" in caught.value.do


def test_both_parts_joined_are_one_adapter_that_peft_loads(family: str, tmp_path: Path) -> None:
    """Ranks differ from module to module, and stop at the module's size."""
    model = random_model(family)
    state, frozen_delta = only(random_state(model), lambda n: n % 3 != 0), only(frozen_state(model, rank=31), lambda n: n % 4 != 1)
    whole = (state + frozen_delta).compacted()
    assert all(one.rank <= min(one.size) for one in whole.modules.values())
    assert len(set(whole.ranks.values())) > 2
    save_adapter(whole, tmp_path, base_name="x", transposed=is_transposed(model))
    with torch.no_grad():
        with attached(model, state, frozen_delta=frozen_delta):
            ours = model(IDS).logits
        with attached(model, load_adapter(tmp_path)):
            torch.testing.assert_close(model(IDS).logits, ours, rtol=1e-4, atol=1e-4)
        theirs = PeftModel.from_pretrained(random_model(family), tmp_path).eval()(IDS).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert all(module_size(model.get_submodule(name)) == one.size for name, one in whole.modules.items())
