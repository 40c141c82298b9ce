"""The data of a run: what is trained on, what is held out, and what is told, all before anything is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import huggingface_hub
import pytest

import atoll
from atoll.config.load import load, load_config
from atoll.errors import BadRowError, BadValueError, ConflictError, InputError
from atoll.jobs.inputs import base_shapes, base_source, edge_rows, eval_rows, labels_of, public_name, public_revision, run_labels
from atoll.jobs.job import prepare
from atoll.runs.events import Advised, DataLoaded

from tests.conftest import save_model_folder
from tests.run_files import write_run

Row = Mapping[str, object]
ROWS: Sequence[Row] = [{"prompt": f"w{n}", "completion": f" w{n + 1}"} for n in range(10)]


def write(folder: Path, name: str, rows: Sequence[Row] = ROWS) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def notes(folder: Path) -> list[str]:
    job = prepare(folder / "run.toml")
    job.close()
    return [event.advice for event in job.data_events if isinstance(event, Advised)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model_folder(tmp_path / "base", "llama")
    write(tmp_path, "rows.jsonl")
    return tmp_path


def test_a_share_of_the_rows_is_held_out_and_not_trained_on(folder: Path) -> None:
    config = write_run(folder, {"data": {"eval": None, "validation_share": 0.3}})
    trained = [dict(edge.rows[n]) for edge in edge_rows(load(config)) for n in range(len(edge.rows))]
    held_out = eval_rows(load(config))
    assert held_out is not None
    scored = [dict(held_out[n]) for n in range(len(held_out))]
    assert (len(trained), len(scored)) == (7, 3)
    assert sorted(trained + scored, key=str) == sorted(map(dict, ROWS), key=str)
    again, other = eval_rows(load(config)), eval_rows(load(config, ["run.seed=1"]))
    assert again is not None
    assert other is not None
    assert [dict(again[n]) for n in range(3)] == scored != [dict(other[n]) for n in range(3)]


@pytest.mark.parametrize(
    ("sections", "edges"),
    [({"data": {"validation_share": 0.3}}, {"a": {}}), ({"data": {"eval": None, "validation_share": 0.3}}, {"a": {"data": "rows.jsonl"}})],
)
def test_a_share_that_is_nobodys(folder: Path, sections: dict[str, dict[str, object]], edges: dict[str, dict[str, object]]) -> None:
    with pytest.raises(ConflictError):
        load_config(write_run(folder, sections, edges))


def test_an_edge_has_columns_of_its_own(folder: Path) -> None:
    write(folder, "other.jsonl", [{"frage": "w1", "antwort": " w2"}] * 10)
    own = {"data": "other.jsonl", "prompt": "{frage}", "completion": "{antwort}"}
    job = prepare(write_run(folder, {}, {"a": {}, "b": own, "c": {"data": "other.jsonl", **own, "completion": " w9{antwort}"}}))
    job.close()
    texts = [job.base.tokenizer.decode(edge.examples[0].token_ids) for edge in job.edges if edge.examples is not None]
    assert texts[1:] == ["w1 w2 </s>", "w1 w9 w2 </s>"]


WRONG_OWN = {
    "one alone": ({}, {"data": "rows.jsonl", "prompt": "{prompt}"}),
    "no data of its own": ({}, {"prompt": "{prompt}", "completion": "{completion}"}),
    "beside text": ({"text": "{prompt}"}, {"data": "rows.jsonl", "prompt": "{prompt}", "completion": "{completion}"}),
}


@pytest.mark.parametrize("kind", WRONG_OWN)
def test_templates_of_an_edge_that_do_not_fit(folder: Path, kind: str) -> None:
    data, edge = WRONG_OWN[kind]
    with pytest.raises(ConflictError) as caught:
        load_config(write_run(folder, {"data": data}, {"a": edge}))
    assert "run.toml, line" in caught.value.where


def test_held_out_rows_are_checked_before_anything_is_written(folder: Path) -> None:
    write(folder, "held.jsonl", [*ROWS, {"prompt": "w1", "completion": None}])
    config = write_run(folder, {"data": {"eval": "held.jsonl", "max_length": 3}})
    with pytest.raises(BadRowError) as caught:
        prepare(config)
    assert caught.value.where == "held.jsonl, line 11, column completion"
    job = prepare(config, ["data.on_bad_row=skip"])
    job.close()
    (told,) = [event for event in job.data_events if isinstance(event, DataLoaded) and event.role == "eval"]
    assert (told.num_rows, told.num_skipped) == (10, 1)
    assert job.scored is not None
    assert len(job.scored) == 10


def test_choices_of_held_out_rows_are_checked_before_anything_is_written(folder: Path) -> None:
    write(folder, "held.jsonl", [{**ROWS[0], "choices": [" w1", " w2"]}, {**ROWS[1], "choices": "w1"}])
    sections = {"data": {"eval": "held.jsonl"}, "evaluate": {"metrics": ["choice_accuracy"], "choices": "choices", "answer": "completion"}}
    with pytest.raises(BadRowError) as caught:
        prepare(write_run(folder, sections))
    assert caught.value.where == "held.jsonl, line 2, column choices"


def test_held_out_rows_may_have_a_form_of_their_own(folder: Path) -> None:
    write(folder, "held.jsonl", [{"instruction": "w1", "output": "w2"}])
    job = prepare(write_run(folder, {"data": {"eval": "held.jsonl", "max_length": 200}}))
    job.close()
    assert job.form is not None
    assert "instruction" in job.form.columns


def test_a_held_out_file_of_the_folder_is_not_trained_on(folder: Path) -> None:
    write(folder, "d/a.jsonl")
    write(folder, "d/b.jsonl", [{"prompt": "w7", "completion": " w7"}])
    edges = {"a": {}, "b": {"data": "d"}}
    config = write_run(folder, {"data": {"train": "d", "eval": "d/b.jsonl"}}, edges)
    assert all(row != {"prompt": "w7", "completion": " w7"} for edge in edge_rows(load(config)) for row in edge.rows)  # type: ignore[attr-defined]
    assert [note for note in notes(folder) if "held out" in note] == ["not trained on, as it is held out: d/b.jsonl"] * 2


def test_what_is_trained_on_and_scored_on_is_told(folder: Path) -> None:
    write_run(folder, {})
    assert any("by heart" in note for note in notes(folder))


@pytest.mark.parametrize("edges", [{"a": {"data": "rows.jsonl"}}, {"a": {"data": "rows.jsonl"}, "b": {"data": "rows.jsonl"}}])
def test_the_demos_held_out_rows_score_no_other_run(folder: Path, edges: dict[str, dict[str, object]]) -> None:
    config = write_run(folder, {"data": {"train": None, "eval": None}}, edges)
    assert eval_rows(load(config)) is None
    with pytest.raises(ConflictError, match="no held-out rows"):
        load(config, ['evaluate.metrics=["exact_match"]'])
    assert eval_rows(load(write_run(folder, {"data": {"train": None, "eval": None}}, {**edges, "c": {}}))) is not None


CLASSES = {
    "texts": (["pos", " pos ", "neg"], ["neg", "pos"]), "whole numbers": ([1, 0, "1"], ["0", "1"]),
    "as pandas has them": ([1.0, 0.0, 1], ["0", "1"]),
    "other numbers": ([0.5, 1.5], ["0.5", "1.5"]),
}  # fmt: skip
ALIKE = {"case": ["Pos", "pos"], "numbers as text": ["1", "1.0"], "space": ["a b", "a  b"], "true": [True, "true"], "width": ["Ａ", "a"]}
NONE = {"empty": "", "space": " ", "null": None}


def classified(folder: Path, values: Sequence[object], **labels: object) -> Path:
    write(folder, "rows.jsonl", [{"text": "w1", "label": value} for value in values])
    sections = {"model": {"task": "classify"}, "data": {"label": "label"}, "evaluate": labels}
    return write_run(folder, sections, {"a": {"data": "rows.jsonl"}})


@pytest.mark.parametrize("kind", CLASSES)
def test_classes_are_what_they_mean(folder: Path, kind: str) -> None:
    values, wanted = CLASSES[kind]
    loaded = load(classified(folder, values))
    assert list(run_labels(loaded.config, [edge.rows for edge in edge_rows(loaded)])) == wanted


@pytest.mark.parametrize("kind", ALIKE)
def test_classes_that_differ_in_spelling_alone(folder: Path, kind: str) -> None:
    loaded = load(classified(folder, [*ALIKE[kind], "other"]))
    with pytest.raises(BadValueError, match="nothing but how they are written"):
        run_labels(loaded.config, [edge.rows for edge in edge_rows(loaded)])
    named = load(classified(folder, [*ALIKE[kind], "other"], labels=["other", *map(str, ALIKE[kind])]))
    assert len(run_labels(named.config, ())) == 3


@pytest.mark.parametrize("kind", NONE)
def test_a_row_without_a_class(folder: Path, kind: str) -> None:
    loaded = load(classified(folder, ["a", "b", NONE[kind]]))
    with pytest.raises(BadRowError) as caught:
        labels_of(loaded.config, [edge.rows for edge in edge_rows(loaded)])
    assert caught.value.where == "rows.jsonl, line 3, column label"


def test_the_classes_are_shown(folder: Path) -> None:
    classified(folder, ["pos", "neg"])
    assert "2 classes in column label: 'neg', 'pos'" in notes(folder)


@pytest.mark.parametrize(
    ("row", "got"),
    [({"split": "test"}, "'test'; 10 of 11"), ({"train": False}, "False; 10 of 11"), ({"exclude": "yes"}, "'yes'; 10 of 11")],
)
def test_rows_that_say_they_are_not_for_training(folder: Path, row: Row, got: str) -> None:
    write(folder, "rows.jsonl", [*({**one, **row} for one in ROWS), ROWS[0]])
    with pytest.raises(ConflictError) as caught:
        edge_rows(load(write_run(folder, {})))
    assert got in caught.value.got
    assert caught.value.where.startswith("rows.jsonl, line 1, column ")


@pytest.mark.parametrize("column", [{"split": "train"}, {"split": "north"}, {"weight": 0.5}, {"train": "ICE 4"}, {"weight": 70, "x": 0}])
def test_columns_that_mean_something_else(folder: Path, column: Row) -> None:
    write(folder, "rows.jsonl", [{**one, **column} for one in ROWS])
    assert len(edge_rows(load(write_run(folder, {})))) == 2
    write(folder, "rows.jsonl", [{**one, "split": "test"} for one in ROWS])
    assert len(edge_rows(load(write_run(folder, {"data": {"partition": "by:split"}}, {"a": {}})))) == 1, "it is used, so it is no flag"


def test_an_epoch_counts_the_rows_that_can_be_used(folder: Path) -> None:
    write(folder, "rows.jsonl", [*ROWS[:4], *[{"prompt": None, "completion": "w1"}] * 6])
    sections = {"data": {"on_bad_row": "skip"}, "train": {"local_steps": None, "local_epochs": 2, "batch_size": 2}}
    job = prepare(write_run(folder, sections, {"a": {"data": "rows.jsonl"}}))
    job.close()
    (edge,) = job.edges
    assert (edge.num_rows, edge.plan.num_steps) == (4, 4)


def test_a_plan_tells_what_a_run_tells_of_its_data(folder: Path) -> None:
    write(folder, "d/train.jsonl", [{"text": "w1", "label": n} for n in (0, 1)])
    write(folder, "d/test.jsonl", [{"text": "w1", "label": 0}])
    sections = {"model": {"task": "classify"}, "data": {"train": "d", "eval": None, "label": "label"}}
    config = write_run(folder, sections, {"a": {}})
    planned = atoll.plan(config).notes
    assert len(planned) == 2
    assert "the split train is read" in planned[0]
    assert "2 classes in column label" in planned[1]
    assert set(planned) <= set(notes(folder))


def test_held_out_rows_that_are_trained_on_are_told(folder: Path) -> None:
    write(folder, "held.jsonl", [*ROWS[:3], {"prompt": "w50", "completion": " w51"}])
    write_run(folder, {"data": {"eval": "held.jsonl"}})
    assert any(note.startswith("3 of 4 held-out rows stand among the training rows") for note in notes(folder))
    write(folder, "held.jsonl", [{"prompt": "w50", "completion": " w51"}])
    assert not any("stand among" in note for note in notes(folder))


def test_answers_of_nothing_are_told(folder: Path) -> None:
    write(folder, "rows.jsonl", [*ROWS, {"prompt": "w1", "completion": ""}, {"prompt": "w1", "completion": " "}])
    write_run(folder, {"data": {"eval": None}}, {"a": {}})
    assert any(note.startswith("2 rows hold nothing to learn but the end of a text (first: rows.jsonl, line 11)") for note in notes(folder))


def test_a_page_names_the_edge_and_the_file_whose_columns_are_others(folder: Path) -> None:
    write(folder, "other.jsonl", [{"frage": "w1", "antwort": " w2"}] * 2)
    given = {"prompt": "{prompt}", "completion": "{completion}"}
    with pytest.raises(InputError) as caught:
        edge_rows(load(write_run(folder, {"data": given}, {"a": {}, "b": {"data": "other.jsonl"}})))
    assert caught.value.where == "edge b, other.jsonl, [data] prompt"


def test_special_tokens_in_texts_are_told(folder: Path) -> None:
    write(folder, "rows.jsonl", [*ROWS, {"prompt": "w1 </s> w2", "completion": " w3"}])
    write_run(folder, {})
    assert any(note.startswith("1 row holds '</s>' as text") for note in notes(folder))


@pytest.mark.parametrize("key", ["largest_file", "largest_row"])
def test_limits_of_files_are_keys(folder: Path, key: str) -> None:
    with pytest.raises(InputError) as caught:
        edge_rows(load(write_run(folder, {"data": {key: 20}})))
    assert key in caught.value.page()


def test_a_base_of_a_revision_comes_from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(name: str, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(folder / "base")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    loaded = load(write_run(folder, {"model": {"base": "org/name@v1.0"}}))
    assert base_source(loaded) == base_source(loaded) == str(folder / "base")
    assert asked == [("org/name", "v1.0")]
    assert (public_name(loaded), public_revision(loaded)) == ("org/name", "v1.0")
    assert base_shapes(loaded, 0).model_type == "llama"
