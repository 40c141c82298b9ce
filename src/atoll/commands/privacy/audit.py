"""atoll audit: what a host and a coordinator could read out of what this run would send, tried on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from atoll.adapters.state import AdapterState
from atoll.attacks.audit import INVERTER_STEPS, Audit, Setting
from atoll.attacks.finding import NAMES, Finding, Name
from atoll.base.load import Base
from atoll.commands.privacy.public_text import PublicText, public_text
from atoll.config.load import LoadedConfig
from atoll.errors import BadValueError, OutputError, UnavailableError
from atoll.jobs.finished import loaded_base, open_run
from atoll.jobs.inputs import EdgeRows, base_shapes, edge_rows, eval_rows, given_importance, public_name
from atoll.jobs.ready.start import block_ranks, fresh_start, given_start
from atoll.jobs.results.config import Given, given_config
from atoll.planner.edge_plan import Mode
from atoll.planner.plan_fleet import plan_fleet
from atoll.runs.files import write_json
from atoll.runs.layout import RunDirectory, read_object
from atoll.runs.summary import read_summary
from atoll.seeding import stream
from atoll.tasks.classes import form_of
from atoll.tasks.rows import Rows
from atoll.tasks.text import TextForm
from atoll.tasks.tokens import Example, tokenize

HOST_ROWS = 64
"""Private rows whose activations are attacked: enough for an interval of one percent."""
UPDATE_ROWS = 200
AUDIT = "audit.json"


@dataclass(frozen=True, slots=True)
class Effort:
    """How long, against which text, and which attacks."""

    minutes: float = 2.0
    public: Path | None = None
    attacks: Sequence[Name] = NAMES
    host_rows: int = HOST_ROWS
    searched_rows: int = HOST_ROWS
    """Of these, by the slowest attack."""
    inverter_steps: int = INVERTER_STEPS
    update_rows: int = UPDATE_ROWS


def audit(
    config_path: str | Path, *, overrides: Sequence[str] = (), trust: bool = False, effort: Effort = Effort(), out: Path | None = None,
    example: bool = True, told: Callable[[Finding], None] = lambda _: None,
) -> Mapping[str, object]:  # fmt: skip
    """What was recovered, as `atoll audit --json` has it. Of a finished run's folder its adapter is used, and its summary.json notes the
    figures; without `out` nothing else is written. No row is shown but one for each attack, which `example` = False leaves out.

    Raises: InputError leaves; InfeasibleError; TrustError; UnavailableError for a classifier.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise OutputError("the audit cannot be kept there", where="--out", got=f"{out}, a file", expected="a folder", do="name another")
    if not 0 < effort.minutes < float("inf"):
        got, do = f"{effort.minutes:g}", "give it a minute"
        raise BadValueError("there is no time to attack in", where="--minutes", got=got, expected="more than 0", do=do)
    given = given_config(Path(config_path), overrides, trust=trust)
    if given.loaded.config.model.task == "classify":
        raise UnavailableError(
            "a classifier is not audited yet", where='[model] task = "classify"', got="classes", expected="a run that generates",
            do="audit runs of generation; a classifier's updates give away no less",
        )  # fmt: skip
    subject = _subject(given, overrides, trust=trust)
    public = public_text(subject.base, subject.loaded, effort.public)
    setting = _setting(subject, public, effort, is_finished=given.again is not None)
    found = Audit(setting).findings(effort.attacks, told)
    document = {
        "setting": _told_setting(subject, setting, public, effort), "attacks": [one.to_json(example=example) for one in found],
        "recommended": None,
    }  # fmt: skip
    _keep(document, found, given.again, out)
    return document


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    """What is audited."""

    loaded: LoadedConfig
    base: Base
    adapter: AdapterState
    rows: tuple[EdgeRows, ...]
    modes: Mapping[str, Mode]
    held_out: tuple[Rows, TextForm] | None


