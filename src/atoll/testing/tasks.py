"""Checks of readers and metrics: rows that are one length, and scores that are numbers, the same for the same input."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atoll.config.schema import Data, Evaluate
from atoll.errors import AtollError, InputError
from atoll.tasks.readers.reader import FileRows, Origin
from atoll.tasks.rows import Rows
from atoll.tasks.scoring.ranking import Ranking
from atoll.tasks.text import TextForm, text_form
from atoll.testing.law import BrokenLaw, Subject

_TEXTS = (("a b c", ("a b c", "c b a")), ("", ("a",)), ("the cat sat on the mat", ("a dog", "the cat sat")), ("é 漢", ("é 漢",)))


def check_reader(subject: Subject) -> None:
    """Raises: BrokenLaw; ValueError without a sample."""
    if subject.sample is None:
        raise ValueError("a reader is checked on a file that it reads: sample=Path(...)")
    origin = Origin(subject.sample.name, subject.sample, subject.name)
    first, again = (subject.make().read(origin, "error") for _ in range(2))
    subject.expect(isinstance(first, FileRows), f"read gives FileRows, not {type(first).__name__}")
    subject.expect(len(first.records) > 0 and len(first.columns) > 0, "the sample has rows and columns")
    lengths = {len(values) for values in first.columns.values()}
    subject.expect(lengths == {len(first.records)}, f"columns are as long as records: {lengths} beside {len(first.records)}")
    subject.expect(bool((np.diff(first.records) > 0).all()), "records are numbers in the order of the file")
    subject.expect(all(isinstance(name, str) and name for name in first.columns), "columns have names")
    same = {name: list(values) for name, values in first.columns.items()} == {name: list(values) for name, values in again.columns.items()}
    subject.expect(same, "the same file gives the same rows")
    skipping = subject.make().read(origin, "skip")
    subject.expect(len(skipping.records) == len(first.records), "of a sample without bad rows nothing is skipped")
    with tempfile.TemporaryDirectory() as folder:
        _check_no_rows(subject, Path(folder) / f"empty{subject.sample.suffix}")


def _check_no_rows(subject: Subject, path: Path) -> None:
    path.write_bytes(b"")
    try:
        read = subject.make().read(Origin(path.name, path, subject.name), "error")
    except InputError:
        return
    except Exception as problem:
        if isinstance(problem, MemoryError):
            raise
        raise BrokenLaw(f"{subject.name}: an empty file is an EmptyDataError, or no rows, and not {type(problem).__name__}") from problem
    subject.expect(len(read.records) == 0, "an empty file has no rows")


@dataclass(eq=False)
class _Answers:
    """What metrics are given, without a model: texts are as they are here, and the first completion is always the likeliest."""

    settings: Evaluate
    rows: Rows
    form: TextForm
    usable: Sequence[int]

    @property
    def generated(self) -> Sequence[str]:
        return [text for text, _ in _TEXTS]

    @property
    def references(self) -> Sequence[Sequence[str]]:
        return [list(several) for _, several in _TEXTS]

    @property
    def questions(self) -> Sequence[Mapping[str, object]]:
        return [self.rows[number] for number in self.usable]

    def accuracy(self, rankings: Iterable[Ranking]) -> float:
        found = [ranking.truth == 0 for ranking in rankings]
        return sum(found) / len(found)


def check_metric(subject: Subject) -> None:
    """Raises: BrokenLaw."""
    firsts = [references[0] for _, references in _TEXTS]
    columns: dict[str, Sequence[object]] = {
        "prompt": [f"q{number}" for number in range(len(_TEXTS))], "completion": firsts, "slots": [f"name[{text}]" for text in firsts],
        "choices": [[text, "x"] for text in firsts], "answer": ["0"] * len(_TEXTS),
    }  # fmt: skip
    numbers = np.arange(len(_TEXTS))
    rows = Rows(tuple(columns), tuple(columns.values()), ("rows",), np.zeros(len(_TEXTS), dtype=np.int64), numbers, 0, "error")
    settings = Evaluate.model_validate({"metrics": (subject.name,), **{key: key for key in subject.trait("columns")}})
    answers = _Answers(settings, rows, text_form(Data(), rows.columns), [int(number) for number in numbers])
    try:
        first, again = (subject.make().score(answers) for _ in range(2))
    except AtollError as problem:
        subject.expect(False, f"rows that have all that it asks for are refused: {problem.what}")
        return
    subject.expect(isinstance(first, Mapping) and len(first) > 0, "score gives at least one number by name")
    subject.expect(all(isinstance(name, str) and math.isfinite(score) for name, score in first.items()), f"scores are finite: {first}")
    subject.expect(dict(first) == dict(again), "the same answers give the same scores")
