"""Projections in 8 and 4 bits: much smaller, nearly the same outputs and gradients, and the other weights untouched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.base.blocks import blocks_path, sizes_of, trace
from atoll.base.load import load_base
from atoll.errors import BadValueError, UnavailableError, WeightsError

from tests.conftest import save_model_folder

# Relative Frobenius norms of the differences: 8 bits keep 1/254 of a row's largest entry, 4 bits one of 16 levels.
TOLERANCE = {8: 0.02, 4: 0.25}
ALONG = {8: 0.999, 4: 0.95}
"""Least cosine of a gradient through a projection to that through the unquantized one."""


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp(request.param)
    save_model_folder(path, request.param)
    return str(path)


def block_bytes(model: torch.nn.Module, path: str) -> int:
    """Of the blocks' tensors, with the scales that bitsandbytes keeps beside weights.

    Without its tables (a kilobyte beside each matrix, whatever its size), which in a real model are nothing.
    """
    tensors = {name: t for name, t in model.state_dict().items() if name.startswith(f"{path}.")}
    return sum(t.numel() * t.element_size() for name, t in tensors.items() if "quant_map" not in name and "quant_state." not in name)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_outputs_and_gradients_are_close(folder: str, bits: int, precision: str) -> None:
    base, small = load_base(folder).model, load_base(folder, precision=precision, bits=bits).model
    h_BTD = base.get_input_embeddings()(torch.arange(24).view(2, 12)).detach().requires_grad_()
    results = []
    for model in (base, small):
        out = model.base_model(inputs_embeds=h_BTD.to(model.dtype), use_cache=False).last_hidden_state.float()
        (grad,) = torch.autograd.grad(out.square().sum() + out[..., 0].sum(), h_BTD)
        results.append((out.detach(), grad))
    (out, grad), (small_out, small_grad) = results
    assert 0 < distance(out, small_out) < TOLERANCE[bits]
    assert 0 < distance(grad, small_grad) < 2 * TOLERANCE[bits]
    assert not any(parameter.requires_grad for parameter in small.parameters())
    assert not small.training


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_pass_every_projection_also_after_a_pass_without_gradients(
    folder: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at one by one, because past a block's projections its residual connection passes most of a gradient anyway."""
    # What processors with AVX512-BF16 have: a product without backward pass, for which weights would be laid out anew.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    base, small = load_base(folder).model, load_base(folder, bits=bits).model
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        small(tokens)
    for name in (name for group in trace(base).groups for name in group):
        x_TI = torch.randn(6, sizes_of(base.get_submodule(name))[0], generator=torch.Generator().manual_seed(0), requires_grad=True)
        grads = []
        for model in (base, small):
            out_TO = model.get_submodule(name)(x_TI)
            (grad_TI,) = torch.autograd.grad(out_TO, x_TI, torch.linspace(-1, 1, out_TO.numel()).view_as(out_TO))
            grads.append(grad_TI.flatten())
        assert torch.cosine_similarity(*grads, dim=0) > ALONG[bits], name


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 1, 5), (2, 3, 1, 2)])
def test_inputs_of_any_number_of_dimensions_are_taken(bits: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    """As latent attention gives its compressed keys to a projection: rows x 1 x T x width."""
    save_model_folder(tmp_path, "llama")
    models = [load_base(str(tmp_path), bits=some).model for some in (None, bits)]
    wide, small = (model.get_submodule("model.layers.0.mlp.up_proj") for model in models)
    x = torch.randn(*shape, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grads = []
    for module in (wide, small):
        y = module(x)
        assert y.shape[:-1] == shape
        grads.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    assert all(distance(a, b) < 2 * TOLERANCE.get(bits, 0.01) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_are_smaller_and_the_rest_is_as_before(folder: str, bits: int) -> None:
    base, loaded = load_base(folder), load_base(folder, bits=bits)
    small, path = loaded.model, blocks_path(base.model)
    assert block_bytes(small, path) < block_bytes(base.model, path) * (0.35 if bits == 8 else 0.2)
    names = [name for group in trace(base.model).groups for name in group]
    assert [name for group in trace(small).groups for name in group] == names
    assert [sizes_of(small.get_submodule(name)) for name in names] == [sizes_of(base.model.get_submodule(name)) for name in names]
    assert all(small.get_submodule(name).weight.element_size() == 1 for name in names)
    assert torch.equal(small.get_input_embeddings().weight, base.model.get_input_embeddings().weight)
    assert torch.equal(small.get_output_embeddings().weight, base.model.get_output_embeddings().weight)
    assert not loaded.transposed


def test_four_bits_are_half_of_eight(folder: str) -> None:
    four, eight = (load_base(folder, bits=bits).model for bits in (4, 8))
    for name in (name for group in trace(four).groups for name in group):
        state = four.get_submodule(name).weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True)
        assert 2 * four.get_submodule(name).weight.numel() == eight.get_submodule(name).weight.numel()


def test_other_bits_are_refused(folder: str) -> None:
    with pytest.raises(BadValueError, match="this many bits"):
        load_base(folder, bits=3)


def test_without_the_library_it_says_what_to_install(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UnavailableError, match="bitsandbytes") as caught:
        load_base(folder, bits=4)
    assert "atoll[host]" in caught.value.do


def test_broken_weights_are_the_same_error_as_without_quantization(tmp_path: Path) -> None:
    save_model_folder(tmp_path, "llama")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load_base(str(tmp_path), bits=8)


def test_a_library_that_peft_imports_says_nothing_of_kernels_that_are_not_used() -> None:
    code = "import atoll, logging; print(logging.getLogger('bitsandbytes.backends.cpu.ops').isEnabledFor(logging.WARNING))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
