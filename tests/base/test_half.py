"""Projections stored in bf16: the same losses and gradients as of rounded fp32 weights, in half the memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from atoll.adapters.attach import attached
from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.places import module_size
from atoll.adapters.state import AdapterState
from atoll.base.blocks import blocks_path, trace
from atoll.base.half import HalfConv1D, HalfLinear
from atoll.base.head import loss_sum
from atoll.base.load import load_base
from atoll.tasks.batches import Batch
from atoll.training.local_trainer import checkpointing

from tests.conftest import save_model_folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    paths: dict[str, Path] = {name: tmp_path_factory.mktemp(name) for name in ("llama", "gpt2", "gpt_neox", "opt", "bloom", "gemma2")}
    for name, path in paths.items():
        save_model_folder(path, name)
    return {name: str(path) for name, path in paths.items()}


def projections(model: PreTrainedModel) -> list[str]:
    return [name for group in trace(model).groups for name in group]


def rounded(model: PreTrainedModel) -> PreTrainedModel:
    """The oracle: an ordinary fp32 model whose projection weights went through bf16."""
    for name in projections(model):
        weight = model.get_submodule(name).weight
        weight.data = weight.data.bfloat16().float()
    return model


def batch() -> Batch:
    ids = torch.arange(3, 27).view(2, 12)
    positions = torch.arange(24).view(2, 12)[:, :-1].flatten()
    return Batch(ids, positions, ids.flatten()[positions + 1], None, None, (12, 12))


def adapters(model: PreTrainedModel) -> AdapterState:
    sizes = {name: module_size(model.get_submodule(name)) or (0, 0) for name in projections(model)}
    fresh = fresh_adapters("lora", sizes, dict.fromkeys(sizes, 3), 6.0, 0)
    generator = torch.Generator().manual_seed(1)
    return AdapterState(
        fresh.kind,
        {name: type(a)(a.down_RI, torch.randn(a.up_OR.shape, generator=generator) * 0.1, a.scaling) for name, a in fresh.modules.items()},
    )


def loss_and_gradients(model: PreTrainedModel, *, again: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    with attached(model, adapters(model)) as on, checkpointing(model, again):
        loss = loss_sum(model, batch())
        loss.backward()
        return loss.detach(), on.flats[0].grad.clone()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "bloom", "gemma2"])
def test_loss_and_adapter_gradients_are_those_of_rounded_weights(folders: dict[str, str], family: str) -> None:
    half, oracle = load_base(folders[family], bits=16), rounded(load_base(folders[family]).model)
    (loss, grad), (true_loss, true_grad) = loss_and_gradients(half.model), loss_and_gradients(oracle)
    assert true_grad.norm() > 0
    torch.testing.assert_close(loss, true_loss, rtol=1e-6, atol=0)
    assert (grad - true_grad).norm() < 5e-6 * true_grad.norm()
    again = loss_and_gradients(half.model, again=True)
    assert torch.equal(again[0], loss)
    assert (again[1] - grad).norm() < 5e-6 * grad.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_projections_take_two_bytes_and_the_rest_stays_as_it_was(folders: dict[str, str], family: str) -> None:
    half, whole = load_base(folders[family], bits=16), load_base(folders[family])
    names = projections(whole.model)
    assert projections(half.model) == names
    stored, bytes_before = 0, 0
    for name in names:
        narrow, wide = half.model.get_submodule(name), whole.model.get_submodule(name)
        assert type(narrow) in (HalfLinear, HalfConv1D)
        assert isinstance(narrow, type(wide))
        assert torch.equal(narrow.weight, wide.weight.bfloat16())
        assert module_size(narrow) == module_size(wide)
        stored += narrow.weight.untyped_storage().nbytes()
        bytes_before += wide.weight.untyped_storage().nbytes()
    assert 2 * stored == bytes_before
    weights = {f"{name}.weight" for name in names}
    others = {key: value for key, value in whole.model.state_dict().items() if key not in weights}
    narrow_state = half.model.state_dict()
    assert narrow_state.keys() == whole.model.state_dict().keys()
    assert all(value.dtype == narrow_state[key].dtype and torch.equal(value, narrow_state[key]) for key, value in others.items())
    assert half.transposed == whole.transposed == (family == "gpt2")
    assert not any(parameter.requires_grad for parameter in half.model.parameters())
    assert not half.model.training
    assert not hasattr(half.model.config, "quantization_config")


@pytest.mark.parametrize("layer", [HalfLinear(8, 6), HalfConv1D(6, 8)])
def test_a_product_keeps_no_wide_copy_of_its_weight(layer: HalfLinear | HalfConv1D) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().bfloat16(), requires_grad=False)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer.requires_grad_(False)(torch.ones(2, 3, 8, requires_grad=True))
    assert y.shape == (2, 3, 6)
    assert [tensor.dtype for tensor in kept] == [torch.bfloat16]
    assert kept[0].data_ptr() == layer.weight.data_ptr()


def test_in_bf16_nothing_is_left_to_halve(folders: dict[str, str]) -> None:
    asked, plain = (load_base(folders["llama"], precision="bf16", bits=bits) for bits in (16, None))  # type: ignore[arg-type]
    assert asked.digest() == plain.digest()
    assert type(asked.model.get_submodule(f"{blocks_path(asked.model)}.0.mlp.up_proj")) is nn.Linear


def test_a_loaded_base_does_not_hang_on_its_file(tmp_path: Path) -> None:
    save_model_folder(tmp_path, "llama")
    base = load_base(str(tmp_path))
    before = base.digest()
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert base.digest() == before
