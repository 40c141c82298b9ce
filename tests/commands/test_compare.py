"""atoll compare and sweep: a run for each variant and seed, none done twice, and what they came to side by side."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

import atoll
from atoll.cli.app import main
from atoll.cli.pages import format_error
from atoll.cli.showing import program
from atoll.commands.many.compare import Variant, compare, grid, read_settings, sweep
from atoll.config.load import load
from atoll.errors import AtollError, CommandLineError, InfeasibleError, OutputError, ResumeError
from atoll.registry.methods import METHODS
from atoll.report.many.comparison import comparison_table
from atoll.report.tables import print_table
from atoll.runs.events import Event, RoundFinished
from atoll.runs.summary import read_summary

from tests.conftest import write_job

SMALL: dict[str, dict[str, object]] = {"run": {"rounds": 2, "name": "both"}, "train": {"local_steps": 2}}
TWO: dict[str, dict[str, object]] = {"north": {"rank": 2}, "south": {"rank": 4}}
METHOD_PAIR = ("lora", "hetlora")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A small run.toml."""
    return write_job(tmp_path, SMALL, TWO, count=12)


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: object, **more: object) -> None:
        raise AssertionError("nothing is to be trained")

    for name in ("train", "resume"):
        monkeypatch.setattr(f"atoll.commands.many.compare.{name}", never)


