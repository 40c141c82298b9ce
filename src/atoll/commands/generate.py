"""atoll generate: talk to the result of a run."""

from __future__ import annotations

from pathlib import Path

from atoll.adapters.attach import attached
from atoll.adapters.peft_files import read_labels
from atoll.errors import ConflictError
from atoll.jobs.finished import open_run
from atoll.jobs.split import HostAccess
from atoll.runs.layout import RunDirectory
from atoll.tasks.scoring.generation import generate_greedy
from atoll.tasks.tokens import begin_ids, encode_texts


def generate(
    run_dir: str | Path, prompt: str, *, max_new_tokens: int = 64, host: HostAccess | None = None, trust: bool = False,
    other_base: bool = False, model: str | None = None,
) -> str:  # fmt: skip
    """The greedy continuation of `prompt` by the run's base with its adapter; with a `host`, most of the base is there.

    `model` is where the base is now, if it was moved.

    Raises: TrustError where the run names code and `trust` does not say that it may; RunFolderError and what loading the base and the
    adapter raise; OtherBaseError where the base's weights are not those of the run, and `other_base` does not say that they may;
    ConflictError for a classifier.
    """
    labels = read_labels(RunDirectory.open(Path(run_dir)).adapter)
    if labels:
        raise ConflictError(
            "a classifier writes no text", where=str(run_dir), got="a run that classifies: " + ", ".join(labels[:5]),
            expected='a run with task = "generate"', do="use atoll evaluate, or load adapter/ with PEFT to tell the classes of rows",
        )  # fmt: skip
    finished = open_run(Path(run_dir), host, trust=trust, other_base=other_base, model=model)
    tokenizer = finished.base.tokenizer
    ids = [*begin_ids(tokenizer), *encode_texts([prompt], tokenizer)[0]]
    try:
        with attached(finished.base.model, finished.adapter):
            return generate_greedy(finished.base.model, tokenizer, [ids], max_new_tokens=max_new_tokens, batch_size=1)[0]
    finally:
        finished.close()
