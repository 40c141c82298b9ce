"""The one call: which checks belong to which kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from atoll.registry.kinds import KINDS
from atoll.registry.parts import known, register
from atoll.registry.plugins import is_reference, load_plugin
from atoll.testing.federation import check_aggregation, check_transform
from atoll.testing.law import Subject
from atoll.testing.planning import check_planner
from atoll.testing.selection import check_policy
from atoll.testing.tasks import check_metric, check_reader
from atoll.testing.tracking import check_tracker
from atoll.testing.warmup import check_importance
from atoll.testing.wire import check_codec

_CHECKS: Mapping[str, Callable[[Subject], None]] = {
    "policy": check_policy, "planner": check_planner, "importance": check_importance, "aggregation": check_aggregation,
    "codec": check_codec, "reader": check_reader, "metric": check_metric, "tracker": check_tracker, "transform": check_transform,
}  # fmt: skip


def check(kind: str, part: str | type, *, options: Mapping[str, object] | None = None, sample: Path | None = None) -> None:
    """Run all that is asked of a part of this kind, on made-up input that is the same every time.

    `part` is a class, "module:object" from this folder or the environment, or the name of a part that is built in or installed. A reader
    also needs a `sample`, a file that it reads.

    Raises: BrokenLaw naming what the part does otherwise; PartError where it cannot be loaded; ValueError for a kind that does not exist,
    or options that the part's own config refuses.
    """
    if kind not in KINDS:
        raise ValueError(f"no kind is called {kind!r}; there are {', '.join(KINDS)}")
    _CHECKS[kind](Subject(kind, _named(kind, part), options, sample))


def _named(kind: str, part: str | type) -> str:
    if isinstance(part, type):
        name = f"{part.__module__}:{part.__qualname__}"
        register(kind, name, part, origin=Path(part.__module__))
        return name
    if known(kind, part) is None or is_reference(part):
        load_plugin(kind, part, Path())
    return part
