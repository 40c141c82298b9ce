"""Generation ends where training put the end of a turn, as a token or as plain text, and a chat's prompt has its begin token once."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from atoll.base.load import Base
from atoll.config.schema import Data, Evaluate
from atoll.tasks.evaluate import evaluate
from atoll.tasks.rows import Rows
from atoll.tasks.scoring.generation import ends_of, generate_texts
from atoll.tasks.text import text_form
from atoll.tasks.tokens import begin_ids, encode, encode_texts, tokenize, with_begin

from tests.tasks.letters import letters_tokenizer

RowsOf = Callable[..., Rows]
TEMPLATES = {
    "as a token": "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|system|>\n{% endfor %}",
    "as a text": "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }} .;\n{% endfor %}",
    "as the end token": "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}",
    "after a thought": "{% for m in messages %}<|{{ m.role }}|>{{ '()' if m.role == 'assistant' }}{{ m.content }}<|system|>{% endfor %}",
}
OPEN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def with_template(kind: str) -> PreTrainedTokenizerFast:
    tokenizer = letters_tokenizer()
    tokenizer.chat_template = TEMPLATES[kind] + OPEN
    return tokenizer


def that_says(text: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A model that says one token after the other, each by the one before it, and the first of them again after the last."""
    size = len(tokenizer)
    config = AutoConfig.for_model(
        "llama", vocab_size=size, hidden_size=size + size % 2, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.model.layers.parameters():
        parameter.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(*model.model.embed_tokens.weight.shape))
    model.lm_head.weight.zero_()
    (ids,) = encode_texts([text], tokenizer)
    for before, after in zip(ids, [*ids[1:], ids[1]], strict=True):
        model.lm_head.weight[after, before] = 1.0
    return model


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_model_that_answers_right_is_right(rows_of: RowsOf, kind: str) -> None:
    """It would go on with the next turn for ever."""
    tokenizer, rows = with_template(kind), rows_of(json.dumps(ROW) + "\n", "rows.jsonl")
    form = text_form(Data(), rows.columns)
    (encoded,) = encode([form.segments(rows[0], tokenizer)], tokenizer, frame=False)
    model = that_says(tokenizer.decode(encoded.token_ids[encoded.answer_start - 1 :]), tokenizer)
    settings = Evaluate(metrics=("exact_match",), max_new_tokens=24)
    scores = evaluate(Base("says", model, tokenizer, False), rows, form, settings, max_length=48)
    assert scores["exact_match"] == 1.0
    prompt = encode_texts([form.prompt_text(rows[0], tokenizer)], tokenizer)[0]
    said = generate_texts(model, tokenizer, [prompt] * 2, max_new_tokens=24, batch_size=2, closing=form.closing(tokenizer))
    assert [text.strip() for text in said] == [("()" if kind == "after a thought" else "") + "yo"] * 2
    (runs_on,) = generate_texts(model, tokenizer, [prompt], max_new_tokens=24, batch_size=1)
    assert (len(runs_on) > len(said[0])) == (kind != "as the end token")


def test_ends_are_the_tokenizers_the_models_and_the_templates() -> None:
    tokenizer = letters_tokenizer()
    model = that_says("ab", tokenizer)
    model.generation_config.eos_token_id = [2, 7]
    assert ends_of(model, tokenizer).token_ids == (2, 7)
    assert ends_of(model, tokenizer, "\n<|user|></s>").token_ids == (2, 7, tokenizer.convert_tokens_to_ids("<|user|>"))
    assert ends_of(model, tokenizer, " END\n").text == "END"


@pytest.mark.parametrize(
    ("text", "begins", "ends"), [("ab", 1, 1), ("<s>ab", 1, 1), ("ab</s>", 1, 1), ("<s>ab</s>", 1, 1), ("a<s>b", 2, 1)]
)
def test_begin_and_end_tokens_that_a_text_brings_come_once(rows_of: RowsOf, text: str, begins: int, ends: int) -> None:
    tokenizer, rows = letters_tokenizer(), rows_of(json.dumps({"text": text}) + "\n", "rows.jsonl")
    ids = tokenize(rows, text_form(Data(), rows.columns), tokenizer, 32)[0].token_ids.tolist()
    assert (ids[0], ids.count(1), ids[-1], ids.count(2)) == (1, begins, 2, ends)
    assert with_begin(encode_texts(["<s>a"], tokenizer)[0], begin_ids(tokenizer)) == with_begin(encode_texts(["a"], tokenizer)[0], [1])
