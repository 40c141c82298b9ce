"""What a small run starts from: run.toml, and the rows beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from atoll.config.keys import as_toml

Sections = Mapping[str, Mapping[str, object]]
SMALL: Sections = {
    "run": {"rounds": 2}, "model": {"base": "base"}, "data": {"train": "rows.jsonl", "eval": "rows.jsonl", "max_length": 16},
    "train": {"learning_rate": 1e-2, "local_steps": 3, "batch_size": 2},
}  # fmt: skip
"""Of a base and rows beside it."""
ONE_ROUND: Sections = {"run": {"rounds": 1}, "data": {"eval": None}, "train": {"local_steps": 8, "batch_size": 4}}
"""Long enough to lose a host within it, and nothing is scored."""
DEMO: Sections = {"model": {"base": "tiny"}, "data": {"train": "demo", "prompt": "{mr} ->", "completion": " {ref}"}}
"""On what is built in."""
PAIR: Sections = {"north": {}, "south": {}}


def merged(over: Sections, sections: Sections) -> Sections:
    """The sections, key by key over others."""
    return {name: {**over.get(name, {}), **sections.get(name, {})} for name in dict.fromkeys((*over, *sections))}


def run_text(sections: Sections, edges: Sections, over: Sections = SMALL) -> str:
    """The sections over others, and an [[edge]] for each name; a key that is None is left out."""
    lines = list[str]()
    for name, fields in merged(over, sections).items():
        lines += [f"[{name}]", *_keys(fields)]
    for name, fields in edges.items():
        lines += ["[[edge]]", *_keys({"name": name, **fields})]
    return "\n".join(lines) + "\n"


def _keys(fields: Mapping[str, object]) -> list[str]:
    return [f"{key} = {as_toml(value)}" for key, value in fields.items() if value is not None]


def write_run(folder: Path, sections: Sections, edges: Sections = PAIR, over: Sections = SMALL) -> Path:
    """run.toml."""
    path = folder / "run.toml"
    path.write_text(run_text(sections, edges, over))
    return path


def write_rows(path: Path, count: int = 24, owners: Sequence[str] = ("",)) -> None:
    """Rows of one length with a prompt and a completion, dealt to the owners in turn."""
    rows = [{"owner": owners[n % len(owners)], "prompt": f"w{n} w{n + 1}", "completion": f" w{n + 2} w3"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
