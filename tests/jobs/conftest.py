"""Small whole runs: a tiny random base and a few rows, so that a run takes about a second."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import atoll

from tests.conftest import save_model_folder

ROWS = ["a,b", *(f"w{n % 40} w{(n * 7) % 40},w90 w{n % 40} w{(n * 3) % 40}" for n in range(24))]
Sections = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Done:
    """A finished run."""

    result: atoll.RunResult

    def events(self, kind: str) -> list[dict[str, object]]:
        """Its events of one kind."""
        lines = (self.result.run_dir / "events.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["event"] == kind]

    @property
    def weights(self) -> bytes:
        """Of its adapter."""
        return (self.result.adapter / "adapter_model.safetensors").read_bytes()

    @property
    def plan(self) -> dict[str, object]:
        """plan.json."""
        return json.loads((self.result.run_dir / "plan.json").read_text())


@dataclass(frozen=True, slots=True)
class Workplace:
    """Where runs are made: their base, rows and folders."""

    base: Path
    folder: Path

    def config(self, edges: Mapping[str, Mapping[str, object]], sections: Sections) -> Path:
        """A run.toml of these edges: two rounds of two steps, unless the sections say otherwise."""
        default: dict[str, dict[str, object]] = {
            "run": {"rounds": 2}, "model": {"base": str(self.base)},
            "data": {"train": "rows.csv", "eval": "rows.csv", "eval_rows": 4, "prompt": "{a}", "completion": " {b}", "max_length": 16},
            "adapter": {"targets": "attention", "rank": 4}, "train": {"local_steps": 2, "batch_size": 2, "learning_rate": 1e-2},
            "plan": {}, "federated": {}, "evaluate": {}, "select": {},
        }  # fmt: skip
        lines, default = [], {**default, **{name: {} for name in sections if name not in default}}
        for name, values in default.items():
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in {**values, **sections.get(name, {})}.items())]
        for name, fields in edges.items():
            lines += ["[[edge]]", f'name = "{name}"', *(f"{key} = {json.dumps(value)}" for key, value in fields.items())]
        (self.folder / "rows.csv").write_text("\n".join(ROWS) + "\n")
        path = self.folder / "run.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    def train(self, edges: Mapping[str, Mapping[str, object]], sections: Sections, out: str = "run") -> Done:
        """Train it."""
        return Done(atoll.train(self.config(edges, sections), out=self.folder / out))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a random Llama of two blocks."""
    folder = tmp_path_factory.mktemp("base")
    save_model_folder(folder, "llama")
    return folder


@pytest.fixture
def place(llama: Path, tmp_path: Path) -> Workplace:
    """A folder to run in."""
    return Workplace(llama, tmp_path)


