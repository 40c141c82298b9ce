"""Checkpoints that are released quantized are made wide as they are read, or refused with the method's name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from atoll.base.load import load_base
from atoll.base.read_shapes import read_shapes
from atoll.errors import WeightsError

from tests.families import FAMILIES, save


def rewrite(folder: Path, tensors: dict[str, Tensor], **quantization: object) -> None:
    """Other weights in a model folder, and what config.json says of them."""
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def as_fp8(folder: Path) -> PreTrainedModel:
    """A DeepSeek-V3 whose projections are fp8 with one scale for each 128 x 128 weights, and the same one wide."""
    model = save("deepseek_v3", folder)
    wide: dict[str, Tensor] = {}
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim != 2 or ".layers." not in name or name.endswith("gate.weight"):
            stored[name] = tensor
            continue
        scale = tensor.abs().amax() / 448
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
        wide[name] = stored[name].float() * scale
    rewrite(folder, stored, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128])
    for name, tensor in wide.items():
        if ".experts." not in name:
            model.get_parameter(name).data.copy_(tensor)
    return model


def test_fp8_is_made_wide(tmp_path: Path) -> None:
    expected = as_fp8(tmp_path)
    loaded = load_base(str(tmp_path)).model
    for name, parameter in loaded.named_parameters():
        tolerance = 0.05 if ".experts." in name else 0.0  # Theirs are compared with what they were before.
        torch.testing.assert_close(parameter, expected.get_parameter(name), rtol=0.0, atol=tolerance)
    assert read_shapes(str(tmp_path)).num_parameters == sum(parameter.numel() for parameter in loaded.parameters())


def test_mxfp4_is_made_wide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "gpt_oss", ("gpt_oss", {**FAMILIES["gpt_oss"][1], "intermediate_size": 64}))
    save("gpt_oss", tmp_path)
    generator, stored, packed = torch.Generator().manual_seed(0), {}, {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = tensor
            continue
        experts, d_in, d_out = tensor.shape
        blocks = torch.randint(0, 256, (experts, d_out, d_in // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 128, (experts, d_out, d_in // 32), dtype=torch.uint8, generator=generator)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        packed[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    rewrite(tmp_path, stored, quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn", "lm_head"])
    loaded = load_base(str(tmp_path)).model
    for name, tensor in packed.items():
        torch.testing.assert_close(loaded.get_parameter(name).data, tensor, rtol=0.0, atol=0.0)
    assert read_shapes(str(tmp_path)).num_parameters == sum(parameter.numel() for parameter in loaded.parameters())


def test_what_is_quantized_is_not_quantized_again(tmp_path: Path) -> None:
    as_fp8(tmp_path)
    with pytest.raises(WeightsError, match="released quantized") as caught:
        load_base(str(tmp_path), bits=4)
    assert "save_pretrained" in caught.value.do


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", None])
def test_other_methods_are_named(tmp_path: Path, method: str | None) -> None:
    save("llama", tmp_path)
    rewrite(tmp_path, load_file(tmp_path / "model.safetensors"), quant_method=method)
    for look in (read_shapes, load_base):
        with pytest.raises(WeightsError, match="quantized already") as caught:
            look(str(tmp_path))
        assert repr(method) in caught.value.got