def test_runs_are_those_of_train_and_are_not_repeated(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = atoll.compare(config, METHOD_PAIR, seeds=(0, 1), out=tmp_path / "out")
    assert [(run.variant, run.seed) for run in found.runs] == [("lora", 0), ("lora", 1), ("hetlora", 0), ("hetlora", 1)]
    alone = atoll.train(config, out=tmp_path / "alone", overrides=["method=hetlora", "run.seed=1"])
    last = found.runs[-1]
    weights = "adapter_model.safetensors"
    assert (last.run_dir / "adapter" / weights).read_bytes() == (alone.adapter / weights).read_bytes()
    losses = [read_summary(run.run_dir / "summary.json").eval.adapted["loss"] for run in found.runs[2:]]  # type: ignore[index]
    loss = found.variants["hetlora"]["loss"]
    assert (loss.mean, loss.deviation) == (fmean(losses), stdev(losses))  # type: ignore[type-var]
    kept = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert kept == json.loads(json.dumps(found.to_json()))
    assert (tmp_path / "out" / "compare.png").stat().st_size > 0
    forbid_training(monkeypatch)
    again = compare(config, METHOD_PAIR, seeds=(1, 0), out=tmp_path / "out")
    assert again.variants == found.variants


def test_a_comparison_that_was_stopped_goes_on(config: Path, tmp_path: Path) -> None:
    told: list[str] = []

    @contextmanager
    def stopping() -> Iterator[Any]:
        def stop(event: Event) -> None:
            if isinstance(event, RoundFinished):
                raise KeyboardInterrupt

        yield stop

    with pytest.raises(KeyboardInterrupt):
        compare(config, ["lora"], seeds=(3,), out=tmp_path / "out", tell=told.append, observed=stopping)
    assert told[-1] == f"finished in {tmp_path / 'out'}: 0 of 1 run"
    found = compare(config, ["lora"], seeds=(3,), out=tmp_path / "out")
    assert "resumed" in (found.runs[0].run_dir / "events.jsonl").read_text()
    whole = atoll.train(config, out=tmp_path / "whole", overrides=["method=lora", "run.seed=3"])
    assert whole.summary.eval.adapted == found.runs[0].summary.eval.adapted


def test_runs_of_other_configs_rows_or_bases_are_not_taken_for_these(config: Path, tmp_path: Path) -> None:
    lora, out = ["lora"], tmp_path / "out"
    compare(config, lora, out=out)
    toml, rows = config.read_text(), (tmp_path / "rows.jsonl").read_text()
    settings = (tmp_path / "base" / "config.json").read_text()
    changes = {
        "config": lambda: config.write_text(toml.replace("rounds = 2", "rounds = 3")),
        "data": lambda: (tmp_path / "rows.jsonl").write_text("".join(reversed(rows.splitlines(keepends=True)))),
        "base": lambda: (tmp_path / "base" / "config.json").write_text(settings.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1')),
    }
    for what, change in changes.items():
        change()
        with pytest.raises(ResumeError) as caught:
            compare(config, lora, out=out)
        assert f"another {what}" in caught.value.got, what
        assert ("run.rounds differs" in caught.value.got) == (what == "config")
        config.write_text(toml)
        (tmp_path / "rows.jsonl").write_text(rows)
        (tmp_path / "base" / "config.json").write_text(settings)
    compare(config, lora, out=out)


def test_what_one_method_cannot_do_is_said_before_any_is_trained(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_training(monkeypatch)
    for method in ("full", "fedadapter"):  # They have no ranks that differ between edges.
        with pytest.raises(AtollError) as caught:
            compare(config, ["lora", method], out=tmp_path / "out")
        assert "rank" in format_error(caught.value)
    with pytest.raises(InfeasibleError):
        compare(config, ["lora"], overrides=["edge.north.memory=1 MB"], out=tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    for place in (tmp_path / "full", config):
        with pytest.raises(OutputError):
            compare(config, ["lora"], out=place)
    assert not (tmp_path / "out").exists()


def test_settings_are_combined() -> None:
    words = ["adapter.rank=4", "8", "train.learning_rate=1e-3", "adapter.rank=8", "adapter.alpha=2", "4"]
    found = grid(read_settings(words), ["method=lora"])
    assert [one.name for one in found] == [
        f"adapter.rank={rank} adapter.alpha={alpha}" for rank in (4, 8) for alpha in (2, 4)
    ]  # fmt: skip
    assert found[0] == Variant(
        "adapter.rank=4 adapter.alpha=2", ("method=lora", "adapter.rank=4", "train.learning_rate=1e-3", "adapter.alpha=2")
    )
    assert grid({"adapter.rank": [4]})[0].name == "as given"
    assert grid({"adapter.targets": [["q_proj"], "all-linear"], "data.shuffle": [True]})[0].overrides == (
        'adapter.targets=["q_proj"]', "data.shuffle=true",
    )  # fmt: skip
    with pytest.raises(CommandLineError, match="no key"):
        read_settings(["4", "adapter.rank=4"])


def test_a_method_is_run_once_and_what_changes_nothing_is_said(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = compare(config, ["lora", "flexlora", "lora", "hetlora"], out=tmp_path / "out")
    assert [run.variant for run in found.runs] == ["lora", "flexlora", "hetlora"]
    assert found.alike == [["lora", "flexlora"]]
    assert main(["compare", str(config), "--methods", "lora", "flexlora", "hetlora", "--out", str(tmp_path / "out")]) == 0
    assert "the same adapters, bit for bit: lora, flexlora;" in capsys.readouterr().out


def test_a_sweep_from_python(config: Path, tmp_path: Path) -> None:
    found = sweep(config, {"adapter.alpha": [2, 4]}, overrides=["train.batch_size=1"], out=tmp_path / "out")
    assert list(found.variants) == ["adapter.alpha=2", "adapter.alpha=4"]
    assert found.alike == []


def test_the_command_lines(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(config), "--methods", "lora", "hetlora", "--seeds", "0", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (list(found["variants"]), len(found["runs"])) == (["lora", "hetlora"], 4)
    assert found["variants"]["lora"]["loss"].keys() == {"mean", "deviation", "min", "max"}
    assert (tmp_path / "runs" / "both-compare" / "lora-seed-0" / "summary.json").is_file()
    line = ["sweep", str(config), "--set", "train.learning_rate=1e-3", "2e-3", "--set", "train.batch_size=1", "--seeds=0"]
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "train.learning_rate=1e-3" in shown
    assert "one seed: no spread" in shown
    assert len(list((tmp_path / "runs" / "both-sweep").glob("*/summary.json"))) == 2


@pytest.mark.parametrize("width", [80, 100, 140])
def test_no_name_is_cut_at_any_width(width: int, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare(config, METHOD_PAIR, out=tmp_path / "out")
    monkeypatch.setenv("COLUMNS", str(width))
    text = io.StringIO()
    print_table(comparison_table(found), text)
    assert "…" not in text.getvalue()
    assert max(map(len, text.getvalue().splitlines())) <= width
    assert all(name in text.getvalue() for name in (*METHOD_PAIR, "base", "traffic"))


def test_the_example_is_every_methods() -> None:
    example = Path(__file__).parents[2] / "examples" / "compare.toml"
    for name in METHODS:
        atoll.plan(example, overrides=[f"method={name}"])
    assert load(example).config.model.base == "tiny"


def test_the_next_line_names_the_program_as_it_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [".venv/bin/atoll", "train"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert program() == (".venv/bin/atoll",)
    monkeypatch.setattr("sys.argv", ["pytest"])
    assert program() == ("atoll",)
    monkeypatch.setattr("sys.argv", ["/somewhere/atoll/__main__.py"])
    assert program() == (sys.executable, "-m", "atoll")
