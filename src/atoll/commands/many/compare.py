"""atoll compare and atoll sweep: a run for each variant and seed, each in a folder of its own, and what they came to side by side."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from atoll.base.part import stored_digest
from atoll.commands.plan import plan_at_once
from atoll.commands.resume import resume
from atoll.commands.train import train
from atoll.config.document import few
from atoll.config.load import LoadedConfig, config_hash, load, resolved
from atoll.errors import AtollError, CommandLineError, OutputError, ResumeError
from atoll.jobs.inputs import base_source, edge_rows, eval_rows
from atoll.jobs.resume_state import rows_hash
from atoll.registry.methods import METHODS
from atoll.report.many.comparison import ComparedRun, Comparison
from atoll.report.many.figure import write_comparison_figure
from atoll.runs.comparison import differing_keys
from atoll.runs.events import Event
from atoll.runs.files import write_json
from atoll.runs.layout import RunDirectory, read_object
from atoll.runs.record import read_noted
from atoll.runs.summary import read_summary
from atoll.units import counted

_BEGAN, _RESULTS, _FIGURE = "began.json", "compare.json", "compare.png"
ALL = "all"
"""In place of methods: every one."""
Observed = Callable[[], AbstractContextManager[Callable[[Event], None]]]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run, and what is put on top of run.toml for it."""

    name: str
    overrides: tuple[str, ...]


def compare(
    config_path: str | Path, methods: Sequence[str], *, overrides: Sequence[str] = (), seeds: Sequence[int] = (),
    out: str | Path | None = None, tell: Tell = lambda line: None, observed: Observed | None = None,
) -> Comparison:  # fmt: skip
    """Train by every method ("all": all that there are) with every seed (none: the file's own); the results side by side in `out`.

    Runs that are finished there are not repeated, those that were stopped go on. All plans are made before anything is trained.

    Raises: what `atoll.plan` and `atoll.train` raise; ResumeError where `out` holds runs of other configs, data or another base.
    """
    wanted = list(METHODS) if ALL in methods else list(dict.fromkeys(methods))
    variants = [Variant(name, (f"method={name}", *overrides)) for name in wanted]
    return _side_by_side(Path(config_path), variants, seeds, out or _usual_folder(config_path, "compare"), tell, observed or _silent)


def sweep(
    config_path: str | Path, settings: Mapping[str, Sequence[object]], *, overrides: Sequence[str] = (), seeds: Sequence[int] = (),
    out: str | Path | None = None, tell: Tell = lambda line: None, observed: Observed | None = None,
) -> Comparison:  # fmt: skip
    """The same for every combination of values of these keys: `{"adapter.rank": [4, 8]}`; a text is a value as --set takes it.

    Raises: as `compare`.
    """
    variants = grid(settings, overrides)
    return _side_by_side(Path(config_path), variants, seeds, out or _usual_folder(config_path, "sweep"), tell, observed or _silent)


def grid(settings: Mapping[str, Sequence[object]], overrides: Sequence[str] = ()) -> list[Variant]:
    """A variant for each combination, named by what differs between them."""
    axes = [
        dict.fromkeys(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for value in values)
        for key, values in settings.items()
    ]  # fmt: skip
    return [
        Variant(" ".join(one for one, axis in zip(chosen, axes, strict=True) if len(axis) > 1) or "as given", (*overrides, *chosen))
        for chosen in product(*axes)
    ]  # fmt: skip


def read_settings(words: Sequence[str]) -> dict[str, list[str]]:
    """Values by key, of "SECTION.KEY=VALUE" words; a word without "=" is one more value for the key before.

    Raises: CommandLineError for a value without a key.
    """
    values: dict[str, list[str]] = {}
    key = None
    for word in words:
        name, equals, value = word.partition("=")
        if not equals and key is None:
            raise CommandLineError(
                "a value has no key", where="--set", got=word, expected="--set SECTION.KEY=VALUE [VALUE ...]", do="name the key first"
            )
        key, value = (name.strip(), value) if equals else (key, word)
        values.setdefault(str(key), []).append(value)
    return values


def _usual_folder(config_path: str | Path, command: str) -> Path:
    return Path("runs") / f"{load(Path(config_path)).config.run.name}-{command}"


def _side_by_side(
    config: Path, variants: Sequence[Variant], seeds: Sequence[int], out: str | Path, tell: Tell, observed: Observed
) -> Comparison:  # fmt: skip
    tell(f"planning {counted(len(variants) * max(1, len(set(seeds))), 'run')}")
    folder, jobs = Path(out), list(_jobs(config, variants, tuple(dict.fromkeys(seeds))))
    _check_began(config, folder, jobs)
    for job in jobs:
        if not _is_complete(folder / job.folder):
            plan_at_once(load(config, job.overrides))
    _make(folder)
    write_json(folder / _BEGAN, {"began_with": _noted(folder) | {job.folder: dict(job.began_with) for job in jobs}})
    found: list[ComparedRun] = []
    for number, job in enumerate(jobs, start=1):
        try:
            found.append(_run(config, job, folder / job.folder, f"run {number} of {len(jobs)}: {job.title}", tell, observed))
        except (AtollError, KeyboardInterrupt):
            tell(f"finished in {folder}: {len(found)} of {counted(len(jobs), 'run')}")
            raise
    comparison = Comparison(folder, tuple(found))
    write_json(folder / _RESULTS, comparison.to_json())
    write_comparison_figure(comparison, folder / _FIGURE)
    return comparison


