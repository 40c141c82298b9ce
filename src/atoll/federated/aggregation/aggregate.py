"""Updates of unequal rank and partial weights become one, by a rule for each module.

The rules are the parts of [federated] aggregation: exact_svd.py, stack.py, zero_pad.py and residual.py, or somebody else's. Of a weight
that is trained itself, the change travels, and by each of the rules its exact mean is what comes out. With a rule that takes robust means,
`robust` can put the median or the trimmed mean in the mean's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.low_rank import row_length
from atoll.adapters.state import AdapterState
from atoll.errors import AdapterFitError, PartError, UpdateRefusedError
from atoll.federated.aggregation.norms import LARGEST_NORM, largest_norm
from atoll.federated.aggregation.robust import MEAN, Clipped, Robust, clip_updates, combined_full_weights, combined_product
from atoll.federated.aggregation.rule import AggregationRule, Merged, ModuleInRound, ModuleSum
from atoll.federated.aggregation.rules.stack import new_adapter
from atoll.federated.aggregation.rules.zero_pad import ZeroPad
from atoll.federated.aggregation.spool import Contribution, Spool
from atoll.federated.aggregation.sums import FullWeightSum
from atoll.registry.class_checks import wrong_methods
from atoll.registry.parts import make, trait, wrong_result

_SUM = {"add": 3, "finish": 0}
"""Methods of what a rule begins, with the number of their arguments."""


@dataclass(frozen=True, slots=True, eq=False)
class Common:
    """What the edges share: an adapter that they train, and the frozen delta."""

    trained: AdapterState
    frozen_delta: AdapterState | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """What a round came to."""

    common: Common
    discarded_share: float
    """Squared Frobenius norm of what the result misses of the exact mean, over that of the exact mean."""
    clipped: Sequence[Clipped] = ()
    """Updates that were shrunk before."""


def started(state: AdapterState, aggregation: str, seed: int) -> Common:
    """What the first round begins with: where adapters always start anew, what `state` has learned becomes the frozen delta."""
    if not trait("aggregation", aggregation, "starts_anew") or not any(adapter.up_OR.any() for adapter in state.modules.values()):
        return Common(state)
    found = {name: ModuleInRound(name, state.kind, one, one.rank, seed, 0) for name, one in state.modules.items()}
    anew = {name: new_adapter(module) for name, module in found.items()}
    return Common(AdapterState(state.kind, anew, state.full_weights), AdapterState(state.kind, state.modules))


def joined(common: Common) -> AdapterState:
    """The two parts as one adapter that makes the same change. Ranks add up, and stop at min(inputs, outputs)."""
    trained, frozen_delta = common.trained, common.frozen_delta
    if frozen_delta is None:
        return trained
    # A start that was not trained yet would add columns of zeros.
    modules = {name: one for name, one in trained.modules.items() if name not in frozen_delta.modules or one.up_OR.any()}
    whole = (AdapterState(trained.kind, modules) + frozen_delta).compacted()
    order = dict.fromkeys([*trained.modules, *frozen_delta.modules])
    return AdapterState(trained.kind, {name: whole.modules[name] for name in order}, trained.full_weights)


def aggregate(
    spool: Spool, aggregation: str, common: Common, ranks: Mapping[str, int], sent: Callable[[str], AdapterState], *,
    robust: Robust = MEAN, options: Mapping[str, object] | None = None, seed: int = 0, round: int = 1,
) -> Aggregate:  # fmt: skip
    """One round's updates become one, the same bits in whatever order they came; `sent` is what an edge was given, by its name.

    `aggregation` names a rule, and `options` are its own.

    Raises: AdapterFitError where `robust` needs products, and the rule or the adapters have none; PartError where a rule's result is of
    another size or rank than it must be; UpdateRefusedError where it is not finite.
    """
    robust.check(aggregation, common.trained)
    try:
        clipped = [] if robust.clip is None else clip_updates(spool, robust.clip, sent)
        if robust.combine != "mean":
            found = _combined(spool, common, ranks, robust)
        else:
            aggregator = Aggregator(aggregation, common, ranks, options=options, seed=seed, round=round)
            for contribution in spool:
                aggregator.add(contribution, sent(contribution.edge))
            found = aggregator.finish()
        return replace(found, clipped=clipped)
    except torch.linalg.LinAlgError as problem:  # type: ignore[attr-defined]
        raise _not_finite("a product", str(problem)) from None


def is_too_large(common: Common, most: float | None) -> bool:
    """Whether a module of what edges would be sent is larger than an update's may be (`most`; None: LARGEST_NORM)."""
    largest = max(map(largest_norm, _states(common)))
    return largest > max(LARGEST_NORM, most or 0.0)


def _check_finite(common: Common) -> None:
    for state in _states(common):
        for name, part in state.parts.items():
            if not all(bool(tensor.isfinite().all()) for tensor in part.tensors):
                raise _not_finite(name, "NaN or infinity")


def _states(common: Common) -> list[AdapterState]:
    return [common.trained, *([] if common.frozen_delta is None else [common.frozen_delta])]


def _not_finite(where: str, got: str) -> UpdateRefusedError:
    return UpdateRefusedError(
        "the updates of a round come to numbers that are not finite", where=where, got=got, expected="finite numbers",
        do="lower learning_rate, or set max_norm below [federated]",
    )  # fmt: skip


