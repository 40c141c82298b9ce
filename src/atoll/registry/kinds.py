"""The kinds of parts: where run.toml names them, which methods they have, and what may be said of them beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of part."""

    name: str
    key: str
    """Key of run.toml that names one, or a list of them."""
    group: str
    """Of entry points, for parts that are installed."""
    protocol: str
    """The class that says what its methods do, as "module:object"."""
    methods: tuple[str, ...]
    """That every part of this kind has."""
    traits: Mapping[str, object] = field(default_factory=dict)
    """Attributes of the part's class that Atoll looks at, with what holds where it has none."""


_ALL = (
    Kind(
        "policy", "select.policy", "atoll.policies", "atoll.selection.policy:SelectionPolicy", ("measures", "schedule", "choose"),
        {"trains_all": False, "observes": True, "repeats": False},
    ),
    Kind(
        "planner", "plan.policy", "atoll.planners", "atoll.planner.planner:Planner", ("plan",),
        {"decides": False, "grows": False},
    ),
    Kind(
        "importance", "plan.importance", "atoll.importances", "atoll.training.importance_score:ImportanceScore",
        ("factors", "take", "score"), {"least_steps": 1, "per_parameter": False},
    ),
    Kind(
        "aggregation", "federated.aggregation", "atoll.aggregations", "atoll.federated.aggregation.rule:AggregationRule", ("begin",),
        {
            "keeps_frozen_delta": False, "starts_anew": False, "works_on_products": False, "takes_robust_means": False,
            "sends_best_rank": False, "averages_bottlenecks": False, "pads": False,
        },
    ),
    Kind("codec", "wire.codec", "atoll.codecs", "atoll.wire.codecs:TensorCodec", ("num_bytes", "encode", "decode", "error_bound")),
    Kind("reader", "data.reader", "atoll.readers", "atoll.tasks.readers.reader:Reader", ("read",), {"suffixes": ()}),
    Kind("metric", "evaluate.metrics", "atoll.metrics", "atoll.tasks.scoring.metric:Metric", ("score",), {"columns": ()}),
    Kind("tracker", "track.to", "atoll.trackers", "atoll.runs.tracker:Tracker", ("start", "event", "finish")),
    Kind("transform", "privacy.transforms", "atoll.transforms", "atoll.privacy.transform:UpdateTransform", ("apply",)),
)  # fmt: skip
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _ALL}
