"""What [data] and [evaluate] exclude."""

from __future__ import annotations

from collections import Counter

from atoll.config.checks.page import conflict
from atoll.config.document import Document, Location
from atoll.config.keys import as_toml
from atoll.config.schema import RunConfig
from atoll.errors import InputError
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


def evaluation(config: RunConfig, document: Document) -> list[InputError]:
    """Metrics and comparisons without what they need."""
    errors: list[InputError] = []
    metrics, data = config.evaluate.metrics, config.data
    for metric in metrics:
        missing = [name for name in trait("metric", metric, "columns") if getattr(config.evaluate, name) is None]
        if missing and not (metric == "slot_accuracy" and data.train == "demo"):
            needed = " and ".join(f"evaluate.{name}" for name in missing)
            do = f'name the column: {missing[0]} = "..." below [evaluate]'
            errors.append(conflict(document, ("evaluate", "metrics"), f"{metric} needs {needed}", as_toml(metrics), needed, do))
    twice = [metric for metric, count in Counter(metrics).items() if count > 1]
    if twice:
        what, do = "a metric is asked for twice", "name it once"
        errors.append(conflict(document, ("evaluate", "metrics"), what, ", ".join(twice), "each metric once", do))
    if data.text is not None and metrics:
        what, do = "metrics of completions need completions", "write prompt and completion instead of text, or take the metrics out"
        errors.append(
            conflict(document, ("evaluate", "metrics"), what, "data.text, which has none", "data.prompt and data.completion", do)
        )
    if data.eval is None and data.train != "demo":
        errors += _without_held_out_rows(config, document)
    return errors


def _without_held_out_rows(config: RunConfig, document: Document) -> list[InputError]:
    asked: dict[Location, object] = {("run", "compare"): config.run.compare, ("evaluate", "metrics"): config.evaluate.metrics}
    asked["data", "eval_rows"] = config.data.eval_rows
    what, do = "there are no held-out rows to evaluate on", 'name a file: eval = "..." below [data]; or leave this key out'
    return [
        conflict(document, location, f"{what}, and {'.'.join(map(str, location))} needs them", as_toml(value), "data.eval", do)
        for location, value in asked.items()
        if value
    ]
