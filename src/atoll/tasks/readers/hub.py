"""Rows of a Hugging Face data set, through the `datasets` library, which is imported only here and only when one is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atoll.errors import DataFileError
from atoll.tasks.readers.reader import Origin
from atoll.tasks.readers.tables import columns_of

Role = Literal["train", "eval"]
HELD_OUT_SPLITS = ("validation", "test")
ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?(:[^/:]+){0,2}")


@dataclass(frozen=True, slots=True)
class HubSource:
    """A data set as run.toml names it: "org/name", with an optional "@REVISION", ":SPLIT" or ":CONFIG:SPLIT" behind it."""

    name: str
    revision: str | None
    config: str | None
    split: str | None

    @classmethod
    def of(cls, source: str) -> HubSource:
        """The parts of what looks like an id."""
        name, *rest = source.split(":")
        name, _, revision = name.partition("@")
        return cls(name, revision or None, rest[0] if len(rest) == 2 else None, rest[-1] if rest else None)


def looks_like_id(source: str) -> bool:
    """Whether `source` could be a data set id, as HubSource has it."""
    return ID.fullmatch(source) is not None and not source.startswith(".")


def load_hub(source: str, limit: int | None, role: Role, origin: Origin) -> Mapping[str, Sequence[object]]:
    """The columns of a data set. Without a split: "train"; of held-out rows "validation", else "test".

    A lone word behind the colon is a split or, where there is no such split, a config.

    Raises: DataFileError where the data set is unknown, unreadable, or out of reach.
    """
    import datasets
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    asked = HubSource.of(source)
    tries: list[tuple[str | None, str]] = [(asked.config, asked.split)] if asked.split else [(None, split) for split in _usual(role)]
    if asked.split and not asked.config:
        tries += [(asked.split, split) for split in _usual(role)]
    problems: list[Exception] = []
    for config, split in tries:
        try:
            found = datasets.load_dataset(asked.name, config, split=split, revision=asked.revision)
        except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError, HfHubHTTPError, httpx.HTTPError) as problem:
            problems.append(problem)
            if not isinstance(problem, ValueError):
                break  # Another split or config would be as far out of reach.
        else:
            return dataset_columns(found, limit, origin)
    told = next((one for one in problems if "onfig name is missing" in str(one)), problems[0])
    raise DataFileError(
        "there is no such file, and no such data set can be loaded", where=source, got=_said(told),
        expected='a file or folder beside run.toml, or a Hugging Face data set id such as "org/name", "org/name:SPLIT" or '
        '"org/name@REVISION:CONFIG:SPLIT"',
        do="check the name, the config and the split; without network, give a local file",
    ) from None  # fmt: skip


def load_saved(folder: Path, split: str | None, role: Role, limit: int | None, origin: Origin) -> Mapping[str, Sequence[object]]:
    """The columns of a folder that `save_to_disk` of `datasets` wrote.

    Raises: DataFileError where it is damaged, or has no such split.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as problem:
        raise DataFileError(
            "the saved data set cannot be read", where=origin.name, got=_said(problem), expected="a folder that save_to_disk wrote",
            do="save it again",
        ) from None  # fmt: skip
    if isinstance(found, dict):
        chosen = next((one for one in ((split,) if split else _usual(role)) if one in found), None)
        if chosen is None:
            raise no_split(origin.name, split or " or ".join(_usual(role)), list(found))
        found = found[chosen]
    elif split not in (None, "train"):
        raise no_split(origin.name, split or "", ["train"])
    return dataset_columns(found, limit, origin)


def dataset_columns(found: Any, limit: int | None, origin: Origin) -> Mapping[str, Sequence[object]]:
    """The columns of a data set of `datasets`, as Arrow has them.

    Raises: DataFileError for one that is larger than allowed.
    """
    chosen = found.select(range(min(limit or len(found), len(found)))).with_format("arrow")
    batches = (batch for table in chosen.iter(256) for batch in table.to_batches())
    return columns_of(batches, origin)


def no_split(name: str, split: str, known: Sequence[str]) -> DataFileError:
    """The error for a split that a data set does not have."""
    return DataFileError(
        "the data has no such split", where=name, got=split, expected=f"one of {', '.join(known)}" if known else "a split that has files",
        do=f'name one behind a colon: "{name}:{known[0]}"' if known else "name the files themselves",
    )  # fmt: skip


def _usual(role: Role) -> tuple[str, ...]:
    return ("train",) if role == "train" else HELD_OUT_SPLITS


def _said(problem: Exception) -> str:
    return " ".join((str(problem).strip() or type(problem).__name__).split())[:300]
