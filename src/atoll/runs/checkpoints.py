"""Checkpoints that are whole or absent: filled in a staging folder, synced, listed in a manifest, renamed into place."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from atoll.runs.files import sync_folder, write_json
from atoll.runs.layout import RunDirectory

MANIFEST = "manifest.json"


def write_checkpoint(run: RunDirectory, round: int, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a folder and make it checkpoints/round-0003; one of the same round is replaced.

    Until the rename the checkpoint does not exist: a crash before it leaves a staging folder that the next write removes.
    """
    run.checkpoints.mkdir(exist_ok=True)
    for left in run.checkpoints.glob(".stage-*"):
        shutil.rmtree(left)
    target = checkpoint_path(run, round)
    stage = run.checkpoints / f".stage-{target.name}"
    stage.mkdir()
    write(stage)
    for file in _files(stage):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    manifest = {file.relative_to(stage).as_posix(): {"sha256": _digest(file), "size_bytes": file.stat().st_size} for file in _files(stage)}
    write_json(stage / MANIFEST, {"round": round, "files": manifest})
    if target.exists():
        target.rename(run.checkpoints / f".stage-old-{target.name}")
    os.rename(stage, target)
    sync_folder(run.checkpoints)
    shutil.rmtree(run.checkpoints / f".stage-old-{target.name}", ignore_errors=True)
    return target


def checkpoint_path(run: RunDirectory, round: int) -> Path:
    """Where the checkpoint of a round lies once it is whole."""
    return run.checkpoints / f"round-{round:04d}"


def latest_checkpoint(run: RunDirectory) -> Path | None:
    """The whole checkpoint of the latest round; one whose files do not match its manifest is passed over."""
    found = {int(match[1]): path for path in run.checkpoints.glob("round-*") if (match := re.fullmatch(r"round-([0-9]{4,})", path.name))}
    return next((found[number] for number in sorted(found, reverse=True) if is_whole(found[number])), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether the folder holds exactly the files of its manifest, byte for byte."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = {file.relative_to(checkpoint).as_posix(): file for file in _files(checkpoint) if file != checkpoint / MANIFEST}
        return files.keys() == listed.keys() and all(
            file.stat().st_size == listed[name]["size_bytes"] and _digest(file) == listed[name]["sha256"] for name, file in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # a manifest that cannot be read vouches for nothing


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