def _subject(given: Given, overrides: Sequence[str], *, trust: bool) -> _Subject:
    loaded, finished = given.loaded, None
    # What costs nothing to check comes first.
    rows, shapes = edge_rows(loaded), base_shapes(loaded, 0)
    held_out = eval_rows(loaded)
    form = None if held_out is None else form_of(loaded.config.data, held_out, ())
    start = given_start(loaded, shapes)
    plan = plan_fleet(
        loaded.config, shapes, {edge.name: len(edge.rows) for edge in rows}, start_ranks=block_ranks(start, shapes) if start else None,
        has_host=_has_host(given), importance=given_importance(loaded),
    )  # fmt: skip
    if given.again is not None:
        finished = open_run(given.again.path, trust=trust, overrides=overrides)
    base = loaded_base(loaded, ()) if finished is None else finished.base
    adapter = start or fresh_start(loaded.config, shapes, plan) if finished is None else finished.adapter
    modes = {edge.name: edge.mode for edge in plan.edges}
    return _Subject(loaded, base, adapter, rows, modes, None if held_out is None or form is None else (held_out, form))


def _has_host(given: Given) -> bool:
    """Whether edges that do not say where their base runs have it in a host: so the run had it, or run.toml says what of it stays."""
    if given.again is not None:
        return any(edge.mode == "split" for edge in read_summary(given.again.summary_path).edges)
    config = given.loaded.config
    return "cut" in config.model.model_fields_set or "wire" in config.model_fields_set


def _setting(subject: _Subject, public: PublicText, effort: Effort, *, is_finished: bool) -> Setting:
    edges = [edge for edge in subject.rows if edge.name in subject.modes]
    in_a_host = [edge for edge in edges if subject.modes[edge.name] == "split"]
    held_out = () if subject.held_out is None else _drawn(subject, [("held out", *subject.held_out)], effort.update_rows)
    return Setting(
        subject.loaded.config, subject.base, subject.adapter, is_finished,
        _drawn(subject, [(edge.name, edge.rows, edge.form) for edge in in_a_host], effort.host_rows),
        _drawn(subject, [(edge.name, edge.rows, edge.form) for edge in edges], effort.update_rows),
        held_out, public.rows, effort.minutes * 60, effort.inverter_steps, effort.searched_rows,
    )  # fmt: skip


def _drawn(subject: _Subject, parts: Sequence[tuple[str, Rows, TextForm]], count: int) -> list[Example]:
    """Rows of every part, drawn at random, as tokens."""
    config, found = subject.loaded.config, list[Example]()
    for name, rows, form in parts:
        share = min(len(rows), max(1, count // len(parts)))
        random = np.random.default_rng(stream(config.run.seed, "audit/rows", edge=name))
        drawn = rows.take(random.permutation(len(rows))[:share].tolist())
        found += [one for one in tokenize(drawn, form, subject.base.tokenizer, config.data.max_length) if len(one) > 1]
    return found


def _told_setting(subject: _Subject, setting: Setting, public: PublicText, effort: Effort) -> dict[str, object]:
    config = subject.loaded.config
    split = "split" in subject.modes.values()
    return {
        "base": public_name(subject.loaded), "edges": dict(Counter(subject.modes.values())),
        "cut": config.model.cut.model_dump() if split else None,
        "wire": config.wire.mode if split else None, "codec": config.wire.codec if split else None,
        "adapter": "finished" if setting.is_finished else "new" if config.adapter.start is None else "start",
        "transforms": list(config.privacy.transforms), "rows_in_a_host": len(setting.in_a_host), "rows": len(setting.private),
        "public": public.name, "public_tokens": sum(map(len, public.rows)), "minutes": effort.minutes, "seed": config.run.seed,
    }  # fmt: skip


def _keep(document: Mapping[str, object], found: Sequence[Finding], run: RunDirectory | None, out: Path | None) -> None:
    if out is not None:
        try:
            out.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(out / AUDIT, document, 0o600)  # With rows, and what was recovered of them.
        except OSError as problem:
            raise OutputError(
                "the audit cannot be kept there", where=str(out), got=str(problem), expected="room, and a folder", do="name another"
            ) from None  # fmt: skip
    if run is not None:
        summary = read_object(run.summary_path)
        spent = summary.get("privacy")
        figures = {**document, "attacks": [one.to_json(example=False) for one in found]}
        write_json(run.summary_path, {**summary, "privacy": {**(spent if isinstance(spent, dict) else {}), "audit": figures}})
