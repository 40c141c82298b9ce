"""An edge's own copy of the adapter on its own machine: trained, scored and kept here. What the coordinator gets is scores and costs."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from atoll.adapters.attach import attached
from atoll.adapters.fresh import head_state
from atoll.adapters.peft_files import save_adapter
from atoll.adapters.state import AdapterState
from atoll.errors import DataFileError
from atoll.federated.aggregation.aggregate import Common, joined
from atoll.federated.flower import ConfigRecord, RecordDict
from atoll.federated.payload import FROZEN_DELTA, get_adapter
from atoll.federated.store import read_record, refuse_link, write_record
from atoll.fleet.links.frames import digest_of, folder_name
from atoll.jobs.backends.work_orders import SentOrder
from atoll.jobs.backends.worker import Worker
from atoll.jobs.inputs import base_source, eval_rows
from atoll.jobs.job import Job
from atoll.jobs.personal.asked import PERSONAL, TEXT, WHOLE, PersonalAnswer
from atoll.jobs.personal.copies import personal_copy
from atoll.jobs.personal.held_out import with_own_rows
from atoll.jobs.results.adapter import written_form
from atoll.runs.events import Advised, Evaluated, EventLog
from atoll.runs.files import write_folder
from atoll.tasks.evaluate import evaluate

_ANSWER, _QUESTION = "answer.record", "question.txt"


def answer_personal(worker: Worker, sent: SentOrder, question: RecordDict, folder: Path, log: EventLog) -> RecordDict:
    """Train the copy into `folder`, below the run's id, and say what it is worth; asked again, the same answer without training.

    Raises: RunFolderError for a folder that is a link; what training raises.
    """
    refuse_link(folder)
    here, digest = folder / folder_name(sent.run_id), digest_of(question)
    refuse_link(here)
    if (here / _QUESTION).is_file() and (here / _QUESTION).read_text(encoding="utf-8") == digest:
        return read_record(here / _ANSWER)
    job, edge = worker.work(sent)
    frozen = get_adapter(question, FROZEN_DELTA) if FROZEN_DELTA in question else None
    given = Common(get_adapter(question), frozen)
    copy = personal_copy(job, edge, sent.order, given, log)
    scores = _scores(replace(job, loaded=worker.of_all), worker.name, {
        "base": head_state(job.base.head) if job.base.head else None,
        "federated": get_adapter(question, WHOLE) if WHOLE in question else joined(given),
        "personal": copy.state,
    }, log)  # fmt: skip
    answer = PersonalAnswer(worker.name, scores, dict(copy.work.to_numbers()), dict(copy.wire.sent), dict(copy.wire.received))
    content, form = RecordDict({PERSONAL: ConfigRecord({TEXT: answer.to_text()})}), written_form(job.base, job.loaded)

    def fill(stage: Path) -> None:
        save_adapter(
            copy.state, stage, base_name=form.base_name, transposed=form.transposed, head=form.head, labels=form.labels,
            embeddings=form.embeddings, revision=form.revision,
        )  # fmt: skip
        write_record(stage / _ANSWER, content)
        (stage / _QUESTION).write_text(digest, encoding="utf-8")

    folder.mkdir(mode=0o700, exist_ok=True)
    write_folder(here, fill)
    use = shlex.join(("atoll", "evaluate", "--model", base_source(worker.of_all), "--adapter", str(here.resolve()), "--data"))
    log.append(Advised(worker.name, f"this edge's own copy of the adapter is in {here}, a PEFT adapter; to score it: {use} FILE"))
    return content


def _scores(job: Job, edge: str, states: dict[str, AdapterState | None], log: EventLog) -> dict[str, dict[str, float]]:
    with suppress(DataFileError):  # Held-out rows of all need not be on this machine.
        job = replace(job, held_out=eval_rows(job.loaded))
    own, told = with_own_rows(job, edge)
    for event in told:
        log.append(event)
    if own.held_out is None or own.form is None:
        return {}
    found = dict[str, dict[str, float]]()
    for row, state in states.items():
        with attached(job.base.model, state or AdapterState("lora", {})):
            found[row] = evaluate(
                own.base, own.held_out, own.form, own.config.evaluate, max_length=own.config.data.max_length, examples=own.scored,
                options=own.config.options,
            )  # fmt: skip
        log.append(Evaluated(f"{row}:{edge}", found[row]))
    return found
