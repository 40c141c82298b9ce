"""Values that are right one by one and exclude each other."""

from __future__ import annotations

from atoll.config.checks.data import evaluation, held_out_rows, templates, templates_of_edges, tracking
from atoll.config.checks.federation import aggregation, personal, robust
from atoll.config.checks.planning import edges, growing, planning, training
from atoll.config.checks.selection import selection
from atoll.config.checks.whole_base import classes, full_weights
from atoll.config.document import Document
from atoll.config.schema import RunConfig
from atoll.errors import InputError


def conflicts(config: RunConfig, document: Document) -> list[InputError]:
    """One leaf for each group of values that exclude each other."""
    data = (templates, templates_of_edges, held_out_rows, evaluation, tracking)
    checks = (*data, selection, planning, growing, training, edges, aggregation, robust, personal, full_weights, classes)
    return [error for check in checks for error in check(config, document)]
