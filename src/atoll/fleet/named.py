"""What run.toml names and the machines of a fleet must have beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from atoll.config.document import read_document
from atoll.config.fleet import with_fleet
from atoll.config.load import LoadedConfig, resolve_path
from atoll.config.named_parts import plugin_parts
from atoll.jobs.inputs import base_source
from atoll.registry.plugins import files_of
from atoll.tasks.readers.sources import local_path


@dataclass(frozen=True, slots=True)
class NeededInput:
    """What run.toml names and a machine must have."""

    what: str
    value: str
    """As run.toml has it; a path is relative to run.toml."""
    path: Path | None
    """None: a Hugging Face id, as nothing of this name lies beside run.toml."""


def named_by_coordinator(loaded: LoadedConfig) -> list[NeededInput]:
    """What the coordinator's machine must have: the base, held-out rows, and what the plan and the adapter start from."""
    config = loaded.config
    given = {"start adapter": config.adapter.start, "importance": config.plan.importance_file}
    files = [NeededInput(what, value, loaded.resolve(value)) for what, value in given.items() if value is not None]
    source = config.data.eval if config.data.validation_share is None else config.data.train
    rows = [_rows(loaded, "held-out rows", source)] if source not in (None, "demo") else []
    return [*_of_config(loaded), *_base(loaded), *files, *rows]


def named_by_edge(loaded: LoadedConfig, name: str) -> list[NeededInput]:
    """What an edge's machine must have: the base, and its own rows, or all rows of which it trains on a share."""
    edge = next(edge for edge in loaded.config.edge if edge.name == name)
    what, source = ("rows", edge.data) if edge.data is not None else ("all edges' rows", loaded.config.data.train)
    rows = [_rows(loaded, what, source)] if source != "demo" else []
    rows += [_rows(loaded, "its own held-out rows", edge.eval)] if edge.eval is not None else []
    return [*_of_config(loaded), *_base(loaded), *rows]


def _of_config(loaded: LoadedConfig) -> list[NeededInput]:
    """What reading run.toml opens, on every machine: the fleet file, the profiles of all edges, and parts that are not built in."""
    document = read_document(loaded.path)
    run = document.table.get("run")
    fleet = run.get("fleet") if isinstance(run, Mapping) else None
    edges = with_fleet(document)[0].table.get("edge")
    profiles = [edge.get("profile") for edge in edges] if isinstance(edges, list) else []
    values = [*([("fleet file", fleet)] if fleet else []), *(("profile", profile) for profile in dict.fromkeys(profiles) if profile)]
    files = [NeededInput(what, value, resolve_path(loaded.path, value)) for what, value in values]
    return files + [_part(part.name, loaded.path.parent) for part in plugin_parts(loaded.config)]


def _part(name: str, folder: Path) -> NeededInput:
    """Its file, or the folder of its package; where neither is there, the file."""
    module, package = files_of(name, folder)
    path = package.parent if package.is_file() and not module.is_file() else module
    return NeededInput(f"part {name} (a program: copy it if you trust who wrote it)", str(path.relative_to(folder)), path)


def _base(loaded: LoadedConfig) -> list[NeededInput]:
    name = loaded.config.model.base
    source = base_source(loaded)
    if name == "tiny":
        return []
    is_path = source != name or Path(source).is_dir() or Path(source).is_absolute()
    return [NeededInput("base", name, Path(source) if is_path else None)]


def _rows(loaded: LoadedConfig, what: str, source: str) -> NeededInput:
    return NeededInput(what, source, local_path(source, loaded.path.parent))
