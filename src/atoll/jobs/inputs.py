"""What run.toml points at: the base, and the rows of every edge. Opens without torch, for `atoll plan`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from atoll import seeding
from atoll.base.read_shapes import read_shapes
from atoll.config.load import LoadedConfig
from atoll.config.schema import RunConfig, held_out_source
from atoll.errors import BadValueError, DataFileError, EmptyDataError
from atoll.planner.importance import Importance, read_importance
from atoll.planner.plan_fleet import LOCAL_EDGE
from atoll.shapes import BaseShapes, with_full_weights
from atoll.tasks.partition import partition
from atoll.tasks.readers.hub import Role
from atoll.tasks.readers.reader import Limits
from atoll.tasks.rows import RowProblem, Rows, files_of, load_rows
from atoll.tasks.text import as_text, check_column
from atoll.tasks.tokens import skip_or_raise


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


def public_name(config: RunConfig) -> str:
    """The base as others may know it, in an adapter's own files: as run.toml names it; of a place on this machine, its last name alone.

    It is what PEFT's Auto classes load the base by: a hub id does for everybody, a relative path where the reader has it, too. Whoever
    gives PeftModel a base, as `atoll.load` does, needs none of it.
    """
    name = config.model.base
    return Path(name).name if name.startswith("~") or Path(name).is_absolute() else name


def base_shapes(loaded: LoadedConfig, num_classes: int) -> BaseShapes:
    """The shapes of the base, of a classifier with so many classes (0: it generates), and whether its weights are to be trained.

    Raises: BaseFolderError, WeightsError, ArchitectureError.
    """
    shapes = read_shapes(base_source(loaded), num_classes or None)
    return with_full_weights(shapes) if loaded.config.adapter.kind == "full" else shapes


def run_labels(config: RunConfig, parts: Iterable[Rows]) -> tuple[str, ...]:
    """The classes of a run in their order, as `labels_of` has them.

    Raises: ColumnError, BadRowError; BadValueError for fewer than two classes.
    """
    labels = labels_of(config, parts)
    check_labels(config, labels)
    return labels


def check_labels(config: RunConfig, labels: Sequence[str]) -> None:
    """Whether there are classes to tell apart, where a run does that.

    Raises: BadValueError for fewer than two.
    """
    if config.model.task == "classify" and len(labels) < 2:
        raise BadValueError(
            "there are no classes to tell apart", where=f"[data] label = {config.data.label!r}", got=", ".join(labels) or "no label",
            expected="two classes or more", do="name the column that holds the classes",
        )  # fmt: skip


def labels_of(config: RunConfig, parts: Iterable[Rows]) -> tuple[str, ...]:
    """The classes of some rows: as [evaluate] labels says, or all that are there, sorted; none where the run generates.

    Raises: ColumnError, BadRowError.
    """
    column = config.data.label
    if config.model.task == "generate" or column is None:
        return ()
    if config.evaluate.labels is not None:
        return config.evaluate.labels
    found: set[str] = set()
    for rows in {id(rows): rows for rows in parts}.values():
        check_column(column, rows.columns, "[data] label")
        for index, value in enumerate(rows.column(column)):
            try:
                found.add(as_text({column: value}, column))
            except RowProblem as problem:
                skip_or_raise(rows, index, problem)
    return tuple(sorted(found))


def edge_rows(loaded: LoadedConfig, only: str | None = None) -> tuple[EdgeRows, ...]:
    """Every edge's rows, or those of one: its own file, read once for all that name it, or its share of [data] train; none held out.

    Raises: DataFileError, EmptyDataError, BadRowError, PartitionError, ColumnError.
    """
    config = loaded.config
    edges = config.edge
    if not edges:
        return (EdgeRows(LOCAL_EDGE, _trained_on(loaded, _held_out_files(loaded))),)
    sharing = [edge.name for edge in edges if edge.data is None]
    if only is not None and only not in sharing:
        sharing = []  # The file that others share may not be on this machine.
    shares: dict[str, Rows] = {}
    held_out = _held_out_files(loaded)
    if sharing:
        rows = _trained_on(loaded, held_out)
        parts = partition(rows, config.data.partition, sharing, config.run.seed)
        shares = {name: rows.take(part) for name, part in zip(sharing, parts, strict=True)}
    asked = [edge for edge in edges if only in (None, edge.name)]
    sources = dict.fromkeys(edge.data for edge in asked if edge.data is not None)
    own = {source: _load(loaded, source, config.data.train_rows, held_out=held_out) for source in sources}
    return tuple(EdgeRows(edge.name, shares[edge.name] if edge.data is None else own[edge.data]) for edge in asked)


def eval_rows(loaded: LoadedConfig) -> Rows | None:
    """The held-out rows: those of [data] eval, a share of the training rows, or the demo's own where edges train on the demo.

    Raises: as `edge_rows`.
    """
    data = loaded.config.data
    if data.validation_share is not None:
        return _held_out_share(loaded)[1]
    source = held_out_source(loaded.config)
    return None if source is None else _load(loaded, source, data.eval_rows, "eval")


def _held_out_files(loaded: LoadedConfig) -> tuple[Path, ...]:
    """The files of held-out rows, which are not trained on; none where they are not on this machine."""
    source, data = held_out_source(loaded.config), loaded.config.data
    try:
        return () if source is None else files_of(source, base_dir=loaded.path.parent, reader=data.reader, role="eval")
    except DataFileError:
        return ()


def _trained_on(loaded: LoadedConfig, held_out: Collection[Path]) -> Rows:
    data = loaded.config.data
    if data.validation_share is not None:
        return _held_out_share(loaded)[0]
    return _load(loaded, data.train, data.train_rows, held_out=held_out)


def _held_out_share(loaded: LoadedConfig) -> tuple[Rows, Rows]:
    """The rows of [data] train in two: to train on, and held out."""
    data, seed = loaded.config.data, loaded.config.run.seed
    rows = _load(loaded, data.train, None)
    num_held_out = min(len(rows) - 1, max(1, round((data.validation_share or 0) * len(rows))))
    if num_held_out < 1:
        raise EmptyDataError(
            "one row cannot be divided", where=f"[data] validation_share = {data.validation_share}", got=f"1 row in {data.train}",
            expected="at least two rows", do="give more rows, or take validation_share out",
        )  # fmt: skip
    order = np.random.default_rng(seeding.stream(seed, "held-out")).permutation(len(rows))
    held_out, trained_on = np.sort(order[:num_held_out]), np.sort(order[num_held_out:])
    return replace(rows.take(trained_on[: data.train_rows]), notes=rows.notes), rows.take(held_out[: data.eval_rows])


def given_importance(loaded: LoadedConfig) -> Importance | None:
    """The importance of weights that an earlier run found, where run.toml names it.

    Raises: RunFolderError for a file that is missing or damaged.
    """
    file = loaded.config.plan.importance_file
    return None if file is None else read_importance(loaded.resolve(file))


def _load(
    loaded: LoadedConfig, source: str, limit: int | None, role: Role = "train", held_out: Collection[Path] = ()
) -> Rows:  # fmt: skip
    data = loaded.config.data
    return load_rows(
        source, base_dir=loaded.path.parent, limit=limit, on_bad_row=data.on_bad_row, reader=data.reader,
        options=loaded.config.options_of(data.reader), limits=Limits(data.largest_file, data.largest_row), role=role, held_out=held_out,
    )  # fmt: skip
