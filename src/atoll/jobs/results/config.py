"""The config of a run, from its folder: to use what came of it, to go on with it, or to train it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.config.document import Document, few
from atoll.config.load import LoadedConfig, changed, load, raise_all, restored
from atoll.config.named_parts import load_parts, plugin_parts
from atoll.errors import ConflictError, RunFolderError, TrustError
from atoll.runs.layout import RunDirectory


@dataclass(frozen=True, slots=True)
class Given:
    """What a run is to be trained by."""

    loaded: LoadedConfig
    again: RunDirectory | None = None
    """The run that it repeats, where a run's folder was given in place of run.toml."""
    noted: Mapping[str, Any] | None = None
    """That run's config.json."""


def given_config(path: Path, overrides: Sequence[str] = (), *, trust: bool = False) -> Given:
    """The config of a run.toml, or that with which the run in a folder began, with overrides on top.

    Raises: as `load` and `run_config`.
    """
    run = RunDirectory(path)
    if not run.config_json.is_file():
        return Given(load(path, overrides))
    loaded = run_config(run, trust=trust, loads_parts=True, as_it_began=True)
    return Given(with_overrides(run, loaded, overrides, trust=trust) if overrides else loaded, run, _noted(run, as_it_began=True))


def _noted(run: RunDirectory, *, as_it_began: bool) -> Mapping[str, Any]:
    values = run.read_config()
    began = values.get("began")  # Only where edges came or went since.
    return {**values, **began} if as_it_began and isinstance(began, dict) else values


def run_config(run: RunDirectory, *, trust: bool = False, loads_parts: bool = False, as_it_began: bool = False) -> LoadedConfig:
    """The config that holds for the run, with the edges of its last checkpoint, or those that it began with (`as_it_began`); with
    `loads_parts`, the parts that it names are imported from where it was started.

    Raises: RunFolderError where config.json is damaged or of another version; TrustError where it names parts that are not built in, which
    a folder that somebody else made may do with any code, unless `trust` says that they may be imported; PartError where they cannot be.
    """
    values = _noted(run, as_it_began=as_it_began)
    config, folder, overrides = values.get("config"), values.get("folder"), values.get("overrides")
    try:
        if not isinstance(config, dict) or not isinstance(folder, str):
            raise ValueError("no config, or no folder")
        kept = tuple(map(str, overrides)) if isinstance(overrides, list) else ()  # Older runs kept none.
        text = run.config_toml.read_text(encoding="utf-8")
        loaded = LoadedConfig(restored(config), _folder(run, folder, values.get("folder_from_run")) / "run.toml", text, kept)
    except (ValueError, OSError) as problem:
        raise RunFolderError(
            "config.json cannot be used", where=str(run.config_json), got=str(problem).splitlines()[0],
            expected="the file as the run wrote it", do="run again with this version, from config.toml",
        ) from None  # fmt: skip
    _check_trusted(run, loaded, trust=trust)
    if loads_parts:
        raise_all(load_parts(loaded.config, Document(loaded.path, loaded.toml_text, {})))
    return loaded


def with_overrides(
    run: RunDirectory, loaded: LoadedConfig, overrides: Sequence[str], *, trust: bool, imports: bool = True
) -> LoadedConfig:  # fmt: skip
    """The config of a run with overrides on top; with `imports`, the parts that it names then are imported.

    Raises: TrustError, too, for a part that an override names: which file that is, the run's folder says.
    """
    _check_trusted(run, changed(loaded, overrides, imports=False), trust=trust)
    return changed(loaded, overrides, imports=imports)


def check_begun_with(run: RunDirectory, noted: Mapping[str, Any], *, has_host: bool, on_fleet: bool) -> None:
    """Whether a run goes on, or is trained again, with a host and on a fleet as it began.

    Raises: ConflictError.
    """
    for what, before, now, option in (
        ("a host that was named", bool(noted.get("has_host")), has_host, "--host HOST:PORT"),
        ("a fleet", bool(noted.get("run_id")), on_fleet, "--engine flower, with --fleet as it began"),
    ):
        if before != now:
            raise ConflictError(
                f"a run goes on as it began: with {what}, or without", where=str(run.path), got="with" if now else "without",
                expected="with" if before else "without", do=f"add {option}" if before else f"leave {option.split()[0]} away",
            )  # fmt: skip


def _folder(run: RunDirectory, absolute: str, relative: object) -> Path:
    """Where the paths of the config begin: where run.toml lay, or, if run and data were moved together, as far from the run as it was."""
    if not Path(absolute).is_dir() and isinstance(relative, str) and (moved := run.path.resolve() / relative).is_dir():
        return moved.resolve()
    return Path(absolute)


def _check_trusted(run: RunDirectory, loaded: LoadedConfig, *, trust: bool) -> None:
    foreign = plugin_parts(loaded.config)
    if foreign and not trust:
        raise TrustError(
            "this run names code that is not Atoll's", where=str(run.config_json),
            got=few([f"{part.name} ({'.'.join(map(str, part.location))})" for part in foreign]), expected="--trust, or trust=True",
            do=f"read that code, below {loaded.path.parent}; add --trust if you would run it",
        )  # fmt: skip
