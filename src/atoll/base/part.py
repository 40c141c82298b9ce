"""A device's part of a base: everything but the middle blocks, read, compared and handed on without the rest."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from atoll.base.blocks import Skip, blocks_path, hear_hidden_states_only, sizes_of, trace
from atoll.base.head import check_head
from atoll.base.headers import (
    CONFIG,
    INDEX,
    PART,
    WEIGHTS,
    StoredTensor,
    fetch,
    read_config,
    read_headers,
    read_index,
    read_part,
    read_stored,
    weight_files,
)  # fmt: skip
from atoll.base.load import (
    DTYPES,
    Base,
    check_folder,
    check_vocabulary,
    first_line,
    load_causal_config,
    load_generation_config,
    load_tokenizer,
    quiet,
    weights_error,
)
from atoll.base.skeleton.build import build, left_in_files
from atoll.base.skeleton.released import not_twice
from atoll.base.skeleton.stored_names import StoredNames
from atoll.base.weights.beside import settings_digest, tokenizer_digest
from atoll.base.weights.checks import check_all_taken, check_numbers, check_one_head
from atoll.embedded import tiny_path
from atoll.errors import BadValueError, WeightsError
from atoll.remote_blocks import RemoteBlocksPlaceholder
from atoll.units import counted

Sizes = Mapping[str, tuple[int, int]]
BESIDE_WEIGHTS = (
    CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""What a model folder may hold beside weights that loading a model and its tokenizer may need."""
_CHUNK_BYTES = 2**22


@dataclass(frozen=True, slots=True, eq=False)
class _Skeleton:
    """A model without weights, and which of its tensors a device with some cut holds."""

    source: str
    folder: Path
    model: PreTrainedModel
    names: StoredNames
    path: str
    front: int
    back: int

    @property
    def middle(self) -> range:
        blocks: Any = self.model.get_submodule(self.path)
        return range(self.front, len(blocks) - self.back)

    def is_middle(self, name: str) -> bool:
        number = name.removeprefix(f"{self.path}.").partition(".")[0]
        return name.startswith(f"{self.path}.") and number.isdecimal() and int(number) in self.middle

    def held(self) -> dict[str, Tensor]:
        """The model's tensors outside the middle blocks, as they stand in it."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if not self.is_middle(name)}

    def holds(self, stored: str) -> bool:
        """Whether a device holds a tensor of a checkpoint, under whatever name the model has it, alone or as a part of another."""
        return any(not self.is_middle(name) for name in self.names.of(stored))


@dataclass(frozen=True, slots=True)
class _Held:
    """One tensor of the part: its name in the checkpoint, where it is, and whether the model merges it with others."""

    stored: str
    tensor: StoredTensor
    merged: bool = False


def load_part(name: str, front: int, back: int, *, precision: str, remote_blocks: Callable[[Sizes, bool], RemoteBlocksPlaceholder]) -> Base:
    """The base called `name` without its middle blocks, which no memory is used for: the first of them is what `remote_blocks` makes.

    `remote_blocks` is given inputs and outputs of all middle projections, by full name and in the order in which they run, and whether the
    family's blocks return a tuple. The placeholder's forward gets the hidden states as its only argument.

    Raises: BadValueError for a cut that leaves no middle block; BaseFolderError, ArchitectureError, TokenizerError, WeightsError.
    """
    skeleton = _skeleton(name, front, back, DTYPES[precision])
    folder, model = str(skeleton.folder), skeleton.model
    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
    with quiet():
        tokenizer = load_tokenizer(folder)
        _make_buffers(skeleton)
        sizes, returns_tuple = _skip_middle(skeleton)
        _fill(skeleton, DTYPES[precision])
        load_generation_config(model, skeleton.folder)
    check_one_head(folder, model)
    check_numbers(folder, skeleton.held().items())
    check_vocabulary(folder, model, tokenizer)
    check_head(model.requires_grad_(False).eval())
    blocks: Any = model.get_submodule(skeleton.path)
    blocks[front] = remote_blocks(sizes, returns_tuple)
    hear_hidden_states_only(blocks[front].eval())
    if torch.cuda.is_available():
        nn.Module.to(model, "cuda")
    return Base(name, model, tokenizer, transposed)


def part_digest(source: str, front: int, back: int) -> str:
    """SHA-256 over names, types, shapes and bytes of the stored tensors that a device with this cut holds, and over config.json's settings.

    It does not depend on the division of the checkpoint into files, nor on whether its names have their leading component.

    Raises: what load_part raises.
    """
    skeleton = _skeleton(source, front, back)
    hasher = hashlib.sha256(settings_digest(read_config(skeleton.folder)).encode())
    for name, held in sorted(_held(skeleton).items()):
        hasher.update(f"\n{name} {held.tensor.dtype} {tuple(held.tensor.shape)}\n".encode())
        for chunk in _bytes_of(held.tensor):
            hasher.update(chunk)
    return hasher.hexdigest()


def stored_digest(source: str) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors of a base as they are stored, however it is divided into files, over
    config.json's settings, and over the tokenizer.

    Raises: BaseFolderError, WeightsError, TokenizerError.
    """
    source = str(tiny_path()) if source == "tiny" else source
    check_folder(source)
    folder = Path(source) if Path(source).is_dir() else fetch(source, (*BESIDE_WEIGHTS, INDEX, WEIGHTS))
    with quiet():
        beside = settings_digest(read_config(folder)) + tokenizer_digest(load_tokenizer(str(folder)))
    hasher = hashlib.sha256(beside.encode())
    for name, tensor in sorted(read_stored(weight_files(folder)).items()):
        hasher.update(f"\n{name} {tensor.dtype} {tensor.shape}\n".encode())
        for chunk in _bytes_of(tensor):
            hasher.update(chunk)
    return hasher.hexdigest()


