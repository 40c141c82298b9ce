"""A new folder for a model, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atoll.errors import OutputError
from atoll.scratch import scratch_folder


def check_free(target: Path) -> None:
    """Whether there is nothing yet, or an empty folder.

    Raises: OutputError.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(
            "the folder to write to is not empty", where=str(target), got="something there already", expected="a new or empty folder",
            do="give another folder with --out",
        )  # fmt: skip


@contextmanager
def written_whole(target: Path, what: str) -> Iterator[Path]:
    """A folder to write to, which is `target` once the context ends well.

    Raises: OutputError where `what`, such as "the merged model", cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(f".{target.name}-", target.parent) as stage:
            folder = Path(stage) / "model"
            yield folder
            for file in folder.rglob("*.safetensors"):
                # safetensors writes for its user alone; who serves a model may be another, and the folder has what the umask leaves.
                file.chmod(folder.stat().st_mode & 0o666)
            folder.rename(target)
    except OSError as problem:
        do = "give another folder with --out"
        raise OutputError(f"{what} cannot be written", where=str(target), got=str(problem), do=do) from None
