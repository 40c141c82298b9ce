"""What [plan], [train] and [[edge]] exclude."""

from __future__ import annotations

from collections import Counter

from atoll.config.checks.page import conflict
from atoll.config.document import Document, Location, few
from atoll.config.keys import as_toml
from atoll.config.schema import DEFAULT_LOCAL_STEPS, RunConfig
from atoll.errors import InputError
from atoll.registry.parts import trait
from atoll.units import counted


def planning(config: RunConfig, document: Document) -> list[InputError]:
    """Settings of a planner."""
    plan, errors = config.plan, list[InputError]()

    def add(section: str, key: str, what: str, got: str, expected: str, do: str) -> None:
        errors.append(conflict(document, (section, key), what, got, expected, do))

    if config.federated.late != "wait" and plan.round_deadline is None:
        what, got = f'federated.late = "{config.federated.late}" needs plan.round_deadline', "no round_deadline"
        add("federated", "late", what, got, "the seconds of a round", 'add round_deadline = "60 s" below [plan], or write late = "wait"')
    if not trait("planner", plan.policy, "decides"):
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
    least = trait("importance", plan.importance, "least_steps") if warms_up else 0
    if plan.warmup_steps < least:
        what = f'importance = "{plan.importance}" sees nothing in fewer steps than {least}'
        do = 'raise warmup_steps, or write importance = "gradient-weight"'
        add("plan", "warmup_steps", what, f"warmup_steps = {plan.warmup_steps}", f"{least} or more; 10 is the default", do)
    return errors


def growing(config: RunConfig, document: Document) -> list[InputError]:
    """Adapters that grow in stages."""
    plan, rounds, errors = config.plan, config.run.rounds, list[InputError]()
    if not trait("planner", plan.policy, "grows"):
        return errors

    def add(location: Location, what: str, got: str, expected: str, do: str) -> None:
        errors.append(conflict(document, location, what, got, expected, do))

    if len(plan.ranks) > rounds:
        got = f"{counted(rounds, 'round')}, {counted(len(plan.ranks), 'rank')}"
        what = f'plan.policy = "{plan.policy}" has a stage for each of plan.ranks, of a round or more'
        add(("plan", "ranks"), what, got, f"at most {rounds}", "raise run.rounds, or name fewer ranks")
    if list(plan.ranks) != sorted(plan.ranks):
        add(("plan", "ranks"), "adapters grow from stage to stage", as_toml(plan.ranks), "ranks that do not fall", "put them in order")
    taken: dict[Location, bool] = {("edge", number, "rank"): edge.rank is not None for number, edge in enumerate(config.edge)}
    taken["adapter", "start"] = config.adapter.start is not None
    for location in (location for location, given in taken.items() if given):
        what = f"plan.ranks are the ranks of every stage, and {document.dotted(location)} names others"
        add(location, what, f'plan.policy = "{plan.policy}"', "the key left out", "take it out, or choose another policy")
    if config.select.chooses:
        what = "modules that a stage adds would have no turn in a choice that was made before"
        do = 'write policy = "all" below [select], or another [plan] policy'
        got = f'policy = "{config.select.policy}" beside plan.policy = "{plan.policy}"'
        add(("select", "policy"), what, got, 'select.policy = "all"', do)
    return errors


def training(config: RunConfig, document: Document) -> list[InputError]:
    """Lengths of training."""
    train = config.train
    if train.local_steps is not None and train.local_epochs is not None:
        what, got = (
            "train.local_steps and train.local_epochs exclude each other",
            f"{counted(train.local_steps, 'step')} and {counted(train.local_epochs, 'epoch', 'g')}",
        )
        return [conflict(document, ("train", "local_epochs"), what, got, "one of the two", "take one of them out")]
    if train.local_epochs is not None and config.data.batching == "pack":
        what, do = "packed rows make an epoch that is as long as they turn out", 'write local_steps, or batching = "bucket"'
        got = 'batching = "pack", and ' + counted(train.local_epochs, "epoch", "g")
        return [conflict(document, ("train", "local_epochs"), what, got, "local_steps", do)]
    if train.local_epochs is not None:
        return []  # the number of steps is known only with the data
    total = config.run.rounds * (train.local_steps or DEFAULT_LOCAL_STEPS)
    if 0 < train.warmup_steps < total or train.warmup_steps == 0:
        return []
    what = "the warm-up does not end before the run does"
    got = f"warmup_steps = {train.warmup_steps} of {counted(total, 'step')} in all rounds"
    do = "lower train.warmup_steps, or raise run.rounds or train.local_steps"
    return [conflict(document, ("train", "warmup_steps"), what, got, f"fewer than {counted(total, 'step')}", do)]


def edges(config: RunConfig, document: Document) -> list[InputError]:
    """Edges with each other."""
    errors: list[InputError] = []
    names = [edge.name for edge in config.edge]
    last = {name: number for number, name in enumerate(names)}
    for name, count in Counter(names).items():
        if count > 1:
            what = "two edges have the same name"
            do = "give each its own name; it names the edge's folder and its random streams"
            errors.append(conflict(document, ("edge", last[name], "name"), what, f"{count} edges called {name}", "names that differ", do))
    num_edges = max(1, len(names))
    if config.federated.min_edges > num_edges:
        got = f"min_edges = {config.federated.min_edges}, edges: {few(names) or 'one (there is no [[edge]])'}"
        do = "lower federated.min_edges, or add [[edge]] sections"
        where: Location = ("federated", "min_edges")
        errors.append(conflict(document, where, "a round needs more edges than there are", got, f"at most {num_edges}", do))
    for number, edge in enumerate(config.edge):
        if edge.mode == "split" and edge.bits is not None:
            what, do = "the host decides the bits of the base that it holds", 'take bits out, or write mode = "local"'
            got = f'bits = {edge.bits} beside mode = "split"'
            errors.append(conflict(document, ("edge", number, "bits"), what, got, "an edge that holds the whole base", do))
    ranks = {edge.rank or config.adapter.rank for edge in config.edge}
    if config.adapter.kind == "bottleneck" and len(ranks) > 1:
        what = "bottleneck adapters of unequal rank cannot be averaged"
        do = 'give every edge the same rank, or write adapter.kind = "lora"'
        errors.append(conflict(document, ("adapter", "kind"), what, f"ranks {', '.join(map(str, sorted(ranks)))}", "one rank", do))
    return errors
