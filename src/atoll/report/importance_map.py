"""How much each weight matters, as a heat map of blocks by weight types: from the event log."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.errors import RunFolderError
from atoll.report.activity import block_of
from atoll.runs.events import ImportanceFound, read_events
from atoll.units import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_LOG_FROM = 30.0
"""From this ratio of largest to least score on, the scale is logarithmic."""
_CELL_INCHES, _LEAST_CELL_INCHES, _MOST_INCHES = (0.62, 0.3), 0.12, 8.0
_MOST_WRITTEN_CELLS = 240
"""Up to so many, the numbers stand in the cells."""
_NOTHING = "#EDEDED"
_BRIGHT_FROM = 0.55
"""Place on the colour scale from which on dark letters are read better."""
_OUTSIDE = "outside"
_TITLES = {
    "svd-sensitivity": "smoothed sensitivity × uncertainty of the adapter P diag(l) Q",
    "gradient-weight": "|parameter · gradient| of the adapter over the cost of training it",
    "none": "all alike",
}


@dataclass(frozen=True, slots=True)
class ImportanceTable:
    """The last importance that a run found, as a table; None where a block has no such weight, or a score was not finite."""

    importance: str
    edges: tuple[str, ...]
    blocks: tuple[int | None, ...]
    """One row each; None, which is last: modules outside the blocks."""
    types: tuple[str, ...]
    """One column each: a module's last name, or all that follows the block's number where that is not unique in a block."""
    scores: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """What is needed of an importance_found line."""

    importance: str
    edges: tuple[str, ...]
    scores: Mapping[str, float | None]

    def __post_init__(self) -> None:
        if not self.scores:
            raise ValueError("there is no score")


def read_importance_table(events_path: Path) -> ImportanceTable | None:
    """The last importance of a run; None where none was found.

    Raises: RunFolderError for a log that is missing, damaged, or lacks a field.
    """
    last: tuple[int, object] | None = None
    for number, line in enumerate(read_events(events_path), start=1):
        if isinstance(line, dict) and line.get("event") == ImportanceFound.kind():
            last = number, line
    return None if last is None else _table(_read(*last, events_path))


def draw_importance(table: ImportanceTable) -> Figure:
    """Rows are blocks, columns weight types; grey where a block has no such weight."""
    from matplotlib.figure import Figure

    num_rows, num_columns = len(table.blocks), len(table.types)
    width = min(_MOST_INCHES, max(4.5, _CELL_INCHES[0] * num_columns))
    height = min(_MOST_INCHES, max(1.2, max(_LEAST_CELL_INCHES, _CELL_INCHES[1]) * num_rows))
    figure = Figure(figsize=(width + 1.8, height + 1.5), layout="constrained")
    axes = figure.subplots()
    image = _draw_cells(axes, table)
    figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
    mean, kind = f"mean over {counted(len(table.edges), 'edge')}", _TITLES.get(table.importance, table.importance)
    axes.set_title(f"importance of each weight, {mean}\n{kind}", loc="left")
    axes.set_xticks(range(num_columns), table.types, rotation=30, ha="right", rotation_mode="anchor")
    every = math.ceil(num_rows * 0.16 / height)
    rows = [_OUTSIDE if block is None else str(block) for block in table.blocks]
    axes.set_yticks(range(0, num_rows, every), rows[::every])
    axes.set_ylabel("block")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if num_rows * num_columns <= _MOST_WRITTEN_CELLS:
        _write_numbers(axes, table, image)
    return figure


def _draw_cells(axes: Axes, table: ImportanceTable) -> AxesImage:
    values = [[math.nan if score is None else score for score in row] for row in table.scores]
    known = [value for row in values for value in row if value > 0]
    least, most = min(known, default=0.0), max(known, default=1.0)
    logarithmic = most > _LOG_FROM * least > 0
    # A weight that does not matter at all has no logarithm: it is drawn as the one that matters least.
    shown = [[max(value, least) if value == value else value for value in row] for row in values] if logarithmic else values
    axes.set_facecolor(_NOTHING)
    return axes.imshow(
        shown, aspect="auto", interpolation="none", cmap="cividis", norm="log" if logarithmic else "linear",
        vmin=least if logarithmic else 0.0, vmax=most,
    )  # fmt: skip


def _write_numbers(axes: Axes, table: ImportanceTable, image: AxesImage) -> None:
    """In percent of the largest score."""
    least, largest = image.get_clim()
    for y, row in enumerate(table.scores):
        for x, score in enumerate(row):
            if score is not None and largest:
                bright = float(image.norm(max(score, least or 0.0))) > _BRIGHT_FROM  # type: ignore[arg-type]
                axes.text(x, y, f"{100 * score / largest:.3g}", ha="center", va="center", fontsize=7, color="black" if bright else "white")
    axes.set_xlabel("numbers: percent of the largest")


def _table(found: _Found) -> ImportanceTable:
    numbered = sorted({block for name in found.scores if (block := block_of(name)) is not None})
    blocks = (*numbered, *([None] if any(block_of(name) is None for name in found.scores) else []))
    types = _types(tuple(found.scores))
    columns = tuple(dict.fromkeys(types.values()))
    cells = {(block_of(name), types[name]): score for name, score in found.scores.items()}
    rows = tuple(tuple(cells.get((block, column)) for column in columns) for block in blocks)
    return ImportanceTable(found.importance, found.edges, blocks, columns, rows)


def _types(names: Sequence[str]) -> dict[str, str]:
    """By module: its last name; all that follows the block's number for a last name that a block has twice."""
    places = [(block_of(name), name.rpartition(".")[2]) for name in names]
    twice = {last for (_, last), count in Counter(places).items() if count > 1}
    return {name: _after_block(name) if last in twice else last for name, (_, last) in zip(names, places, strict=True)}


def _after_block(name: str) -> str:
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[number + 1 :])


def _read(number: int, line: object, path: Path) -> _Found:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(_Found).validate_python(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        got = f"{'.'.join(map(str, first['loc'])) or 'the line'}: {first['msg']}"
        what, where = "an event lacks what it must have", f"{path}, line {number}"
        do = "the file was changed after the run, or another version wrote it; run `atoll train` again"
        raise RunFolderError(what, where=where, got=got, expected="an event as docs/run-directory.md says", do=do) from None
