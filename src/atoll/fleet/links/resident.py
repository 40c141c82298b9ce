"""An edge's long-lived process: it holds base, rows and state, and answers what Flower's short-lived apps hand it.

A round's state and answer are written before the answer leaves. So a question that is asked again, because an answer was lost or a process
was killed, gets the same answer and trains nothing twice; and one for a round that was cut short trains it from the state before.
"""

from __future__ import annotations

import errno
import shutil
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from atoll.errors import AtollError, BadRowError, OrderRefusedError, OutputError, PeerError, ProtocolError, RunFolderError
from atoll.federated.client import EdgeWork, client_app
from atoll.federated.figures import MALFORMED, said, shown
from atoll.federated.flower import ConfigRecord, Context, Message, MessageType, RecordDict, assume_identity
from atoll.federated.payload import WORK_ORDER, get_adapter, num_bytes
from atoll.federated.store import read_record, refuse_link, write_record
from atoll.fleet.links.frames import Frame, digest_of, folder_name
from atoll.fleet.links.personal import answer_personal
from atoll.jobs.backends.fleet import CAPABILITIES, FINISHED, ROUNDS, TEXT
from atoll.jobs.backends.in_process import edge_work
from atoll.jobs.backends.work_orders import SentOrder, from_text
from atoll.jobs.backends.worker import Worker
from atoll.jobs.personal.asked import PERSONAL
from atoll.runs.events import Advised, EdgeFinished, EventLog, PhaseStarted, RoundStarted
from atoll.runs.files import write_folder
from atoll.split.host.audit import Audit
from atoll.training.trainer import StepReport
from atoll.units import counted, format_bytes, format_seconds

