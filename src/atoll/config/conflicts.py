"""Values that are right one by one and exclude each other."""

from __future__ import annotations

from collections import Counter

from atoll.config.document import Document, Location
from atoll.config.keys import as_toml
from atoll.config.schema import DEFAULT_LOCAL_STEPS, RunConfig
from atoll.errors import ConflictError, InputError


def conflicts(config: RunConfig, document: Document) -> list[InputError]:
    """One leaf for each group of values that exclude each other."""
    parts = (_templates, _selection, _training, _edges, _evaluation)
    return [error for part in parts for error in part(config, document)]


def _conflict(document: Document, location: Location, what: str, got: str, expected: str, do: str) -> ConflictError:
    return ConflictError(what, where=document.where(location), got=got, expected=expected, do=do)


def _templates(config: RunConfig, document: Document) -> list[InputError]:
    data = config.data
    given = [name for name in ("prompt", "completion", "text", "messages") if getattr(data, name) is not None]
    expected = "prompt with completion, or text, or messages"
    if set(given) <= {"prompt", "completion"}:
        if len(given) != 1:
            return []
        other = "completion" if given == ["prompt"] else "prompt"
        what = f"data.{given[0]} needs data.{other}"
        do = f"add {other} = ..." + ("; for loss on every token write text = ... instead" if other == "prompt" else "")
        return [_conflict(document, ("data", given[0]), what, f"{given[0]} alone", expected, do)]
    if len(given) == 1:
        return []
    what = "more than one way to make text of a row"
    return [_conflict(document, ("data", given[-1]), what, " and ".join(given), expected, "keep one of the three")]


def _selection(config: RunConfig, document: Document) -> list[InputError]:
    select = config.select
    if select.policy == "all":
        return []
    errors: list[InputError] = []

    def add(key: str, what: str, got: str, expected: str, do: str) -> None:
        errors.append(_conflict(document, ("select", key), what, got, expected, do))

    if select.threshold == "absolute" and select.least_variation is None:
        what, expected = 'select.threshold = "absolute" needs select.least_variation', "the variation that a module must exceed"
        add("threshold", what, "no least_variation", expected, "add least_variation = ...; every choice is in events.jsonl with its scores")
    if select.threshold != "absolute" and select.least_variation is not None:
        what, got = "select.least_variation goes with another threshold", f"least_variation beside threshold = {as_toml(select.threshold)}"
        add("least_variation", what, got, 'threshold = "absolute"', 'write threshold = "absolute", or take least_variation out')
    if select.policy in ("random", "last-layers") and select.threshold != "keep":
        what = f'select.policy = "{select.policy}" observes nothing, so that no threshold applies'
        got = f"threshold = {as_toml(select.threshold)}"
        add("threshold", what, got, 'threshold = "keep"', "take threshold out, and set keep to the share of modules to train")
    for key, value in (("variation", "product-change"), ("killed", "merge")):
        if config.adapter.kind == "bottleneck" and getattr(select, key) == value:
            what = f'select.{key} = "{value}" needs a product B A, which a bottleneck does not have'
            do = f'choose another {key}, or write kind = "lora" below [adapter]'
            add(key, what, 'adapter.kind = "bottleneck"', 'adapter.kind = "lora"', do)
    if config.model.precision == "bf16" and select.killed == "merge":
        what = 'select.killed = "merge" rounds away what a young adapter adds to weights in bf16'
        add("killed", what, 'model.precision = "bf16"', 'model.precision = "fp32"', 'write killed = "offload", or precision = "fp32"')
    window, period = select.observe_steps, select.every
    if select.policy == "kill-and-revive" and isinstance(window, int) and isinstance(period, int) and period <= window:
        what = "a window of observation is no shorter than its period, so that no module would ever be killed"
        add("every", what, f"observe_steps = {window}, every = {period}", f"every above {window}", "raise every, or lower observe_steps")
    return errors


