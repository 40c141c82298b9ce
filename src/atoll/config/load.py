"""run.toml in, a checked value out; every error of the file in one reading."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from atoll.config.checks.availability import unavailable
from atoll.config.checks.conflicts import conflicts
from atoll.config.checks.problems import problems
from atoll.config.document import Document, read_document
from atoll.config.fleet import with_fleet, with_profiles
from atoll.config.named_parts import load_parts, plugin_parts
from atoll.config.overrides import apply_overrides, is_of_edge, method_of
from atoll.config.schema import RunConfig
from atoll.errors import InputError, ManyErrors


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A checked config, with the edges of its fleet file and what their profiles say; the file it came from, and that file's text."""

    config: RunConfig
    path: Path
    toml_text: str
    overrides: tuple[str, ...] = ()
    """What was put on top of the file, in this order."""

    @property
    def method(self) -> str | None:
        """The published method that was asked for by name, if any."""
        return method_of(self.overrides)

    def resolve(self, value: str) -> Path:
        """A path of the file, relative to the folder the file is in."""
        return resolve_path(self.path, value)


def load(path: Path, overrides: Sequence[str] = (), *, environment: bool = True, imports: bool = True) -> LoadedConfig:
    """The config at `path` with every override (section.key=value) on top, and the parts that it names.

    Parts that are not built in are imported from the folder of the file or, unless `environment` is False, from what is installed. Without
    `imports` none is; then what such a part excludes is not looked at.

    Raises: an InputError leaf, or ManyErrors with all of them.
    """
    return _checked(read_document(Path(path)), overrides, environment=environment, imports=imports)


def changed(loaded: LoadedConfig, overrides: Sequence[str], *, imports: bool = True) -> LoadedConfig:
    """A config that was loaded before, with overrides on top; `imports` as in `load`.

    Raises: as `load`.
    """
    document = Document(loaded.path, loaded.toml_text, _given(resolved(loaded.config)))
    return replace(_checked(document, overrides, imports=imports), overrides=(*loaded.overrides, *overrides))


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config at `path` as a value; see `load`."""
    return load(path, overrides).config


def resolve_path(config_path: Path, value: str) -> Path:
    """A path written in run.toml: relative to the folder of the file; ~ is the home folder."""
    return Path(config_path).parent / Path(value).expanduser()


def resolved(config: RunConfig) -> dict[str, object]:
    """Every key with the value that holds, as JSON values."""
    return config.model_dump(mode="json")


def restored(values: Mapping[str, object]) -> RunConfig:
    """The config that `resolved` wrote.

    Raises: ValueError if the values are of another version's schema.
    """
    return RunConfig.model_validate(tuples(values))


def config_hash(config: RunConfig) -> str:
    """SHA-256 of the resolved config: equal for files that ask for the same run."""
    return hashlib.sha256(json.dumps(resolved(config), sort_keys=True).encode()).hexdigest()


def _checked(document: Document, overrides: Sequence[str], *, environment: bool = True, imports: bool = True) -> LoadedConfig:
    document, errors, has_edges = _gathered(document, overrides)
    try:
        config = RunConfig.model_validate(tuples(document.table))
    except ValidationError as error:
        errors += problems(error, document)
        raise_all(errors + unavailable(document, {one.where for one in errors}))
        raise  # not reached: a ValidationError has at least one problem
    of_parts = load_parts(config, document, environment=environment) if imports else []
    # What excludes a part is known once it is loaded.
    knows = has_edges and not of_parts and (imports or not plugin_parts(config))
    raise_all(errors + unavailable(document, ()) + of_parts + (conflicts(config, document) if knows else []))
    return LoadedConfig(config, document.path, document.text, tuple(overrides))


def _gathered(document: Document, overrides: Sequence[str]) -> tuple[Document, list[InputError], bool]:
    """The document with all that belongs to it: overrides, the fleet's edges, their profiles; and whether the edges could be had."""
    document, errors = apply_overrides(document, [text for text in overrides if not is_of_edge(text)])
    document, of_fleet = with_fleet(document)
    if of_fleet:
        return document, errors + of_fleet, False
    document, of_edges = apply_overrides(document, [text for text in overrides if is_of_edge(text)])
    document, of_profiles = with_profiles(document)
    return document, errors + of_edges + of_profiles, True


def _given(values: Mapping[str, object]) -> dict[str, object]:
    """Without the keys that hold nothing: TOML has no word for that, and the checks see what a file could say."""
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found[key] = _given(value)
        elif isinstance(value, list):
            found[key] = [_given(item) if isinstance(item, Mapping) else item for item in value]
        elif value is not None:
            found[key] = value
    return found


def raise_all(errors: Sequence[InputError]) -> None:
    """Raise one error as itself and several as ManyErrors; return if there is none."""
    if len(errors) > 1:
        raise ManyErrors(errors)
    if errors:
        raise errors[0]


def tuples(value: object) -> object:
    """TOML's arrays as the tuples that the frozen schema holds."""
    if isinstance(value, list | tuple):
        return tuple(tuples(item) for item in value)
    if isinstance(value, Mapping):
        return {key: tuples(item) for key, item in value.items()}
    return value
