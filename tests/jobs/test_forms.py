"""Edges that write their rows in different forms are told so."""

from __future__ import annotations

import json
from pathlib import Path

from atoll.config.load import load
from atoll.jobs.inputs import edge_rows
from atoll.jobs.ready.forms import unlike_forms, unlike_kinds

ROWS = {
    "clinic": {"instruction": "What?", "input": "", "output": "That."}, "lab": {"prompt": "What ->", "completion": " that"},
    "ward": {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]},
    "office": {"prompt": "Who ->", "completion": " you"},
}  # fmt: skip


def advice(folder: Path, owners: dict[str, tuple[dict[str, object], str]]) -> list[str]:
    text = '[model]\nbase = "tiny"\n'
    for name, (row, more) in owners.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        text += f'[[edge]]\nname = "{name}"\ndata = "{name}.jsonl"\n{more}\n'
    (folder / "run.toml").write_text(text)
    return [event.advice for event in unlike_forms({edge.name: edge.form for edge in edge_rows(load(folder / "run.toml"))})]


def test_forms_that_differ_are_told_with_the_edges_that_have_them(tmp_path: Path) -> None:
    (said,) = advice(tmp_path, {name: (row, "") for name, row in ROWS.items()})  # type: ignore[misc]
    assert "in 3 forms" in said
    assert "; lab, office as they stand; ward chats. Ask" in said


def test_columns_of_other_names_are_no_difference(tmp_path: Path) -> None:
    forms = (("a", "b"), ("mr", "ref"))
    owners = {
        one: ({one: "x", other: "y"}, f'prompt = "{{{one}}} ->"\ncompletion = " {{{other}}}"') for one, other in forms
    }  # fmt: skip
    assert advice(tmp_path, owners) == []  # type: ignore[arg-type]


def test_edges_on_machines_of_their_own_say_their_kind() -> None:
    assert unlike_kinds({"north": "messages", "south": "messages"}) == ()
    assert "north chats; south prompts and completions. Ask" in unlike_kinds({"north": "messages", "south": "completion"})[0].advice
