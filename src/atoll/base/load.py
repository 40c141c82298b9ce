"""Load a Hugging Face causal language model and its tokenizer, frozen, from the package, a folder or a hub."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate.utils import check_device_map
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.auto_factory import _get_model_class
from transformers.pytorch_utils import Conv1D
from transformers.utils.quantization_config import QuantizationConfigMixin

from atoll.base.head import NextToken, Objective, check_head
from atoll.base.headers import (
    CONFIG,
    INDEX,
    PART,
    WEIGHTS,
    fetch,
    read_config,
    read_index,
    read_part,
    read_stored,
    to_convert,
    weight_files,
)
from atoll.base.quantize import Bits, check_kept, how_to_keep, left_wide, let_deep_inputs_in, let_gradients_through
from atoll.base.skeleton.build import auto_class_of, build, config_of_text, left_in_files
from atoll.base.skeleton.reasons import why_no_config, why_no_tokenizer
from atoll.base.skeleton.released import made_wide
from atoll.base.weights.checks import check_all_taken, check_numbers, check_one_head, check_types, stored_tensors
from atoll.base.weights.hub import check_hub_name
from atoll.embedded import tiny_path
from atoll.errors import ArchitectureError, BadValueError, BaseFolderError, TokenizerError, WeightsError
from atoll.heap import map_large_tensors
from atoll.units import counted

_GENERATION = "generation_config.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DeviceMap = Literal["auto"] | Mapping[str, int | str]
"""Where each module of a base is, as accelerate has it: by name, the number of an accelerator, "cpu" or "disk". "auto": fill the
accelerators one after the other, then memory, then disk."""
# trust_remote_code=False wherever something is loaded: without it, transformers asks at the terminal whether to run the code that a
# config's auto_map names.


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A frozen model in eval mode, with its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    transposed: bool
    """Whether projections keep their weights as (inputs, outputs), as GPT-2's Conv1D does."""
    objective: Objective = field(default_factory=NextToken)
    """What it is trained for."""
    labels: tuple[str, ...] = ()
    """Of a classifier, its classes in order."""
    head: Mapping[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    """Of a classifier, what its head starts with, by module: the weight, and the bias if it has one. In the model itself they are zeros:
    what is trained there is the whole of them."""

    def digest(self, without: tuple[str, ...] = ()) -> str:
        """SHA-256 over names, shapes and bits of all weights but those whose names begin so."""
        hasher = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            if without and name.startswith(without):
                continue
            hasher.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return hasher.hexdigest()


def load_base(name: str, *, precision: str = "fp32", bits: Bits | None = None, device_map: DeviceMap | None = None) -> Base:
    """The base called `name`: "tiny", a folder, or a hub id; the projections of its blocks in so many bits, the rest in `precision`.

    Without `bits` all weights are in `precision`. 16: bf16, made wide for each product; 8: int8 with a scale for each row; 4: NF4, its
    scales in 8 bits. Arithmetic is in `precision` always. GPT-2's transposed projections become plain ones in 8 and 4 bits.

    Raises: BaseFolderError, ArchitectureError, TokenizerError, WeightsError; BadValueError for other bits, UnavailableError without
    bitsandbytes, which 8 and 4 need.

    With a `device_map` the base may be larger than one accelerator. It can be served, not trained beside: its head is not looked at.
    """
    if device_map is not None:
        _check_device_map(device_map)
    source = str(tiny_path()) if name == "tiny" else name
    quantization = None if bits is None else how_to_keep(bits, DTYPES[precision])
    if quantization is not None:
        map_large_tensors()
    check_folder(source)
    check_whole(source)
    with quiet():
        config = load_causal_config(source)
        tokenizer = load_tokenizer(name)
        wide = left_wide(build(source, config)) if quantization is not None else []
        if hasattr(quantization, "llm_int8_skip_modules"):
            quantization.llm_int8_skip_modules = wide  # type: ignore[union-attr]
        wider = made_wide(config, source, quantization)
        model = load_model(source, config, precision, quantization or wider, device_map=device_map)
    check_vocabulary(source, model, tokenizer)
    if device_map is None:
        check_head(model)
    if bits is not None and quantization is not None:
        check_kept(name, model, bits, wide)
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    return Base(name, model, tokenizer, transposed)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the base called `name`.

    Raises: TokenizerError.
    """
    source = str(tiny_path()) if name == "tiny" else name
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RecursionError) as problem:
        raise why_no_tokenizer(source, problem) from None
    except Exception as problem:
        # The tokenizers library raises the bare Exception class for a file it cannot parse; anything else is a bug and goes up.
        if type(problem) is not Exception:
            raise
        raise TokenizerError(
            "tokenizer.json cannot be read", where=source, got=first_line(problem), expected="the file as the tokenizers library wrote it",
            do="copy the tokenizer files of the model into the folder again",
        ) from None  # fmt: skip
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise TokenizerError(
            "the tokenizer has no vocabulary", where=source, got=counted(len(tokenizer), "token"),
            expected="tokenizer.json with a vocabulary",
            do="copy the tokenizer files of the model into the folder",
        )  # fmt: skip
    return tokenizer


def check_folder(source: str) -> None:
    """Look whether a source that looks like a folder is a model folder.

    Raises: BaseFolderError.
    """
    path = Path(source)
    if (path / CONFIG).is_file():
        read_config(path)
    looks_local = path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1
    if not looks_local:
        check_hub_name(source, Path())
    if not looks_local or (path / "config.json").is_file():
        return
    if (to_do := to_convert(source)) is not None:
        raise to_do
    if path.is_dir():
        names = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise BaseFolderError(
            "the model folder has no config.json", where=source, got=f"a folder holding {names}",
            expected="config.json, *.safetensors and tokenizer files", do="give the folder that save_pretrained wrote",
        )  # fmt: skip
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*/")] if path.parent.is_dir() else [], n=1)
    raise BaseFolderError(
        "there is no such model folder", where=source, got="a file" if path.exists() else "nothing there",
        expected='"tiny", a model folder, or a hub id such as "org/name"',
        do=f"did you mean {path.parent / near[0]}?" if near else "check the path in [model] base; it is relative to run.toml",
    )  # fmt: skip


def check_whole(source: str) -> None:
    """Look whether a folder holds a whole base.

    Raises: WeightsError for a device's part of one.
    """
    if (Path(source) / PART).is_file():
        (front, back), _ = read_part(Path(source))
        raise WeightsError(
            "the folder holds a part of a base", where=source, got=f"{PART}: {counted(front, 'block')} at the front and {back} at the back",
            expected="the weights of all blocks", do="use a host, which runs the other blocks (split mode); or give a whole model folder",
        )  # fmt: skip


def load_config(source: str) -> Any:
    """The configuration of a folder or hub id.

    Raises: BaseFolderError.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RecursionError, ArithmeticError, StrictDataclassError) as problem:
        raise why_no_config(source, problem) from None
    return config


