"""A folder of data: which of its files `datasets` would call which split, and which it leaves out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.errors import DataFileError
from atoll.tasks.readers.hub import HELD_OUT_SPLITS, Role, no_split
from atoll.tasks.readers.nearest import few_names

_TOLD = 8
_OF_DATASETS = ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json")
"""What `datasets` writes beside data."""
_HELD_OUT = frozenset({
    "test", "tests", "testing", "testset", "validation", "valid", "val", "dev", "devel", "eval", "evaluation", "holdout", "heldout",
    "devset", "valset", "evalset",
})  # fmt: skip
"""Words in names of files that are hardly meant to be trained on."""


@dataclass(frozen=True, slots=True)
class FolderFiles:
    """The files of one split, in order, and a word for each kind of file that is not among them."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]
    doubtful: tuple[Path, ...] = ()
    """Those of training rows that are named as if they were held out."""


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def split_files(name: str, folder: Path, words: Sequence[str], role: Role, is_data: Callable[[Path], bool]) -> FolderFiles:
    """The files of a folder and those below it that `datasets` would give this split: by the README's configs, or by their names.

    `words` are what stands behind the folder's name: a split, a config, or both. Without a split: "train"; for held-out rows "validation",
    else "test", else all where nothing is named after a split.

    Raises: DataFileError.
    """
    everything = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    data = [path for path in everything if is_data(path) and path.name not in _OF_DATASETS]
    if not data:
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise DataFileError(
            "the folder holds no data files", where=name, got=f"a folder holding {inside}",
            expected="files whose suffix says how to read them", do="name the folder that holds the files themselves",
        )  # fmt: skip
    configs = _configs(name, folder)
    config = words[0] if len(words) == 2 or (words and words[0] in configs) else None
    split = words[-1] if words and (len(words) == 2 or config is None) else None
    below, patterns = _patterns(name, configs, config)
    splits = _splits(folder, below, data, patterns)
    chosen = split or ("train" if role == "train" else next((one for one in HELD_OUT_SPLITS if one in splits), "train"))
    if not splits.get(chosen):
        raise no_split(name, chosen, [one for one, files in splits.items() if files])
    if len(splits) > 1 and split is None and role == "eval" and chosen == "train":
        raise no_split(name, " or ".join(HELD_OUT_SPLITS), list(splits))
    guessed = split is None and role == "train" and patterns is None
    doubtful = _named_otherwise(folder, splits[chosen]) if guessed else ()
    return FolderFiles(tuple(splits[chosen]), _notes(name, folder, chosen, splits, everything), doubtful)


def _named_otherwise(folder: Path, files: Sequence[Path]) -> tuple[Path, ...]:
    """Files that `datasets` takes for training rows, and that are named after other ones in a way that it does not know, as Test.csv."""
    names = {file: re.sub("held[_-]out", "heldout", file.relative_to(folder).as_posix().lower()) for file in files}
    return tuple(file for file, name in names.items() if _HELD_OUT.intersection(re.findall("[a-z]+", name)))


def _splits(folder: Path, below: str, data: Sequence[Path], of_config: object | None) -> dict[str, list[Path]]:
    from datasets.data_files import _get_data_files_patterns, resolve_pattern, sanitize_patterns

    base, root = (folder / below).resolve(), folder.resolve()
    known = {(root / path.relative_to(folder)).as_posix(): path for path in data}

    def resolve(pattern: str) -> list[str]:
        found = [path for path in resolve_pattern(pattern, base.as_posix()) if path in known]
        if not found:
            raise FileNotFoundError(pattern)
        return found

    def files(patterns: Iterable[str]) -> list[Path]:
        found: set[str] = set()
        for pattern in patterns:
            try:
                found |= set(resolve(pattern))
            except FileNotFoundError:
                continue
        return [known[path] for path in sorted(found)]

    try:
        splits = _get_data_files_patterns(resolve) if of_config is None else sanitize_patterns(of_config)
    except FileNotFoundError:
        return {}
    return {str(split): files(wanted) for split, wanted in splits.items()}


def _configs(name: str, folder: Path) -> dict[str, Mapping[str, object]]:
    """Each config that the data set card names; the default one under "", too.

    Raises: DataFileError for a card that speaks of configs and cannot be read.
    """
    import yaml
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub.repocard import DatasetCard

    card = folder / "README.md"
    if not card.is_file():
        return {}
    try:
        configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data)
    except (ValueError, TypeError, AttributeError, KeyError, OSError, yaml.YAMLError) as problem:
        if "configs:" not in card.read_text(encoding="utf-8", errors="replace"):
            return {}  # A README that is no card, as most are.
        raise DataFileError(
            "the README says in a broken way which files are data", where=f"{name}/README.md", got=" ".join(str(problem).split())[:160],
            expected="a data set card as `datasets` reads it", do="mend what stands there between --- and ---, or take it out",
        ) from None  # fmt: skip
    named = {one: config for one, config in configs.items() if config.keys() & {"data_files", "data_dir"}}
    default = next(iter(named)) if len(named) == 1 else configs.get_default_config_name() if named else None
    return named | ({"": named[default]} if default in named else {})


def _patterns(name: str, configs: dict[str, Mapping[str, object]], config: str | None) -> tuple[str, object | None]:
    """What the data set card says of a config, or of the default one: the folder of its files, and which they are, or None."""
    if not configs and config is None:
        return "", None
    if (config or "") in configs:
        chosen = configs[config or ""]
        return str(chosen.get("data_dir") or ""), chosen.get("data_files")
    known = [one for one in configs if one]
    raise DataFileError(
        "the data has no such config" if config else "the data has several configs, and no default", where=name, got=config or "none",
        expected=f"one of {few_names(known)}", do=f'name one behind a colon: "{name}:{known[0]}"' if known else "leave it out",
    )  # fmt: skip


def _notes(
    name: str, folder: Path, chosen: str, splits: dict[str, list[Path]], everything: Sequence[Path]
) -> tuple[str, ...]:  # fmt: skip
    files = splits[chosen]

    def told(paths: Sequence[Path]) -> str:
        return few_names([path.relative_to(folder).as_posix() for path in paths], _TOLD)

    others = sorted({path for split, of in splits.items() if split != chosen for path in of} - set(files))
    left = [path for path in everything if path not in {*others, *files} and path.name not in (*_OF_DATASETS, "README.md")]
    notes = [f"of {name} the split {chosen} is read ({told(files)}); of other splits, and not read: {told(others)}"] if others else []
    return (*notes, *([f"of {name} not read: {told(left)}"] if left else []))


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts) or path.name.startswith("_")