def part_tensors(source: str, front: int, back: int) -> tuple[str, ...]:
    """Names, as stored, of the tensors that a device with this cut holds.

    Raises: what load_part raises.
    """
    return tuple(sorted(held.stored for held in _held(_skeleton(source, front, back)).values()))


@dataclass(frozen=True, slots=True, eq=False)
class PartFile:
    """A file of a device's part of a base, made piece by piece from what the base's own files hold."""

    name: str
    num_bytes: int
    pieces: Callable[[], Iterator[bytes]]
    """Its bytes from the beginning, the same each time."""


def part_files(source: str, front: int, back: int) -> tuple[PartFile, ...]:
    """The files of a folder that holds a device's part of a base, for a device that has no copy. No weights are read yet.

    Raises: what load_part raises.
    """
    skeleton = _skeleton(source, front, back)
    held, whole = _held(skeleton), read_headers(skeleton.source)
    beside = [skeleton.folder / name for name in BESIDE_WEIGHTS if (skeleton.folder / name).is_file()]
    tensors = {name: {"shape": list(header.shape), "num_bytes": header.num_bytes} for name, header in whole.tensors.items()}
    about = json.dumps({"front": front, "back": back, "tensors": tensors}).encode()
    files = [PartFile(path.name, path.stat().st_size, partial(_bytes_at, path, 0, path.stat().st_size)) for path in beside]
    return (*files, _weights_file(held), PartFile(PART, len(about), lambda: iter((about,))))


def _skeleton(name: str, front: int, back: int, dtype: torch.dtype | None = None) -> _Skeleton:
    """The base without weights and buffers. A `dtype` is torch's default for all threads while the model is made; names and shapes of
    tensors, which are all that threads of a host want, need none."""
    source = str(tiny_path()) if name == "tiny" else name
    check_folder(source)
    folder = Path(source) if Path(source).is_dir() else fetch(source, (*BESIDE_WEIGHTS, INDEX, PART))
    with quiet():
        config = load_causal_config(str(folder))
        if getattr(config, "quantization_config", None) is not None:
            raise not_twice(source, "split mode, for which a device has a part of the base")
        model = build(source, config, dtype)
    skeleton = _Skeleton(source, folder, model, StoredNames(model), blocks_path(model), front, back)
    _check_cut(skeleton)
    return skeleton


