"""atoll audit: from run.toml to the document, with nothing sent, and nothing written where nobody said so."""

from __future__ import annotations

import json
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import atoll
from atoll.attacks.finding import NAMES
from atoll.cli.app import main
from atoll.commands.privacy.audit import Effort, audit
from atoll.errors import BadValueError, ConflictError, OutputError, UnavailableError
from atoll.report.privacy.audit import audit_table, describe
from atoll.runs.summary import read_summary

from tests.run_files import DEMO, write_run

QUICK = Effort(minutes=0.01, host_rows=2, searched_rows=1, inverter_steps=2, update_rows=2)
SPLIT = {"model": {"cut": {"front": 0, "back": 0}}, "data": {"train_rows": 20}, "run": {"placement": "split"}}
FIGURES = ("tokens_recovered", "top5_recovered", "rare_recovered", "rouge_l", "interval", "seconds", "example")


def attacks_of(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {one["name"]: one for one in document["attacks"]}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_of_a_run_toml_nothing_is_sent_and_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path, SPLIT, {}, DEMO)
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("somebody was called")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    document = audit(run, effort=QUICK)
    assert files(tmp_path) == {"run.toml"}
    assert set(document) == {"setting", "attacks", "recommended"}
    found = attacks_of(document)
    assert tuple(found) == NAMES
    assert all(set(FIGURES) <= set(one) for one in found.values())
    assert found["nearest-embedding"]["tokens_recovered"] == 1.0
    assert found["nearest-embedding"]["example"]["true"] == found["nearest-embedding"]["example"]["recovered"]
    json.dumps(document, allow_nan=False)
    table = audit_table(document)
    assert [row[0] for row in table.rows] == [one["name"] for one in document["attacks"] if one["rows"]]  # type: ignore[attr-defined]


def test_the_example_is_the_only_row_and_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, SPLIT, {}, DEMO)
    with_row = attacks_of(audit(run, effort=QUICK))["nearest-embedding"]["example"]["true"]
    out = tmp_path / "kept"
    assert main(["audit", str(run), "--minutes", "0.01", "--no-example", "--json", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert all(one["example"] is None for one in document["attacks"])
    assert with_row not in printed.out + printed.err + (out / "audit.json").read_text()
    assert files(tmp_path) == {"run.toml", "kept", "kept/audit.json"}
    assert stat.S_IMODE((out / "audit.json").stat().st_mode) == 0o600


def test_of_a_finished_run_its_summary_notes_the_figures(tmp_path: Path) -> None:
    small = {"data": {"train_rows": 20, "eval_rows": 8}, "train": {"local_steps": 1, "batch_size": 2}, "run": {"rounds": 1}}
    run = write_run(tmp_path, small, {"north": {}, "south": {}}, DEMO)
    done = atoll.train(run, out=tmp_path / "run")
    before = files(tmp_path)
    document = audit(done.run_dir, effort=QUICK)
    assert files(tmp_path) == before
    assert document["setting"]["adapter"] == "finished"  # type: ignore[index]
    found = attacks_of(document)
    assert 0.0 <= found["membership"]["auc"] <= 1.0
    assert "no edge is split" in found["inverter"]["why"]
    noted = json.loads((done.run_dir / "summary.json").read_text())["privacy"]["audit"]
    assert attacks_of(noted)["membership"]["auc"] == found["membership"]["auc"]
    assert all(one["example"] is None for one in noted["attacks"])
    summary = read_summary(done.run_dir / "summary.json")
    assert summary.privacy is not None
    assert summary.status == "complete"


def test_what_says_where_blocks_stay_is_audited_as_a_device_would_run_it(tmp_path: Path) -> None:
    sections = {"model": {"cut": {"front": 1, "back": 0}}, "data": {"train_rows": 20}}
    document = audit(write_run(tmp_path, sections, {}, DEMO), effort=Effort(0.01, attacks=["nearest-embedding"], host_rows=1))
    assert document["setting"]["edges"] == {"split": 1}  # type: ignore[index]
    assert "nearest-embedding: " in describe(document["attacks"][0])  # type: ignore[index]


def test_what_is_wrong_is_a_page(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"mr": f"word {n}", "ref": f"other {n}"}) + "\n" for n in range(12)))
    run = write_run(tmp_path, {**SPLIT, "data": {"train": "rows.jsonl", "train_rows": None}}, {}, DEMO)
    for public in (rows, tmp_path):
        with pytest.raises(ConflictError, match="trained on says nothing"):
            audit(run, effort=Effort(0.01, public))
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError):
        audit(run, effort=QUICK, out=tmp_path / "taken")
    for minutes in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(BadValueError):
            audit(run, effort=Effort(minutes))
    classes = {"model": {"task": "classify"}, "data": {"label": "owner", "prompt": None, "completion": None, "text": "{ref}"}}
    with pytest.raises(UnavailableError, match="classifier"):
        audit(write_run(tmp_path, classes, {}, DEMO), effort=QUICK)
