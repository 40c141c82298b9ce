"""What run.toml points at: the base, and the rows of every edge. Opens without torch, for `atoll plan`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from atoll import seeding
from atoll.adapters.targets import named_outside
from atoll.base.headers import fetch
from atoll.base.read_shapes import read_shapes
from atoll.base.weights.hub import check_hub_name
from atoll.config.load import LoadedConfig
from atoll.config.schema import Data, Edge, RunConfig, held_out_source
from atoll.errors import AdapterFolderError, BadValueError, BaseFolderError, DataFileError, EmptyDataError, InputError
from atoll.planner.importance import Importance, read_importance
from atoll.planner.plan_fleet import LOCAL_EDGE
from atoll.runs.events import Advised, DataLoaded, Event
from atoll.shapes import BaseShapes, with_full_weights, with_outside
from atoll.tasks.forms.flags import check_flags
from atoll.tasks.forms.special import seen_note, token_notes
from atoll.tasks.forms.values import check_alike, class_of, in_order
from atoll.tasks.partition import partition
from atoll.tasks.readers.hub import Role
from atoll.tasks.readers.nearest import few_names
from atoll.tasks.readers.reader import Limits
from atoll.tasks.rows import RowProblem, Rows, files_of, load_rows
from atoll.tasks.text import TextForm, check_column, row_form
from atoll.tasks.tokens import Examples, skip_or_raise
from atoll.units import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB_REVISION = re.compile(r"[\w.-]+/[\w.-]+@[\w./-]+")
_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
POSITIONS_END = frozenset({
    "gpt2", "gpt_neo", "gptj", "gpt_bigcode", "codegen", "opt", "mpt", "biogpt", "ctrl", "openai-gpt", "bert", "distilbert", "electra",
    "albert", "ernie", "roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "mpnet", "deberta",
})  # fmt: skip
"""Families whose positions are learned or tabulated: there is none behind the last. With rotary positions a base goes on, untrained."""
KEPT_FREE = dict.fromkeys(("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "mpnet"), 2)
"""Positions that a family's table keeps for padding."""

_DOWN = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(embedding_A|A\.weight)")


@dataclass(frozen=True, slots=True, eq=False)
class EdgeRows:
    """The rows one edge owns."""

    name: str
    rows: Rows
    form: TextForm
    """How they become text, without classes: which there are is known when all edges are."""
    notes: tuple[tuple[str, str], ...] = ()
    """What is to be told of them, each with the edge whose rows they are, or "" where edges share them."""

    @property
    def written_alike(self) -> tuple[object, ...]:
        """Equal for edges whose rows are the same and become the same text: an edge's own are its templates alone."""
        return id(self.rows), self.form.prompt, self.form.completion


def base_source(loaded: LoadedConfig) -> str:
    """The base as given: "tiny", a folder (relative to run.toml, and to nothing else), a hub id, or the cached folder of one's revision.

    Raises: BaseFolderError for a folder where Atoll was started, which libraries would take instead, and a revision that the hub has not.
    """
    name = loaded.config.model.base
    if _is_folder(loaded):
        return str(loaded.resolve(name))
    if _HUB_REVISION.fullmatch(name):
        return _fetched(*name.split("@"))
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


@cache
def _fetched(name: str, revision: str) -> str:
    return str(fetch(name, _MODEL_FILES, revision=revision))


def public_name(loaded: LoadedConfig) -> str:
    """The base as others may know it, in an adapter's own files: a hub id as it is; a folder as run.toml names it, of a place on this
    machine the last name alone, and never so that a hub could be asked for it.

    It is what PEFT's Auto classes load the base by: a hub id does for everybody, a relative path where the reader has it, too. Whoever
    gives PeftModel a base, as `atoll.load` does, needs none of it.
    """
    name = loaded.config.model.base
    if not _is_folder(loaded):
        return name.partition("@")[0] if _HUB_REVISION.fullmatch(name) else name
    path = Path(name)
    return f"./{path.name}" if name.startswith("~") or path.is_absolute() else name if name.startswith(".") else f"./{name}"


def public_revision(loaded: LoadedConfig) -> str | None:
    """The revision of a base from a hub, where run.toml names one."""
    name = loaded.config.model.base
    return name.partition("@")[2] if not _is_folder(loaded) and _HUB_REVISION.fullmatch(name) else None