def _check_cut(skeleton: _Skeleton) -> None:
    front, back = skeleton.front, skeleton.back
    blocks: Any = skeleton.model.get_submodule(skeleton.path)
    if front < 0 or back < 0 or not skeleton.middle:
        raise BadValueError(
            "the cut leaves no block to the host", where="[model] cut", got=f"front = {front}, back = {back}",
            expected=f"0 or more each, and together fewer than the {counted(len(blocks), 'block')} of the base",
            do="keep fewer blocks on the device, or train without a host",
        )  # fmt: skip
    if (skeleton.folder / PART).is_file():
        (has_front, has_back), _ = read_part(skeleton.folder)
        if front > has_front or back > has_back:
            raise WeightsError(
                "the folder holds a part of a base, for another cut", where=str(skeleton.folder),
                got=f"front = {has_front}, back = {has_back}", expected=f"front = {front}, back = {back}",
                do="set [model] cut to what the folder holds, or remove the folder and get the part from the host again",
            )  # fmt: skip


def _held(skeleton: _Skeleton) -> dict[str, _Held]:
    """Where the part's tensors are, by their names in the model; one of two tied tensors that are equal."""
    expected, names = skeleton.held(), skeleton.names
    found: dict[str, _Held] = {}
    filled: set[str] = set()
    tensors, stored_type = _stored_tensors(skeleton), str(read_config(skeleton.folder).get("model_type"))
    check_all_taken(str(skeleton.folder), names.not_taken(tensors), left_in_files(skeleton.model.config, stored_type))
    for stored, tensor in tensors.items():
        if skeleton.holds(stored):
            merged = names.converted(stored)
            filled.update(names.of(stored))
            found[names.whole(stored) if merged else names.of(stored)[0]] = _Held(stored, tensor, merged)
    tied: Mapping[str, str] = skeleton.model.all_tied_weights_keys
    for twin, name in tied.items():
        if twin in found and (name not in found or _same_bytes(found[twin].tensor, found[name].tensor)):
            found[name] = found.get(name, found[twin])
            del found[twin]
            filled.add(name)
    wrong = [name for name in expected if name not in filled and name not in tied]
    wrong += [name for name, held in found.items() if not held.merged and held.tensor.shape != tuple(expected[name].shape)]
    if wrong:
        raise weights_error(str(skeleton.folder), "missing or of another shape: " + ", ".join(wrong[:3]))
    return found


def _stored_tensors(skeleton: _Skeleton) -> dict[str, StoredTensor]:
    """The tensors of those files that hold any of the part's."""
    folder = skeleton.folder
    if not (folder / INDEX).is_file():
        _fetch_missing(skeleton, (WEIGHTS,))
    if (folder / WEIGHTS).is_file():
        return read_stored((folder / WEIGHTS,))
    index = read_index(folder)
    files = sorted({file for stored, file in index.items() if skeleton.holds(stored)})
    _fetch_missing(skeleton, files)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise weights_error(str(folder), f"no {', '.join(missing[:3])}")
    return read_stored(folder / file for file in files)


def _fetch_missing(skeleton: _Skeleton, files: Sequence[str]) -> None:
    is_here = Path(skeleton.source).is_dir()
    if not is_here and not all((skeleton.folder / file).is_file() for file in files):
        fetch(skeleton.source, files, revision=skeleton.folder.name)


