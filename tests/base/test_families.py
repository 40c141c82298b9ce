"""Every family's plan speaks of the model as it is in memory: its modules, their sizes, what nothing can be put beside, its bytes."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from atoll.adapters.targets import resolve_targets, unreached
from atoll.base.blocks import blocks_path
from atoll.base.load import load_base
from atoll.base.quantize import Bits
from atoll.base.read_shapes import read_shapes
from atoll.cost.memory import training_memory
from atoll.errors import ArchitectureError, TargetError, WeightsError

from tests.families import NAMES, save

KEPT_NARROW = ("llama", "mixtral", "mamba", "jamba", "gemma3n_text", "qwen2_vl", "opt, 350m", "granitemoe")
NEEDS = {"gemma3n": "timm"}
MIXTURES = {
    "dbrx", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "granitemoehybrid", "jamba", "llama4",
    "llama4_text", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
}  # fmt: skip


def linear_modules(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """The oracle: linear layers in the blocks of the loaded model, but for routers, which answer more than a product."""
    path = blocks_path(model)
    found: dict[str, Any] = dict(model.get_submodule(path).named_modules())
    linear = {n: m for n, m in found.items() if isinstance(m, nn.Linear) and not type(m).__name__.endswith("Router")}
    sizes = {f"{path}.{n}": (m.in_features, m.out_features) for n, m in linear.items()}
    return sizes | {f"{path}.{n}": (m.nx, m.nf) for n, m in found.items() if type(m).__name__ == "Conv1D"}


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_speaks_of_the_model_in_memory(tmp_path: Path, name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    save(name, tmp_path)
    shapes, model = read_shapes(str(tmp_path)), load_base(str(tmp_path)).model
    assert {module.name: (module.d_in, module.d_out) for module in shapes.modules} == linear_modules(model)
    assert shapes.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shapes.num_blocks == len(model.get_submodule(blocks_path(model)))  # type: ignore[arg-type]
    assert bool(shapes.num_wide) == (name in MIXTURES)
    everywhere = set(dict(model.named_parameters())) | set(dict(model.named_modules()))
    assert set(shapes.without_adapter) <= everywhere


@pytest.mark.parametrize(("name", "bits"), [*((name, 16) for name in NAMES if name not in NEEDS), *product(KEPT_NARROW, (8, 4))])
def test_a_plan_counts_the_bytes_that_a_quantized_base_has(tmp_path: Path, name: str, bits: Bits) -> None:
    save(name, tmp_path)
    if name.startswith("falcon, "):
        with pytest.raises(ArchitectureError, match="cannot be quantized"):
            load_base(str(tmp_path), bits=bits)
        return
    model = load_base(str(tmp_path), bits=bits).model
    counted = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if bits < 16:
        inside = [m for m in model.modules() if type(m).__name__ in ("Linear8bitLt", "Linear4bit")]
        counted += sum(scales(module) for module in inside)
    planned = training_memory(
        read_shapes(str(tmp_path)), {}, num_rows=1, row_tokens=8, num_label_tokens=8, bits=bits, activation_bytes=4
    ).base_bytes  # fmt: skip
    assert planned == counted


def scales(module: Any) -> int:
    """Bytes beside a narrow weight."""
    if hasattr(module.weight, "SCB"):
        return int((module.state.SCB if module.weight.SCB is None else module.weight.SCB).nbytes)
    state = module.weight.quant_state
    return int(state.absmax.nbytes + state.code.nbytes + state.state2.absmax.nbytes + state.state2.code.nbytes + state.offset.nbytes)


def test_experts_are_left_out_of_groups_with_a_word_and_refused_by_name(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    shapes = read_shapes(str(tmp_path))
    chosen = resolve_targets("all-linear", shapes.modules, shapes.without_adapter)
    assert {name.rpartition(".")[2] for name in chosen} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "mlp.experts.gate_up_proj" in (unreached("all-linear", shapes.without_adapter) or "")
    assert "mlp.gate.weight" in (unreached(["q_proj", "mlp"], shapes.without_adapter) or "")
    for reached in (["q_proj"], "attention"):
        assert unreached(reached, shapes.without_adapter) is None
    for request in ("experts", "gate_up_proj", "mlp.experts.down_proj"):
        with pytest.raises(TargetError, match="nothing can be put beside"):
            resolve_targets([request], shapes.modules, shapes.without_adapter)


def test_what_a_family_reads_past_the_module_gets_no_adapter(tmp_path: Path) -> None:
    save("mamba", tmp_path)
    taken = {module.last_name for module in read_shapes(str(tmp_path)).modules if module.takes_adapter}
    assert taken == {"in_proj", "x_proj"}, "dt_proj is multiplied bare, and PEFT does not load an adapter of out_proj"


def test_a_missing_expert_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    save("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.experts" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError) as caught:
        read_shapes(str(tmp_path))
    assert "layers.1.mlp.experts" in caught.value.got


def test_extra_prediction_layers_are_not_of_the_model(tmp_path: Path) -> None:
    save("deepseek_v3", tmp_path)
    plain = read_shapes(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in tensors.items() if ".layers.2." in name}
    save_file(tensors | extra, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert read_shapes(str(tmp_path)).modules == plain.modules
    assert read_shapes(str(tmp_path)).num_parameters == plain.num_parameters
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    assert sum(parameter.numel() for parameter in load_base(str(tmp_path)).model.parameters()) == plain.num_parameters
