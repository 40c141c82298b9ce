"""What [data] and [evaluate] exclude."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from atoll.config.checks.page import conflict
from atoll.config.document import Document, Location
from atoll.config.keys import as_toml
from atoll.config.schema import COLUMN_KEYS, RunConfig, held_out_source
from atoll.errors import InputError, PartError
from atoll.registry.parts import trait


def templates(config: RunConfig, document: Document) -> list[InputError]:
    """Ways to make text of a row."""
    data = config.data
    given = [name for name in ("prompt", "completion", "text", "messages") if getattr(data, name) is not None]
    expected = "prompt with completion, or text, or messages"
    if set(given) <= {"prompt", "completion"}:
        if len(given) != 1:
            return []
        other = "completion" if given == ["prompt"] else "prompt"
        what = f"data.{given[0]} needs data.{other}"
        do = f"add {other} = ..." + ("; for loss on every token write text = ... instead" if other == "prompt" else "")
        return [conflict(document, ("data", given[0]), what, f"{given[0]} alone", expected, do)]
    if len(given) == 1:
        return []
    what = "more than one way to make text of a row"
    return [conflict(document, ("data", given[-1]), what, " and ".join(given), expected, "keep one of the three")]


def held_out_rows(config: RunConfig, document: Document) -> list[InputError]:
    """Two ways to come by held-out rows, and the share that is not of the file of edges that have their own."""
    data = config.data
    if data.validation_share is None:
        return []
    where, got = ("data", "validation_share"), str(data.validation_share)
    if data.eval is not None:
        what, do = "data.eval and data.validation_share exclude each other", "keep one of the two"
        return [conflict(document, where, what, f"eval = {data.eval!r}, and a share of train", "one of the two", do)]
    own = [edge.name for edge in config.edge if edge.data is not None]
    if own:
        what, do = "edges with data of their own share none of data.train", "name held-out rows: eval = ..., or take their data out"
        return [conflict(document, where, what, f"{got}, and data of {', '.join(own[:5])}", "edges that share data.train", do)]
    return []


def templates_of_edges(config: RunConfig, document: Document) -> list[InputError]:
    """Templates of an edge's own: both, for data of its own, where [data] has these two as well or nothing."""
    errors: list[InputError] = []
    for number, edge in enumerate(config.edge):
        given = [name for name in ("prompt", "completion") if getattr(edge, name) is not None]
        if not given:
            continue
        where, got = ("edge", number, given[0]), f"edge {edge.name}: {' and '.join(given)}"
        other = [name for name in ("text", "messages", "label") if getattr(config.data, name) is not None]
        if edge.data is None:
            what, do = "an edge without data of its own has no columns of its own", "add data = ... to the edge, or take them out"
            errors.append(conflict(document, where, what, got, "[data] prompt and completion", do))
        elif other or config.model.task == "classify":
            what, do = "an edge's prompt and completion need prompt and completion elsewhere", "write all edges' rows in one way"
            errors.append(conflict(document, where, what, f"{got}; [data] {' and '.join(other) or 'label'}", "one way for all edges", do))
        elif len(given) == 1 and config.data.prompt is None:
            missing = "completion" if given == ["prompt"] else "prompt"
            errors.append(conflict(document, where, f"{given[0]} needs {missing}", got, "both", f"add {missing} = ..."))
    return errors


def evaluation(config: RunConfig, document: Document) -> list[InputError]:
    """Metrics and comparisons without what they need."""
    errors: list[InputError] = []
    metrics, data = config.evaluate.metrics, config.data
    for metric in metrics:
        columns = trait("metric", metric, "columns")
        if unknown := [name for name in columns if name not in COLUMN_KEYS]:
            errors.append(_no_column_key(metric, unknown[0], document))
            continue
        missing = [name for name in columns if getattr(config.evaluate, name) is None]
        if missing:
            needed = " and ".join(f"evaluate.{name}" for name in missing)
            do = f'name the column: {missing[0]} = "..." below [evaluate]'
            errors.append(conflict(document, ("evaluate", "metrics"), f"{metric} needs {needed}", as_toml(metrics), needed, do))
    errors += _twice(("evaluate", "metrics"), "metric", metrics, document)
    if data.text is not None and metrics:
        what, do = "metrics of completions need completions", "write prompt and completion instead of text, or take the metrics out"
        errors.append(
            conflict(document, ("evaluate", "metrics"), what, "data.text, which has none", "data.prompt and data.completion", do)
        )
    if held_out_source(config) is None and data.validation_share is None:
        errors += _without_held_out_rows(config, document)
    return errors


def tracking(config: RunConfig, document: Document) -> list[InputError]:
    """One tracker told twice."""
    return _twice(("track", "to"), "tracker", config.track.to, document)


def _twice(location: Location, kind: str, asked: Sequence[str], document: Document) -> list[InputError]:
    twice = [name for name, count in Counter(asked).items() if count > 1]
    what, expected = f"a {kind} is asked for twice", f"each {kind} once"
    return [conflict(document, location, what, ", ".join(twice), expected, "name it once")] if twice else []


def _no_column_key(metric: str, name: str, document: Document) -> PartError:
    return PartError(
        f"the metric {metric} needs a key that [evaluate] does not have", where=document.where(("evaluate", "metrics")),
        got=f"columns = ({name!r}, ...)", expected=f"of {', '.join(COLUMN_KEYS)}",
        do="mend columns in its class; a setting of its own is a field of its Options",
    )  # fmt: skip


def _without_held_out_rows(config: RunConfig, document: Document) -> list[InputError]:
    asked: dict[Location, object] = {("run", "compare"): config.run.compare, ("evaluate", "metrics"): config.evaluate.metrics}
    asked["data", "eval_rows"] = config.data.eval_rows
    what, do = "there are no held-out rows to evaluate on", 'name a file: eval = "..." below [data]; or leave this key out'
    return [
        conflict(document, location, f"{what}, and {'.'.join(map(str, location))} needs them", as_toml(value), "data.eval", do)
        for location, value in asked.items()
        if value
    ]