def load_causal_config(source: str) -> Any:
    """The configuration of a folder or hub id that generates.

    Raises: BaseFolderError, ArchitectureError.
    """
    config = load_config(source)
    if auto_class_of(config) is None or config.is_encoder_decoder:
        raise ArchitectureError(
            "the model is not a causal language model", where=source, got=f"model_type = {config.model_type!r}",
            expected="a decoder such as llama, mistral, qwen2, qwen3, gemma, gpt2, opt, bloom, gpt_neox",
            do="choose a model that generates text from left to right",
        )  # fmt: skip
    return config_of_text(config)


def load_model(
    source: str, config: Any, precision: str, quantization: QuantizationConfigMixin | None = None, *, family: Any = None,
    may_miss: Collection[str] = (), may_stay: tuple[str, ...] = (), device_map: DeviceMap | None = None,
) -> PreTrainedModel:  # fmt: skip
    """The frozen model of a folder or hub id, on the accelerator where there is one, or as `device_map` says.

    `family` is one of the library's auto classes, by itself one that generates; weights of the modules in `may_miss` may be absent, and
    are then whatever they are; those whose names begin with one of `may_stay` may be left in the files.

    Raises: WeightsError; BadValueError for a device map that does not fit the model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        folder = weights_folder(source)
        with ExitStack() as opened:
            # What a device map leaves on disk is read from the folder's own files at every pass.
            stored = _stored(folder, opened) if device_map is None else None
            if stored is not None and getattr(config, "quantization_config", None) is None:
                check_types(source, ((name, one.get_dtype(), len(one.get_shape())) for name, one in stored.items()))
            blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
            if stored is not None and isinstance(blocks, int) and blocks > len(stored):
                raise ValueError(f"{counted(len(stored), 'tensor')} for the {counted(blocks, 'block')} that {CONFIG} describes")
            found: Any = _get_model_class(config, (family or auto_class_of(config))._model_mapping).from_pretrained(
                str(folder) if stored is None else None, config=config, state_dict=stored, dtype=DTYPES[precision],
                output_loading_info=True, quantization_config=quantization, use_safetensors=True,
                device_map=device_map or (None if quantization is None else {"": device}),
                ignore_mismatched_sizes=True,  # They are named below.
            )  # fmt: skip
        model, loaded = found
        if isinstance(device_map, Mapping):
            check_device_map(model, dict(device_map))
        model.name_or_path = model.config.name_or_path = source
        load_generation_config(model, folder)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, RecursionError, ArithmeticError) as problem:
        raise _placing_error(first_line(problem)) if device_map else weights_error(source, _why(problem)) from None
    check_all_taken(source, loaded["unexpected_keys"], (*may_stay, *left_in_files(config, str(read_config(folder).get("model_type")))))
    missing = [key for key in sorted(loaded["missing_keys"]) if key.rpartition(".")[0] not in may_miss]
    others = (f"{name}, {tuple(stored)} where the model has {tuple(own)}" for name, stored, own in sorted(loaded["mismatched_keys"]))
    wrong = [*missing, *others][:3]
    if wrong:
        raise weights_error(source, "missing or of another shape: " + ", ".join(wrong))
    check_one_head(source, model)
    # Fewer bits would hide them.
    plain = quantization is None and device_map is None
    check_numbers(source, model.state_dict().items() if plain else stored_tensors(weight_files(folder)))
    if device_map is not None and model.device.type == "meta":
        raise _placing_error("an input embedding that is brought in for each pass")
    model = model.to(device) if quantization is None and device_map is None else model
    let_gradients_through(model)
    let_deep_inputs_in(model)
    return model.eval().requires_grad_(False)


def _why(problem: BaseException) -> str:
    # The library's own words speak of a report that it has written elsewhere.
    if "automatic conversion of the weights" in str(problem):
        return "tensors that are one in the model, as experts are, do not go together: one is missing, or too many"
    return first_line(problem)


def _check_device_map(device_map: DeviceMap) -> None:
    here = torch.cuda.device_count()
    known = {"cpu", "disk", *range(here), *(f"cuda:{number}" for number in range(here))}
    unknown = [] if isinstance(device_map, str) else [f"{name} on {place}" for name, place in device_map.items() if place not in known]
    if unknown:
        raise _placing_error(", ".join(unknown[:3]))


def _placing_error(got: str) -> BadValueError:
    return BadValueError(
        "the device map does not fit this base and this machine", where="device map", got=got,
        expected=f"every module once, on one of {torch.cuda.device_count()} accelerators (0, 1, ...), cpu or disk; the input embedding "
        "first of all, and where the arithmetic is", do='mend the file, or take "auto"',
    )  # fmt: skip


def weights_folder(source: str) -> Path:
    """The folder, or the one on this machine where the hub's files are."""
    if Path(source).is_dir():
        return Path(source)
    folder = fetch(source, (CONFIG, _GENERATION, INDEX, WEIGHTS))
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        fetch(source, sorted(set(read_index(folder).values())), revision=folder.name)
    return folder


