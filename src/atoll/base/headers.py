"""What a model folder or hub repository says about its weights, read from JSON headers alone: no weight is loaded."""

from __future__ import annotations

import difflib
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any

from atoll.errors import BaseFolderError, InputError, WeightsError
from atoll.parsed import parse_json
from atoll.units import counted

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PART = "atoll_part.json"
"""In a folder that holds a device's part of a base: the cut, and shapes and sizes of all tensors of the whole base."""
_LARGEST_JSON_BYTES = 100 * 10**6
_MOST_BLOCKS, _LARGEST_SIZE = 10_000, 2**31
_BLOCKS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_SIZE = re.compile(r"(n|num|d)_.+|.+_(size|dim|heads|experts|embeddings|positions)")
_LARGEST_HEADER_BYTES = 100 * 10**6
"""The limit that the safetensors library sets itself."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Shape and stored size of one tensor."""

    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor's bytes are."""

    file: Path
    start: int
    """Offset of its first byte from the beginning of the file."""
    num_bytes: int
    dtype: str
    """As safetensors writes it: "F32", "BF16"."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Headers:
    """config.json and the headers of all tensors, in the order of the files."""

    source: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]


def read_headers(source: str) -> Headers:
    """Headers of a local folder, of a hub repository in the local cache, or of one on the hub, in this order.

    Raises: BaseFolderError for what is missing or cannot be reached, WeightsError for broken weight files.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path)
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise _no_folder(source, path)
    return _read_repository(source)


def _read_folder(folder: Path) -> Headers:
    if not (folder / CONFIG).is_file():
        raise _no_config(folder)
    config = read_config(folder)
    if (folder / PART).is_file():
        return Headers(str(folder), config, read_part(folder)[1])
    stored = read_stored(weight_files(folder))
    return Headers(str(folder), config, {name: TensorHeader(tensor.shape, tensor.num_bytes) for name, tensor in stored.items()})


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json, with sizes that a model can have: what a library makes of others may take all time and memory.

    Raises: BaseFolderError.
    """
    config = _read_json(folder / CONFIG)
    parts = [config]
    while parts:
        part = parts.pop()
        for key, value in part.items():
            if isinstance(value, dict):
                parts.append(value)
            elif isinstance(value, int) and ((value > _LARGEST_SIZE and _SIZE.fullmatch(key)) or (value > _MOST_BLOCKS and key in _BLOCKS)):
                limit = _MOST_BLOCKS if key in _BLOCKS else _LARGEST_SIZE
                got = f"{key} = {value if value < 10**18 else 'a number of many digits'}"
                raise BaseFolderError(
                    f"{CONFIG} describes a model that cannot be", where=str(folder / CONFIG), got=got,
                    expected=f"{limit} or less", do="give the config.json that belongs to the weights",
                )  # fmt: skip
    return config


def read_part(folder: Path) -> tuple[tuple[int, int], dict[str, TensorHeader]]:
    """The cut (front, back) of a folder that holds a part of a base, and the headers of the whole base.

    Raises: WeightsError for a broken file.
    """
    found = _read_json(folder / PART)
    try:
        cut = int(found["front"]), int(found["back"])
        return cut, {
            name: TensorHeader(tuple(int(size) for size in entry["shape"]), int(entry["num_bytes"]))
            for name, entry in found["tensors"].items()
        }  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise WeightsError(
            f"{PART} cannot be understood", where=str(folder / PART), got=f"{type(problem).__name__}: {problem}",
            expected="front, back, and shape and num_bytes of every tensor", do="remove the folder and get the part from the host again",
        ) from None  # fmt: skip


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights.

    Raises: BaseFolderError or WeightsError where there are none, or some are missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    weight_map = read_index(folder)
    files = [folder / name for name in dict.fromkeys(weight_map.values())]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise WeightsError(
            "a part of the weights is missing", where=str(folder), got=f"no {', '.join(missing[:3])}",
            expected=f"all {len(files)} files that {INDEX} names", do="copy or download the missing files",
        )  # fmt: skip
    return files


def read_index(folder: Path) -> dict[str, str]:
    """The file of every tensor, by a folder's index.

    Raises: BaseFolderError where there is no index, WeightsError for a broken one.
    """
    if not (folder / INDEX).is_file():
        raise _no_weights(folder)
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(
            "the index of the weight files names no tensors", where=str(folder / INDEX), got="no weight_map",
            expected="a weight_map from tensor to file", do="copy or download the model again",
        )  # fmt: skip
    outside = [value for value in weight_map.values() if not _is_inside(value)]
    if outside:
        raise WeightsError(
            "the index names what is no weight file of its folder", where=str(folder / INDEX), got=str(outside[0])[:200],
            expected="names of files in the folder", do="copy or download the model again",
        )  # fmt: skip
    return {str(name): str(value) for name, value in weight_map.items()}


def _is_inside(name: object) -> bool:
    """Whether a file's name, taken from an index, stays in its folder; links that lie there are the owner's own, as in the hub's cache."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or not name.isprintable() or "\\" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def read_stored(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Places of all tensors of these files.

    Raises: WeightsError for a file that is not whole.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files:
        stored |= _read_safetensors(file)
    return stored