class Aggregator:
    """One round's updates, added one after the other in an order that is always the same; what it holds does not grow with their number.

    A module that nobody trained stays as it was.
    """

    def __init__(
        self, aggregation: str, common: Common, ranks: Mapping[str, int], *, options: Mapping[str, object] | None = None, seed: int = 0,
        round: int = 1,
    ) -> None:  # fmt: skip
        bottleneck = common.trained.kind == "bottleneck"
        if bottleneck and not trait("aggregation", aggregation, "averages_bottlenecks"):
            raise AdapterFitError(
                "bottleneck adapters have no product, which this rule needs", got=f'aggregation = "{aggregation}"',
                expected='"exact-svd" or "zero-pad", which average them the same way', do="choose one of them",
            )  # fmt: skip
        self._rule: AggregationRule = ZeroPad() if bottleneck else make("aggregation", aggregation, options)
        self._aggregation, self._common, self._ranks, self._seed, self._round = aggregation, common, ranks, seed, round
        self._sums: dict[str, ModuleSum] = {}
        self._full_weights: dict[str, FullWeightSum] = {}

    @property
    def num_held(self) -> int:
        """Numbers in memory of what was added, as far as rules tell."""
        sums = sum(int(getattr(one, "num_held", 0)) for one in self._sums.values())
        return sums + sum(total.num_held for total in self._full_weights.values())

    def add(self, contribution: Contribution, sent: AdapterState) -> None:
        """Count one edge's update, which `check_update` has accepted, of what it was `sent`."""
        for name, adapter in contribution.state.modules.items():
            if name not in self._sums:
                self._sums[name] = self._begun(name)
            self._sums[name].add(adapter, contribution.weight, sent.modules[name])
        for name, change in contribution.state.full_weights.items():
            if name not in self._full_weights:
                self._full_weights[name] = FullWeightSum(change)
            self._full_weights[name].add(change, contribution.weight)

    def finish(self) -> Aggregate:
        """The new common adapter, and what it misses."""
        merged = {name: self._checked(name, total.finish()) for name, total in self._sums.items()}
        return _joined_parts(self._common, merged, {name: total.mean() for name, total in self._full_weights.items()})

    def _begun(self, name: str) -> ModuleSum:
        """Raises: PartError for what cannot be added to."""
        total = self._rule.begin(self._module(name))
        if wrong := "; ".join(wrong_methods(_SUM, total)):
            raise wrong_result("aggregation", self._aggregation, "begin", total, f"an object with add and finish; this is one {wrong}")
        return total

    def _module(self, name: str) -> ModuleInRound:
        trained = self._common.trained
        return ModuleInRound(name, trained.kind, trained.modules[name], self._ranks[name], self._seed, self._round)

    def _checked(self, name: str, merged: Merged) -> Merged:
        """Whether the rule made what edges can be sent."""
        if not isinstance(merged, Merged):
            raise wrong_result("aggregation", self._aggregation, "finish", merged, "a Merged (atoll.federated.aggregation.rule)")
        module, new, delta = self._module(name), merged.trained, merged.frozen_delta
        keeps = trait("aggregation", self._aggregation, "keeps_frozen_delta")
        if new.size != module.old.size or not module.is_whole(new) or not (delta is None or (keeps and delta.size == new.size)):
            raise PartError(
                f"the rule {self._aggregation} made an adapter that no edge can be sent", where=f"[federated] aggregation, {name}",
                got=f"(inputs, outputs) = {new.size}, rank {new.rank}, scaling {new.scaling:g}",
                expected=f"{module.old.size}, rank {module.rank}, scaling {module.scaling:g}",
                do='see what it returns with atoll.testing.check("aggregation", ...)',
            )  # fmt: skip
        return merged


def _combined(spool: Spool, common: Common, ranks: Mapping[str, int], robust: Robust) -> Aggregate:
    """The median or trimmed mean, one module in memory at a time."""
    parts, changes = dict[str, Merged](), dict[str, FullWeightDelta]()
    for name, voters in spool.voters().items():
        if name in common.trained.full_weights:
            changes[name] = combined_full_weights(spool, name, voters, common.trained.full_weights[name], robust)
            continue
        module = ModuleInRound(name, common.trained.kind, common.trained.modules[name], ranks[name], 0, 0)
        alone = spool.adapter(voters[0], name) if len(voters) == 1 else None
        if alone is not None and module.is_whole(alone):
            parts[name] = Merged(alone)
        else:
            lengths = [row_length(spool.adapter(voter, name).down_RI) for voter in voters]
            parts[name] = module.cut(combined_product(spool, name, voters, module.old.size, robust), lengths)
    return _joined_parts(common, parts, changes)


def _joined_parts(common: Common, parts: Mapping[str, Merged], changes: Mapping[str, FullWeightDelta]) -> Aggregate:
    trained = {**common.trained.modules, **{name: part.trained for name, part in parts.items()}}
    added = {name: part.frozen_delta for name, part in parts.items() if part.frozen_delta is not None}
    frozen_delta = common.frozen_delta
    if added:
        frozen_delta = (AdapterState("lora", frozen_delta.modules if frozen_delta else {}) + AdapterState("lora", added)).compacted()
    missed, exact = sum(part.missed for part in parts.values()), sum(part.exact for part in parts.values())
    whole = Common(AdapterState(common.trained.kind, trained, {**common.trained.full_weights, **changes}), frozen_delta)
    _check_finite(whole)
    return Aggregate(whole, missed / exact if exact else 0.0)
