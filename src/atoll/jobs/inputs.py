"""What run.toml points at: the base, and the rows of every edge. Opens without torch, for `atoll plan`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.adapters.targets import named_outside
from atoll.base.read_shapes import read_shapes
from atoll.config.load import LoadedConfig
from atoll.config.schema import RunConfig
from atoll.errors import AdapterFolderError, BadValueError, BaseFolderError
from atoll.planner.importance import Importance, read_importance
from atoll.planner.plan_fleet import LOCAL_EDGE
from atoll.shapes import BaseShapes, with_full_weights, with_outside
from atoll.tasks.partition import partition
from atoll.tasks.rows import RowProblem, Rows, load_rows
from atoll.tasks.text import as_text, check_column
from atoll.tasks.tokens import skip_or_raise

_DOWN = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(embedding_A|A\.weight)")


@dataclass(frozen=True, slots=True, eq=False)
class EdgeRows:
    """The rows one edge owns."""

    name: str
    rows: Rows


def base_source(loaded: LoadedConfig) -> str:
    """The base as given: "tiny", a folder (paths are relative to run.toml, and to nothing else), or a hub id.

    Raises: BaseFolderError for a hub id that is also a folder where Atoll was started, which libraries would take instead.
    """
    name = loaded.config.model.base
    if _is_folder(loaded):
        return str(loaded.resolve(name))
    if name != "tiny" and Path(name).exists():
        raise BaseFolderError(
            "the base is not beside run.toml, but in the folder where Atoll was started", where=f"[model] base = {name!r}",
            got=f"{name} in {Path.cwd()}, and none in {loaded.path.resolve().parent}",
            expected="a path from the folder of run.toml, or a hub id",
            do="write the path from run.toml's folder, or one from the root; for a model of the hub start Atoll in another folder",
        )  # fmt: skip
    return name


def _is_folder(loaded: LoadedConfig) -> bool:
    name = loaded.config.model.base
    looks_local = name.startswith((".", "~")) or Path(name).is_absolute() or name.count("/") > 1
    return name != "tiny" and (looks_local or loaded.resolve(name).is_dir())


def public_name(loaded: LoadedConfig) -> str:
    """The base as others may know it, in an adapter's own files: a hub id as it is; a folder as run.toml names it, of a place on this
    machine the last name alone, and never so that a hub could be asked for it.

    It is what PEFT's Auto classes load the base by: a hub id does for everybody, a relative path where the reader has it, too. Whoever
    gives PeftModel a base, as `atoll.load` does, needs none of it.
    """
    name = loaded.config.model.base
    if not _is_folder(loaded):
        return name
    path = Path(name)
    return f"./{path.name}" if name.startswith("~") or path.is_absolute() else name if name.startswith(".") else f"./{name}"


def base_shapes(loaded: LoadedConfig, num_classes: int) -> BaseShapes:
    """The shapes of the base, of a classifier with so many classes (0: it generates), and whether its weights are to be trained.

    Raises: BaseFolderError, WeightsError, ArchitectureError.
    """
    shapes, adapter = read_shapes(base_source(loaded), num_classes or None), loaded.config.adapter
    if adapter.kind != "lora":
        return with_full_weights(shapes) if adapter.kind == "full" else shapes
    if adapter.start is None:
        return with_outside(shapes, named_outside(adapter.targets, shapes.outside))
    try:
        return with_outside(shapes, start_ranks(loaded.resolve(adapter.start)))
    except AdapterFolderError:
        # Who reads the folder says what is wrong with it; of a fleet, an edge need not have it.
        return with_outside(shapes, {module.name for module in shapes.outside})


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
    """Every edge's rows, or those of one: its own file, read once for all that name it, or its share of [data] train.

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
    asked = [edge for edge in edges if only in (None, edge.name)]
    own = {source: _load(loaded, source, config.data.train_rows) for source in dict.fromkeys(edge.data for edge in asked) if source}
    return tuple(EdgeRows(edge.name, shares[edge.name] if edge.data is None else own[edge.data]) for edge in asked)


def eval_rows(loaded: LoadedConfig) -> Rows | None:
    """The held-out rows; the demo brings its own.

    Raises: as `edge_rows`.
    """
    data = loaded.config.data
    source = "demo-eval" if data.eval is None and data.train == "demo" else data.eval
    return None if source is None else _load(loaded, source, data.eval_rows)


def given_importance(loaded: LoadedConfig) -> Importance | None:
    """The importance of weights that an earlier run found, where run.toml names it.

    Raises: RunFolderError for a file that is missing or damaged.
    """
    file = loaded.config.plan.importance_file
    return None if file is None else read_importance(loaded.resolve(file))


def _load(loaded: LoadedConfig, source: str, limit: int | None) -> Rows:
    config = loaded.config
    return load_rows(
        source, base_dir=loaded.path.parent, limit=limit, on_bad_row=config.data.on_bad_row, reader=config.data.reader,
        options=config.options_of(config.data.reader),
    )  # fmt: skip


def start_ranks(folder: Path) -> dict[str, int]:
    """Rank by module of an adapter folder, from the header of its weights.

    Raises: AdapterFolderError.
    """
    from safetensors import SafetensorError, safe_open

    file = folder / "adapter_model.safetensors"
    try:
        with safe_open(file, framework="numpy") as tensors:
            matches = {key: match for key in tensors.keys() if (match := _DOWN.fullmatch(key))}  # noqa: SIM118  not a mapping
            ranks = {match["module"]: tensors.get_slice(key).get_shape()[0] for key, match in matches.items()}
    except (OSError, SafetensorError) as problem:
        ranks, got = {}, str(problem)
    else:
        got = "no LoRA matrices"
    if not ranks:
        raise AdapterFolderError(
            "the adapter to start from cannot be read", where=str(file), got=got, expected="an adapter folder as PEFT writes it",
            do="give the folder that holds adapter_config.json and adapter_model.safetensors in [adapter] start",
        )  # fmt: skip
    return ranks
