"""What a model makes of held-out rows, for metrics: completions and likelihoods, each found when a metric first asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from atoll.base.load import Base
from atoll.config.schema import Evaluate
from atoll.errors import EmptyDataError
from atoll.tasks.rows import RowProblem, Rows
from atoll.tasks.scoring.generation import ends_of, generate_texts
from atoll.tasks.scoring.likelihood import Question, log_likelihoods
from atoll.tasks.scoring.ranking import Ranking
from atoll.tasks.text import TextForm
from atoll.tasks.tokens import begin_ids, encode, encode_texts, skip_or_raise, with_begin


@dataclass(eq=False)
class HeldOutAnswers:
    """As `ModelAnswers` says, of a base that is in eval mode."""

    base: Base
    rows: Rows
    form: TextForm
    settings: Evaluate
    usable: Sequence[int]
    max_length: int

    @cached_property
    def _groups(self) -> Mapping[str, Sequence[int]]:
        """Numbers of the rows of every question, by its prompt."""
        groups: dict[str, list[int]] = {}
        for number in self.usable:
            groups.setdefault(self.form.prompt_text(self.rows[number], self.base.tokenizer), []).append(number)
        return dict(list(groups.items())[: self.settings.generate_rows])

    @cached_property
    def generated(self) -> Sequence[str]:
        """The model's completion of every question."""
        base, settings = self.base, self.settings
        begin = begin_ids(base.tokenizer) if self.form.adds_special_tokens else []
        prompts = [with_begin(ids, begin) for ids in encode_texts(list(self._groups), base.tokenizer)]
        return generate_texts(
            base.model, base.tokenizer, prompts, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size,
            closing=self.form.closing(base.tokenizer),
        )  # fmt: skip

    @property
    def references(self) -> Sequence[Sequence[str]]:
        """The right ones, by question."""
        return [[self._reference(number) for number in numbers] for numbers in self._groups.values()]

    def _reference(self, number: int) -> str:
        """What a model that says the right thing is read to have said: a chat template may write reasoning before an answer."""
        row, tokenizer = self.rows[number], self.base.tokenizer
        if self.form.kind != "messages":
            return self.form.reference(row)
        (encoded,) = encode([self.form.segments_with(row, self.form.reference(row), tokenizer)], tokenizer, frame=False)
        ends = ends_of(self.base.model, tokenizer, self.form.closing(tokenizer))
        return ends.said(encoded.token_ids[encoded.answer_start :], tokenizer)

    @property
    def questions(self) -> Sequence[Mapping[str, object]]:
        """The first row of every question, by column."""
        return [self.rows[numbers[0]] for numbers in self._groups.values()]

    def accuracy(self, rankings: Iterable[Ranking]) -> float:
        """Share of rows whose right completion has the largest total log-likelihood; the first of equals counts.

        Raises: EmptyDataError.
        """
        form, tokenizer, found, questions = self.form, self.base.tokenizer, list[Ranking](), list[Question]()
        for ranking in rankings:
            try:
                segments = [form.segments_with(self.rows[ranking.row], completion, tokenizer) for completion in ranking.completions]
            except RowProblem as problem:
                skip_or_raise(self.rows, ranking.row, problem)
                continue
            encoded = encode(segments, tokenizer, frame=form.adds_special_tokens)
            start = encoded[0].answer_start
            found.append(ranking)
            questions.append(Question(tuple(encoded[0].token_ids[:start]), tuple(tuple(one.token_ids[start:]) for one in encoded)))
        if not found:
            raise EmptyDataError(
                "no row has completions to choose from", where=self.rows.name, got="0 usable rows", expected="at least one",
                do='set on_bad_row = "error" in [data] to see what is wrong with them',
            )  # fmt: skip
        scores = log_likelihoods(self.base.model, questions, batch_size=self.settings.batch_size, max_length=self.max_length)
        return float(np.mean([int(np.argmax(score)) == ranking.truth for score, ranking in zip(scores, found, strict=True)]))
