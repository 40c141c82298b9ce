"""The metrics that ship: pure functions over lists of strings, and the parts of [evaluate] metrics made of them."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence

from atoll.config.schema import Evaluate
from atoll.tasks.rows import Rows
from atoll.tasks.scoring.metric import ModelAnswers
from atoll.tasks.scoring.ranking import choice_rankings, label_rankings
from atoll.tasks.text import TextForm

SLOT = re.compile(r"[^\[\],]+\[([^\]]*)\]")


def exact_match(generated: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of texts equal to one of their references, spaces at both ends aside."""
    hits = [text.strip() in {reference.strip() for reference in several} for text, several in zip(generated, references, strict=True)]
    return sum(hits) / len(hits)


def bleu(generated: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU by sacrebleu with its standard settings (13a tokens, 4-grams), each text against all its references.

    Units: 0 to 100.
    Source: Post 2018, arXiv:1804.08771.
    """
    import sacrebleu

    most = max(len(several) for several in references)
    # sacrebleu wants as many references for every text; None stands for one that is not there.
    streams = [[several[k].strip() if k < len(several) else None for several in references] for k in range(most)]
    return float(sacrebleu.corpus_bleu([text.strip() for text in generated], streams).score)  # type: ignore[arg-type]


def rouge(generated: Sequence[str], references: Sequence[Sequence[str]]) -> Mapping[str, float]:
    """Mean F-measures rouge1, rouge2 and rougeL by rouge_score, without stemming, each text against its best reference.

    Units: 0 to 1.
    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries".
    """
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(list(names))
    scores = [scorer.score_multi(list(several), text) for text, several in zip(generated, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in names}


def slot_values(slots: str) -> tuple[str, ...]:
    """The values of "key[value], key[value]" pairs."""
    return tuple(value.strip() for value in SLOT.findall(slots) if value.strip())


def slot_accuracy(generated: Sequence[str], slots: Sequence[str]) -> float:
    """Share of all slot values that their text mentions, letter case aside; a value that people paraphrase (yes, no) counts as missed."""
    found = [value.casefold() in text.casefold() for text, pairs in zip(generated, slots, strict=True) for value in slot_values(pairs)]
    return sum(found) / len(found) if found else 0.0


class ExactMatch:
    """[evaluate] metrics = ["exact_match"]."""

    def score(self, answers: ModelAnswers) -> Mapping[str, float]:
        """0 to 1."""
        return {"exact_match": exact_match(answers.generated, answers.references)}


class Bleu:
    """[evaluate] metrics = ["bleu"]."""

    def score(self, answers: ModelAnswers) -> Mapping[str, float]:
        """0 to 100."""
        return {"bleu": bleu(answers.generated, answers.references)}


class Rouge:
    """[evaluate] metrics = ["rouge"]."""

    def score(self, answers: ModelAnswers) -> Mapping[str, float]:
        """Three of them, 0 to 1."""
        return rouge(answers.generated, answers.references)


class SlotAccuracy:
    """[evaluate] metrics = ["slot_accuracy"]."""

    columns = ("slots",)

    def score(self, answers: ModelAnswers) -> Mapping[str, float]:
        """0 to 1; none where no column is named."""
        column = answers.settings.slots
        if column is None:
            return {}
        return {"slot_accuracy": slot_accuracy(answers.generated, [str(row[column] or "") for row in answers.questions])}


class ChoiceAccuracy:
    """[evaluate] metrics = ["choice_accuracy"]."""

    columns = ("choices", "answer")

    def check(self, rows: Rows, usable: Sequence[int], form: TextForm, settings: Evaluate) -> None:
        """Raises: BadRowError for choices that cannot be compared."""
        deque(choice_rankings(rows, usable, form, settings), maxlen=0)

    def score(self, answers: ModelAnswers) -> Mapping[str, float]:
        """0 to 1."""
        rankings = choice_rankings(answers.rows, answers.usable, answers.form, answers.settings)
        return {"choice_accuracy": answers.accuracy(rankings)}


class LabelAccuracy:
    """[evaluate] metrics = ["label_accuracy"]."""

    def check(self, rows: Rows, usable: Sequence[int], form: TextForm, settings: Evaluate) -> None:
        """Raises: BadRowError, BadValueError for labels that cannot be compared."""
        deque(label_rankings(rows, usable, form, settings), maxlen=0)

    def score(self, answers: ModelAnswers) -> Mapping[str, float]:
        """0 to 1."""
        rankings = label_rankings(answers.rows, answers.usable, answers.form, answers.settings)
        return {"label_accuracy": answers.accuracy(rankings)}
