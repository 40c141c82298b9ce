"""Checkpoints that are whole or absent: filled in a staging folder, synced, listed in a manifest, renamed into place."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from atoll.runs.files import files_in, write_folder, write_json
from atoll.runs.layout import RunDirectory
from atoll.units import counted

MANIFEST = "manifest.json"
STATE = "state"
"""The folder of a checkpoint that a run goes on from; the rest is the adapter."""
NUM_STATES = 2
"""Checkpoints of so many last rounds keep theirs: if one is damaged, there is the one before."""


def write_checkpoint(run: RunDirectory, round: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a folder and make it checkpoints/round-0003; one of the same round is replaced.

    Until the rename the checkpoint does not exist: a crash before it leaves a staging folder that the next write removes.
    """
    target = checkpoint_path(run, round)

    def fill(stage: Path) -> None:
        write(stage)
        manifest = {file.relative_to(stage).as_posix(): _entry(file) for file in files_in(stage)}
        write_json(stage / MANIFEST, {"round": round, "files": manifest})

    write_folder(target, fill)
    _thin_out(run, round)
    return target


def checkpoint_path(run: RunDirectory, round: int) -> Path:
    """Where the checkpoint of a round lies once it is whole."""
    return run.checkpoints / f"round-{round:04d}"


def checkpoints_of(run: RunDirectory) -> dict[int, Path]:
    """The folders of all checkpoints by round, the latest first; not all of them need be whole."""
    found = {int(match[1]): path for path in run.checkpoints.glob("round-*") if (match := re.fullmatch(r"round-([0-9]{4,})", path.name))}
    return {number: found[number] for number in sorted(found, reverse=True)}


def latest_checkpoint(run: RunDirectory) -> Path | None:
    """The whole checkpoint of the latest round; one whose files do not match its manifest is passed over."""
    return next((path for path in checkpoints_of(run).values() if damage(path) is None), None)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming a file; None where it holds exactly the files of its manifest, byte for byte."""
    try:
        listed = _listed(checkpoint)
        files = {file.relative_to(checkpoint).as_posix(): file for file in files_in(checkpoint) if file != checkpoint / MANIFEST}
        for name, entry in listed.items():
            if name not in files:
                return f"{name} is missing"
            size = files[name].stat().st_size
            if size != entry["size_bytes"]:
                return f"{name} has {size} of {counted(entry['size_bytes'], 'byte')}"
            if _digest(files[name]) != entry["sha256"]:
                return f"{name} holds other bytes than were written"
        return next((f"{name} was not written by the run" for name in files if name not in listed), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        # A manifest that cannot be read vouches for nothing.
        return f"{MANIFEST} cannot be read: {type(problem).__name__}: {problem}"


def _thin_out(run: RunDirectory, round: int) -> None:
    """Leave of older checkpoints the adapter alone; a crash in the middle leaves one that is passed over, until the next call."""
    older = [path for number, path in checkpoints_of(run).items() if number <= round and (path / STATE).is_dir()][NUM_STATES:]
    for path in older:
        try:
            listed = _listed(path)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        kept = {name: entry for name, entry in listed.items() if not name.startswith(f"{STATE}/")}
        write_json(path / MANIFEST, {"round": int(path.name.removeprefix("round-")), "files": kept})
        shutil.rmtree(path / STATE)


def _listed(checkpoint: Path) -> Mapping[str, Any]:
    listed: Mapping[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    return listed


def _entry(file: Path) -> dict[str, object]:
    return {"sha256": _digest(file), "size_bytes": file.stat().st_size}


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