def base_shapes(loaded: LoadedConfig, num_classes: int) -> BaseShapes:
    """The shapes of the base, of a classifier with so many classes (0: it generates), and whether its weights are to be trained.

    Raises: BaseFolderError, WeightsError, ArchitectureError; BadValueError where max_length is beyond the base's positions.
    """
    source, adapter = check_hub_name(base_source(loaded), loaded.path.resolve().parent), loaded.config.adapter
    shapes = read_shapes(source, num_classes or None)
    check_positions(loaded.config, shapes.model_type, shapes.max_positions)
    if adapter.kind != "lora":
        return with_full_weights(shapes) if adapter.kind == "full" else shapes
    if adapter.start is None:
        return with_outside(shapes, named_outside(adapter.targets, shapes.outside))
    try:
        return with_outside(shapes, start_ranks(loaded.resolve(adapter.start)))
    except AdapterFolderError:
        # Who reads the folder says what is wrong with it; of a fleet, an edge need not have it.
        return with_outside(shapes, {module.name for module in shapes.outside})


def check_positions(config: RunConfig, model_type: str, positions: int | None) -> None:
    """Whether rows of max_length tokens have a place each in the base, where its positions end.

    Raises: BadValueError.
    """
    room = None if positions is None else positions - KEPT_FREE.get(model_type, 0)
    if room is not None and model_type in POSITIONS_END and config.data.max_length > room:
        raise BadValueError(
            "rows may be longer than the base has positions", where="[data] max_length", got=str(config.data.max_length),
            expected=f"at most {room}, the positions of this {model_type}",
            do=f"write max_length = {room} below [data]: longer rows are cut",
        )  # fmt: skip


def run_labels(config: RunConfig, parts: Iterable[Rows]) -> tuple[str, ...]:
    """The classes of a run in their order, as `labels_of` has them.

    Raises: ColumnError, BadRowError; BadValueError for fewer than two classes.
    """
    labels = labels_of(config, parts)
    check_labels(config, labels)
    return labels


def check_labels(config: RunConfig, labels: Sequence[str]) -> None:
    """Whether there are classes to tell apart, where a run does that.

    Raises: BadValueError for fewer than two, or for two that differ in nothing but how they are written.
    """
    if config.model.task == "classify" and len(labels) < 2:
        raise BadValueError(
            "there are no classes to tell apart", where=f"[data] label = {config.data.label!r}", got=", ".join(labels) or "no label",
            expected="two classes or more", do="name the column that holds the classes",
        )  # fmt: skip
    if config.model.task == "classify" and config.evaluate.labels is None:
        check_alike(labels, f"[data] label = {config.data.label!r}")


def labels_of(config: RunConfig, parts: Iterable[Rows]) -> tuple[str, ...]:
    """The classes of some rows: as [evaluate] labels says, or all that are there, in order; none where the run generates.

    Raises: ColumnError, BadRowError.
    """
    column = config.data.label
    if config.model.task == "generate" or column is None:
        return ()
    if config.evaluate.labels is not None:
        return tuple(label.strip() for label in config.evaluate.labels)
    found: set[str] = set()
    for rows in {id(rows): rows for rows in parts}.values():
        check_column(column, rows.columns, "[data] label")
        for index, value in enumerate(rows.column(column)):
            try:
                found.add(class_of({column: value}, column))
            except RowProblem as problem:
                skip_or_raise(rows, index, problem)
    return in_order(found)


def edge_rows(loaded: LoadedConfig, only: str | None = None) -> tuple[EdgeRows, ...]:
    """Every edge's rows, or those of one: its own file, read once for all that name it, or its share of [data] train; none held out.

    Raises: DataFileError, EmptyDataError, BadRowError, PartitionError, ColumnError.
    """
    config, held_out = loaded.config, _held_out_files(loaded)
    sharing = [edge.name for edge in config.edge if edge.data is None] or ([] if config.edge else [LOCAL_EDGE])
    if only is not None and only not in sharing:
        sharing = []  # The file that others share may not be on this machine.
    found: dict[str, EdgeRows] = {}
    if sharing:
        rows = _trained_on(loaded, held_out)
        form = _checked_form(config.data, rows)
        notes = tuple(("", note) for note in (*rows.notes, form.note) if note)
        for name, share in zip(sharing, _shares(config, rows, sharing), strict=True):
            found[name] = EdgeRows(name, share, form, notes)
            notes = ()  # Once for all that share.
    own: dict[str, Rows] = {}
    for edge in config.edge:
        if edge.data is None or only not in (None, edge.name):
            continue
        if edge.data not in own:
            own[edge.data] = _load(loaded, edge.data, config.data.train_rows, held_out=held_out)
        rows = own[edge.data]
        form = _checked_form(data_of(config, edge), rows, f"edge {edge.name}, ")
        found[edge.name] = EdgeRows(edge.name, rows, form, tuple((edge.name, note) for note in (*rows.notes, form.note) if note))
    names = [edge.name for edge in config.edge] or [LOCAL_EDGE]
    return tuple(found[name] for name in names if only in (None, name))


