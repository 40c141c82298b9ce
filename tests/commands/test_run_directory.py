"""docs/run-directory.md has every file that a run writes."""

from __future__ import annotations

import re
from pathlib import Path

import atoll
from atoll.commands.many import compare
from atoll.runs.layout import WRITTEN

from tests.conftest import write_job
from tests.run_files import merged

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "run-directory.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("| path | what | written |\n")[2].partition("\n\n")[0]
NAMED = [name for row in TABLE.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
LATER = {"report.html", "mlflow", "trackio"}
"""Names kept free: what comes later, and trackers that write elsewhere unless they are told to write here."""
EVERYTHING = {
    "run": {"compare": ["local-only", "central"]}, "select": {"policy": "kill-and-revive", "observe_steps": 1, "every": 2, "keep": 0.5},
    "federated": {"personal_steps": 1}, "track": {"to": ["tensorboard"]},
}  # fmt: skip
PLANNED = {"plan": {"policy": "fedpipe", "importance": "gradient-weight", "warmup_steps": 1}}


def is_named(file: str) -> bool:
    """By a row of its own, or as part of a folder that has one."""
    for name in NAMED:
        pattern = re.escape(name).replace("NAME", "[^/]+").replace("round\\-0003", "round-[0-9]{4}")
        if re.fullmatch(pattern + ".*" if name.endswith("/") else pattern, file):
            return True
    return False


def test_every_file_that_a_run_writes_is_on_the_page(tmp_path: Path) -> None:
    for number, sections in enumerate((EVERYTHING, merged(PLANNED, {}))):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = atoll.train(write_job(folder, sections), out=folder / "run").run_dir
        files = {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}
        assert not [file for file in sorted(files) if not is_named(file)]
        assert {file.partition("/")[0] for file in files} <= set(WRITTEN)


def test_every_name_that_is_a_runs_is_on_the_page() -> None:
    assert {name.partition("/")[0] for name in NAMED} == set(WRITTEN) - LATER


def test_what_lies_beside_compared_runs_is_on_the_page() -> None:
    for name in (compare._BEGAN, compare._RESULTS, compare._FIGURE):
        assert f"`{name}`" in PAGE
