"""What only an edge that holds the whole base can do: train full weights, or classify."""

from __future__ import annotations

from collections.abc import Sequence

from atoll.config.checks.page import conflict
from atoll.config.document import Document, Location, few
from atoll.config.keys import as_toml
from atoll.config.schema import PRECISION_BITS, RunConfig
from atoll.errors import ConflictError, InputError
from atoll.registry.parts import trait

_FULL_WEIGHTS = 'adapter.kind = "full" trains the weights themselves'
_FULL_WEIGHTS_DO = 'or write kind = "lora" below [adapter]'


def full_weights(config: RunConfig, document: Document) -> list[InputError]:
    """Full fine-tuning."""
    if config.adapter.kind != "full":
        return []
    errors: list[InputError] = []

    def add(location: Location, why: str, got: object, expected: str, do: str) -> None:
        key = str(location[-1])
        what, do = f"{_FULL_WEIGHTS}, {why}", f"{do}, {_FULL_WEIGHTS_DO}"
        errors.append(conflict(document, location, what, f"{key} = {as_toml(got)}", expected, do))

    if trait("planner", config.plan.policy, "decides") or trait("planner", config.plan.policy, "grows"):
        what = "which have no ranks to plan"
        add(("plan", "policy"), what, config.plan.policy, 'plan.policy = "as-written"', "take policy out")
    if config.select.chooses:
        add(("select", "policy"), "all of them all the time", config.select.policy, 'select.policy = "all"', "take policy out")
    if config.adapter.dropout:
        add(("adapter", "dropout"), "and nothing beside them", config.adapter.dropout, "no dropout", "take dropout out")
    if trait("aggregation", config.federated.aggregation, "keeps_frozen_delta"):
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


def classes(config: RunConfig, document: Document) -> list[InputError]:
    """Classification."""
    errors: list[InputError] = []
    data = config.data

    def add(location: Location, what: str, got: str, expected: str, do: str) -> None:
        errors.append(conflict(document, location, f"{_CLASSIFIES} {what}", got, expected, f"{do}, {_CLASSIFIES_DO}"))

    if config.model.task == "generate":
        if data.label is not None:
            what, do = "data.label is the class of a row, and nothing is classified", 'write task = "classify" below [model]'
            do += "; to score answers among labels, see evaluate.labels"
            errors.append(conflict(document, ("data", "label"), what, 'model.task = "generate"', _CLASSIFIES, do))
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
