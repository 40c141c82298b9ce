"""The main job on every model family: from a folder on disk to an adapter that PEFT loads with the same loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import atoll
from atoll.base.head import token_losses_N
from atoll.base.load import load_base
from atoll.tasks.batches import pad_batch
from atoll.tasks.tokens import Example

from tests.conftest import save_model_folder
from tests.run_files import Sections, write_run

ROWS = "a,b\n" + "".join(f"w{n} w{n + 1},w{n + 2} w9{n % 3}\n" for n in range(20))


def write_job(folder: Path, family: str, *, targets: str = "all-linear", precision: str = "fp32", batching: str = "bucket") -> Path:
    save_model_folder(folder / "base", family)
    (folder / "rows.csv").write_text(ROWS)
    data = {"train": "rows.csv", "eval": "rows.csv", "prompt": "{a}", "completion": "{b}", "batching": batching, "max_length": 24}
    sections: Sections = {"model": {"precision": precision}, "data": data, "adapter": {"targets": targets, "rank": 3}}
    return write_run(folder, {**sections, "train": {"local_steps": 4, "batch_size": None}}, {"north": {}, "south": {"rank": 2}})


def test_training_from_a_folder_to_a_peft_adapter(family: str, tmp_path: Path) -> None:
    run = atoll.train(write_job(tmp_path, family), out=tmp_path / "run")
    base, adapted = run.summary.eval.base or {}, run.summary.eval.adapted or {}
    assert adapted["loss"] < base["loss"]  # type: ignore[operator]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(run.adapter)).eval()
    ids = [1, 4, 5, 6, 93, 2]  # what no row says: the check is of the model, not of the data
    labels = torch.tensor([[-100, -100, -100, 6, 93, 2]])
    with torch.no_grad():
        theirs = float(model(input_ids=torch.tensor([ids]), labels=labels).loss)
    ours = load_loss(run.run_dir, ids)
    assert ours == pytest.approx(theirs, abs=1e-5)


def load_loss(run_dir: Path, ids: list[int]) -> float:
    """The loss of one row by our own path: base, adapter, label positions only."""
    from atoll.adapters.attach import attached
    from atoll.jobs.finished import open_run

    finished = open_run(run_dir)
    example = Example(torch.tensor(ids, dtype=torch.int32).numpy(), torch.tensor([False] * 3 + [True] * 3).numpy())
    with attached(finished.base.model, finished.adapter):
        return float(token_losses_N(finished.base.model, pad_batch([example], 0)).mean())


@pytest.mark.parametrize("targets", ["attention", "mlp"])
def test_groups_name_modules_of_every_family(family: str, targets: str, tmp_path: Path) -> None:
    config = write_job(tmp_path, family, targets=targets)
    ranks = atoll.plan(config).edges[0].ranks
    others = atoll.plan(config, overrides=('adapter.targets="all-linear"',)).edges[0].ranks
    assert 0 < len(ranks) < len(others)
    assert set(ranks) < set(others)


@pytest.mark.parametrize("batching", ["pack", "shuffle"])
def test_other_batchings_train(batching: str, tmp_path: Path) -> None:
    run = atoll.train(write_job(tmp_path, "llama", batching=batching), out=tmp_path / "run")
    assert (run.summary.eval.adapted or {})["loss"] < (run.summary.eval.base or {})["loss"]  # type: ignore[operator]


def test_bf16_trains_and_evaluates(tmp_path: Path) -> None:
    config = write_job(tmp_path, "qwen3", precision="bf16")
    assert load_base(str(tmp_path / "base"), precision="bf16").model.dtype == torch.bfloat16
    run = atoll.train(config, out=tmp_path / "run")
    assert (run.summary.eval.adapted or {})["loss"] < (run.summary.eval.base or {})["loss"]  # type: ignore[operator]
    assert run.summary.edges[0].bits == 16
