"""What run.toml points at: the base, and the rows of every edge. Opens without torch, for `atoll plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atoll.config.load import LoadedConfig
from atoll.selection.plan import LOCAL_EDGE
from atoll.tasks.partition import partition
from atoll.tasks.rows import Rows, load_rows


@dataclass(frozen=True, slots=True, eq=False)
class EdgeRows:
    """The rows one edge owns."""

    name: str
    rows: Rows


def base_source(loaded: LoadedConfig) -> str:
    """The base as given: "tiny", a folder (paths are relative to run.toml), or a hub id."""
    name = loaded.config.model.base
    folder = loaded.resolve(name)
    is_path = folder.is_dir() or name.startswith((".", "~")) or Path(name).is_absolute() or name.count("/") > 1
    return str(folder) if is_path and name != "tiny" else name


def edge_rows(loaded: LoadedConfig, only: str | None = None) -> tuple[EdgeRows, ...]:
    """Every edge's rows, or those of one: its own file, or its share of [data] train.

    Raises: DataFileError, EmptyDataError, BadRowError, PartitionError, ColumnError.
    """
    config = loaded.config
    edges = config.edge
    if not edges:
        return (EdgeRows(LOCAL_EDGE, _load(loaded, config.data.train, config.data.train_rows)),)
    sharing = [edge.name for edge in edges if edge.data is None]
    if only is not None and only not in sharing:
        sharing = []  # The file that others share may not be on this machine.
    shares: dict[str, Rows] = {}
    if sharing:
        rows = _load(loaded, config.data.train, config.data.train_rows)
        parts = partition(rows, config.data.partition, sharing, config.run.seed)
        shares = {name: rows.take(part) for name, part in zip(sharing, parts, strict=True)}
    return tuple(
        EdgeRows(edge.name, shares[edge.name] if edge.data is None else _load(loaded, edge.data, config.data.train_rows))
        for edge in edges if only in (None, edge.name)
    )  # fmt: skip


def eval_rows(loaded: LoadedConfig) -> Rows | None:
    """The held-out rows; the demo brings its own.

    Raises: as `edge_rows`.
    """
    data = loaded.config.data
    source = "demo-eval" if data.eval is None and data.train == "demo" else data.eval
    return None if source is None else _load(loaded, source, data.eval_rows)


def _load(loaded: LoadedConfig, source: str, limit: int | None) -> Rows:
    return load_rows(source, base_dir=loaded.path.parent, limit=limit, on_bad_row=loaded.config.data.on_bad_row)