@dataclass(frozen=True, slots=True)
class _Job:
    variant: str
    seed: int
    overrides: tuple[str, ...]
    folder: str
    began_with: Mapping[str, str]

    @property
    def title(self) -> str:
        return f"{self.variant}, seed {self.seed}"


def _silent() -> AbstractContextManager[Callable[[Event], None]]:
    return nullcontext(lambda event: None)


def _jobs(config: Path, variants: Sequence[Variant], seeds: Sequence[int]) -> Iterator[_Job]:
    data: dict[str, str] = {}
    bases: dict[str, str] = {}
    for variant in variants:
        own = seeds or (load(config, variant.overrides).config.run.seed,)
        for seed in own:
            overrides = (*variant.overrides, f"run.seed={seed}")
            loaded = load(config, overrides)
            source, read = base_source(loaded), _what_is_read(loaded)
            if source not in bases:
                bases[source] = stored_digest(source)
            if read not in data:
                data[read] = _data_digest(loaded)
            began_with = {"config": config_hash(loaded.config), "data": data[read], "base": bases[source]}
            yield _Job(variant.name, seed, overrides, f"{_as_folder(variant.name)}-seed-{seed}", began_with)


def _as_folder(name: str) -> str:
    plain = re.sub(r"[^\w.=+-]+", "_", name, flags=re.ASCII)[:80]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _what_is_read(loaded: LoadedConfig) -> str:
    config = loaded.config
    edges = [(edge.name, edge.data, edge.prompt, edge.completion) for edge in config.edge]
    return json.dumps([config.data.model_dump(mode="json"), edges, config.run.seed, config.evaluate.model_dump(mode="json")], default=str)


def _data_digest(loaded: LoadedConfig) -> str:
    hasher = hashlib.sha256()
    for edge in edge_rows(loaded):
        hasher.update(f"{edge.name} {rows_hash(edge.rows)}\n".encode())
    held_out = eval_rows(loaded)
    hasher.update(b"" if held_out is None else rows_hash(held_out).encode())
    return hasher.hexdigest()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_other = not (folder / _BEGAN).is_file() and any(folder.iterdir())
    except OSError as problem:
        raise OutputError(
            "the output folder cannot be written", where=str(folder), got=problem.strerror or str(problem), do="give another with --out"
        ) from None  # fmt: skip
    if is_other:
        raise OutputError(
            "the output folder holds something else", where=str(folder), got=f"no {_BEGAN} of a comparison",
            expected="an absent or empty folder, or that of the same comparison", do="give another with --out",
        )  # fmt: skip


def _noted(folder: Path) -> dict[str, Mapping[str, str]]:
    if not (folder / _BEGAN).is_file():
        return {}
    found = read_object(folder / _BEGAN).get("began_with")
    return found if isinstance(found, dict) else {}


def _check_began(config: Path, folder: Path, jobs: Sequence[_Job]) -> None:
    noted = _noted(folder)
    for job in jobs:
        before = noted.get(job.folder)
        if before is None and not (folder / job.folder).exists():
            continue
        others = [key for key, value in job.began_with.items() if not isinstance(before, Mapping) or before.get(key) != value]
        if others:
            raise ResumeError(
                f"the folder holds a run of {job.title} that began with something else", where=str(folder / job.folder),
                got=f"another {' and another '.join(others)}{_where_they_differ(config, job, folder / job.folder)}",
                expected="what the run began with",
                do="put back what was there, or give another folder with --out",
            )  # fmt: skip


def _where_they_differ(config: Path, job: _Job, folder: Path) -> str:
    noted, now = read_noted(RunDirectory(folder))[0].get("config"), resolved(load(config, job.overrides).config)
    keys = differing_keys(noted, now) if isinstance(noted, dict) else []
    return f"; {few(keys)} differ{'s' * (len(keys) == 1)}" if keys else ""


def _is_complete(folder: Path) -> bool:
    run = RunDirectory(folder)
    return run.summary_path.is_file() and read_summary(run.summary_path).status == "complete"


def _run(
    config: Path, job: _Job, folder: Path, title: str, tell: Tell, observed: Observed
) -> ComparedRun:  # fmt: skip
    run = RunDirectory(folder)
    if _is_complete(folder):
        tell(f"{title}: finished before")
        return ComparedRun(job.variant, job.seed, folder, read_summary(run.summary_path))
    tell(title)
    with observed() as observer:
        if run.config_json.is_file():
            summary = resume(folder, observers=(observer,), trust=True).summary
        else:
            summary = train(config, out=folder, overrides=job.overrides, observers=(observer,)).summary
    return ComparedRun(job.variant, job.seed, folder, summary)
