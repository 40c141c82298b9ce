"""atoll init: a folder to start from."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

from atoll.config.keys import as_toml
from atoll.config.reference import commented_toml, short_toml
from atoll.embedded import demo_path
from atoll.errors import OutputError
from atoll.runs.files import write_text

_HEAD = """\
# Several owners' rows train one adapter, and no row leaves its owner. Every other key has a default: docs/configuration.md,
# or `atoll init --full DIR`.
"""
_NOTES = {
    "run.compare": "scored beside: each owner alone, and all rows in one place", "model.base": "or a folder, or a Hugging Face id",
    "data.train": "or .jsonl, .parquet, a folder, a data set id", "data.prompt": "columns in braces; loss falls on the completion alone",
    "train.local_steps": "of each round",
}  # fmt: skip
OWNER = "owner"
"""The demo's column that says whose row it is."""


def init(directory: str | Path, *, full: bool = False) -> Path:
    """Write a run.toml with sample data beside it, and return its path: what a first run needs, or (`full`) every key with what it means.

    Raises: OutputError for a folder that holds something or cannot be written.
    """
    folder = Path(directory)
    files = {role: demo_path(role) for role in ("train", "eval")}
    with files["train"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    owners = sorted({row[OWNER] for row in rows if OWNER in row})
    try:
        _make_empty(folder)
        for role, path in files.items():
            shutil.copyfile(path, folder / f"{role}.csv")
        values = _values(set(rows[0]), owners)
        text = commented_toml(values) if full else _HEAD + short_toml(values, _NOTES)
        write_text(folder / "run.toml", text + _edges(owners))
    except OSError as error:
        got, do = error.strerror or str(error), "give another folder, or mend its permissions"
        raise OutputError("the folder cannot be written", where=str(folder), got=got, do=do) from None
    return folder / "run.toml"


def _make_empty(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise OutputError(
            "there is a file in the way", where=str(folder), got="a file", expected="an absent or empty folder", do="give another name"
        )
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(entry.name for entry in folder.iterdir())
    if found:
        got, do = f"a folder with {', '.join(found[:3])}", "give the name of a new folder"
        raise OutputError("the folder is not empty", where=str(folder), got=got, expected="an absent or empty folder", do=do)


def _values(columns: set[str], owners: list[str]) -> dict[str, object]:
    """What the sample run.toml sets; everything else it shows as a comment."""
    values: dict[str, object] = {"run.name": "first", "run.rounds": 7, "run.compare": ("local-only", "central"), "model.base": "tiny"}
    values |= {"data.train": "train.csv", "data.eval": "eval.csv"}
    for prompt, completion in (("prompt", "completion"), ("mr", "ref")):
        if {prompt, completion} <= columns:
            tail = (" ->", " ") if prompt == "mr" else ("", "")
            values |= {"data.prompt": f"{{{prompt}}}{tail[0]}", "data.completion": f"{tail[1]}{{{completion}}}"}
    if len(owners) > 1:
        values |= {"data.partition": f"by:{OWNER}"}
    # The tiny base learns much in few steps: in a minute it speaks of these rows.
    values |= {"adapter.rank": 16, "adapter.alpha": 32}
    return values | {"train.learning_rate": 8e-3, "train.schedule": "linear", "train.batch_size": 4, "train.local_steps": 12}


def _edges(owners: list[str]) -> str:
    if len(owners) < 2:
        return ""
    head = "\n# One edge for each owner of the sample data; each may name its own `data`.\n"
    return head + "\n".join(f"[[edge]]\nname = {as_toml(owner)}\n" for owner in owners)