KEPT_ROUNDS = 3
"""A coordinator whose last checkpoints are damaged goes back by as many."""
KEPT_RUNS = 4
"""Of which the last rounds are kept: any of them may be resumed."""
_RUN_ID, _COORDINATOR = 1, 0
_WITHOUT_ROWS = (RuntimeError, IndexError, MemoryError, OSError)
"""As torch and the system raise them: of sizes, devices, memory, files and connections."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_STATE, _ANSWER, _QUESTION = "state.record", "answer.record", "question.txt"


class Resident:
    """Answers questions to one edge, one at a time. A context, at whose end the base is let go.

    Raises: RunFolderError for a folder of states that is a link.
    """

    def __init__(self, worker: Worker, folder: Path, log: EventLog, audit: Audit) -> None:
        refuse_link(folder)
        self._worker, self._folder, self._log, self._audit = worker, folder, log, audit
        self._lock = threading.Lock()
        self._sent: SentOrder | None = None
        self._app = client_app(lambda context: self._work())
        assume_identity(_RUN_ID, _COORDINATOR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._worker.close()
        self._audit.close()

    def _work(self) -> EdgeWork:
        job, edge = self._worker.work(self._order)
        for event in self._worker.untold():
            self._log.append(event)
        work, policy = edge_work(job, edge, self._order.order, self._log, self._worker.digest), self._worker.policy
        return work if policy.seconds is None else replace(work, on_step=_within(policy.seconds, work))

    def answer(self, data: bytes) -> bytes:
        """The answer to a frame, as a frame."""
        question, begin = Frame.from_bytes(data), time.monotonic()
        with self._lock:
            answer = self._answer(question, len(data))
        sent = answer.to_bytes()
        facts: dict[str, object] = {
            "kind": question.kind, "group": question.group, "received_bytes": len(data), "sent_bytes": len(sent),
            "seconds": round(time.monotonic() - begin, 3),
        }  # fmt: skip
        if answer.problem is not None:
            facts["refused"] = answer.problem.partition("\n")[0]
        self._audit.note("asked", "coordinator", "", facts)
        return sent

    def _answer(self, question: Frame, num_bytes: int) -> Frame:
        try:
            self._check_size(num_bytes)
            return question.answered(self._answered(question))
        except BadRowError as problem:
            # Its page quotes a row, which stays here.
            bare = BadRowError(problem.what, expected=problem.expected, do="look at this edge's own log")
            self._log.append(Advised(self._worker.name, problem.page()))
            return question.answered(problem=bare.page())
        except AtollError as problem:
            self._log.append(Advised(self._worker.name, problem.page()))
            return question.answered(problem=problem.page())
        except KeyboardInterrupt:  # So are the signals that ask this process to end.
            raise
        # torch's, a library's (what was compiled panics past Exception) or our own: asked again, it would fail again.
        except BaseException as problem:
            return question.answered(problem=self._failed(problem).page())

    def _failed(self, problem: BaseException) -> AtollError:
        """What the coordinator is told; the edge's log says it too, and where the traceback is."""
        if isinstance(problem, OSError) and problem.errno in _FULL:  # Nor could more be written of it.
            return OutputError("this edge cannot save its state", where=str(self._folder), got=str(problem), do="free some space")
        kept = self._folder.with_name("traceback.txt")
        kept.write_text("".join(traceback.format_exception(problem)), encoding="utf-8")
        place = traceback.extract_tb(problem.__traceback__)[-1]
        # What other libraries say may quote a row.
        got = said(problem) if isinstance(problem, _WITHOUT_ROWS) else type(problem).__name__
        is_memory = isinstance(problem, MemoryError) or "memory" in str(problem)
        do = "give it more memory, or a smaller batch" if is_memory else f"see {kept.name} in this edge's folder"
        failed = PeerError("this edge cannot do its part", where=f"{Path(place.filename).name}, line {place.lineno}", got=got, do=do)
        self._log.append(Advised(self._worker.name, f"{failed.page()}\n  traceback {kept}"))
        return failed

    def _check_size(self, num_bytes: int) -> None:
        most = self._worker.policy.bytes
        if most is not None and num_bytes > most:
            raise OrderRefusedError(
                "a message is longer than this edge takes", where=f"edge {self._worker.name}", got=format_bytes(num_bytes),
                expected=f"at most {format_bytes(most)} (policy.toml)", do="train a smaller adapter, or have the edge's owner allow more",
            )  # fmt: skip

    @property
    def _order(self) -> SentOrder:
        assert self._sent is not None
        return self._sent

    def _answered(self, question: Frame) -> RecordDict:
        if question.kind == f"query.{CAPABILITIES}":
            return RecordDict({CAPABILITIES: ConfigRecord({TEXT: self._worker.capabilities().to_text()})})
        if question.kind == f"{MessageType.QUERY}.{FINISHED}":
            return self._finished(question)
        sent = from_text(str(_told(question, WORK_ORDER, TEXT)))
        if question.kind == f"{MessageType.QUERY}.{PERSONAL}":
            self._worker.check(sent, PERSONAL, adapter=get_adapter(question.content))
            return answer_personal(self._worker, sent, question.content, self._folder.with_name(PERSONAL), self._log)
        if question.kind == MessageType.QUERY:
            self._worker.check(sent, "importance")
            self._sent = sent
            self._log.append(PhaseStarted("warm-up", self._worker.config.plan.warmup_steps))
            return self._asked(question, RecordDict()).content
        number = _told(question, "ask", "round")
        if question.kind != MessageType.TRAIN or type(number) is not int or question.group != str(number):
            raise _not_ours(question, "a question of a round")
        self._worker.check(sent, sent.order.phase, number, get_adapter(question.content))
        self._sent = sent
        return self._trained(question, number)

    def _finished(self, question: Frame) -> RecordDict:
        rounds = _told(question, FINISHED, ROUNDS)
        if type(rounds) is not int:
            raise _not_ours(question, "the number of rounds")
        self._log.append(Advised(self._worker.name, f"the run is complete: {counted(rounds, 'round')}; this edge waits for the next"))
        return RecordDict()

    def _trained(self, question: Frame, number: int) -> RecordDict:
        sent = self._order
        rounds = self._folder / folder_name(sent.run_id) / sent.order.phase
        for path in (rounds.parent, rounds):
            refuse_link(path)
        here, digest = rounds / f"round-{number:04d}", digest_of(question.content)
        if (here / _QUESTION).is_file() and (here / _QUESTION).read_text() == digest:
            return _kept(here / _ANSWER)
        state = self._state_before(rounds, number)
        context = Context(_RUN_ID, question.node, {"edge": self._order.order.edge}, state, {})
        self._log.append(RoundStarted(sent.order.phase, number, self._worker.config.run.rounds, (self._worker.name,)))
        begin = time.monotonic()
        content = self._asked(question, state, context).content
        self._log.append(_finished(sent, number, question.content, content, time.monotonic() - begin))

        def fill(stage: Path) -> None:
            write_record(stage / _STATE, context.state)
            write_record(stage / _ANSWER, content)
            (stage / _QUESTION).write_text(digest)

        self._folder.mkdir(mode=0o700, exist_ok=True)
        if not rounds.parent.exists():
            self._forget_old_runs()
        write_folder(here, fill)
        self._thin_out(rounds, number)
        return content

    def _asked(self, question: Frame, state: RecordDict, context: Context | None = None) -> Message:
        context = context or Context(_RUN_ID, question.node, {"edge": self._order.order.edge}, state, {})
        message = Message(question.content, question.node, question.kind, group_id=question.group)
        return self._app(message, context)

    def _state_before(self, rounds: Path, number: int) -> RecordDict:
        """Of the last round before this one that the edge took part in; an edge that comes anew, or back without its files, has none."""
        before = [path for path in rounds.glob("round-*") if _number(path) < number]
        if not before:
            if number > 1:
                self._log.append(Advised(self._order.order.edge, f"no state from before round {number} is here: this edge begins anew"))
            return RecordDict()
        return _kept(max(before, key=_number) / _STATE)

    def _forget_old_runs(self) -> None:
        """Keep the last runs that this edge took part in, with room for one more."""
        runs = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in runs[KEPT_RUNS - 1 :]:
            shutil.rmtree(path)

    def _thin_out(self, rounds: Path, number: int) -> None:
        """Keep the last rounds that the edge took part in, and none that comes after this one: the coordinator went back."""
        done = sorted(rounds.glob("round-*"), key=_number)
        last = [path for path in done if _number(path) <= number][-KEPT_ROUNDS:]
        for path in set(done) - set(last):
            shutil.rmtree(path)


