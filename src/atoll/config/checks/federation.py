"""What [federated] excludes."""

from __future__ import annotations

from collections.abc import Sequence

from atoll.config.checks.page import conflict
from atoll.config.document import Document, few
from atoll.config.keys import as_toml
from atoll.config.schema import RunConfig
from atoll.errors import ConflictError, InputError
from atoll.registry.parts import find, names, trait

_FROZEN_DELTA = "keeps a frozen delta, which a host cannot hold"
_FROZEN_DELTA_DO = 'write aggregation = "exact-svd" or "zero-pad", or let every edge hold the whole base: mode = "local"'


def aggregation(config: RunConfig, document: Document) -> list[InputError]:
    """Rules that need products, or the whole base."""
    rule, location = config.federated.aggregation, ("federated", "aggregation")
    part, errors = find("aggregation", rule), list[InputError]()
    if config.adapter.kind == "bottleneck" and not part.trait("averages_bottlenecks"):
        what = f'aggregation = "{rule}" needs a product B A, which a bottleneck does not have'
        do = 'write aggregation = "exact-svd", or adapter.kind = "lora"'
        errors.append(conflict(document, location, what, 'adapter.kind = "bottleneck"', 'adapter.kind = "lora"', do))
    if not part.trait("keeps_frozen_delta"):
        return errors
    split = [edge.name for edge in config.edge if (config.run.placement if edge.mode == "auto" else edge.mode) == "split"]
    if split or (not config.edge and config.run.placement == "split"):
        got = f'mode = "split": {few(split)}' if split else 'run.placement = "split"'
        what, expected = f'aggregation = "{rule}" {_FROZEN_DELTA}', "edges that hold the whole base"
        errors.append(conflict(document, location, what, got, expected, _FROZEN_DELTA_DO))
    return errors


def rules_with(trait_name: str) -> tuple[str, ...]:
    """Built-in rules of federated.aggregation with this trait."""
    return tuple(name for name in names("aggregation") if trait("aggregation", name, trait_name))


def robust(config: RunConfig, document: Document) -> list[InputError]:
    """Medians and clipping."""
    federated, errors = config.federated, list[InputError]()
    asked = {"combine": "takes_robust_means" if federated.combine != "mean" else None}
    asked["clip_update"] = "works_on_products" if federated.clip_update else None
    for key, needed in asked.items():
        rules = None if needed is None else rules_with(needed)
        what = f"federated.{key} = {as_toml(getattr(federated, key))} works on products B A"
        got = f'aggregation = "{federated.aggregation}"'
        if rules is not None and needed is not None and not trait("aggregation", federated.aggregation, needed):
            expected = " or ".join(f'aggregation = "{rule}"' for rule in rules)
            errors.append(conflict(document, ("federated", key), what, got, expected, f"take {key} out, or write {expected}"))
        if rules is not None and config.adapter.kind == "bottleneck":
            got, expected = 'adapter.kind = "bottleneck"', 'adapter.kind = "lora" or "full"'
            do = f'take {key} out, or write kind = "lora" below [adapter]'
            errors.append(conflict(document, ("federated", key), f"{what}, which a bottleneck does not have", got, expected, do))
    if federated.combine != "trimmed-mean" and federated.trim != type(federated)().trim:
        what, got = "federated.trim belongs to a trimmed mean", f'trim = {federated.trim:g} beside combine = "{federated.combine}"'
        do = 'write combine = "trimmed-mean", or take trim out'
        errors.append(conflict(document, ("federated", "trim"), what, got, 'combine = "trimmed-mean"', do))
    return errors


def personal(config: RunConfig, document: Document) -> list[InputError]:
    """Held-out rows of edges that nothing would be scored on."""
    if config.federated.personal_steps is not None:
        return []
    what, got = "an edge's own held-out rows are for its personal copy", "no federated.personal_steps"
    do = "write personal_steps = 20 below [federated], or take eval out; [data] eval is what all are scored on"
    named = (number for number, edge in enumerate(config.edge) if edge.eval is not None)
    return [conflict(document, ("edge", number, "eval"), what, got, "federated.personal_steps", do) for number in named]


def frozen_delta_in_a_host(config: RunConfig, split_edges: Sequence[str]) -> ConflictError:
    """The error of a plan by which these edges train against a host, under a rule that keeps a frozen delta."""
    return ConflictError(
        f'aggregation = "{config.federated.aggregation}" {_FROZEN_DELTA}', where="[federated] aggregation",
        got=f'mode = "split": {few(split_edges)}', expected="edges that hold the whole base", do=_FROZEN_DELTA_DO,
    )  # fmt: skip
