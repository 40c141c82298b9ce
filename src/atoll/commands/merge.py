"""The result of a run for other libraries: atoll merge writes an ordinary Hugging Face model folder, atoll.load makes a PEFT model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from atoll.adapters.attach import merge_into
from atoll.errors import AdapterFitError, OutputError
from atoll.jobs.finished import open_run
from atoll.scratch import scratch_folder

if TYPE_CHECKING:
    from peft import PeftModel


def merge(run_dir: str | Path, *, out: str | Path, trust: bool = False) -> Path:
    """Write the merged model and its tokenizer to `out`, whole or not at all, and return the folder.

    Raises: TrustError where the run names code and `trust` does not say that it may; OutputError where `out` is not absent or empty;
    AdapterFitError for adapters that no weight can hold.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(
            "the folder to write to is not empty", where=str(target), got="something there already", expected="a new or empty folder",
            do="give another folder with --out",
        )  # fmt: skip
    finished = open_run(Path(run_dir), trust=trust)
    if finished.adapter.kind != "lora":
        raise AdapterFitError(
            "a bottleneck adapter cannot be merged", where=str(finished.run.adapter), got=finished.adapter.kind, expected="lora",
            do="use the run with atoll generate or atoll.load; its relu has no place in a weight",
        )  # fmt: skip
    model = finished.base.model
    with torch.no_grad():
        merge_into(model, finished.adapter)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(f".{target.name}-", target.parent) as stage:
            folder = Path(stage) / "model"
            model.save_pretrained(folder)
            finished.base.tokenizer.save_pretrained(folder)
            folder.rename(target)
    except OSError as problem:
        do = "give another folder with --out"
        raise OutputError("the merged model cannot be written", where=str(target), got=str(problem), do=do) from None
    return target


def load(run_dir: str | Path, *, trust: bool = False) -> PeftModel:
    """The run's base with its adapter, in eval mode.

    Raises: TrustError where the run names code and `trust` does not say that it may; RunFolderError; AdapterFitError for bottleneck
    adapters, which PEFT does not have.
    """
    from peft import PeftModel

    finished = open_run(Path(run_dir), trust=trust)
    if finished.adapter.kind != "lora":
        raise AdapterFitError(
            "PEFT has no bottleneck adapter", where=str(finished.run.adapter), got=finished.adapter.kind, expected="lora",
            do="use atoll generate and atoll evaluate on the run directory, or train with kind = \"lora\"",
        )  # fmt: skip
    return PeftModel.from_pretrained(finished.base.model, str(finished.run.adapter)).eval()