def _training(config: RunConfig, document: Document) -> list[InputError]:
    train = config.train
    if train.local_steps is not None and train.local_epochs is not None:
        what, got = (
            "train.local_steps and train.local_epochs exclude each other",
            f"{train.local_steps} steps and {train.local_epochs} epochs",
        )
        return [_conflict(document, ("train", "local_epochs"), what, got, "one of the two", "take one of them out")]
    if train.local_epochs is not None:
        return []  # the number of steps is known only with the data
    total = config.run.rounds * (train.local_steps or DEFAULT_LOCAL_STEPS)
    if 0 < train.warmup_steps < total or train.warmup_steps == 0:
        return []
    what, got = "the warm-up does not end before the run does", f"warmup_steps = {train.warmup_steps} of {total} steps in all rounds"
    do = "lower train.warmup_steps, or raise run.rounds or train.local_steps"
    return [_conflict(document, ("train", "warmup_steps"), what, got, f"fewer than {total} steps", do)]


def _edges(config: RunConfig, document: Document) -> list[InputError]:
    errors: list[InputError] = []
    names = [edge.name for edge in config.edge]
    for name, count in Counter(names).items():
        if count > 1:
            second = len(names) - 1 - names[::-1].index(name)
            what = "two edges have the same name"
            do = "give each its own name; it names the edge's folder and its random streams"
            errors.append(_conflict(document, ("edge", second, "name"), what, f"{count} edges called {name}", "names that differ", do))
    num_edges = max(1, len(names))
    if config.federated.min_edges > num_edges:
        got = f"min_edges = {config.federated.min_edges}, edges: {', '.join(names) or 'one (there is no [[edge]])'}"
        do = "lower federated.min_edges, or add [[edge]] sections"
        where: Location = ("federated", "min_edges")
        errors.append(_conflict(document, where, "a round needs more edges than there are", got, f"at most {num_edges}", do))
    ranks = {edge.rank or config.adapter.rank for edge in config.edge}
    if config.adapter.kind == "bottleneck" and len(ranks) > 1:
        what = "bottleneck adapters of unequal rank cannot be averaged"
        do = 'give every edge the same rank, or write adapter.kind = "lora"'
        errors.append(_conflict(document, ("adapter", "kind"), what, f"ranks {', '.join(map(str, sorted(ranks)))}", "one rank", do))
    return errors


def _evaluation(config: RunConfig, document: Document) -> list[InputError]:
    errors: list[InputError] = []
    metrics, data = config.evaluate.metrics, config.data
    for metric, columns in (("slot_accuracy", ("slots",)), ("choice_accuracy", ("choices", "answer"))):
        missing = [name for name in columns if metric in metrics and getattr(config.evaluate, name) is None]
        if missing and not (metric == "slot_accuracy" and data.train == "demo"):
            needed = " and ".join(f"evaluate.{name}" for name in missing)
            do = f'name the column: {missing[0]} = "..." below [evaluate]'
            errors.append(_conflict(document, ("evaluate", "metrics"), f"{metric} needs {needed}", as_toml(metrics), needed, do))
    twice = [metric for metric, count in Counter(metrics).items() if count > 1]
    if twice:
        what, do = "a metric is asked for twice", "name it once"
        errors.append(_conflict(document, ("evaluate", "metrics"), what, ", ".join(twice), "each metric once", do))
    if data.text is not None and metrics:
        what, do = "metrics of completions need completions", "write prompt and completion instead of text, or take the metrics out"
        errors.append(
            _conflict(document, ("evaluate", "metrics"), what, "data.text, which has none", "data.prompt and data.completion", do)
        )
    if data.eval is None and data.train != "demo":
        errors += _without_held_out_rows(config, document)
    return errors


def _without_held_out_rows(config: RunConfig, document: Document) -> list[InputError]:
    asked: dict[Location, object] = {("run", "compare"): config.run.compare, ("evaluate", "metrics"): config.evaluate.metrics}
    asked["data", "eval_rows"] = config.data.eval_rows
    what, do = "there are no held-out rows to evaluate on", 'name a file: eval = "..." below [data]; or leave this key out'
    return [
        _conflict(document, location, f"{what}, and {'.'.join(map(str, location))} needs them", as_toml(value), "data.eval", do)
        for location, value in asked.items()
        if value
    ]
