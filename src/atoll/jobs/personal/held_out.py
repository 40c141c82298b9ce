"""Each edge's own held-out rows: its own file, what [data] eval holds of its values, or, where nothing tells them apart, all there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from atoll.config.schema import Edge
from atoll.jobs.inputs import data_of, edge_rows, eval_rows
from atoll.jobs.job import Job
from atoll.runs.events import Advised, Event
from atoll.tasks.classes import form_of
from atoll.tasks.evaluate import check_metrics, held_out_examples
from atoll.tasks.forms.values import class_of
from atoll.tasks.rows import RowProblem, Rows


def check_own_rows(job: Job) -> None:
    """Whether every edge's own held-out rows can be scored, where its personal copy will be.

    Raises: as `with_own_rows`.
    """
    if job.config.federated.personal_steps is not None and all(edge.examples is not None for edge in job.edges):
        for edge in job.edges:
            with_own_rows(job, edge.name)


def with_own_rows(job: Job, edge: str) -> tuple[Job, tuple[Event, ...]]:
    """The job with one edge's held-out rows in place of all; what is to be told of them. Without any, it has none.

    Raises: what reading the edge's file raises; as check_metrics.
    """
    rows, told = _rows(job, edge)
    if rows is None:
        return replace(job, held_out=None, form=None, scored=None), told
    config = job.config
    own = next((one for one in config.edge if one.name == edge), Edge(name=edge))
    form = form_of(data_of(config, own) if own.eval is not None else config.data, rows, job.base.labels)
    check_metrics(config.evaluate, form, rows)
    examples = held_out_examples(rows, form, job.base.tokenizer, config.evaluate, config.data.max_length)
    return replace(job, held_out=rows, form=form, scored=examples), told


def _rows(job: Job, edge: str) -> tuple[Rows | None, tuple[Event, ...]]:
    config = job.config
    own = next((one for one in config.edge if one.name == edge), None)
    if own is not None and own.eval is not None:
        data = config.data.model_copy(update={"eval": own.eval, "validation_share": None})
        return eval_rows(replace(job.loaded, config=config.model_copy(update={"data": data}))), ()
    everybody = job.held_out
    if everybody is None:
        return None, (Advised(edge, "there are no held-out rows to score its personal copy on"),)
    kind, _, column = config.data.partition.partition(":")
    if own is None or own.data is not None or kind != "by" or column not in everybody.columns:
        several = len(config.edge) > 1
        told = "its personal copy is scored on the held-out rows of all edges; name rows of its own: eval below [[edge]]"
        return everybody, (Advised(edge, told),) if several else ()
    trained = next(part.rows for part in edge_rows(job.loaded) if part.name == edge)
    values = set(_values(trained, column))
    numbers = [number for number, value in enumerate(_values(everybody, column)) if value in values]
    if not numbers:
        return None, (Advised(edge, f"no held-out row has a value of {column} that it trains on: its personal copy is not scored"),)
    return everybody.take(np.array(numbers, dtype=np.int64)), ()


def _values(rows: Rows, column: str) -> Iterator[str | None]:
    for value in rows.column(column):
        try:
            yield class_of({column: value}, column)
        except RowProblem:  # A row that was skipped.
            yield None
