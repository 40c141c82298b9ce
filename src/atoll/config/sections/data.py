"""[data] of run.toml: see docs/data.md for what each form of rows is taken as."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from atoll.config.named import Named
from atoll.config.quantities import Bytes
from atoll.config.sections.section import Section, Text


class Data(Section):
    """[data] rows in, and how a row becomes tokens."""

    train: Text = "demo"
    """"demo" (built in); or .jsonl .json .csv .tsv .parquet .arrow (also packed), a folder of them or of save_to_disk, or a Hugging Face
    data set id. Behind the last two: ":SPLIT", ":CONFIG:SPLIT"; behind an id "@REVISION" before these. Without a split: "train", as
    `datasets` finds it."""
    eval: Text | None = None
    """Held-out rows, in the same forms (without a split: "validation" or "test"), never trained on; none: the run trains and does not
    evaluate ("demo" brings its own)."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out this share of the rows of `train`, drawn by [run] seed, instead of naming `eval`."""
    prompt: str | None = None
    """Template over the columns, "{mr} ->"; its tokens carry no loss."""
    completion: Text | None = None
    """Template over the columns, " {ref}"; loss falls here."""
    text: Text | None = None
    """Template of plain text; loss falls on every token. Instead of prompt and completion."""
    label: Text | None = None
    """Column that holds a row's class (task = "classify"), beside text."""
    messages: Text | None = None
    """Column of chat messages (role, content); rendered by the tokenizer's chat template, loss on the answers. Instead of the others."""
    train_on: Literal["all", "last"] = "all"
    """Of chats: loss on every answer, or on the last one alone, as the others may be written without their reasoning once more follows."""
    chat_template_kwargs: Text | None = None
    """Variables of the chat template as JSON, '{"enable_thinking": false}'; a row's own column of this name adds to them."""
    max_length: Annotated[int, Field(ge=2)] = 256
    """Tokens; longer rows are cut, and counted in an event."""
    train_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only the first rows."""
    eval_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only the first rows."""
    partition: Text = "iid"
    """"iid", "by:COLUMN" or "dirichlet:CONCENTRATION:COLUMN"; ignored for edges that name their own data."""
    batching: Literal["bucket", "pack", "shuffle"] = "bucket"
    """Rows of like length together; several rows in one sequence, kept apart by the attention mask; or plain shuffling."""
    reader: Annotated[str, Named("reader", ("auto",))] = "auto"
    """What reads data files; "auto": by their suffix."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Stop at a row that cannot be used, or skip and count it."""
    largest_file: Bytes = 2_000_000_000
    """Bytes of a data file once it is unpacked; a larger one is refused."""
    largest_row: Bytes = 16_000_000
    """Bytes of one row; a larger one is a bad row."""
