"""The seam of evaluation: a metric, and what it is given of a model and its held-out rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from atoll.config.schema import Evaluate
from atoll.tasks.rows import Rows
from atoll.tasks.scoring.ranking import Ranking
from atoll.tasks.text import TextForm


class ModelAnswers(Protocol):
    """Held-out rows with what a model makes of them. It is asked when a metric looks, and once for all metrics.

    Rows with one prompt are one question with several references, as E2E has them; [evaluate] generate_rows counts questions.
    """

    settings: Evaluate
    rows: Rows
    form: TextForm
    usable: Sequence[int]
    """Numbers of the rows that can be used."""

    @property
    def generated(self) -> Sequence[str]:
        """The model's completion of every question."""

    @property
    def references(self) -> Sequence[Sequence[str]]:
        """The right ones, by question."""

    @property
    def questions(self) -> Sequence[Mapping[str, object]]:
        """The first row of every question, by column."""

    def accuracy(self, rankings: Iterable[Ranking]) -> float:
        """Share of rows whose right completion, of those that compete, has the largest total log-likelihood.

        Raises: EmptyDataError where there are none.
        """


class Metric(Protocol):
    """A metric. Its class may name `columns`: keys of [evaluate] that must name a column of the held-out rows.

    It may have `check(rows, usable, form, settings)`, which raises for rows that it cannot be had of before any model is asked.
    """

    def score(self, answers: ModelAnswers) -> Mapping[str, float]:
        """One or several scores by name, from 0 to 1 unless the name is known for another range.

        Raises: InputError leaves for rows that it cannot be had of.
        """
