"""Public text for attacks that learn: a file, the built-in demo, or what the base itself writes; never the rows of the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from atoll.base.load import Base
from atoll.config.load import LoadedConfig
from atoll.embedded import demo_path
from atoll.errors import ConflictError, EmptyDataError
from atoll.seeding import stream
from atoll.tasks.rows import Rows, files_of, load_rows

LARGEST_TOKENS = 40_000
WRITTEN_ROWS, WRITTEN_TOKENS = 96, 64


@dataclass(frozen=True, slots=True, eq=False)
class PublicText:
    """Token ids of each row, and what they are of."""

    name: str
    rows: tuple[Tensor, ...]


def public_text(base: Base, loaded: LoadedConfig, file: Path | None) -> PublicText:
    """At most 40,000 tokens.

    Raises: what load_rows raises; ConflictError where it is a file that the run itself names; EmptyDataError.
    """
    data = loaded.config.data
    if file is None and "demo" in (data.train, *(edge.data for edge in loaded.config.edge)):
        return PublicText("what the base writes by itself, and random tokens", tuple(_written(base, loaded.config.run.seed)))
    if file is not None:
        _check_public(loaded, file)
    path = (demo_path("train") if file is None else file).absolute()
    rows = load_rows(str(path), base_dir=Path(), limit=None, on_bad_row="skip")
    found, total = list[Tensor](), 0
    for ids in _tokens(rows, base, data.max_length):
        found.append(ids)
        total += len(ids)
        if total >= LARGEST_TOKENS:
            break
    if total < 2:
        do = "give other text"
        raise EmptyDataError("there is no text in it", where=f"--public {path.name}", got="no words", expected="columns of text", do=do)
    return PublicText("the built-in demo's rows" if file is None else path.name, tuple(found))


def _check_public(loaded: LoadedConfig, file: Path) -> None:
    data = loaded.config.data
    named = [name for name in (data.train, data.eval, *(edge.data for edge in loaded.config.edge)) if name]
    private = {path.resolve() for name in named if loaded.resolve(name).exists() for path in _files(loaded, name)}
    given = {path.resolve() for path in (file.rglob("*") if file.is_dir() else [file])}
    if private & given:
        raise ConflictError(
            "an attack on rows that it was trained on says nothing", where="--public", got=f"{file}, which run.toml names",
            expected="text that is nobody's secret", do="give another file, or leave --public out",
        )  # fmt: skip


def _files(loaded: LoadedConfig, name: str) -> tuple[Path, ...]:
    return files_of(name, base_dir=loaded.path.parent, reader=loaded.config.data.reader, role="train")


def _tokens(rows: Rows, base: Base, max_length: int) -> Iterator[Tensor]:
    for number in range(len(rows)):
        text = " ".join(value for value in rows[number].values() if isinstance(value, str))
        ids = base.tokenizer(text, truncation=True, max_length=max_length)["input_ids"]
        if len(ids) > 1:
            yield torch.tensor(ids)


def _written(base: Base, seed: int) -> list[Tensor]:
    first = base.tokenizer.bos_token_id
    start = torch.full((WRITTEN_ROWS, 1), 0 if first is None else first, device=base.model.device)
    size, vocabulary = (WRITTEN_ROWS, WRITTEN_TOKENS), base.model.config.get_text_config().vocab_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "audit/public"))
        rows_BT = base.model.generate(  # type: ignore[operator]
            start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, max_new_tokens=WRITTEN_TOKENS,
            min_new_tokens=WRITTEN_TOKENS, pad_token_id=0,
        )  # fmt: skip
        # A base writes the words that it knows; by chance alone every token comes about.
        return [*rows_BT.cpu(), *torch.randint(vocabulary, size)]
