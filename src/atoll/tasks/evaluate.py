"""What a model is worth on held-out rows: loss per completion token, and the metrics of the task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from atoll.base.head import token_losses_N
from atoll.base.load import Base
from atoll.config.schema import Evaluate
from atoll.errors import BadValueError, ColumnError, ConflictError, PartError
from atoll.registry.parts import make, trait
from atoll.tasks.batches import pad_batch
from atoll.tasks.classes import evaluate_classes, examples_of
from atoll.tasks.readers.nearest import did_you_mean
from atoll.tasks.rows import Rows
from atoll.tasks.scoring.answers import HeldOutAnswers
from atoll.tasks.scoring.builtin_metrics import slot_values
from atoll.tasks.text import TextForm
from atoll.tasks.tokens import Examples, pad_id
from atoll.threads import suited_threads

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAY_BE_MISSING = ("answer",)


def evaluate(
    base: Base, rows: Rows, form: TextForm, settings: Evaluate, *, max_length: int, examples: Examples | None = None,
    options: Mapping[str, Mapping[str, object]] | None = None,
) -> dict[str, float]:
    """Loss and the metrics that `settings` names, over the rows that can be used; the model is left as it was.

    Always: loss, perplexity, num_rows, num_label_tokens. By name: exact_match, bleu, rouge1, rouge2, rougeL, slot_accuracy,
    choice_accuracy, label_accuracy. Of rows with classes: loss, accuracy, macro_f1, num_rows. `examples` are the tokenized rows where
    they are at hand.

    Units: loss in nats per label token (or per class), over all of them; bleu 0 to 100; the others 0 to 1.
    Raises: what tokenize and check_metrics raise.
    """
    check_metrics(settings, form, rows)
    examples = examples_of(rows, form, base.tokenizer, max_length) if examples is None else examples
    if form.classes is not None:
        with suited_threads(base.model.config.get_text_config().hidden_size), _eval_mode(base.model):
            return evaluate_classes(base, examples, settings.batch_size)
    with suited_threads(base.model.config.get_text_config().hidden_size), _eval_mode(base.model):
        loss = _mean_loss(base, examples, settings.batch_size)
        result = {
            "loss": loss, "perplexity": math.exp(min(loss, 700.0)), "num_rows": float(len(examples)),
            "num_label_tokens": float(examples.num_label_tokens),
        }  # fmt: skip
        answers = HeldOutAnswers(base, rows, form, settings, [int(number) for number in examples.row_numbers], max_length)
        for name in settings.metrics:
            result |= _checked(name, make("metric", name, (options or {}).get(name)).score(answers))
    return result


def held_out_examples(
    rows: Rows, form: TextForm, tokenizer: PreTrainedTokenizerBase, settings: Evaluate, max_length: int,
    options: Mapping[str, Mapping[str, object]] | None = None,
) -> Examples:  # fmt: skip
    """Held-out rows as tokens; metrics that have a `check` look at them, too, before any model is asked.

    Raises: as examples_of; what a metric raises for rows that it cannot be had of.
    """
    examples = examples_of(rows, form, tokenizer, max_length)
    for name in settings.metrics if form.classes is None else ():
        check = getattr(make("metric", name, (options or {}).get(name)), "check", None)
        if check is not None:
            check(rows, examples.row_numbers.tolist(), form, settings)
    return examples


def check_metrics(settings: Evaluate, form: TextForm, rows: Rows) -> None:
    """Refuse metrics that these rows cannot have, before any time is spent on them.

    Raises: ConflictError, ColumnError, BadValueError.
    """
    if settings.metrics and form.kind == "text":
        raise ConflictError(
            "plain text has nothing to compare a completion with", where="[evaluate] metrics", got=", ".join(settings.metrics),
            expected="prompt and completion, or messages, in [data]", 
            do="set them, or leave metrics empty: loss and perplexity are always measured",
        )  # fmt: skip
    needed = [(metric, key) for metric in settings.metrics for key in trait("metric", metric, "columns")]
    for metric, key in needed:
        if getattr(settings, key) is None and key not in _MAY_BE_MISSING:
            raise ConflictError(
                f"{metric} needs to know a column", where=f"[evaluate] {key}", got="nothing", expected=f"one of {', '.join(rows.columns)}",
                do=f"set {key} in [evaluate], or leave {metric} out",
            )  # fmt: skip
    for _, key in needed:
        name = getattr(settings, key)
        if name is not None and name not in rows.columns:
            raise ColumnError(
                "the held-out data has no such column", where=f"[evaluate] {key}", got=name, expected=f"one of {', '.join(rows.columns)}",
                do=did_you_mean(name, rows.columns, "name one of these columns"),
            )  # fmt: skip
    if settings.labels is not None and len(set(settings.labels)) < max(2, len(settings.labels)):
        raise BadValueError(
            "labels must be different from each other, and at least two", where="[evaluate] labels", got=", ".join(settings.labels),
            expected="two or more different completions", do="list every label once",
        )  # fmt: skip
    asked_for_slots = any(key == "slots" for _, key in needed)
    if asked_for_slots and settings.slots and not any(slot_values(str(v)) for v in rows.column(settings.slots)):
        raise BadValueError(
            "the column holds no slots", where=f"[evaluate] slots = {settings.slots!r}", got=str(rows.column(settings.slots)[0])[:60],
            expected='pairs such as "name[Alimentum], area[city centre]"', do="name the column that holds them",
        )  # fmt: skip


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = {module for module in model.modules() if module.training}
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


def _mean_loss(base: Base, examples: Examples, batch_size: int) -> float:
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    total = 0.0
    for start in range(0, len(order), batch_size):
        batch = pad_batch([examples[i] for i in order[start : start + batch_size]], pad_id(base.tokenizer))
        total += float(token_losses_N(base.model, batch.to(base.model.device)).sum(dtype=torch.float64))
    return total / examples.num_label_tokens


def _checked(metric: str, scores: Mapping[str, float]) -> dict[str, float]:
    """Scores as a run keeps them.

    Raises: PartError where a metric gives something else than numbers by name.
    """
    wrong = not isinstance(scores, Mapping) or not all(
        isinstance(name, str) and isinstance(score, int | float) and not isinstance(score, bool) for name, score in scores.items()
    )  # fmt: skip
    if wrong:
        raise PartError(
            f"the metric {metric} gave no scores", where="[evaluate] metrics", got=repr(scores)[:80], expected="numbers by name",
            do='see what it returns with atoll.testing.check("metric", ...)',
        )  # fmt: skip
    return {name: float(score) for name, score in scores.items()}
