"""Full fine-tuning as a run: what run.toml may ask beside it, what it costs, and that its result is an ordinary PEFT folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import atoll
from atoll.adapters.attach import attached
from atoll.adapters.peft_files import load_adapter
from atoll.commands.plan import plan
from atoll.config.load import load
from atoll.errors import AtollError, ConflictError, InfeasibleError, ManyErrors
from atoll.jobs.job import prepare
from atoll.jobs.split import HostAccess

from tests.commands.test_flops import WIDTH, first_steps
from tests.conftest import write_job

IDS = torch.arange(24).view(2, 12) % 93 + 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_job(tmp_path, {"adapter": {"kind": "full"}})
    return tmp_path


def test_a_run_ends_in_a_folder_that_peft_loads(folder: Path) -> None:
    result = atoll.train(folder / "run.toml", out=folder / "out")
    summary = result.summary
    assert summary.eval.adapted is not None
    assert summary.eval.base is not None
    assert (summary.eval.adapted["loss"] or 0) < (summary.eval.base["loss"] or 0)
    state = load_adapter(result.adapter)
    assert not state.modules
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    with torch.no_grad(), attached(model, state):
        ours = model(IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(atoll.merge(result.run_dir, out=folder / "merged")).eval()
    with torch.no_grad():
        torch.testing.assert_close(PeftModel.from_pretrained(model, result.adapter).eval()(IDS).logits, ours, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(merged(IDS).logits, ours, rtol=1e-5, atol=1e-5)
    again = prepare(folder / "run.toml", [f"adapter.start={result.adapter}"])
    assert again.start.digest() == state.digest()
    with pytest.raises(AtollError, match="of another kind"):
        prepare(folder / "run.toml", [f"adapter.start={result.adapter}", "adapter.kind=lora"])


def test_the_first_step_is_counted_and_is_what_the_formula_says(folder: Path) -> None:
    """But for the one product by which fused attention makes its scores anew in the backward pass."""
    result = atoll.train(folder / "run.toml", out=folder / "out", overrides=["run.rounds=1", "train.accumulate=2"])
    steps = first_steps(result.run_dir)
    assert {edge.name for edge in result.summary.edges} == {"north", "south"}
    for edge in result.summary.edges:
        flops, tokens = edge.first_step_flops, steps[edge.name]["num_tokens"]
        assert flops is not None
        assert flops.counted - 2 * 2 * 4 * (tokens // 4) ** 2 * WIDTH == flops.formula > 0
        assert flops.counted_head == flops.formula_head


def test_the_plan_counts_every_weight_of_the_targets(folder: Path) -> None:
    whole, attention = plan(folder / "run.toml"), plan(folder / "run.toml", overrides=["adapter.targets=attention"])
    weights = sum(tensor.numel() for tensor in load_weights(folder / "base", "_proj"))
    assert whole.num_trainable == weights > attention.num_trainable
    edge = whole.edge("north")
    assert edge.up_bytes == edge.down_bytes == 4 * weights
    lora = plan(folder / "run.toml", overrides=["adapter.kind=lora", "adapter.rank=1"]).edge("north")
    rank_one = sum(sum(tensor.shape) for tensor in load_weights(folder / "base", "_proj"))
    sum_of_the_largest = 4 * 32 * 48
    assert edge.predicted_peak_bytes - lora.predicted_peak_bytes == (16 + 32) * (weights - rank_one) + sum_of_the_largest


def load_weights(base: Path, part: str) -> list[torch.Tensor]:
    """Matrices of the model whose name holds `part`."""
    return [tensor for name, tensor in AutoModelForCausalLM.from_pretrained(base).state_dict().items() if part in name]


def test_too_little_memory_is_not_advised_to_be_met_by_quantizing(folder: Path) -> None:
    with pytest.raises(InfeasibleError) as caught:
        plan(folder / "run.toml", overrides=["edge.north.memory=100 kB", "edge.north.process_memory=0 B"])
    assert "bits = " not in caught.value.page()


@pytest.mark.parametrize(("override", "where"), [
    ("plan.policy=fedpipe", "plan.policy"), ("select.policy=early-kill", "select.policy"), ("adapter.dropout=0.1", "adapter.dropout"),
    ("federated.aggregation=stack", "federated.aggregation"), ("federated.aggregation=residual", "federated.aggregation"),
    ("run.placement=split", "run.placement"), ("edge.north.mode=split", "edge.north.mode"), ("edge.south.bits=8", "edge.south.bits"),
    ("model.quantize=4", "model.quantize"), ("edge.south.rank=4", "edge.south.rank"), ("run.compare=[\"homogeneous\"]", "run.compare"),
])  # fmt: skip
def test_what_whole_weights_exclude_is_refused(folder: Path, override: str, where: str) -> None:
    with pytest.raises((ConflictError, ManyErrors)) as caught:
        load(folder / "run.toml", [override])
    page = caught.value.page()
    assert 'adapter.kind = "full"' in page
    assert where in page
    assert '"lora"' in page


def test_a_host_is_refused_before_it_is_asked(folder: Path) -> None:
    with pytest.raises(ConflictError, match="whole base"):
        prepare(folder / "run.toml", host=HostAccess("127.0.0.1:9"))


def test_bf16_in_sixteen_bits_is_no_quantization(folder: Path) -> None:
    assert load(folder / "run.toml", ["model.quantize=16", "model.precision=bf16"]).config.adapter.kind == "full"
