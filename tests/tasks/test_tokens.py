"""Token ids and loss masks: segment by segment, whatever the tokenizer's special tokens are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from atoll.config.schema import Data
from atoll.tasks.chat import Segment
from atoll.tasks.rows import Rows
from atoll.tasks.text import text_form
from atoll.tasks.tokens import begin_ids, encode, encode_texts, pad_id, tokenize

from tests.tasks.letters import letters_tokenizer

RowsOf = Callable[..., Rows]
FORM = Data(prompt="{a}>", completion="{b}")


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("eos", ["</s>", None])
def test_begin_end_and_mask(rows_of: RowsOf, begin: bool, end: bool, eos: str | None) -> None:
    """An end token that the tokenizer adds of itself is left off the prompt, and one is there once, with loss, if there is one at all."""
    tokenizer = letters_tokenizer(begin=begin, end=end, eos=eos)
    rows = rows_of("a,b\nxy,zw\n")
    example = tokenize(rows, text_form(FORM, rows.columns), tokenizer, 32)[0]
    wanted = [1] * begin + encode_texts(["xy>zw"], tokenizer)[0] + [2] * (eos is not None)
    assert example.token_ids.tolist() == wanted
    assert example.loss_mask.tolist() == [False] * (3 + begin) + [True] * (2 + (eos is not None))
    assert begin_ids(tokenizer) == [1] * begin


def test_the_padding_id_may_be_a_label(rows_of: RowsOf) -> None:
    """ "~" is unknown here, and unknown is padding, id 0: it carries loss like any other token."""
    tokenizer = letters_tokenizer()
    rows = rows_of("a,b\nx,~z~\n")
    example = tokenize(rows, text_form(FORM, rows.columns), tokenizer, 32)[0]
    assert example.token_ids[-4] == pad_id(tokenizer) == 0
    assert example.loss_mask[-4:].all()


def test_the_first_token_is_never_a_label(rows_of: RowsOf) -> None:
    rows = rows_of("text\nabc\n")
    example = tokenize(rows, text_form(Data(), rows.columns), letters_tokenizer(begin=False, eos=None), 32)[0]
    assert example.loss_mask.tolist() == [False, True, True]


def test_long_rows_lose_their_end_and_are_counted(rows_of: RowsOf) -> None:
    rows = rows_of("a,b\nx,0123456789\nx,01234\nx,0123\n")
    examples = tokenize(rows, text_form(FORM, rows.columns), letters_tokenizer(), 8)
    assert [len(example) for example in examples] == [8, 8, 8]
    assert examples.was_cut.tolist() == [True, True, False]  # The end token of the second does not fit.
    assert (examples.num_truncated, examples.num_tokens, examples.num_label_tokens) == (2, 24, 15)
    some = examples.take([2, 0])
    assert (some.row_numbers.tolist(), some.num_truncated) == ([2, 0], 1)


def test_chats_bring_their_own_special_tokens(rows_of: RowsOf) -> None:
    tokenizer = letters_tokenizer()
    rows = rows_of('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n', "a.jsonl")
    example = tokenize(rows, text_form(Data(), rows.columns), tokenizer, 32)[0]
    assert example.token_ids.tolist() == tokenizer.apply_chat_template(rows[0]["messages"], tokenize=True, return_dict=False)
    assert example.loss_mask.tolist() == [False, False, False, False, True, True]


def test_no_padding_token_at_all() -> None:
    assert pad_id(letters_tokenizer(pad=None)) == 2
    assert pad_id(letters_tokenizer(pad=None, eos=None)) == 0


def test_a_completion_has_the_tokens_of_running_text(shared: object) -> None:
    """A tokenizer that begins every text with a space must not put a second one before the completion."""
    from transformers import AutoTokenizer

    for name in ("stories260K", "house-4M", "tokenizer-gpt2", "tokenizer-llama2"):
        tokenizer = AutoTokenizer.from_pretrained(f"{shared}/models/{name}")
        (encoded,) = encode([(Segment("name[A] ->", False), Segment(" The cat.", True))], tokenizer, frame=True)
        assert encoded.token_ids[len(begin_ids(tokenizer)) : -1] == encode_texts(["name[A] -> The cat."], tokenizer)[0]
        assert encoded.token_ids[: encoded.answer_start] == begin_ids(tokenizer) + encode_texts(["name[A] ->"], tokenizer)[0]
        assert encoded.token_ids[-1] == tokenizer.eos_token_id
        # A border inside a token: the prompt keeps the tokens that it has when it stands alone.
        (split,) = encode([(Segment("name[A] -> The c", False), Segment("at", True))], tokenizer, frame=True)
        assert split.token_ids[: split.answer_start] == begin_ids(tokenizer) + encode_texts(["name[A] -> The c"], tokenizer)[0]
