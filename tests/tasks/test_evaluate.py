"""Evaluation against plain, slow computations: one row at a time, through the library's own forward pass."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from atoll.base.load import Base
from atoll.config.schema import Data, Evaluate
from atoll.errors import BadRowError, BadValueError, ColumnError, ConflictError, EmptyDataError, InputError
from atoll.tasks.evaluate import check_metrics, evaluate
from atoll.tasks.rows import Rows
from atoll.tasks.scoring.generation import generate_texts
from atoll.tasks.scoring.likelihood import Question, log_likelihoods
from atoll.tasks.scoring.ranking import choice_rankings
from atoll.tasks.text import text_form
from atoll.tasks.tokens import begin_ids, encode_texts, tokenize

from tests.conftest import random_model
from tests.families import FAMILIES, build
from tests.tasks.letters import letters_tokenizer

RowsOf = Callable[..., Rows]
FORM = Data(prompt="{q}>", completion=" {a}")
QUIZ = [
    {"q": "ab", "a": "x", "choices": ["x", "yz", "w"], "right": 0},
    {"q": "abcdef", "a": "yz", "choices": ["w", "yz"], "right": "yz"},
    {"q": "c", "a": "w", "choices": ["x", "w"], "right": "1"},
    {"q": "dd", "a": "x", "choices": ["x", "yz", "w", "v"], "right": "x"},
]  # fmt: skip


def quiz(rows_of: RowsOf) -> Rows:
    return rows_of("\n".join(map(json.dumps, QUIZ)), "quiz.jsonl")


def losses(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    ids = torch.tensor(prompt + answer)
    return nn.functional.cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:], reduction="none")[len(prompt) - 1 :]


def ids_of(base: Base, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    prompt_ids, answer_ids = encode_texts([prompt, answer], base.tokenizer)
    return begin_ids(base.tokenizer) + prompt_ids, [*answer_ids, 2]


def test_loss_is_the_mean_over_label_tokens(rows_of: RowsOf, letters_base: Base) -> None:
    rows = quiz(rows_of)
    result = evaluate(letters_base, rows, text_form(FORM, rows.columns), Evaluate(batch_size=3), max_length=32)
    wanted = torch.cat([losses(letters_base.model, *ids_of(letters_base, f"{row['q']}>", f" {row['a']}")) for row in QUIZ])
    assert result["loss"] == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert (result["num_rows"], result["num_label_tokens"]) == (4, len(wanted))


def test_accuracies_are_those_of_slow_likelihoods(rows_of: RowsOf, letters_base: Base) -> None:
    rows = quiz(rows_of)
    settings = Evaluate(metrics=("choice_accuracy", "label_accuracy"), choices="choices", answer="right")
    form = text_form(FORM, rows.columns)
    result = evaluate(letters_base, rows, form, settings, max_length=32)

    def best(row: dict[str, object], options: list[str]) -> str:
        return min(options, key=lambda option: float(losses(letters_base.model, *ids_of(letters_base, f"{row['q']}>", f" {option}")).sum()))

    assert result["choice_accuracy"] == np.mean([best(row, row["choices"]) == row["a"] for row in QUIZ])
    assert result["label_accuracy"] == np.mean([best(row, ["w", "x", "yz"]) == row["a"] for row in QUIZ])
    named = Evaluate(metrics=("label_accuracy",), labels=("x", "yz", "w"))
    assert evaluate(letters_base, rows, form, named, max_length=32)["label_accuracy"] == result["label_accuracy"]


@pytest.mark.parametrize(
    ("choices", "answer", "completion", "right"),
    [
        (["0", "2", "1"], 1, "2", "2"), (["0", "2", "1"], 1, "1", "1"), (["0", "2", "1"], 1, "so two", "2"),
        (["0", "2", "1"], "1", "2", "2"), (["0", "2", "1"], "1", "1", "1"), (["0", "2", "1"], "1", "so two", None),
        ([0, 2, 1], 1, "2", "2"), ([0, 2, 1], 1, "so two", None),
        ([0, 2, 1], 0, "", "0"), (["1", "0"], 0, "1", "1"), (["x", "y"], 1, "", "y"), (["x", "y"], "1", "", "y"),
        (["x", "y"], 1.0, "", "y"),
        (["x", "y"], 2, "", None), (["x", "y"], -1, "", None), (["x", "y"], 0.5, "", None), ([10, 20], 20, "", "20"),
        (["7", "8"], 8, "", "8"), ([0.5, 1.5], 1.5, "", "1.5"), (["True", "False"], True, "", "True"), (["x", "x "], 1, "", None),
        ('["0", "2", "1"]', "1", "2", "2"), (["x", "y"], " y", "", "y"),
    ],
)  # fmt: skip
def test_an_answer_is_a_text_or_a_number_and_never_taken_for_the_other(
    rows_of: RowsOf, choices: object, answer: object, completion: str, right: str | None
) -> None:
    rows = rows_of(json.dumps({"q": "?", "a": completion, "choices": choices, "right": answer}) + "\n", "a.jsonl")
    settings = Evaluate(metrics=("choice_accuracy",), choices="choices", answer="right")
    form = text_form(Data(prompt="{q}", completion="{a}"), rows.columns)
    if right is None:
        with pytest.raises(BadRowError):
            list(choice_rankings(rows, [0], form, settings))
    else:
        (ranking,) = choice_rankings(rows, [0], form, settings)
        assert ranking.completions[ranking.truth] == right


# Where the layout of shared prompts is wrong, by what makes it so.
ODD: dict[str, dict[str, object]] = {
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "new_decoder_architecture": False},
    "mistral": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
        "sliding_window": 6,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "phi3": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "pad_token_id": 0,
        "max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 16,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("family", [*ODD, *(f"usual {name}" for name in FAMILIES)])
def test_likelihoods_are_those_of_single_rows_in_whatever_layout(family: str, batch_size: int) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "initializer_range": 0.2}
    if family in ODD:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | ODD[family])).eval().requires_grad_(False)
    else:
        model = build(family.removeprefix("usual ")).eval().requires_grad_(False)
    random = np.random.default_rng(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(int(i) for i in random.integers(3, 96, length))

    questions = [Question(ids(prompt), tuple(map(ids, answers))) for prompt, answers in ((5, (4, 9)), (1, (2, 2)), (12, (3, 9, 1)))]
    found = log_likelihoods(model, questions, batch_size=batch_size, max_length=48)
    for question, scores in zip(questions, found, strict=True):
        wanted = [-float(losses(model, list(question.prompt), list(candidate)).sum()) for candidate in question.candidates]
        np.testing.assert_allclose(scores, wanted, atol=1e-3)


def test_shared_prompts_change_no_likelihood(family_model: PreTrainedModel) -> None:
    """Prompt once and candidates side by side, or (BLOOM) everything anew: the sums are those of single rows."""
    random = np.random.default_rng(0)

    def ids(low: int) -> tuple[int, ...]:
        return tuple(int(i) for i in random.integers(3, 96, random.integers(low, 8)))

    questions = [Question(ids(1), tuple(ids(1) for _ in range(k))) for k in (2, 5, 3, 2)]
    found = log_likelihoods(family_model, questions, batch_size=3, max_length=32)
    for question, scores in zip(questions, found, strict=True):
        wanted = [-float(losses(family_model, list(question.prompt), list(candidate)).sum()) for candidate in question.candidates]
        np.testing.assert_allclose(scores, wanted, atol=1e-4)


def test_long_prompts_lose_their_beginning_for_all_candidates_alike(letters_base: Base) -> None:
    question = Question(tuple(range(3, 40)), ((50, 51), (52,)))
    found = log_likelihoods(letters_base.model, [question], batch_size=4, max_length=10)[0]
    wanted = [-float(losses(letters_base.model, list(question.prompt[-8:]), list(candidate)).sum()) for candidate in question.candidates]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_batched_generation_is_generation_one_by_one(family_model: PreTrainedModel) -> None:
    tokenizer = letters_tokenizer()
    prompts = [[1, *range(10, 10 + length)] for length in (3, 9, 1, 5, 2)] + [[]]
    together = generate_texts(family_model, tokenizer, prompts, max_new_tokens=12, batch_size=4)
    assert together == [generate_texts(family_model, tokenizer, [prompt], max_new_tokens=12, batch_size=1)[0] for prompt in prompts]
    ids = torch.tensor([prompts[0]])
    for _ in range(12):
        ids = torch.cat([ids, family_model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == 2:
            break
    assert together[0] == tokenizer.decode(ids[0, len(prompts[0]) :], skip_special_tokens=True)


def test_generation_ignores_the_settings_a_model_brings_along(letters_base: Base) -> None:
    model = random_model("llama")
    plain = generate_texts(model, letters_base.tokenizer, [[1, 20, 30]], max_new_tokens=10, batch_size=1)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 3.0
    kept = model.generation_config
    assert generate_texts(model, letters_base.tokenizer, [[1, 20, 30]], max_new_tokens=10, batch_size=1) == plain
    assert model.generation_config is kept
    with pytest.raises(BadValueError):
        generate_texts(model, letters_base.tokenizer, [[1]], max_new_tokens=128, batch_size=1)


def test_generated_metrics_group_rows_of_one_prompt(rows_of: RowsOf, letters_base: Base) -> None:
    (answer,) = generate_texts(
        letters_base.model, letters_base.tokenizer, [ids_of(letters_base, "ab>", "")[0]], max_new_tokens=6, batch_size=1
    )
    rows = rows_of("\n".join(json.dumps({"q": "ab", "a": a, "slots": f"x[{answer[1:3]}], y[zzz]"}) for a in ("other", answer)), "a.jsonl")
    settings = Evaluate(metrics=("exact_match", "bleu", "rouge", "slot_accuracy"), slots="slots", max_new_tokens=6)
    result = evaluate(letters_base, rows, text_form(FORM, rows.columns), settings, max_length=32)
    assert result["exact_match"] == 1.0
    assert result["slot_accuracy"] == 0.5
    assert {"bleu", "rouge1", "rouge2", "rougeL"} <= set(result)


def test_chats_are_evaluated_too(rows_of: RowsOf, letters_base: Base) -> None:
    talks = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in (("hi", "yes"), ("oh", "no"))]
    rows = rows_of("\n".join(map(json.dumps, talks)), "a.jsonl")
    settings = Evaluate(metrics=("exact_match", "label_accuracy"), max_new_tokens=4)
    result = evaluate(letters_base, rows, text_form(Data(), rows.columns), settings, max_length=32)
    prompts = [
        letters_base.tokenizer.apply_chat_template(talk["messages"][:1], add_generation_prompt=True, return_dict=False) for talk in talks
    ]
    answers = {a: [*encode_texts([a], letters_base.tokenizer)[0], 2] for a in ("yes", "no")}
    right = [min(answers, key=lambda a: float(losses(letters_base.model, prompt, answers[a]).sum())) for prompt in prompts]
    assert result["label_accuracy"] == np.mean([right[0] == "yes", right[1] == "no"])
    assert result["exact_match"] == 0.0


def test_the_model_and_the_random_state_are_left_as_they_were(rows_of: RowsOf, letters_base: Base) -> None:
    model = random_model("llama")
    model.train()
    model.lm_head.eval()
    rows, before = quiz(rows_of), torch.get_rng_state()
    settings = Evaluate(metrics=("exact_match", "label_accuracy"), max_new_tokens=4)
    form = text_form(FORM, rows.columns)
    examples = tokenize(rows, form, letters_base.tokenizer, 32)
    result = evaluate(dataclasses.replace(letters_base, model=model), rows, form, settings, max_length=32, examples=examples)
    assert result == evaluate(letters_base, rows, form, settings, max_length=32)
    assert model.training
    assert not model.lm_head.training
    assert torch.equal(before, torch.get_rng_state())


BAD: dict[str, tuple[Data, Evaluate, type[InputError], str, str]] = {
    "bleu of plain text": (Data(text="{q}"), Evaluate(metrics=("bleu",)), ConflictError, "[evaluate] metrics", "leave metrics empty"),
    "no slots": (FORM, Evaluate(metrics=("slot_accuracy",)), ConflictError, "[evaluate] slots", "set slots"),
    "no choices": (FORM, Evaluate(metrics=("choice_accuracy",)), ConflictError, "[evaluate] choices", "set choices"),
    "unknown choices": (FORM, Evaluate(metrics=("choice_accuracy",), choices="choice"), ColumnError, "[evaluate] choices", "'choices'?"),
    "unknown answer": (
        FORM, Evaluate(metrics=("choice_accuracy",), choices="choices", answer="rigth"), ColumnError, "[evaluate] answer", "'right'?",
    ),
    "one label": (FORM, Evaluate(metrics=("label_accuracy",), labels=("x",)), BadValueError, "[evaluate] labels", "once"),
    "a label twice": (FORM, Evaluate(metrics=("label_accuracy",), labels=("x", "y", "x")), BadValueError, "[evaluate] labels", "once"),
    "a column without slots": (FORM, Evaluate(metrics=("slot_accuracy",), slots="q"), BadValueError, "[evaluate] slots = 'q'", "column"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_metrics_that_cannot_be_had_are_refused_before_any_work(rows_of: RowsOf, kind: str) -> None:
    data, settings, error, where, do = BAD[kind]
    rows = quiz(rows_of)
    with pytest.raises(error) as caught:
        check_metrics(settings, text_form(data, rows.columns), rows)
    assert caught.value.where == where
    assert do in caught.value.do


BAD_ROWS = {
    "choices are no list": ({"choices": "x or w"}, "column choices", "x or w"),
    "one choice": ({"choices": ["x"]}, "column choices", "['x']"),
    "answer is no choice": ({"right": "v"}, "column right", "'v'"),
    "number out of range": ({"right": 7}, "column right", "'7'"),
    "no answer": ({"right": None}, "column right", "no value"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_choices_are_named_or_skipped(rows_of: RowsOf, letters_base: Base, kind: str) -> None:
    change, where, got = BAD_ROWS[kind]
    settings = Evaluate(metrics=("choice_accuracy",), choices="choices", answer="right")
    lines = [json.dumps(QUIZ[0]), json.dumps({**QUIZ[0], **change})]
    rows = rows_of("\n".join(lines), "a.jsonl")
    with pytest.raises(BadRowError) as caught:
        evaluate(letters_base, rows, text_form(FORM, rows.columns), settings, max_length=32)
    assert caught.value.where == f"a.jsonl, line 2, {where}"
    assert got in caught.value.got
    rows = rows_of("\n".join(lines), "a.jsonl", on_bad_row="skip")
    assert evaluate(letters_base, rows, text_form(FORM, rows.columns), settings, max_length=32)["choice_accuracy"] in (0.0, 1.0)
    rows = rows_of(lines[1], "a.jsonl", on_bad_row="skip")
    with pytest.raises(EmptyDataError):
        evaluate(letters_base, rows, text_form(FORM, rows.columns), settings, max_length=32)


def test_an_answer_outside_the_labels_is_a_bad_row(rows_of: RowsOf, letters_base: Base) -> None:
    rows = quiz(rows_of)
    with pytest.raises(BadRowError) as caught:
        evaluate(letters_base, rows, text_form(FORM, rows.columns), Evaluate(metrics=("label_accuracy",), labels=("x", "w")), max_length=32)
    assert caught.value.where == "quiz.jsonl, line 2"


def test_free_text_is_no_label(rows_of: RowsOf, letters_base: Base) -> None:
    rows = rows_of("q,a\n" + "".join(f"x,{n}\n" for n in range(300)))
    with pytest.raises(BadValueError) as caught:
        evaluate(letters_base, rows, text_form(FORM, rows.columns), Evaluate(metrics=("label_accuracy",)), max_length=32)
    assert "300" in caught.value.got
