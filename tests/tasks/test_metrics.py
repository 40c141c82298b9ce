"""Scores of generated texts on cases that can be checked by hand."""

from __future__ import annotations

import pytest

from atoll.tasks.scoring import builtin_metrics


def test_exact_match_takes_any_reference_and_ignores_outer_spaces() -> None:
    assert builtin_metrics.exact_match([" a", "b", "c d"], [["x", "a "], ["c"], ["c d"]]) == pytest.approx(2 / 3)


def test_bleu_with_unequal_numbers_of_references() -> None:
    texts = ["the cat sat on the mat", "a dog ran over the hill"]
    assert builtin_metrics.bleu(texts, [["something else", texts[0]], [texts[1]]]) == pytest.approx(100)
    assert builtin_metrics.bleu(texts, [["nothing of this kind"], ["neither here nor there"]]) < 5
    worse = builtin_metrics.bleu(texts, [["the cat sat on a mat"], [texts[1]]])
    assert 20 < worse < 100


def test_bleu_is_sacrebleu() -> None:
    import sacrebleu

    texts, first, second = ["the cat sat here"], ["the cat sat there"], ["a cat sat here now"]
    assert builtin_metrics.bleu(texts, [[first[0], second[0]]]) == sacrebleu.corpus_bleu(texts, [first, second]).score


def test_rouge_takes_the_best_reference() -> None:
    scores = builtin_metrics.rouge(["a b c d"], [["x", "a b c e"]])
    assert scores == pytest.approx({"rouge1": 3 / 4, "rouge2": 2 / 3, "rougeL": 3 / 4})


def test_slot_accuracy() -> None:
    slots = ["name[The Mill], eatType[pub], customer rating[5 out of 5]", "name[Aromi], near[]"]
    assert builtin_metrics.slot_values(slots[0]) == ("The Mill", "pub", "5 out of 5")
    assert builtin_metrics.slot_accuracy(["the mill is a PUB", "nothing"], slots) == pytest.approx(2 / 4)
    assert builtin_metrics.slot_accuracy(["x"], ["no slots"]) == 0.0
