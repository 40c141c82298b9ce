"""The run directory: what lies where. docs/run-directory.md describes every file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from atoll.errors import OutputError, RunFolderError
from atoll.parsed import parse_json
from atoll.runs.files import write_json, write_text

_NOTE = "run directory: "
_MODE = 0o700
"""Of a run's folder, whose logs, scores and adapters come from private rows: for its user alone, or less by the umask."""
WRITTEN = (
    "config.toml", "config.json", "plan.json", "importance.json", "events.jsonl", "metrics.csv", "checkpoints", "states", "adapter",
    "edges", ".trackers.json", "report", "report.html", "summary.json", "traceback.txt", "tensorboard", "mlflow", "wandb", "trackio",
)  # fmt: skip
"""What a run puts into its folder, beside stages, whose names begin with a dot."""
_BEFORE_CONFIG = {"config.toml"}


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """One run's folder. Make one with `create` or `create_at`, find one with `open`."""

    path: Path

    @classmethod
    def create(cls, parent: Path, name: str) -> RunDirectory:
        """A new folder NAME-0001, NAME-0002, ... in `parent`; two processes at once get two numbers.

        Raises: OutputError if it cannot be written there.
        """
        try:
            parent.mkdir(parents=True, exist_ok=True)
            number = 1 + max((_number(entry.name, name) for entry in parent.iterdir()), default=0)
            while True:
                path = parent / f"{name}-{number:04d}"
                try:
                    path.mkdir(mode=_MODE)
                except FileExistsError:
                    number += 1
                    continue
                return cls(path)
        except OSError as error:
            raise _not_writable(parent, error) from None

    @classmethod
    def create_at(cls, path: Path) -> RunDirectory:
        """A run directory at exactly `path`, which must be absent or empty.

        Raises: OutputError if there is something there, or it cannot be written.
        """
        try:
            path.mkdir(mode=_MODE, parents=True, exist_ok=True)
            entries = sorted(entry.name for entry in path.iterdir())
        except OSError as error:
            raise _not_writable(path, error) from None
        if entries:
            got = f"a folder with {', '.join(entries[:3])}{', ...' if len(entries) > 3 else ''}"
            do = "name another folder, or leave --out away: every run then gets its own number below runs/"
            raise OutputError("the output folder is not empty", where=str(path), got=got, expected="an absent or empty folder", do=do)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The run directory at `path`.

        Raises: RunFolderError, naming the run most like it.
        """
        run = cls(path)
        if run.config_json.is_file():
            return run
        if not path.exists():
            got = "nothing there"
        elif path.is_dir():
            got = "a folder without config.json"
        else:
            got = "a file"
        likely = _likely(path)
        do = f"did you mean {likely}?" if likely else "give a folder that `atoll train` wrote, such as runs/run-0001"
        raise RunFolderError("this is not a run directory", where=str(path), got=got, expected="a folder with a config.json", do=do)

    def check_finished(self) -> None:
        """Whether there is a result.

        Raises: RunFolderError.
        """
        if not self.adapter.is_dir():
            raise RunFolderError(
                "the run has no adapter", where=str(self.path), got="a run that did not end", expected="a finished run, with adapter/",
                do="give another run, or one of its checkpoints with --model and --adapter",
            )  # fmt: skip

    @property
    def config_toml(self) -> Path:
        """The config as it was given."""
        return self.path / "config.toml"

    @property
    def config_json(self) -> Path:
        """The config as it held, with versions and hashes."""
        return self.path / "config.json"

    @property
    def plan_json(self) -> Path:
        """What was decided for every edge, and why."""
        return self.path / "plan.json"

    @property
    def importance_json(self) -> Path:
        """How important every weight was found to be, where a plan was made by it."""
        return self.path / "importance.json"

    @property
    def events_path(self) -> Path:
        """The append-only log of typed events."""
        return self.path / "events.jsonl"

    @property
    def adapter(self) -> Path:
        """The result, as Hugging Face PEFT writes it."""
        return self.path / "adapter"

    @property
    def summary_path(self) -> Path:
        """summary.json."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of whole checkpoints."""
        return self.path / "checkpoints"

    @property
    def states(self) -> Path:
        """Where edges' own states wait while rounds go on."""
        return self.path / "states"

    def edge_adapter(self, name: str) -> Path:
        """Where an edge's own adapter is kept."""
        return self.path / "edges" / name / "adapter"

    def personal_adapter(self, name: str) -> Path:
        """Where the copy that an edge trained further for itself is kept."""
        return self.path / "edges" / name / "personal"

    def write_config(self, toml_text: str, resolved: Mapping[str, object]) -> None:
        """Keep the config as given, and then as it held: config.json makes the folder a run directory."""
        write_text(self.config_toml, toml_text)
        self.write_json(self.config_json, resolved)

    def read_config(self) -> dict[str, object]:
        """What `write_config` was given as `resolved`.

        Raises: RunFolderError for a config.json that cannot be read.
        """
        return read_object(self.config_json)

    def write_json(self, path: Path, value: object) -> None:
        """Write a JSON file of this run whole or not at all."""
        write_json(path, value)

    def mark(self, error: BaseException) -> None:
        """Note this folder on an exception that ends the run, so that whoever shows it can say where the work is."""
        error.add_note(f"{_NOTE}{self.path}")


