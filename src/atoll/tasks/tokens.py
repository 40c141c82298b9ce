"""Rows as token ids with a loss mask.

Each segment is tokenized in the context of those before it, so that a completion has the tokens it would have in running text, while the
prompt has the very tokens that a prompt alone has. Begin tokens come first where the tokenizer adds them; the end token comes last, with
loss; where a text brings them itself, as one that a chat template wrote, there is no second one. Rows that are too long lose their end,
as in Axolotl and TRL; a row that thereby loses every label is a bad row.

Shape suffixes: T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np

from atoll.errors import BadRowError, EmptyDataError
from atoll.tasks.chat import Segment
from atoll.tasks.rows import RowProblem, Rows
from atoll.tasks.text import TextForm
from atoll.units import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 1024
"""Rows given to the tokenizer at once: enough for its threads, little beside the data."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row: its tokens, and which of them are to be predicted (never the first).

    Shapes: token_ids int32 [T], loss_mask bool [T].
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    label: int | None = None
    """The row's class, where that is what is told; then `loss_mask` counts the row as one label, at its last token."""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Examples(Sequence[Example]):
    """Examples in the order of their rows."""

    items: tuple[Example, ...]
    row_numbers: np.ndarray
    """The row that each example comes from."""
    was_cut: np.ndarray
    num_skipped: int
    """Rows left out here because they could not be used; those that could not be read are counted by Rows."""
    max_length: int

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_truncated(self) -> int:
        """Examples cut to max_length."""
        return int(self.was_cut.sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(example) for example in self.items)

    @property
    def num_label_tokens(self) -> int:
        """Tokens that carry loss."""
        return sum(int(example.loss_mask.sum()) for example in self.items)

    def take(self, indices: Iterable[int]) -> Examples:
        """Some of the examples, in the order given; the count of skipped rows stays with the whole."""
        chosen = np.fromiter(indices, dtype=np.int64)
        return Examples(tuple(self.items[i] for i in chosen), self.row_numbers[chosen], self.was_cut[chosen], 0, self.max_length)

    def joined(self, *others: Examples) -> Examples:
        """These examples and others behind them; row numbers stay those of the rows they came from."""
        parts = (self, *others)
        return Examples(
            tuple(item for part in parts for item in part.items), np.concatenate([part.row_numbers for part in parts]),
            np.concatenate([part.was_cut for part in parts]), sum(part.num_skipped for part in parts), self.max_length,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a row before it is cut, which of them carry loss, and where its last segment with loss begins."""

    token_ids: list[int]
    loss_mask: list[bool]
    answer_start: int


def tokenize(rows: Rows, form: TextForm, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
    """Every usable row as an example of at most `max_length` tokens.

    Raises: BadRowError where a row cannot be used and is not to be skipped; EmptyDataError where none is left; TokenizerError.
    """
    items, numbers, cut, skipped = [], [], [], 0
    for start in range(0, len(rows), CHUNK_ROWS):
        usable: list[tuple[int, tuple[Segment, ...]]] = []
        for index in range(start, min(start + CHUNK_ROWS, len(rows))):
            try:
                usable.append((index, form.segments(rows[index], tokenizer)))
            except RowProblem as problem:
                skipped += skip_or_raise(rows, index, problem)
        encodings = encode([segments for _, segments in usable], tokenizer, frame=form.adds_special_tokens)
        for (index, _), encoded in zip(usable, encodings, strict=True):
            try:
                items.append(_example(encoded, max_length))
            except RowProblem as problem:
                skipped += skip_or_raise(rows, index, problem)
                continue
            numbers.append(index)
            cut.append(len(encoded.token_ids) > max_length)
    if not items:
        raise EmptyDataError(
            "no row can be used", where=rows.name, got=f"{counted(skipped, 'row')}, all skipped", expected="at least one usable row",
            do='set on_bad_row = "error" to see what is wrong with them',
        )  # fmt: skip
    return Examples(tuple(items), np.array(numbers, dtype=np.int64), np.array(cut, dtype=bool), skipped, max_length)


def skip_or_raise(rows: Rows, index: int, problem: RowProblem) -> int:
    """1, the number of rows skipped, where bad rows are to be skipped.

    Raises: BadRowError otherwise.
    """
    if rows.on_bad_row == "skip":
        return 1
    column = f", column {problem.column}" if problem.column else ""
    raise BadRowError(
        "a row cannot be used", where=rows.where(index) + column, got=problem.got, expected=problem.expected,
        do='mend the row, or set on_bad_row = "skip" in [data] to leave such rows out',
    )  # fmt: skip


def encode(rows: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase, *, frame: bool) -> list[Encoded]:
    """Rows of segments as tokens; with `frame`, between the tokenizer's begin token (if it adds one) and its end token (if it has one)."""
    grown = [["".join(segment.text for segment in row[: k + 1]) for k in range(len(row))] for row in rows]
    ids_of = iter(encode_texts([text for texts in grown for text in texts], tokenizer))
    begin = begin_ids(tokenizer) if frame else []
    end = [tokenizer.eos_token_id] if frame and tokenizer.eos_token_id is not None else []
    return [_join(row, [next(ids_of) for _ in row], tokenizer, begin, end) for row in rows]


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts, without begin and end tokens."""
    if not texts:
        return []
    different = list(dict.fromkeys(texts))  # Data sets with several references repeat their prompts.
    ids = tokenizer(different, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False)[
        "input_ids"
    ]
    by_text: dict[str, list[int]] = dict(zip(different, ids, strict=True))
    return [by_text[text] for text in texts]


def begin_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer of itself puts before a text. What it puts behind one is left off: a prompt must not end with an end token."""
    bare, framed = encode_texts(["a"], tokenizer)[0], list(tokenizer("a")["input_ids"])
    for start in range(len(framed) - len(bare) + 1):
        if framed[start : start + len(bare)] == bare:
            return framed[:start]
    return []


def with_begin(token_ids: list[int], begin: list[int]) -> list[int]:
    """A text's tokens behind the begin tokens, unless it has brought them itself."""
    return token_ids if begin and token_ids[: len(begin)] == begin else begin + token_ids


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill up rows with. Any would do: nothing looks at it, and no loss falls there."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token_id) for token_id in known if token_id is not None)


def _join(
    row: Sequence[Segment], grown: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, begin: list[int], end: list[int]
) -> Encoded:
    begin = [] if grown[-1][: len(begin)] == begin else begin
    ids, mask, before, answer_start = list(begin), [False] * len(begin), list[int](), 0
    for segment, so_far in zip(row, grown, strict=True):
        continues = so_far[: len(before)] == before
        # Where a token would straddle the border, the segment is tokenized alone: the prompt must keep the tokens it has when generating.
        new = so_far[len(before) :] if continues else encode_texts([segment.text], tokenizer)[0]
        answer_start = len(ids) if segment.has_loss else answer_start
        ids += new
        mask += [segment.has_loss] * len(new)
        before = so_far
    end = [] if ids[-1:] == end else end
    return Encoded(ids + end, mask + [True] * len(end), answer_start)


def _example(encoded: Encoded, max_length: int) -> Example:
    token_ids = np.array(encoded.token_ids[:max_length], dtype=np.int32)
    loss_mask = np.array(encoded.loss_mask[:max_length], dtype=bool)
    loss_mask[:1] = False  # Nothing comes before the first token that could predict it.
    if len(token_ids) < 2:
        raise RowProblem(counted(len(token_ids), "token"), "at least two tokens: one to predict, and one to predict it from")
    if not loss_mask.any():
        first = next((i for i, has_loss in enumerate(encoded.loss_mask) if has_loss), None)
        raise RowProblem(
            "no token that carries loss" if first is None else f"a completion that begins at token {first}, cut at {max_length}",
            "a completion within max_length tokens; a larger max_length, or a shorter column as in {text:.800}",
        )
    return Example(token_ids, loss_mask)