def alone(loaded: LoadedConfig, name: str) -> LoadedConfig:
    """The config of one edge on its own machine."""
    config = loaded.config
    edges = tuple(edge for edge in config.edge if edge.name == name)
    federated = config.federated.model_copy(update={"min_edges": 1})
    # One machine against its host: no planner may give it the whole base, which it need not have.
    run = config.run.model_copy(update={"placement": "split" if config.run.placement == "auto" else config.run.placement})
    return replace(loaded, config=config.model_copy(update={"run": run, "edge": edges, "federated": federated}))


def data_of(config: RunConfig, edge: Edge) -> Data:
    """[data] as it holds for an edge, with templates of its own where it has any."""
    own = {name: getattr(edge, name) for name in ("prompt", "completion") if getattr(edge, name) is not None}
    return config.data.model_copy(update=own)


def _shares(config: RunConfig, rows: Rows, sharing: Sequence[str]) -> list[Rows]:
    if not config.edge:
        return [rows]
    parts = partition(rows, config.data.partition, sharing, config.run.seed)
    shares = [rows.take(part) for part in parts]
    # What could not be read belongs to no edge: it is counted where it is told first.
    left_out = rows.num_skipped + len(rows) - sum(len(part) for part in parts)
    return [replace(shares[0], num_skipped=left_out), *shares[1:]]


def _checked_form(data: Data, rows: Rows, owner: str = "") -> TextForm:
    """The form of training rows. Raises: as form_of; ConflictError for rows that say that they are not to be trained on."""
    try:
        form = row_form(data, rows)
    except InputError as problem:
        if owner:  # One of several files has other columns.
            problem.where = f"{owner}{rows.name}, {problem.where}"
        raise
    used = {*form.columns, data.label, data.partition.rpartition(":")[2]}
    check_flags(rows, {name for name in used if name})
    return form


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
    found: list[Path] = []
    for source in {held_out_source(loaded.config), *(edge.eval for edge in loaded.config.edge)} - {None}:
        with suppress(DataFileError):
            found += files_of(str(source), base_dir=loaded.path.parent, reader=loaded.config.data.reader, role="eval")
    return tuple(found)


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


def data_events(
    config: RunConfig, rows: Sequence[EdgeRows], examples: Sequence[Examples], labels: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[Event, ...]:  # fmt: skip
    """Of training rows, edge by edge, and the classes that were found in them."""
    events: list[Event] = []
    for edge, part in zip(rows, examples, strict=True):
        events += [*(Advised(name, note) for name, note in edge.notes), *token_events(edge, part, tokenizer)]
    return (*events, *class_events(config, labels))


def token_events(edge: EdgeRows, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> tuple[Event, ...]:
    """What became of an edge's rows as tokens were made of them."""
    notes = [Advised(edge.name, note) for note in token_notes(edge.rows, edge.form, tokenizer)]
    return (*notes, _loaded("train", edge.name, edge.rows, examples))


def data_notes(config: RunConfig, rows: Sequence[EdgeRows], labels: Sequence[str]) -> tuple[str, ...]:
    """What can be told of training rows before tokens are made of them, in sentences."""
    notes = [f"{name}: {note}" if name else note for edge in rows for name, note in edge.notes]
    own = {id(edge.rows): edge for edge in rows}.values()
    notes += [f"left out of {one.name}: {counted(n, 'row')} that cannot be read" for one in own if (n := one.rows.num_skipped)]
    return (*notes, *(event.advice for event in class_events(config, labels)))


def class_events(config: RunConfig, labels: Sequence[str]) -> tuple[Advised, ...]:
    """The classes of a run, which its data alone may have decided."""
    listed = few_names([repr(label) for label in labels], 20)
    return (Advised("", f"{counted(len(labels), 'class')} in column {config.data.label}: {listed}"),) if labels else ()


def held_out_events(rows: Rows | None, form: TextForm, examples: Examples | None, trained: Sequence[Examples] = ()) -> tuple[Event, ...]:
    """Of held-out rows, where there are any; with those that are `trained` on, of rows that are both."""
    if rows is None or examples is None:
        return ()
    notes = [Advised("", f"held-out rows: {note}") for note in (*rows.notes, form.note) if note]
    notes += [Advised("", seen)] if (seen := seen_note(trained, examples)) else []
    return (*notes, _loaded("eval", "", rows, examples))


def _loaded(role: str, edge: str, rows: Rows, examples: Examples) -> DataLoaded:
    return DataLoaded(
        "train" if role == "train" else "eval", edge, len(examples), rows.num_skipped + examples.num_skipped, examples.num_truncated,
        examples.num_tokens, examples.num_label_tokens,
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
