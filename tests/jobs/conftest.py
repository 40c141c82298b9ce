"""Small whole runs: a tiny random base and a few rows, so that a run takes about a second."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import atoll

from tests.conftest import save_model_folder
from tests.run_files import Sections, merged, write_run

ROWS = ["a,b", *(f"w{n % 40} w{(n * 7) % 40},w90 w{n % 40} w{(n * 3) % 40}" for n in range(24))]


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
        default: Sections = {
            "model": {"base": str(self.base)}, "adapter": {"targets": "attention", "rank": 4}, "train": {"local_steps": 2},
            "data": {"train": "rows.csv", "eval": "rows.csv", "eval_rows": 4, "prompt": "{a}", "completion": " {b}"},
        }  # fmt: skip
        (self.folder / "rows.csv").write_text("\n".join(ROWS) + "\n")
        return write_run(self.folder, merged(default, sections), edges)

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


