"""What a model is worth on held-out rows: loss per completion token, and the metrics of the task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from atoll.base.head import token_losses_N
from atoll.base.load import Base
from atoll.config.schema import Evaluate
from atoll.errors import BadValueError, ColumnError, ConflictError, EmptyDataError
from atoll.tasks import metrics
from atoll.tasks.batches import pad_batch
from atoll.tasks.classes import evaluate_classes, examples_of
from atoll.tasks.readers.nearest import did_you_mean
from atoll.tasks.rows import Rows
from atoll.tasks.scoring.generation import generate_greedy
from atoll.tasks.scoring.likelihood import Question, log_likelihoods
from atoll.tasks.scoring.ranking import Ranking, choice_rankings, label_rankings
from atoll.tasks.text import TextForm
from atoll.tasks.tokens import Examples, begin_ids, encode, encode_texts, pad_id
from atoll.threads import suited_threads

GENERATING = ("exact_match", "bleu", "rouge", "slot_accuracy")


def evaluate(
    base: Base, rows: Rows, form: TextForm, settings: Evaluate, *, max_length: int, examples: Examples | None = None
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
        usable = [int(number) for number in examples.row_numbers]
        if set(settings.metrics) & set(GENERATING):
            result |= _generated_scores(base, rows, usable, form, settings)
        if "choice_accuracy" in settings.metrics:
            result["choice_accuracy"] = _accuracy(
                base, rows, list(choice_rankings(rows, usable, form, settings)), form, settings, max_length
            )
        if "label_accuracy" in settings.metrics:
            result["label_accuracy"] = _accuracy(base, rows, list(label_rankings(rows, usable, form, settings)), form, settings, max_length)
    return result


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
    for metric, key in (("slot_accuracy", "slots"), ("choice_accuracy", "choices")):
        if metric in settings.metrics and getattr(settings, key) is None:
            raise ConflictError(
                f"{metric} needs to know a column", where=f"[evaluate] {key}", got="nothing", expected=f"one of {', '.join(rows.columns)}",
                do=f"set {key} in [evaluate], or leave {metric} out",
            )  # fmt: skip
    used = {"slot_accuracy": ("slots",), "choice_accuracy": ("choices", "answer")}
    for key in (key for metric in settings.metrics for key in used.get(metric, ())):
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
    if "slot_accuracy" in settings.metrics and settings.slots and not any(metrics.slot_values(str(v)) for v in rows.column(settings.slots)):
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


def _generated_scores(base: Base, rows: Rows, usable: Sequence[int], form: TextForm, settings: Evaluate) -> dict[str, float]:
    """Rows with one prompt are one question with several references, as E2E has them; `generate_rows` counts questions."""
    groups: dict[str, list[int]] = {}
    for number in usable:
        groups.setdefault(form.prompt_text(rows[number], base.tokenizer), []).append(number)
    chosen = dict(list(groups.items())[: settings.generate_rows])
    begin = begin_ids(base.tokenizer) if form.adds_special_tokens else []
    prompts = [begin + ids for ids in encode_texts(list(chosen), base.tokenizer)]
    generated = generate_greedy(base.model, base.tokenizer, prompts, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size)
    references = [[form.reference(rows[number]) for number in numbers] for numbers in chosen.values()]
    scores: dict[str, float] = {}
    if "exact_match" in settings.metrics:
        scores["exact_match"] = metrics.exact_match(generated, references)
    if "bleu" in settings.metrics:
        scores["bleu"] = metrics.bleu(generated, references)
    if "rouge" in settings.metrics:
        scores |= metrics.rouge(generated, references)
    if "slot_accuracy" in settings.metrics and settings.slots is not None:
        slots = [str(rows[numbers[0]][settings.slots] or "") for numbers in chosen.values()]
        scores["slot_accuracy"] = metrics.slot_accuracy(generated, slots)
    return scores


def _accuracy(base: Base, rows: Rows, rankings: Sequence[Ranking], form: TextForm, settings: Evaluate, max_length: int) -> float:
    """Share of rows whose right completion has the largest total log-likelihood; the first of equals counts."""
    if not rankings:
        raise EmptyDataError(
            "no row has completions to choose from", where=rows.name, got="0 usable rows", expected="at least one",
            do='set on_bad_row = "error" in [data] to see what is wrong with them',
        )  # fmt: skip
    questions = []
    for ranking in rankings:
        segments = [form.segments_with(rows[ranking.row], completion, base.tokenizer) for completion in ranking.completions]
        encoded = encode(segments, base.tokenizer, frame=form.adds_special_tokens)
        start = encoded[0].answer_start
        questions.append(Question(tuple(encoded[0].token_ids[:start]), tuple(tuple(one.token_ids[start:]) for one in encoded)))
    scores = log_likelihoods(base.model, questions, batch_size=settings.batch_size, max_length=max_length)
    return float(np.mean([int(np.argmax(score)) == ranking.truth for score, ranking in zip(scores, rankings, strict=True)]))