def _read_safetensors(file: Path) -> dict[str, StoredTensor]:
    """Header of one file: 8 bytes little-endian length, then JSON, then the data.

    Source: https://github.com/huggingface/safetensors#format
    """
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else _LARGEST_HEADER_BYTES + 1
        if header_bytes > min(size_bytes - 8, _LARGEST_HEADER_BYTES):
            raise _broken(file, f"{counted(size_bytes, 'byte')}, too short for its own header")
        try:
            header = parse_json(stream.read(header_bytes))
            tensors = {
                name: _stored(file, 8 + header_bytes, entry) for name, entry in header.items() if name != "__metadata__"
            }  # fmt: skip
            end = max((tensor.start + tensor.num_bytes for tensor in tensors.values()), default=8 + header_bytes)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise _broken(file, "a header that is not a safetensors header") from None
    if end != size_bytes:
        raise _broken(file, f"{counted(size_bytes, 'byte')} where the header speaks of {end}")
    return tensors


def _stored(file: Path, data_start: int, entry: Mapping[str, Any]) -> StoredTensor:
    start, end = entry["data_offsets"]
    return StoredTensor(file, data_start + start, end - start, str(entry["dtype"]), tuple(entry["shape"]))


def _read_repository(repository: str) -> Headers:
    # Imported here: it takes a quarter of a second, and no local folder needs it.
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    with _hub_errors(repository):
        cached = huggingface_hub.try_to_load_from_cache(repository, CONFIG)
        if isinstance(cached, str) and _is_whole(Path(cached).parent):
            return _read_folder(Path(cached).parent)
        config = _read_json(Path(huggingface_hub.hf_hub_download(repository, CONFIG)))
        try:
            metadata = huggingface_hub.get_safetensors_metadata(repository)
        except NotASafetensorsRepoError:
            raise _no_safetensors(repository, "no *.safetensors in the repository") from None
        except SafetensorsParsingError as problem:
            raise ValueError(str(problem)) from None
    tensors = {
        name: TensorHeader(tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
        for file in metadata.files_metadata.values() for name, info in file.tensors.items()
    }  # fmt: skip
    return Headers(repository, config, tensors)


def fetch(repository: str, files: Sequence[str], *, revision: str | None = None) -> Path:
    """The local folder of a hub repository, with those of these files that it has; nothing else is downloaded.

    Raises: BaseFolderError.
    """
    import huggingface_hub

    with _hub_errors(repository):
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(files)))


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    import httpx
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        yield
    except (EntryNotFoundError, HFValidationError, httpx.HTTPError, OSError, ValueError) as problem:
        raise BaseFolderError(
            "the base is neither a folder here nor a model that the hub gives out", where=repository,
            got=str(problem).strip().splitlines()[0][:200] if str(problem).strip() else type(problem).__name__,
            expected='"tiny", a model folder, or a hub id such as "org/name"',
            do="check the spelling; for a private or gated model log in with `hf auth login`; without network give a local folder",
        ) from None  # fmt: skip


