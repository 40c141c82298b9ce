"""atoll.load: the result of a run as a PEFT model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from atoll.errors import AdapterFitError
from atoll.jobs.finished import open_run

if TYPE_CHECKING:
    from peft import PeftModel


def load(run_dir: str | Path) -> PeftModel:
    """The run's base with its adapter, in eval mode.

    Raises: RunFolderError; AdapterFitError for bottleneck adapters, which PEFT does not have.
    """
    from peft import PeftModel

    finished = open_run(Path(run_dir))
    if finished.adapter.kind != "lora":
        raise AdapterFitError(
            "PEFT has no bottleneck adapter", where=str(finished.run.adapter), got=finished.adapter.kind, expected="lora",
            do="use atoll generate and atoll evaluate on the run directory, or train with kind = \"lora\"",
        )  # fmt: skip
    return PeftModel.from_pretrained(finished.base.model, str(finished.run.adapter)).eval()
