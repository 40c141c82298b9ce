"""A data file as a stream of bytes, unpacked where its name says so, and never more of them than allowed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

from atoll.errors import DataFileError
from atoll.tasks.readers.reader import Limits, Origin, check_size
from atoll.units import counted

PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_BROKEN = (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)


def unpacked_name(path: Path) -> str:
    """A file's name in small letters, without the suffix of what packed it."""
    name = path.name.lower()
    return next((name.removesuffix(suffix) for suffix in PACKED if name.endswith(suffix)), name)


def member_name(path: Path) -> str:
    """What the one file in an archive is called; empty where there is no archive, or another number of files in it."""
    try:
        return _members(zipfile.ZipFile(path))[0].filename if path.suffix.lower() == ".zip" else ""
    except (ValueError, OSError, zipfile.BadZipFile):
        return ""


def opened(origin: Origin) -> IO[bytes]:
    """The file's bytes as they are once unpacked. Reading raises DataFileError, too.

    Raises: DataFileError where the file cannot be read, or is longer than its limit.
    """
    try:
        if origin.path.suffix.lower() not in PACKED:
            check_size(origin.name, origin.path.stat().st_size, origin.limits)
        return io.BufferedReader(_Bounded(_stream(origin.path), origin.name, origin.limits), 2**20)
    except _BROKEN as problem:
        raise _unreadable(origin.name, problem) from None


def check_unpacked(origin: Origin) -> None:
    """Whether a file is within its limit. A packed one is unpacked once for it, so that nothing of it is kept before that is known.

    Raises: as `opened`.
    """
    if origin.path.suffix.lower() not in PACKED:
        return
    with opened(origin) as stream:
        while stream.read(2**20):
            pass


def whole(origin: Origin) -> bytes:
    """All bytes of the file.

    Raises: as `opened`.
    """
    check_unpacked(origin)
    with opened(origin) as stream:
        return stream.read()


def _stream(path: Path) -> Any:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")
        case ".bz2":
            return bz2.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".zst":
            import pyarrow as pa

            return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
        case ".zip":
            return _only_member(path)
        case _:
            return path.open("rb", buffering=0)


def _only_member(path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    return archive.open(_members(archive)[0])


def _members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The one file of an archive."""
    # macOS puts a hidden file beside each.
    members = [one for one in archive.infolist() if not one.is_dir() and not one.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        raise ValueError(f"an archive of {counted(len(members), 'file')}, where one is read: unpack it, and name the folder")
    return members


class _Bounded(io.RawIOBase):
    """Passes on what is read, counts it, and says what is wrong with the file as a page."""

    def __init__(self, stream: Any, name: str, limits: Limits) -> None:
        self._stream, self._name, self._limits, self._read = stream, name, limits, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except _BROKEN as problem:
            raise _unreadable(self._name, problem) from None
        self._read += len(data)
        check_size(self._name, self._read, self._limits)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _unreadable(name: str, problem: Exception) -> DataFileError:
    return DataFileError(
        "the data file cannot be read", where=name, got=(str(problem) or type(problem).__name__).split("\n")[0][:160],
        expected="a readable, whole file", do="check the file and its permissions, or write it again",
    )  # fmt: skip