def _is_whole(folder: Path) -> bool:
    """Whether all weights are there: a device's part of a base leaves some files of a repository on the hub."""
    try:
        return bool(weight_files(folder))
    except InputError:
        return False


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _LARGEST_JSON_BYTES:
            raise ValueError(counted(file.stat().st_size, "byte"))
        value = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise BaseFolderError(
            f"{file.name} cannot be read", where=str(file), got=str(problem)[:200], expected="a JSON object",
            do="copy or download the file again",
        ) from None  # fmt: skip
    if not isinstance(value, dict):
        raise BaseFolderError(
            f"{file.name} holds no JSON object", where=str(file), got=f"a JSON {type(value).__name__}", expected="a JSON object",
            do="copy or download the file again",
        )  # fmt: skip
    return value


def gguf_files(path: Path) -> list[Path]:
    """The GGUF files that a path is, or holds."""
    if path.is_dir():
        return sorted(one for one in path.glob("*") if one.suffix.lower() == ".gguf")
    return [path] if path.suffix.lower() == ".gguf" and path.is_file() else []


def to_convert(source: str) -> BaseFolderError | None:
    """What is said of GGUF files where a model folder is wanted; None where there are none."""
    files = gguf_files(Path(source).expanduser())
    if not files:
        return None
    return BaseFolderError(
        "a GGUF file is no base before it is converted", where=source, got=", ".join(file.name for file in files[:3]),
        expected=f"a model folder with {CONFIG}, {WEIGHTS} and tokenizer files",
        do=f"convert it once: atoll convert {quote(str(files[0]))} --out {quote(str(files[0].with_suffix('')))}; then give that folder",
    )  # fmt: skip


def _no_folder(source: str, path: Path) -> BaseFolderError:
    if (to_do := to_convert(source)) is not None:
        return to_do
    siblings = [p.name for p in path.parent.glob("*/")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [*siblings, "tiny"], n=1)
    return BaseFolderError(
        "there is no such model folder", where=source, got="a file" if path.exists() else "nothing there",
        expected='"tiny", a model folder, or a hub id such as "org/name"',
        do=f"did you mean {near[0] if near[0] == 'tiny' else path.parent / near[0]}?" if near
        else "check the path in [model] base; it is relative to run.toml",
    )  # fmt: skip


def _no_config(folder: Path) -> BaseFolderError:
    if (folder / "adapter_config.json").is_file():
        return BaseFolderError(
            "the folder holds an adapter, not a model", where=str(folder), got="adapter_config.json", expected=CONFIG,
            do="name the base model here, and the adapter in [adapter] start",
        )  # fmt: skip
    if (to_do := to_convert(str(folder))) is not None:
        return to_do
    names = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) or "nothing"
    return BaseFolderError(
        "the model folder has no config.json", where=str(folder), got=f"a folder holding {names}",
        expected="config.json, model.safetensors and tokenizer files", do="give the folder that save_pretrained wrote",
    )  # fmt: skip


def _no_weights(folder: Path) -> BaseFolderError:
    parts = sorted(p.name for p in folder.glob("*.safetensors"))
    if parts:
        return BaseFolderError(
            "the weight files of the model folder cannot be put together", where=str(folder), got=", ".join(parts[:3]),
            expected=f"{WEIGHTS}, or {INDEX} beside the parts", do=f"copy or download {INDEX}, or rename a single file to {WEIGHTS}",
        )  # fmt: skip
    if (to_do := to_convert(str(folder))) is not None:
        return to_do
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack") for p in folder.glob(pattern))
    return _no_safetensors(str(folder), f"only {', '.join(others[:3])}" if others else "no weights at all")


def _no_safetensors(where: str, got: str) -> BaseFolderError:
    return BaseFolderError(
        "the model has no safetensors weights", where=where, got=got, expected=f"{WEIGHTS}, or {INDEX} with its parts",
        do="convert them once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) writes safetensors",
    )  # fmt: skip


def _broken(file: Path, got: str) -> WeightsError:
    return WeightsError(
        f"{file.name} is not a whole safetensors file", where=str(file), got=got,
        expected="8 bytes of length, a JSON header, and all the data it speaks of", do="copy or download the file again",
    )  # fmt: skip
