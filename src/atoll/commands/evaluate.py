"""atoll evaluate: what a run's adapter, or any model with or without one, is worth on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from atoll.adapters.attach import attached
from atoll.adapters.fresh import head_state
from atoll.adapters.peft_files import load_adapter, read_labels
from atoll.adapters.state import AdapterState
from atoll.base.load import Base
from atoll.config.load import LoadedConfig, changed
from atoll.config.schema import RunConfig
from atoll.errors import ConflictError, EmptyDataError
from atoll.jobs.finished import base_of, open_run
from atoll.jobs.inputs import check_positions, eval_rows, held_out_events, run_labels
from atoll.jobs.results.adapter import check_given
from atoll.jobs.results.config import run_config, with_overrides
from atoll.jobs.results.trained_on import check_trained_on, run_of
from atoll.jobs.split import HostAccess
from atoll.runs.events import Evaluated, Event, EventLog, PhaseStarted
from atoll.runs.layout import RunDirectory
from atoll.tasks.classes import form_of
from atoll.tasks.evaluate import check_metrics, held_out_examples
from atoll.tasks.evaluate import evaluate as score
from atoll.tasks.rows import Rows
from atoll.tasks.text import TextForm
from atoll.tasks.tokens import Examples


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    base: Base
    adapter: AdapterState | None
    config: RunConfig
    rows: Rows
    form: TextForm
    close: Callable[[], None]


def evaluate(
    *, run_dir: str | Path | None = None, model: str | None = None, adapter: str | Path | None = None, data: str | None = None,
    overrides: Sequence[str] = (), observers: Sequence[Callable[[Event], None]] = (), host: HostAccess | None = None,
    trust: bool = False, other_base: bool = False,
) -> Mapping[str, Mapping[str, float]]:  # fmt: skip
    """Scores by row: "base", and "adapted" where there is an adapter.

    A run is scored as its own config says; `data` and `overrides` (section.key=value) change that. Without a run, `model` and `data` say
    what to score, and `overrides` how the rows become text.

    Raises: InputError leaves; TrustError where the run names code and `trust` does not say that it may; OtherBaseError where the base's
    weights are not those that the run was trained on, and `other_base` does not say that they may.
    """
    if run_dir is not None:
        subject = _of_run(Path(run_dir), data, overrides, host, trust=trust, other_base=other_base)
    else:
        subject = _of_model(model, adapter, data, overrides, host, other_base=other_base)
    settings, max_length = subject.config.evaluate, subject.config.data.max_length
    scores: dict[str, Mapping[str, float]] = {}
    try:
        with EventLog(None, observers) as log:
            examples = _examples(subject, log)
            for row, state in (("base", None), ("adapted", subject.adapter)):
                if row == "adapted" and state is None:
                    continue
                log.append(PhaseStarted("evaluate", len(examples)))
                with attached(subject.base.model, state or head_state(subject.base.head)):
                    scores[row] = score(
                        subject.base, subject.rows, subject.form, settings, max_length=max_length, examples=examples,
                        options=subject.config.options,
                    )  # fmt: skip
                log.append(Evaluated(row, scores[row]))
    finally:
        subject.close()
    return scores


def _examples(subject: _Subject, log: EventLog) -> Examples:
    """The rows as tokens, and what is to be told of them."""
    own, max_length = subject.base.model.config.get_text_config(), subject.config.data.max_length
    positions = next((getattr(own, name) for name in ("max_position_embeddings", "max_seq_len") if getattr(own, name, None)), None)
    check_positions(subject.config, own.model_type, positions)
    settings, options = subject.config.evaluate, subject.config.options
    examples = held_out_examples(subject.rows, subject.form, subject.base.tokenizer, settings, max_length, options)
    for event in held_out_events(subject.rows, subject.form, examples):
        log.append(event)
    return examples


def _of_run(
    run_dir: Path, data: str | None, overrides: Sequence[str], host: HostAccess | None, *, trust: bool, other_base: bool
) -> _Subject:
    run = RunDirectory.open(run_dir)
    told, extra = _with(run_config(run, trust=trust), data)
    loaded = with_overrides(run, told, [*extra, *overrides], trust=trust)
    rows, form = _rows(loaded, read_labels(run.adapter))
    finished = open_run(run_dir, host, trust=trust, other_base=other_base, overrides=overrides)
    return _Subject(finished.base, finished.adapter, loaded.config, rows, form, finished.close)


def _of_model(
    model: str | None, adapter: str | Path | None, data: str | None, overrides: Sequence[str], host: HostAccess | None, *, other_base: bool
) -> _Subject:
    if model is None:
        got, do = "neither a run directory nor --model", "atoll evaluate RUN_DIR"
        raise ConflictError("nothing to evaluate", got=got, expected="one of the two", do=do)
    start = LoadedConfig(RunConfig(), Path("run.toml"), "")
    told, extra = _with(start, data)
    given = changed(told, [*extra, f"model.base={model}", *overrides])
    if given.config.data.eval is None:
        raise _no_rows()
    folder = Path(adapter) if adapter is not None else None
    state = load_adapter(folder) if folder is not None else None
    labels = read_labels(folder) if folder is not None else run_labels(given.config, ())
    rows, form = _rows(given, labels)
    base, close = base_of(given, host, labels)
    if folder is not None:
        check_given(folder, base)
        run = run_of(folder)
        if run is not None and not other_base and run_config(run, trust=True).config.model.precision == given.config.model.precision:
            check_trained_on(run, base, given.config)
    return _Subject(base, state, given.config, rows, form, close)


def _with(loaded: LoadedConfig, data: str | None) -> tuple[LoadedConfig, list[str]]:
    """The config without what other held-out rows stand for, and the override that names them."""
    # A path on the command line is relative to where the user stands, not to where run.toml lay.
    if data is not None:  # In place of a share of the training rows, where that was held out.
        named = loaded.config.data.model_copy(update={"validation_share": None})
        loaded = replace(loaded, config=loaded.config.model_copy(update={"data": named}))
    return loaded, [f"data.eval={Path(data).absolute() if Path(data).exists() else data}"] if data is not None else []


def _no_rows() -> EmptyDataError:
    return EmptyDataError(
        "there are no held-out rows to score", where="[data] eval", got="nothing", expected="a file, a folder or a data set id",
        do="give --data FILE, or set eval in [data]",
    )


def _rows(loaded: LoadedConfig, labels: Sequence[str]) -> tuple[Rows, TextForm]:
    rows = eval_rows(loaded)
    if rows is None:
        raise _no_rows()
    form = form_of(loaded.config.data, rows, labels)
    check_metrics(loaded.config.evaluate, form, rows)
    return rows, form
