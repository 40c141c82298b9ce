"""Personal copies on machines of their own: what edges are asked, and what they answer, which is scores and costs and no weight."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter

from atoll.adapters.state import AdapterState
from atoll.config.document import few
from atoll.cost.traffic import WireAccount
from atoll.cost.work import Work
from atoll.errors import ProtocolError
from atoll.federated.aggregation.aggregate import Common
from atoll.federated.flower import ConfigRecord, Message, MessageType, RecordDict
from atoll.federated.payload import FROZEN_DELTA, WORK_ORDER, put_adapter
from atoll.jobs.backends.backend import Backend, BackendFactory
from atoll.jobs.backends.work_orders import read_strictly
from atoll.jobs.job import Job
from atoll.jobs.personal.copies import PHASE, personal_order
from atoll.runs.events import Advised, EventLog
from atoll.runs.summary import Scores

PERSONAL, TEXT, WHOLE = PHASE, "text", "whole"
"""Flower's name for the question; key of the text in its answer; of the common adapter, where an edge trains but a part of it."""
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, le=2**62)]
_Word = Annotated[str, Field(max_length=64)]
_ROWS = ("base", "federated", "personal")


@dataclass(frozen=True, slots=True)
class PersonalAnswer:
    """What an edge says of its own copy."""

    edge: Annotated[str, Field(max_length=128)]
    scores: Annotated[dict[_Word, Annotated[dict[_Word, _Number], Field(max_length=64)]], Field(max_length=len(_ROWS))]
    """By adapter, on the edge's own held-out rows; none where it has none."""
    numbers: Annotated[dict[_Word, _Count], Field(max_length=64)]
    """Work, by formula."""
    sent: Annotated[dict[_Word, _Count], Field(max_length=64)]
    """Bytes to the edge's host, by message kind."""
    received: Annotated[dict[_Word, _Count], Field(max_length=64)]

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> PersonalAnswer:
        """What `to_text` wrote.

        Raises: ProtocolError.
        """
        found = read_strictly(TypeAdapter(cls), text, "what an edge says of its copy")
        if not set(found.scores) <= set(_ROWS) or set(found.numbers) != set(Work().to_numbers()):
            raise ProtocolError(
                "what an edge says of its copy cannot be read", got="other names", expected="what this version of Atoll writes",
                do="run the same version of Atoll everywhere",
            )  # fmt: skip
        return found


@dataclass(frozen=True, slots=True)
class CopyElsewhere:
    """A copy that stays where it was trained."""

    edge: str
    scores: Mapping[str, Scores]
    work: Work
    wire: WireAccount

    @property
    def up_bytes(self) -> int:
        """To the edge's host."""
        return sum(self.wire.sent.values())

    @property
    def down_bytes(self) -> int:
        """From it."""
        return sum(self.wire.received.values())


def copies_elsewhere(
    job: Job, state: AdapterState, given: Mapping[str, Common], make_backend: BackendFactory, log: EventLog
) -> list[CopyElsewhere]:
    """Have every edge train a copy where it is, and score all three; the log is told where copies are, and what is missing."""
    found = dict[str, CopyElsewhere]()
    with closing(make_backend(job, job.edges, PHASE, log)) as backend:
        backend.give(job, job.edges, [personal_order(job, edge) for edge in job.edges])
        missing = dict.fromkeys(backend.nodes.values(), "no answer in time")
        timeout = job.config.federated.round_timeout
        for reply in backend.grid.send_and_receive(_questions(backend, state, given), timeout=timeout):
            edge = backend.nodes.get(reply.metadata.src_node_id, "")
            if reply.has_error():
                missing[edge] = reply.error.reason or f"code {reply.error.code}"
                continue
            try:
                answer = PersonalAnswer.from_text(str(reply.content.config_records.get(PERSONAL, ConfigRecord()).get(TEXT)))
                work = Work.from_numbers(answer.numbers)
            except (ProtocolError, ValueError) as problem:
                missing[edge] = problem.page() if isinstance(problem, ProtocolError) else str(problem)
                continue
            found[edge] = CopyElsewhere(edge, answer.scores, work, WireAccount(Counter(answer.sent), Counter(answer.received)))
            missing.pop(edge, None)
    for edge, reason in sorted(missing.items()):
        log.append(Advised(edge, f"there is no personal copy: {reason}"))
    if found:
        where = "on their machines, below personal/ in each edge's folder; the edge's own log says how to use it"
        log.append(Advised("", f"the copies of {few(sorted(found))} stay {where}"))
    if unscored := sorted(edge for edge, copy in found.items() if not copy.scores):
        log.append(Advised("", f"nothing is scored of {few(unscored)}: no held-out rows are there; name some: eval below [[edge]]"))
    return [found[edge.name] for edge in job.edges if edge.name in found]


def _questions(backend: Backend, state: AdapterState, given: Mapping[str, Common]) -> Sequence[Message]:
    questions = []
    for node, edge in backend.nodes.items():
        content, order = RecordDict(), backend.work_order_record(node)
        put_adapter(content, given[edge].trained)
        frozen = given[edge].frozen_delta
        if frozen is not None:
            put_adapter(content, frozen, FROZEN_DELTA)
        if given[edge].trained.ranks != state.ranks or frozen is not None:
            put_adapter(content, state, WHOLE)
        assert order is not None, "edges on machines of their own are told what to do"
        content[WORK_ORDER] = order
        questions.append(Message(content, node, f"{MessageType.QUERY}.{PERSONAL}", group_id="0"))
    return questions
