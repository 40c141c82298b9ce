"""A disk that takes no more, told in words."""

from __future__ import annotations

import errno
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from atoll.errors import DiskError
from atoll.runs.checkpoints import latest_checkpoint
from atoll.runs.layout import RunDirectory
from atoll.runs.record import again_with, go_on_with, read_noted
from atoll.units import format_bytes

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@contextmanager
def disk_told(run: RunDirectory) -> Iterator[None]:
    """Turns what the disk of a run says into an error for people.

    Raises: DiskError in place of an OSError of the disk: full, over quota, read-only, or broken.
    """
    try:
        yield
    except OSError as problem:
        if problem.errno not in _OF_THE_DISK:
            raise
        last = latest_checkpoint(run)
        kept = "there is no checkpoint yet" if last is None else f"the last whole checkpoint is {last.name}, and intact"
        raise DiskError(
            "a file of the run cannot be written", where=str(problem.filename or run.path),
            got=f"{problem.strerror}; {format_bytes(shutil.disk_usage(run.path).free)} free; {kept}",
            expected="place for a checkpoint", do=f"make place, then run `{_goes_on(run)}`",
        ) from problem  # fmt: skip


def _goes_on(run: RunDirectory) -> str:
    noted, _ = read_noted(run)
    return shlex.join(go_on_with(run.path, noted) or again_with(run.path, noted) or ("atoll", "train"))
