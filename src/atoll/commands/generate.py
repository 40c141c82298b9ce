"""atoll generate: talk to the result of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from atoll.adapters.attach import attached
from atoll.adapters.peft_files import read_labels
from atoll.errors import BadValueError, ConflictError
from atoll.jobs.finished import is_chat, open_run
from atoll.jobs.split import HostAccess
from atoll.runs.layout import RunDirectory
from atoll.tasks.chat import chat_closing, question_prompt
from atoll.tasks.rows import RowProblem
from atoll.tasks.scoring.generation import Sampling, generate_texts
from atoll.tasks.text import chat_settings
from atoll.tasks.tokens import begin_ids, encode_texts, with_begin


def generate(
    run_dir: str | Path, prompt: str, *, max_new_tokens: int = 64, host: HostAccess | None = None, trust: bool = False,
    other_base: bool = False, model: str | None = None, temperature: float | None = None, top_p: float | None = None,
    seed: int | None = None,
) -> str:  # fmt: skip
    """The continuation of `prompt` by the run's base with its adapter; with a `host`, most of the base is there.

    Greedy, unless any of `temperature`, `top_p` and `seed` is given: then tokens are drawn, as 1, 1 and 0 say where one is not given.

    A run that was trained on chats answers `prompt` as what a user says, or as the JSON text of messages, in its chat template.
    `model` is where the base is now, if it was moved.

    Raises: TrustError where the run names code and `trust` does not say that it may; RunFolderError and what loading the base and the
    adapter raise; OtherBaseError where the base's weights are not those of the run, and `other_base` does not say that they may;
    ConflictError for a classifier; BadValueError for what cannot be drawn by.
    """
    sampling = Sampling.asked(temperature, top_p, seed)
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise BadValueError(
            "the prompt is no text", where="PROMPT", got="bytes that are not UTF-8, or half of a surrogate pair", expected="text",
            do="write it in a terminal that speaks UTF-8",
        ) from None  # fmt: skip
    labels = read_labels(RunDirectory.open(Path(run_dir)).adapter)
    if labels:
        raise ConflictError(
            "a classifier writes no text", where=str(run_dir), got="a run that classifies: " + ", ".join(labels[:5]),
            expected='a run with task = "generate"', do="use atoll evaluate, or load adapter/ with PEFT to tell the classes of rows",
        )  # fmt: skip
    finished = open_run(Path(run_dir), host, trust=trust, other_base=other_base, model=model)
    tokenizer, closing = finished.base.tokenizer, ""
    try:
        if is_chat(finished):
            settings = chat_settings(finished.loaded.config.data)
            prompt, closing = _as_chat(prompt, tokenizer, settings), chat_closing(tokenizer, settings)
        ids = encode_texts([prompt], tokenizer)[0]
        ids = ids if closing else with_begin(ids, begin_ids(tokenizer))
        with attached(finished.base.model, finished.adapter):
            return generate_texts(
                finished.base.model, tokenizer, [ids], max_new_tokens=max_new_tokens, batch_size=1, closing=closing, sampling=sampling,
            )[0]  # fmt: skip
    finally:
        finished.close()


def _as_chat(prompt: str, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, object]) -> str:
    try:
        return question_prompt(prompt, tokenizer, settings)
    except RowProblem as problem:
        raise BadValueError(
            "the chat template does not take the prompt", where="PROMPT", got=problem.got, expected=problem.expected,
            do='give what a user says, or messages as JSON, [{"role": "user", "content": "..."}]',
        ) from None  # fmt: skip