def marked_run(error: BaseException) -> Path | None:
    """The folder that `RunDirectory.mark` noted on an exception, or on one that was on its way when this one came."""
    found: BaseException | None = error
    while found is not None:
        notes = [note for note in getattr(found, "__notes__", ()) if note.startswith(_NOTE)]
        if notes:
            return Path(notes[-1].removeprefix(_NOTE))
        found = found.__context__
    return None


def looks_like_a_run(path: Path) -> bool:
    """Whether a folder is a run's by the names in it, as a model's, which has a config.json too, is not; also one that never began."""
    has_config = (path / "config.json").is_file()
    return (has_config and any((path / name).is_file() for name in ("config.toml", "events.jsonl"))) or is_half_written(path)


def is_half_written(path: Path) -> bool:
    """Whether a folder has the name of a run that was stopped before its config was kept, and nothing else in it."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*-[0-9]{4,}", path.name) is None:
        return False
    try:
        names = {entry.name for entry in path.iterdir()}
    except OSError:  # No folder, or one that cannot be read.
        return False
    return {name for name in names if not _is_stage(name)} <= _BEFORE_CONFIG


def entries_of_others(path: Path) -> list[str]:
    """Names in the folder of a run that are not the run's."""
    return sorted(entry.name for entry in path.iterdir() if entry.name not in WRITTEN and not _is_stage(entry.name))


def _is_stage(name: str) -> bool:
    return name.startswith(".stage-") or (name.startswith(".") and name.endswith(".stage"))


def read_object(path: Path) -> dict[str, object]:
    """The JSON object at `path`, a file of a run directory.

    Raises: RunFolderError if it is missing or is not one.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        do = "the run may have been stopped before it wrote the file; run `atoll train` again"
        raise RunFolderError(f"the run has no {path.name}", where=str(path), got="no such file", expected="a JSON file", do=do) from None
    except (OSError, ValueError) as error:
        do = "the file was changed or damaged after the run; run `atoll train` again"
        raise RunFolderError(f"{path.name} cannot be read", where=str(path), got=str(error), expected="a JSON object", do=do) from None
    if not isinstance(value, dict):
        do = "the file was changed after the run; run `atoll train` again"
        raise RunFolderError(f"{path.name} is not a JSON object", where=str(path), got=type(value).__name__, expected="an object", do=do)
    return value


def _number(entry: str, name: str) -> int:
    match = re.fullmatch(re.escape(name) + r"-([0-9]{4,})", entry)
    return int(match[1]) if match else 0


def _likely(path: Path) -> Path | None:
    """A run inside the folder, or beside it under a like name."""
    inside = sorted(path.glob("*/config.json")) + sorted(path.glob("runs/*/config.json"))
    if inside:
        return max(inside, key=lambda file: file.stat().st_mtime).parent
    for above in (path.parent, *path.parent.parents[:1]):
        if (above / "config.json").is_file():
            return above
    beside = {file.parent.name: file.parent for file in sorted(path.parent.glob("*/config.json"))}
    matches = difflib.get_close_matches(path.name, list(beside), n=1, cutoff=0.5)
    return beside[matches[0]] if matches else None


def _not_writable(path: Path, error: OSError) -> OutputError:
    got = error.strerror or str(error)
    return OutputError(
        "the output folder cannot be written", where=str(path), got=got, do="give another folder with --out, or mend its permissions"
    )
