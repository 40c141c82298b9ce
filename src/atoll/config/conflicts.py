"""Values that are right one by one and exclude each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from atoll.config.document import Document, Location, few
from atoll.config.keys import as_toml
from atoll.config.schema import DEFAULT_LOCAL_STEPS, PRECISION_BITS, RunConfig
from atoll.errors import ConflictError, InputError

KEEPS_FROZEN_DELTA = ("stack", "residual")
"""Values of federated.aggregation that keep a frozen delta."""
CLIPS = ("exact-svd", "delta-svd", "stack")
"""Values of federated.aggregation that federated.clip_update goes with: those that know no factors, only products."""
_FROZEN_DELTA = "keeps a frozen delta, which a host cannot hold"
_FROZEN_DELTA_DO = 'write aggregation = "exact-svd" or "zero-pad", or let every edge hold the whole base: mode = "local"'


def conflicts(config: RunConfig, document: Document) -> list[InputError]:
    """One leaf for each group of values that exclude each other."""
    parts = (_templates, _selection, _planning, _growing, _training, _edges, _aggregation, _robust, _full_weights, _classes, _evaluation)
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
    if select.draw == "lottery" and select.policy in ("random", "last-layers"):
        what, got = f'select.policy = "{select.policy}" has no scores to draw lots by', f"draw = {as_toml(select.draw)}"
        add("draw", what, got, 'draw = "highest"', 'take draw out, or write policy = "kill-and-revive"')
    elif select.draw == "lottery" and select.threshold != "keep":
        what, got = 'select.draw = "lottery" needs a number of modules to draw', f"threshold = {as_toml(select.threshold)}"
        add("draw", what, got, 'threshold = "keep"', "take draw out; or take threshold out, and set keep to the share of modules to train")
    for key, value in (("variation", "product-change"), ("killed", "merge")):
        if config.adapter.kind == "bottleneck" and getattr(select, key) == value:
            what = f'select.{key} = "{value}" needs a product B A, which a bottleneck does not have'
            do = f'choose another {key}, or write kind = "lora" below [adapter]'
            add(key, what, 'adapter.kind = "bottleneck"', 'adapter.kind = "lora"', do)
    if config.model.precision == "bf16" and select.killed == "merge":
        what = 'select.killed = "merge" rounds away what a young adapter adds to weights in bf16'
        add("killed", what, 'model.precision = "bf16"', 'model.precision = "fp32"', 'write killed = "offload", or precision = "fp32"')
    narrow = _narrow_bits(config) if select.killed == "merge" else None
    if narrow is not None:
        what = 'select.killed = "merge" needs weights in full precision'
        do = 'write killed = "offload" below [select], or leave the bits of the base as they are'
        add("killed", what, narrow, "no bases of fewer bits", do)
    window, period = select.observe_steps, select.every
    if select.policy == "kill-and-revive" and isinstance(window, int) and isinstance(period, int) and period <= window:
        what = "a window of observation is no shorter than its period, so that no module would ever be killed"
        add("every", what, f"observe_steps = {window}, every = {period}", f"every above {window}", "raise every, or lower observe_steps")
    return errors


def _planning(config: RunConfig, document: Document) -> list[InputError]:
    plan, errors = config.plan, list[InputError]()

    def add(section: str, key: str, what: str, got: str, expected: str, do: str) -> None:
        errors.append(_conflict(document, (section, key), what, got, expected, do))

    if config.federated.late != "wait" and plan.round_deadline is None:
        what, got = f'federated.late = "{config.federated.late}" needs plan.round_deadline', "no round_deadline"
        add("federated", "late", what, got, "the seconds of a round", 'add round_deadline = "60 s" below [plan], or write late = "wait"')
    if plan.policy != "fedpipe":
        planners = {
            "steps": plan.steps == "fill", "depth": plan.depth != "all", "refresh": plan.refresh is not None,
            "importance_file": plan.importance_file is not None,
        }  # fmt: skip
        for key in (key for key, given in planners.items() if given):
            got, do = f'plan.policy = "{plan.policy}"', f'write policy = "fedpipe" below [plan], or take {key} out'
            add("plan", key, f"plan.{key} is a setting of the planner, which does not decide here", got, 'plan.policy = "fedpipe"', do)
        return errors
    if config.adapter.kind == "bottleneck":
        what = "the planner gives edges unequal ranks, and bottleneck adapters of unequal width cannot be averaged"
        add("plan", "policy", what, 'adapter.kind = "bottleneck"', 'adapter.kind = "lora"', "choose another of the two")
    if plan.depth != "all" and config.adapter.start is not None:
        what, do = "what a start adapter has learned below the top blocks would be left out of training", "take depth or adapter.start out"
        add("plan", "depth", what, f"depth = {as_toml(plan.depth)} beside adapter.start", 'depth = "all"', do)
    quantize = config.model.quantize
    # Bits as by default may not be written at all: a config that is checked again has every key.
    if quantize != "auto" and plan.bits != type(plan)().bits and set(plan.bits) != {quantize}:
        what, got = "plan.bits are for a planner to choose from, and model.quantize leaves it no choice", f"quantize = {quantize}"
        do = 'take bits out, or write quantize = "auto" below [model]'
        add("plan", "bits", what, f"{got} beside bits = {as_toml(plan.bits)}", 'model.quantize = "auto"', do)
    warms_up = plan.importance != "none" and plan.importance_file is None
    if plan.refresh is not None and not warms_up:
        got = 'importance = "none"' if plan.importance == "none" else f"importance_file = {as_toml(plan.importance_file)}"
        what, do = "plan.refresh needs a warm-up, and there is none", "take refresh out, or let a warm-up find the importance"
        add("plan", "refresh", what, got, 'importance = "svd-sensitivity" or "gradient-weight"', do)
    if warms_up and plan.importance == "svd-sensitivity" and plan.warmup_steps < 2:
        what = 'importance = "svd-sensitivity" sees nothing in its first step, in which l is zero'
        do = 'raise warmup_steps, or write importance = "gradient-weight"'
        add("plan", "warmup_steps", what, f"warmup_steps = {plan.warmup_steps}", "2 or more; 10 is the default", do)
    return errors


def _growing(config: RunConfig, document: Document) -> list[InputError]:
    plan, rounds, errors = config.plan, config.run.rounds, list[InputError]()
    if plan.policy != "fedadapter":
        return errors

    def add(location: Location, what: str, got: str, expected: str, do: str) -> None:
        errors.append(_conflict(document, location, what, got, expected, do))

    if len(plan.ranks) > rounds:
        got = f"{rounds} round{'' if rounds == 1 else 's'}, {len(plan.ranks)} ranks"
        what = 'plan.policy = "fedadapter" has a stage for each of plan.ranks, of a round or more'
        add(("plan", "ranks"), what, got, f"at most {rounds}", "raise run.rounds, or name fewer ranks")
    if list(plan.ranks) != sorted(plan.ranks):
        add(("plan", "ranks"), "adapters grow from stage to stage", as_toml(plan.ranks), "ranks that do not fall", "put them in order")
    taken: dict[Location, bool] = {("edge", number, "rank"): edge.rank is not None for number, edge in enumerate(config.edge)}
    taken["adapter", "start"] = config.adapter.start is not None
    for location in (location for location, given in taken.items() if given):
        what = f"plan.ranks are the ranks of every stage, and {document.dotted(location)} names others"
        add(location, what, 'plan.policy = "fedadapter"', "the key left out", "take it out, or choose another policy")
    if config.select.policy != "all":
        what = "modules that a stage adds would have no turn in a choice that was made before"
        do = 'write policy = "all" below [select], or another [plan] policy'
        add(("select", "policy"), what, f'policy = "{config.select.policy}" beside plan.policy = "fedadapter"', 'select.policy = "all"', do)
    return errors


def _narrow_bits(config: RunConfig) -> str | None:
    """What says that edges hold the base in fewer bits than its precision has; None where nothing does."""
    if config.plan.policy == "fedpipe":
        return 'plan.policy = "fedpipe"'
    if config.model.quantize != "auto":
        return f"model.quantize = {config.model.quantize}"
    if "homogeneous" in config.run.compare:
        return 'run.compare with "homogeneous"'
    return next((f"bits = {edge.bits} of edge {edge.name}" for edge in config.edge if edge.bits is not None), None)


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
    last = {name: number for number, name in enumerate(names)}
    for name, count in Counter(names).items():
        if count > 1:
            what = "two edges have the same name"
            do = "give each its own name; it names the edge's folder and its random streams"
            errors.append(_conflict(document, ("edge", last[name], "name"), what, f"{count} edges called {name}", "names that differ", do))
    num_edges = max(1, len(names))
    if config.federated.min_edges > num_edges:
        got = f"min_edges = {config.federated.min_edges}, edges: {few(names) or 'one (there is no [[edge]])'}"
        do = "lower federated.min_edges, or add [[edge]] sections"
        where: Location = ("federated", "min_edges")
        errors.append(_conflict(document, where, "a round needs more edges than there are", got, f"at most {num_edges}", do))
    for number, edge in enumerate(config.edge):
        if edge.mode == "split" and edge.bits is not None:
            what, do = "the host decides the bits of the base that it holds", 'take bits out, or write mode = "local"'
            got = f'bits = {edge.bits} beside mode = "split"'
            errors.append(_conflict(document, ("edge", number, "bits"), what, got, "an edge that holds the whole base", do))
    ranks = {edge.rank or config.adapter.rank for edge in config.edge}
    if config.adapter.kind == "bottleneck" and len(ranks) > 1:
        what = "bottleneck adapters of unequal rank cannot be averaged"
        do = 'give every edge the same rank, or write adapter.kind = "lora"'
        errors.append(_conflict(document, ("adapter", "kind"), what, f"ranks {', '.join(map(str, sorted(ranks)))}", "one rank", do))
    return errors


def _aggregation(config: RunConfig, document: Document) -> list[InputError]:
    rule, location = config.federated.aggregation, ("federated", "aggregation")
    if rule not in KEEPS_FROZEN_DELTA:
        return []
    errors: list[InputError] = []
    if config.adapter.kind == "bottleneck":
        what = f'aggregation = "{rule}" needs a product B A, which a bottleneck does not have'
        do = 'write aggregation = "exact-svd", or adapter.kind = "lora"'
        errors.append(_conflict(document, location, what, 'adapter.kind = "bottleneck"', 'adapter.kind = "lora"', do))
    split = [edge.name for edge in config.edge if (config.run.placement if edge.mode == "auto" else edge.mode) == "split"]
    if split or (not config.edge and config.run.placement == "split"):
        got = f'mode = "split": {few(split)}' if split else 'run.placement = "split"'
        what, expected = f'aggregation = "{rule}" {_FROZEN_DELTA}', "edges that hold the whole base"
        errors.append(_conflict(document, location, what, got, expected, _FROZEN_DELTA_DO))
    return errors


def _robust(config: RunConfig, document: Document) -> list[InputError]:
    federated, errors = config.federated, list[InputError]()
    asked = {"combine": ("exact-svd",) if federated.combine != "mean" else None, "clip_update": CLIPS if federated.clip_update else None}
    for key, rules in asked.items():
        what = f"federated.{key} = {as_toml(getattr(federated, key))} works on products B A"
        got = f'aggregation = "{federated.aggregation}"'
        if rules is not None and federated.aggregation not in rules:
            expected = " or ".join(f'aggregation = "{rule}"' for rule in rules)
            errors.append(_conflict(document, ("federated", key), what, got, expected, f"take {key} out, or write {expected}"))
        if rules is not None and config.adapter.kind == "bottleneck":
            got, expected = 'adapter.kind = "bottleneck"', 'adapter.kind = "lora" or "full"'
            do = f'take {key} out, or write kind = "lora" below [adapter]'
            errors.append(_conflict(document, ("federated", key), f"{what}, which a bottleneck does not have", got, expected, do))
    if federated.combine != "trimmed-mean" and federated.trim != type(federated)().trim:
        what, got = "federated.trim belongs to a trimmed mean", f'trim = {federated.trim:g} beside combine = "{federated.combine}"'
        do = 'write combine = "trimmed-mean", or take trim out'
        errors.append(_conflict(document, ("federated", "trim"), what, got, 'combine = "trimmed-mean"', do))
    return errors


_FULL_WEIGHTS = 'adapter.kind = "full" trains the weights themselves'
_FULL_WEIGHTS_DO = 'or write kind = "lora" below [adapter]'


def _full_weights(config: RunConfig, document: Document) -> list[InputError]:
    if config.adapter.kind != "full":
        return []
    errors: list[InputError] = []

    def add(location: Location, why: str, got: object, expected: str, do: str) -> None:
        key = str(location[-1])
        what, do = f"{_FULL_WEIGHTS}, {why}", f"{do}, {_FULL_WEIGHTS_DO}"
        errors.append(_conflict(document, location, what, f"{key} = {as_toml(got)}", expected, do))

    if config.plan.policy != "as-written":
        what = "which have no ranks to plan"
        add(("plan", "policy"), what, config.plan.policy, 'plan.policy = "as-written"', "take policy out")
    if config.select.policy != "all":
        add(("select", "policy"), "all of them all the time", config.select.policy, 'select.policy = "all"', "take policy out")
    if config.adapter.dropout:
        add(("adapter", "dropout"), "and nothing beside them", config.adapter.dropout, "no dropout", "take dropout out")
    if config.federated.aggregation in KEEPS_FROZEN_DELTA:
        what, do = "of which no frozen delta is kept: every rule is the exact mean", "take aggregation out"
        add(("federated", "aggregation"), what, config.federated.aggregation, 'aggregation = "exact-svd"', do)
    if "homogeneous" in config.run.compare:
        add(("run", "compare"), "at no rank", config.run.compare, "a comparison without ranks", 'take "homogeneous" out')
    if config.run.placement == "split":
        add(("run", "placement"), "so that the edge must hold the whole base", "split", "an edge with the whole base", "take placement out")
    precision = PRECISION_BITS[config.model.precision]
    asked: list[tuple[Location, object]] = [(("model", "quantize"), config.model.quantize)]
    asked += [(("edge", number, "bits"), edge.bits) for number, edge in enumerate(config.edge)]
    for location, bits in asked:
        if isinstance(bits, int) and bits < precision:
            add(location, "which must not be rounded", bits, "weights in the precision of the arithmetic", f"take {location[-1]} out")
    for number, edge in enumerate(config.edge):
        if edge.mode == "split":
            what, do = "so that the edge must hold the whole base", 'write mode = "local"'
            add(("edge", number, "mode"), what, "split", "an edge with the whole base", do)
        if edge.rank is not None:
            add(("edge", number, "rank"), "which have no rank", edge.rank, "an edge without a rank", "take rank out")
    return errors


def full_weights_in_a_host(split_edges: Sequence[str]) -> ConflictError:
    """The error of a plan by which these edges train against a host, where full weights are to be trained."""
    return ConflictError(
        f"{_FULL_WEIGHTS}, so that the edge must hold the whole base", where="[adapter] kind", got=f'mode = "split": {few(split_edges)}',
        expected="edges that hold the whole base", do=f'train without a host (mode = "local"), {_FULL_WEIGHTS_DO}',
    )  # fmt: skip


_CLASSIFIES = 'model.task = "classify"'
_CLASSIFIES_DO = 'or write task = "generate" below [model]'


def _classes(config: RunConfig, document: Document) -> list[InputError]:
    errors: list[InputError] = []
    data = config.data

    def add(location: Location, what: str, got: str, expected: str, do: str) -> None:
        errors.append(_conflict(document, location, f"{_CLASSIFIES} {what}", got, expected, f"{do}, {_CLASSIFIES_DO}"))

    if config.model.task == "generate":
        if data.label is not None:
            what, do = "data.label is the class of a row, and nothing is classified", 'write task = "classify" below [model]'
            do += "; to score answers among labels, see evaluate.labels"
            errors.append(_conflict(document, ("data", "label"), what, 'model.task = "generate"', _CLASSIFIES, do))
        return errors
    if data.label is None:
        add(("model", "task"), "needs data.label", "no label", "the column of classes", 'add label = "..." below [data]')
    others = [name for name in ("prompt", "completion", "messages") if getattr(data, name) is not None]
    if others:
        add(("data", others[0]), "reads data.text and data.label", " and ".join(others), "text", "write text instead")
    if data.batching == "pack":
        add(("data", "batching"), "gives every row a class of its own", 'batching = "pack"', '"bucket" or "shuffle"', "take batching out")
    if config.evaluate.metrics:
        what, got = "always has accuracy and macro_f1, and no completions", f"metrics = {as_toml(config.evaluate.metrics)}"
        add(("evaluate", "metrics"), what, got, "no metrics", "take metrics out")
    labels = config.evaluate.labels
    if labels is not None and len(set(labels)) < max(2, len(labels)):
        got, do = f"labels = {as_toml(labels)}", "list every class once"
        add(("evaluate", "labels"), "needs two classes or more, each once", got, "two or more different labels", do)
    split = [edge.name for edge in config.edge if (config.run.placement if edge.mode == "auto" else edge.mode) == "split"]
    if split or config.run.placement == "split":
        got = f'mode = "split": {few(split)}' if split else 'run.placement = "split"'
        add(("model", "task"), "needs edges that hold the whole base", got, 'mode = "local"', 'write mode = "local" for every edge')
    return errors


def classes_in_a_host(got: str) -> ConflictError:
    """The error of a classifier that would have its blocks in a host."""
    return ConflictError(
        f"{_CLASSIFIES} needs the whole base", where="[model] task", got=got, expected="no host",
        do=f'train without a host (mode = "local"), {_CLASSIFIES_DO}',
    )  # fmt: skip


def frozen_delta_in_a_host(config: RunConfig, split_edges: Sequence[str]) -> ConflictError:
    """The error of a plan by which these edges train against a host, under a rule that keeps a frozen delta."""
    return ConflictError(
        f'aggregation = "{config.federated.aggregation}" {_FROZEN_DELTA}', where="[federated] aggregation",
        got=f'mode = "split": {few(split_edges)}', expected="edges that hold the whole base", do=_FROZEN_DELTA_DO,
    )  # fmt: skip


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
