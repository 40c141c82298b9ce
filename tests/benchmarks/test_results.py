"""What benchmarks keep: files that can be read, and tables that follow from the runs beside them."""

from __future__ import annotations

import doctest
import json
from pathlib import Path
from typing import Any

import pytest

from sides import fedpipe_table, kr_table, results, scale_table
from sides.options import BENCHMARKS, Options

KEPT = BENCHMARKS / "results"


def kept(name: str) -> dict[str, Any]:
    """A result of the repository."""
    found = results.read(KEPT, name)
    assert found is not None
    return found


def text(name: str) -> str:
    return (KEPT / f"{name}.md").read_text(encoding="utf-8")


def test_what_is_kept_is_read_again_and_equal_results_are_equal_bytes(tmp_path: Path) -> None:
    whole = {"config": {"rates": (1e-3, 2e-3)}, "results": {"rows": [{"name": "é", "loss": float(n)} for n in range(99)]}}
    runs = [[1], {"a": 2}]
    for folder in ("one", "other"):
        results.keep(tmp_path / folder, "some", whole, runs)
    assert results.read(tmp_path / "one", "some") == json.loads(json.dumps(whole))
    assert results.read_runs(tmp_path / "one", "some") == runs
    files = [[path.read_bytes() for path in sorted((tmp_path / folder).rglob("*.*"))] for folder in ("one", "other")]
    assert files[0] == files[1]
    assert results.read(tmp_path, "some") is results.read_runs(tmp_path, "some") is None


def test_methods_on_fleets_are_what_the_runs_say() -> None:
    whole, runs = kept("fedpipe"), results.read_runs(KEPT, "fedpipe")
    assert whole["results"] == fedpipe_table.aggregates(runs)
    assert text("fedpipe") == fedpipe_table.tables(runs["compared"], runs["without one part"], whole["config"])


def test_which_modules_to_train_is_what_the_runs_say() -> None:
    whole, runs = kept("kill_and_revive"), results.read_runs(KEPT, "kill_and_revive")
    assert whole["results"] == kr_table.aggregates(runs, whole["config"])
    assert text("kill_and_revive") == kr_table.tables(runs, whole["config"])


def test_ten_thousand_edges_are_what_the_measured_ones_say() -> None:
    assert text("scale") == scale_table.table(scale_table.costs(kept("scale")["results"]))


@pytest.mark.parametrize("module", [results, fedpipe_table])
def test_examples_in_docstrings(module: Any) -> None:
    tried = doctest.testmod(module)
    assert (tried.failed, tried.attempted > 0) == (0, True)


def test_quick_is_another_default_and_what_is_given_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*words: str) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["script", *words])
        options = Options("What it measures.", work="some")
        options.size("--repeats", 5, 1)
        options.size("--edges", [10, 100], [2])
        options.size("--limits", True, False)
        return vars(options.parse())

    usual = {"quick": False, "repeats": 5, "edges": [10, 100], "limits": True, "out": KEPT, "work": BENCHMARKS.parent / "build" / "some"}
    assert parsed() == usual
    assert parsed("--repeats", "3", "--no-limits") == {**usual, "repeats": 3, "limits": False}
    out = BENCHMARKS.parent / "build" / "quick"
    assert parsed("--quick", "--edges", "4", "8") == {
        "quick": True, "repeats": 1, "edges": [4, 8], "limits": False, "out": out, "work": out / "some"
    }  # fmt: skip
