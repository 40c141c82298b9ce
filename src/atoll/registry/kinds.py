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
    methods: Mapping[str, int]
    """That every part of this kind has, with the number of arguments that each is given."""
    traits: Mapping[str, object] = field(default_factory=dict)
    """Attributes of the part's class that Atoll looks at, with what holds where it has none."""
    trait_methods: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Methods that a part has beside where this trait holds."""
    made_with: int = 0
    """Arguments that its class is called with, before its options."""
    has_options: bool = True


_ALL = (
    Kind(
        "policy", "select.policy", "atoll.policies", "atoll.selection.policy:SelectionPolicy",
        {"measures": 1, "schedule": 2, "choose": 3},
        {"trains_all": False, "observes": True, "repeats": False},
    ),
    Kind(
        "planner", "plan.policy", "atoll.planners", "atoll.planner.planner:Planner", {"plan": 1}, {"decides": False, "grows": False},
        {"grows": {"stages": 1}},
    ),
    Kind(
        "importance", "plan.importance", "atoll.importances", "atoll.training.importance_score:ImportanceScore",
        {"factors": 0, "take": 2, "score": 0}, {"least_steps": 1, "per_parameter": False}, made_with=1,
    ),
    Kind(
        "aggregation", "federated.aggregation", "atoll.aggregations", "atoll.federated.aggregation.rule:AggregationRule", {"begin": 1},
        {
            "keeps_frozen_delta": False, "starts_anew": False, "works_on_products": False, "takes_robust_means": False,
            "sends_best_rank": False, "averages_bottlenecks": False, "pads": False,
        },
    ),
    Kind(
        "codec", "wire.codec", "atoll.codecs", "atoll.wire.codecs:TensorCodec",
        {"num_bytes": 1, "encode": 1, "decode": 4, "error_bound": 1}, has_options=False,
    ),
    Kind("reader", "data.reader", "atoll.readers", "atoll.tasks.readers.reader:Reader", {"read": 2}, {"suffixes": ()}),
    Kind("metric", "evaluate.metrics", "atoll.metrics", "atoll.tasks.scoring.metric:Metric", {"score": 1}, {"columns": ()}),
    Kind("tracker", "track.to", "atoll.trackers", "atoll.runs.tracker:Tracker", {"start": 1, "event": 1, "finish": 1}, {"needs": ()}),
    Kind("transform", "privacy.transforms", "atoll.transforms", "atoll.privacy.transform:UpdateTransform", {"apply": 2}),
)  # fmt: skip
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _ALL}
