"""Checks of aggregation rules and of what is done to an update: what comes out can be sent on, and what went in is as it was."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.errors import AtollError
from atoll.federated.aggregation.aggregate import Aggregate, Aggregator, Common
from atoll.federated.aggregation.edge_parts import EdgeParts
from atoll.federated.aggregation.spool import Contribution
from atoll.privacy.transform import UpdateContext, transformed
from atoll.testing.law import Subject

_SIZES = {"a": (6, 5), "b": (5, 8), "c": (7, 7)}
_ALPHA = 8.0


def check_aggregation(subject: Subject) -> None:
    """Raises: BrokenLaw."""
    common, ranks = Common(_state({"a": 4, "b": 4, "c": 2}, 0)), {"a": 4, "b": 4, "c": 2}
    cases = {
        "one edge": [{"a": 4, "b": 4, "c": 2}],
        "one edge of smaller rank": [{"a": 1, "b": 2, "c": 1}],
        "edges of one rank": [{"a": 4, "b": 4, "c": 2}] * 3,
        "edges of unequal rank": [{"a": 1, "b": 4, "c": 2}, {"a": 4, "b": 2, "c": 1}, {"a": 2, "b": 1, "c": 2}],
        "edges with some of the modules": [{"a": 4}, {"b": 2, "a": 1}],
        "many edges": [{"a": 1 + n % 4, "b": 2, "c": 1} for n in range(25)],
    }  # fmt: skip
    for case, edges in cases.items():
        _check_round(subject, case, common, ranks, edges)
    _check_round(subject, "edges that changed nothing", common, ranks, cases["edges of one rank"], scale=0.0)


def _check_round(
    subject: Subject, case: str, common: Common, ranks: Mapping[str, int], edges: list[dict[str, int]], scale: float = 1.0
) -> None:
    sent = [EdgeParts(common.trained, subject.name).of(own) for own in edges]
    updates = [
        Contribution(f"edge {n}", _state(own, n + 1, scale), 1.0 + n) for n, own in enumerate(edges)
    ]  # fmt: skip
    before = [common.trained.digest(), *(one.digest() for one in sent), *(one.state.digest() for one in updates)]
    results = []
    for _ in range(2):
        try:
            aggregator = Aggregator(subject.name, common, ranks, options=subject.options, seed=3, round=2)
            for update, own in zip(updates, sent, strict=True):
                aggregator.add(update, own)
            results.append(aggregator.finish())
        except AtollError as problem:
            subject.expect(False, f"{case}: {problem.what}; {problem.got}")
    first, again = results
    after = [common.trained.digest(), *(one.digest() for one in sent), *(one.state.digest() for one in updates)]
    subject.expect(before == after, f"{case}: updates, and what was sent, stay as they are")
    subject.expect(_digests(first) == _digests(again), f"{case}: the same updates come to the same bits")
    subject.expect(0 <= first.discarded_share < float("inf"), f"{case}: what is missed is a share, not {first.discarded_share}")
    untouched = set(common.trained.modules) - {name for own in edges for name in own}
    same = all(first.common.trained.modules[name] is common.trained.modules[name] for name in untouched)
    subject.expect(same, f"{case}: a module that nobody trained stays as it was")


def _digests(result: Aggregate) -> tuple[str, str | None]:
    delta = result.common.frozen_delta
    return result.common.trained.digest(), None if delta is None else delta.digest()


def check_transform(subject: Subject) -> None:
    """Raises: BrokenLaw."""
    full = {"head": FullWeightDelta(torch.ones(3, 4) / 7, torch.ones(3) / 3)}
    plain = _state({"a": 4, "b": 2}, 1)
    cases = {
        "adapters": plain,
        "adapters and full weights": AdapterState("lora", plain.modules, full),
        "bottlenecks": AdapterState("bottleneck", plain.modules),
        "full weights alone": AdapterState("lora", {}, full),
        "zeros": _state({"a": 4, "b": 2}, 1, 0.0),
    }
    options = {subject.name: subject.options or {}}
    for case, update in cases.items():
        sent = update.scale(0.5)
        context = UpdateContext(sent, "north", 3, 100, 7)
        before = update.digest(), sent.digest()
        try:
            first, again = (transformed(update, [subject.name], options, context) for _ in range(2))
        except AtollError as problem:
            subject.expect(False, f"{case}: {problem.what}; {problem.got}")
            return
        subject.expect((update.digest(), sent.digest()) == before, f"{case}: the update that is given stays as it is")
        subject.expect(first.digest() == again.digest(), f"{case}: the same seed gives the same update")
        finite = all(bool(tensor.isfinite().all()) for part in first.parts.values() for tensor in part.tensors)
        subject.expect(finite, f"{case}: numbers stay finite")


def _state(ranks: Mapping[str, int], seed: int, scale: float = 1.0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, rank in ranks.items():
        inputs, outputs = _SIZES[name]
        down_RI, up_OR = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
        modules[name] = ModuleAdapter(down_RI, up_OR * scale, _ALPHA / rank)
    return AdapterState("lora", modules)