def _skip_middle(skeleton: _Skeleton) -> tuple[Sizes, bool]:
    """Take the middle blocks out; their projections' sizes in the order in which they run, and whether a block returns a tuple."""
    model, found = skeleton.model, trace(skeleton.model)
    modules = [name for group in found.groups for name in group if skeleton.is_middle(name)]
    sizes = {name: sizes_of(model.get_submodule(name)) for name in modules}
    blocks: Any = model.get_submodule(skeleton.path)
    for number in skeleton.middle:
        blocks[number] = Skip(found.returns_tuple)
    return sizes, found.returns_tuple


def _make_buffers(skeleton: _Skeleton) -> None:
    """Compute what is in no checkpoint, such as rotary tables, as from_pretrained does; weights stay without memory, and middle blocks.

    These are still there: some families write into all their blocks at once.
    """
    for path, module in skeleton.model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not skeleton.is_middle(path):
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
    skeleton.model.initialize_weights()


def _fill(skeleton: _Skeleton, dtype: torch.dtype) -> None:
    """Put the stored tensors into the model, one after the other."""
    model, held, expected = skeleton.model, _held(skeleton), skeleton.held()
    kept_in_fp32 = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype is torch.bfloat16 else ()
    merged: dict[str, Tensor] = {}
    for name, tensor in _read(skeleton, held):
        if held[name].merged:
            merged[held[name].stored] = tensor
            continue
        wanted = torch.float32 if any(part in name for part in kept_in_fp32) else expected[name].dtype
        if tensor.is_floating_point() != wanted.is_floating_point:
            raise weights_error(str(skeleton.folder), f"{held[name].stored} as {tensor.dtype}")
        # A copy: what the library gives is the file itself in memory, which somebody may write anew.
        _put(model, name, tensor.to(wanted, copy=True))
    skeleton.names.merge_into(model, merged, dtype)
    model.tie_weights(missing_keys={n for n in expected if n not in held and _is_absent(model, n)}, recompute_mapping=False)


def _read(skeleton: _Skeleton, held: Mapping[str, _Held]) -> Iterator[tuple[str, Tensor]]:
    try:
        for file in sorted({one.tensor.file for one in held.values()}):
            with safe_open(file, framework="pt") as weights:
                for name, one in held.items():
                    if one.tensor.file == file:
                        yield name, weights.get_tensor(one.stored)
    except (OSError, SafetensorError) as problem:
        raise weights_error(str(skeleton.folder), first_line(problem)) from None


def _is_absent(model: PreTrainedModel, name: str) -> bool:
    path, _, last = name.rpartition(".")
    return bool(getattr(model.get_submodule(path), last).is_meta)


def _put(model: PreTrainedModel, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    is_parameter = isinstance(getattr(module, last), nn.Parameter)
    setattr(module, last, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _bytes_of(tensor: StoredTensor) -> Iterator[bytes]:
    return _bytes_at(tensor.file, tensor.start, tensor.num_bytes)


def _bytes_at(file: Path, start: int, num_bytes: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(start)
        while num_bytes > 0:
            chunk = stream.read(min(num_bytes, _CHUNK_BYTES))
            if not chunk:
                raise weights_error(str(file), "a file that ends too early")
            num_bytes -= len(chunk)
            yield chunk


def _same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and all(x == y for x, y in zip(_bytes_of(a), _bytes_of(b), strict=True))


def _weights_file(held: Mapping[str, _Held]) -> PartFile:
    """One safetensors file, wide types first, so that every tensor starts at a multiple of its own width.

    Source: https://github.com/huggingface/safetensors#format
    """
    ordered = sorted(held.values(), key=lambda one: (-one.tensor.num_bytes // max(1, prod(one.tensor.shape)), one.stored))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in ordered:
        start, end = end, end + one.tensor.num_bytes
        header[one.stored] = {"dtype": one.tensor.dtype, "shape": list(one.tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text

    def pieces() -> Iterator[bytes]:
        yield head
        for one in ordered:
            yield from _bytes_of(one.tensor)

    return PartFile(WEIGHTS, len(head) + end, pieces)
