"""Files that are whole or absent: stage beside the target, fsync, rename."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Put `text` at `path`; a crash at any moment leaves the old file or the new one, never half of one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, mode: int = 0o666) -> None:
    """The same of bytes; `mode` is the file's from the start, less what the umask takes."""
    stage = path.with_name(f".{path.name}.{os.getpid()}.stage")
    try:
        with open(os.open(stage, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(stage, path)
    finally:
        stage.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, value: object, mode: int = 0o666) -> None:
    """Put `value` at `path` as strict JSON; numbers that JSON does not have (NaN, infinity) become null. `mode` as of `write_bytes`."""
    write_bytes(path, (json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(), mode)


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder and put it at `target`, in place of what is there; a crash leaves the old one, the new one or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(".stage-*"):
        shutil.rmtree(left)  # Of a process that was killed.
    stage, old = target.with_name(f".stage-{target.name}"), target.with_name(f".stage-old-{target.name}")
    stage.mkdir()
    try:
        write(stage)
        for file in files_in(stage):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        sync_folder(stage)
        if target.exists():
            target.rename(old)
        os.rename(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # On a full disk, half a folder would take the place that is left.
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def files_in(folder: Path) -> list[Path]:
    """All files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def finite(value: object) -> object:
    """The value with every NaN and infinity as None, paths as text, tuples as lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value