def stored_dtypes(source: str) -> dict[str, torch.dtype]:
    """The types of a base's floating-point weights in its files, by their names there.

    Raises: BaseFolderError, WeightsError.
    """
    folder = weights_folder(str(tiny_path()) if source == "tiny" else source)
    return {name: _STORED[one.dtype] for name, one in read_stored(weight_files(folder)).items() if one.dtype in _STORED}


def _stored(folder: Path, opened: ExitStack) -> dict[str, Any]:
    """The tensors of a folder, each to be read when it is wanted and then forgotten.

    Mapped into memory, as the library does it, the files would count as this process's, and stay as long as one tensor of them.
    """
    slices: dict[str, Any] = {}
    for file in weight_files(folder):
        weights = opened.enter_context(safe_open(file, framework="pt", backend="pread"))
        slices |= {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118  no mapping
    return slices


def load_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """As from_pretrained does, which takes config.json where there is no file for it."""
    if (folder / _GENERATION).is_file():
        settings = GenerationConfig.from_pretrained(str(folder))
    else:
        settings = GenerationConfig.from_pretrained(str(folder), config_file_name=CONFIG, _from_model_config=True)
    model.generation_config = settings


def weights_error(source: str, got: str) -> WeightsError:
    """What is said of weights that do not load."""
    return WeightsError(
        "the model's weights cannot be loaded", where=source, got=got, expected="whole *.safetensors files that match config.json",
        do="copy or download the weights again; .bin weights are converted by save_pretrained(..., safe_serialization=True)",
    )  # fmt: skip


def check_vocabulary(source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Look whether the model has a row for every token.

    Raises: TokenizerError.
    """
    embedding: Any = model.get_input_embeddings()
    largest, rows = max(tokenizer.get_vocab().values()), embedding.weight.shape[0]
    if largest >= rows:
        raise TokenizerError(
            "the tokenizer has more tokens than the model", where=source, got=f"token id {largest}", expected=f"ids below {rows}",
            do="use the tokenizer that belongs to the model",
        )  # fmt: skip


def first_line(problem: BaseException) -> str:
    """What an error of a library says, in short."""
    text = str(problem).strip() or type(problem).__name__
    return text.splitlines()[0][:200]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the loader's progress bar and load report: what they would say is an error here, or in the event log."""
    level = transformers.logging.get_verbosity()
    bar = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bar:
            transformers.logging.enable_progress_bar()
