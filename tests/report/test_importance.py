"""The heat map of importance, from event logs that the real writer wrote."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from atoll.errors import RunFolderError
from atoll.report.figures import write_figures
from atoll.report.importance_map import ImportanceTable, draw_importance, read_importance_table
from atoll.runs.events import Event, EventLog, ImportanceFound, RoundStarted
from atoll.runs.layout import RunDirectory
from atoll.runs.summary import EdgeSummary, Summary, write_summary

LLAMA = {f"model.layers.{block}.self_attn.{name}": 1.0 + block for block in range(3) for name in ("q_proj", "v_proj")}
GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def found(scores: dict[str, float], *edges: str) -> ImportanceFound:
    return ImportanceFound("svd-sensitivity", edges or ("north", "south"), scores, 1.5)


def written(folder: Path, *events: Event) -> RunDirectory:
    run = RunDirectory.create_at(folder)
    run.write_config("", {"config": {}})
    with EventLog(run.events_path) as log:
        for event in events:
            log.append(event)
    row = EdgeSummary("north", "local", 16, 8, dict.fromkeys(LLAMA, 8), 10, None, None, 1.0, 1, 1, 0)
    write_summary(run.summary_path, Summary("complete", edges=(row,)))
    return run


def table(folder: Path, scores: dict[str, float]) -> ImportanceTable:
    result = read_importance_table(written(folder / "run", found(scores)).events_path)
    assert result is not None
    return result


def texts(path: Path) -> list[str]:
    root = ElementTree.fromstring(path.read_bytes())
    return ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_rows_are_blocks_and_columns_are_types(tmp_path: Path) -> None:
    own = table(tmp_path, LLAMA)
    assert (own.importance, own.edges) == ("svd-sensitivity", ("north", "south"))
    assert (own.blocks, own.types) == ((0, 1, 2), ("q_proj", "v_proj"))
    assert own.scores == ((1.0, 1.0), (2.0, 2.0), (3.0, 3.0))


def test_a_last_name_that_a_block_has_twice_is_told_apart(tmp_path: Path) -> None:
    own = table(tmp_path, {f"transformer.h.{block}.{name}": float(place) for block in range(2) for place, name in enumerate(GPT2)})
    assert own.types == ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj")
    assert own.scores == ((0.0, 1.0, 2.0, 3.0),) * 2


def test_a_fused_projection_is_one_column(tmp_path: Path) -> None:
    assert table(tmp_path, {f"gpt_neox.layers.{block}.attention.query_key_value": 1.0 for block in range(2)}).types == ("query_key_value",)


def test_what_is_outside_the_blocks_or_not_in_every_block_has_its_place(tmp_path: Path) -> None:
    own = table(tmp_path, {**LLAMA, "model.layers.1.mlp.up_proj": 9.0, "score": 4.0})
    assert (own.blocks, own.types) == ((0, 1, 2, None), ("q_proj", "v_proj", "up_proj", "score"))
    assert own.scores[1] == (2.0, 2.0, 9.0, None)
    assert own.scores[3] == (None, None, None, 4.0)


def test_the_last_importance_holds_and_a_run_may_have_none(tmp_path: Path) -> None:
    later = written(tmp_path / "later", found(LLAMA), RoundStarted("federated", 1, 3), found({"0.q_proj": 5.0}, "west"))
    own = read_importance_table(later.events_path)
    assert own is not None
    assert (own.edges, own.scores) == (("west",), ((5.0,),))
    assert read_importance_table(written(tmp_path / "none", RoundStarted("federated", 1, 3)).events_path) is None


def test_a_run_with_importance_alone_has_this_one_figure(tmp_path: Path) -> None:
    run = written(tmp_path / "run", found(LLAMA))
    paths = write_figures(run)
    assert [path.name for path in paths] == ["importance.svg", "importance.png"]
    seen = texts(paths[0])
    assert {"q_proj", "v_proj", "0", "2", "100", "33.3", "block"} <= set(seen)
    assert any("mean over 2 edges" in text for text in seen)
    assert paths[1].read_bytes().startswith(b"\x89PNG")
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_figures(run)] == before


@pytest.mark.parametrize(
    "scores",
    [
        dict.fromkeys(LLAMA, 0.0),
        {**LLAMA, next(iter(LLAMA)): math.nan},
        dict.fromkeys(LLAMA, math.nan),
        {**LLAMA, next(iter(LLAMA)): 0.0, "score": 1e-9},
        {"fc": 1.0},
        {f"model.layers.{block}.self_attn.{name}": block + 0.5 for block in range(96) for name in ("q", "k", "v", "o")},
    ],
    ids=["nothing matters", "one not finite", "none finite", "logarithmic with a zero", "one module", "large"],
)
def test_unusual_scores_are_drawn_too(tmp_path: Path, scores: dict[str, float]) -> None:
    figure = draw_importance(table(tmp_path, scores))
    figure.savefig(tmp_path / "importance.svg")
    assert (tmp_path / "importance.svg").stat().st_size > 0


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ('{"event": "importance_found", "importance": "none", "edges": []}', "scores: Field required"),
        ('{"event": "importance_found", "importance": "none", "edges": [], "scores": {}}', "there is no score"),
        ('{"event": "importance_found", "importance": "none", "edges": [], "scores": {"a": "much"}}', "scores.a: Input should be"),
    ],
)
def test_a_damaged_line_is_refused_by_its_number(tmp_path: Path, line: str, got: str) -> None:
    run = written(tmp_path / "run", RoundStarted("federated", 1, 3))
    with run.events_path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(RunFolderError) as caught:
        write_figures(run)
    assert caught.value.where.endswith("line 2")
    assert got in caught.value.got
    assert not (run.path / "report").exists()