def _finished(sent: SentOrder, number: int, question: RecordDict, answer: RecordDict, seconds: float) -> EdgeFinished:
    """What was done, and the bytes of it as the coordinator counts them."""
    numbers = answer.metric_records
    metrics, up, down = dict[str, Any](numbers["metrics"]), dict[str, Any](numbers["wire_up"]), dict[str, Any](numbers["wire_down"])
    return EdgeFinished(
        sent.order.phase, number, sent.order.edge, metrics["num_steps"], metrics["mean_loss"], num_bytes(answer) + sum(up.values()),
        num_bytes(question) + sum(down.values()), metrics["peak_bytes"], seconds,
    )  # fmt: skip


def _within(seconds: float, work: EdgeWork) -> Callable[[int, StepReport], None]:
    """What is told of every step, until so many seconds from now.

    Raises: OrderRefusedError, when it is called after them: so training ends.
    """
    begin = time.monotonic()

    def on_step(round_number: int, report: StepReport) -> None:
        work.on_step(round_number, report)
        if time.monotonic() - begin > seconds:
            raise OrderRefusedError(
                "a round takes longer than this edge gives it", where=f"edge {work.name}", got=f"more than {format_seconds(seconds)}",
                expected=f"at most {format_seconds(seconds)} (policy.toml)", do="order fewer steps, or have the edge's owner allow more",
            )  # fmt: skip

    return on_step


def _kept(path: Path) -> RecordDict:
    try:
        return read_record(path)
    except MALFORMED as problem:
        raise RunFolderError(
            "the state that this edge saved of a round is damaged", where=str(path), got=said(problem),
            expected="the file as it was written", do=f"delete {path.parent}: the edge goes on from the round before",
        ) from None  # fmt: skip


def _told(question: Frame, name: str, key: str) -> object:
    record = question.content.config_records.get(name)
    if record is None or key not in record:
        raise _not_ours(question, f'"{name}" with "{key}"')
    return record[key]


def _not_ours(question: Frame, expected: str) -> ProtocolError:
    return ProtocolError(
        "a message that this edge cannot follow", got=f"{shown(question.kind)}: {shown(list(question.content))}", expected=expected,
        do="run the same version of Atoll everywhere",
    )  # fmt: skip


def _number(path: Path) -> int:
    return int(path.name.removeprefix("round-"))
