"""The result of a run for other libraries: atoll merge writes an ordinary Hugging Face model folder, atoll.load makes a PEFT model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from atoll.adapters.attach import merge_into
from atoll.base.load import DTYPES, quiet, stored_dtypes
from atoll.commands.models.folder import check_free, written_whole
from atoll.errors import AdapterFitError
from atoll.jobs.exports.card import MERGED, write_card
from atoll.jobs.finished import FinishedRun, is_chat, open_run
from atoll.jobs.inputs import base_source
from atoll.tasks.chat import chat_closing
from atoll.tasks.scoring.generation import ends_of
from atoll.tasks.text import chat_settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

MergedDtype = Literal["as-stored", "fp32", "bf16", "fp16"]


def merge(
    run_dir: str | Path, *, out: str | Path, trust: bool = False, other_base: bool = False, dtype: MergedDtype = "as-stored",
    model: str | None = None,
) -> Path:  # fmt: skip
    """Write the merged model and its tokenizer to `out`, whole or not at all, and return the folder.

    Each weight is of the type that it has in the base's files, or all of `dtype`. `model` is where the base is now, if it was moved.

    Raises: TrustError where the run names code and `trust` does not say that it may; OtherBaseError where the base's weights are not those
    of the run, and `other_base` does not say that they may; OutputError where `out` is not absent or empty; AdapterFitError for adapters
    that no weight, or none of this type, can hold.
    """
    target = Path(out)
    check_free(target)
    finished = open_run(Path(run_dir), trust=trust, other_base=other_base, model=model)
    check_merges(finished)
    with written_whole(target, "the merged model") as folder:
        write_merged(finished, folder, dtype)
        write_card(finished.run, finished.loaded, folder, MERGED)
    return target


def check_merges(finished: FinishedRun) -> None:
    """Whether a weight can hold what the run trained.

    Raises: AdapterFitError.
    """
    if finished.adapter.kind != "lora":
        raise AdapterFitError(
            "a bottleneck adapter cannot be merged", where=str(finished.run.adapter), got=finished.adapter.kind, expected="lora",
            do="use the run with atoll generate; its relu has no place in a weight",
        )  # fmt: skip


def write_merged(finished: FinishedRun, folder: Path, dtype: MergedDtype) -> None:
    """Put adapter and base together, for good, and write them and the tokenizer to a folder.

    Raises: AdapterFitError for a weight that its type cannot hold.
    """
    _end_as_trained(finished)
    whole = finished.base.model
    with torch.no_grad():
        merge_into(whole, finished.adapter)
        _narrow(whole, base_source(finished.loaded), dtype)
    with quiet():
        whole.save_pretrained(folder)
    finished.base.tokenizer.save_pretrained(folder)


def _narrow(model: PreTrainedModel, source: str, dtype: MergedDtype) -> None:
    """Keep each weight as it is in the base's files, or all in one type."""
    stored = stored_dtypes(source)
    common = Counter(stored.values()).most_common(1)[0][0] if dtype == "as-stored" else {**DTYPES, "fp16": torch.float16}[dtype]
    prefix = f"{model.base_model_prefix}."
    for name, weight in model.named_parameters():
        names = (name, name.removeprefix(prefix)) if dtype == "as-stored" else ()
        wanted = next((stored[one] for one in names if one in stored), common)
        narrow = weight.data.to(wanted)
        if not torch.isfinite(narrow.sum(dtype=torch.float32)) and not torch.isfinite(narrow).all():
            raise AdapterFitError(
                "a merged weight is too large for its type", where=name, got=f"more than {torch.finfo(wanted).max:.3g}",
                expected=f"what {wanted} can hold", do="give --dtype fp32 or bf16",
            )  # fmt: skip
        weight.data = narrow
    for config in (model.config, model.config.get_text_config()):
        config.dtype = common


def load(run_dir: str | Path, *, trust: bool = False, other_base: bool = False, model: str | None = None) -> PeftModel:
    """The run's base with its adapter, in eval mode. `model` is where the base is now, if it was moved.

    Raises: TrustError where the run names code and `trust` does not say that it may; OtherBaseError where the base's weights are not those
    of the run, and `other_base` does not say that they may; RunFolderError; AdapterFitError for bottleneck adapters, which PEFT does not
    have.
    """
    from peft import PeftModel

    finished = open_run(Path(run_dir), trust=trust, other_base=other_base, model=model)
    if finished.adapter.kind != "lora":
        raise AdapterFitError(
            "PEFT has no bottleneck adapter", where=str(finished.run.adapter), got=finished.adapter.kind, expected="lora",
            do="use atoll generate and atoll evaluate on the run directory, or train with kind = \"lora\"",
        )  # fmt: skip
    _end_as_trained(finished)
    return PeftModel.from_pretrained(finished.base.model, str(finished.run.adapter)).eval()


def _end_as_trained(finished: FinishedRun) -> None:
    """Have other libraries end an answer where the run's chats ended it: they read the model's settings, not the template."""
    model, tokenizer = finished.base.model, finished.base.tokenizer
    if is_chat(finished) and model.generation_config is not None:
        closing = chat_closing(tokenizer, chat_settings(finished.loaded.config.data))
        model.generation_config.eos_token_id = list(ends_of(model, tokenizer, closing).token_ids)
