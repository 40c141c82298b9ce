"""A whole fleet on loopback, each process as on a machine of its own: it comes to what one process comes to, killed or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atoll.commands.merge import load
from atoll.commands.train import train

from tests.fleet.loopback import COORDINATOR, FRONT, HOST, SUPERLINK, LoopbackFleet

RUN = Path(__file__).resolve().parents[2] / "examples" / "fleet" / "run.toml"


@pytest.fixture(scope="module")
def run_toml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's run, in little."""
    text = RUN.read_text().replace("local_steps = 5", "local_steps = 2")
    text = text.replace("max_length = 64", "max_length = 64\neval_rows = 8\ntrain_rows = 60")
    text = text.replace("[federated]\n", "[federated]\npersonal_steps = 2\n")
    path = tmp_path_factory.mktemp("fleet") / "run.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def here(run_toml: Path) -> Path:
    """The same run in one process, which nobody disturbed."""
    return train(run_toml, out=run_toml.parent / "here").run_dir


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_fleet_whose_processes_are_killed_ends_with_the_adapter_of_one_process(
    run_toml: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On machines whose environment names a proxy, at which nobody is: loopback needs none."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with LoopbackFleet(tmp_path, run_toml, ["north", "south", "west"], has_host=True) as fleet:
        fleet.start_all()
        for step, victim in ((0, "north"), (5, SUPERLINK), (6, COORDINATOR), (11, FRONT), (12, HOST)):
            assert fleet.wait_until(lambda step=step: _steps(fleet) > step, 240)  # type: ignore[misc]
            fleet.kill(victim)
            if victim not in (SUPERLINK, FRONT):  # These their coordinator starts again.
                fleet.start(victim)
        fleet.wait(300)
        assert adapter(fleet.run_dir) == adapter(here)
        summary, undisturbed = (json.loads((run / "summary.json").read_text()) for run in (fleet.run_dir, here))
        kept = sorted(fleet.folder.glob("fleet/edges/*/personal/*/adapter_model.safetensors"))
    assert summary["eval"]["adapted"] == undisturbed["eval"]["adapted"]
    assert [path.parents[2].name for path in kept] == ["north", "south", "west"], "each on its own machine"
    assert not list(fleet.run_dir.glob("edges/*/personal")), "and nowhere else"
    for edge, rows in undisturbed["eval"]["personal"].items():
        for row in ("base", "federated", "personal"):
            assert summary["eval"]["personal"][edge][row]["loss"] == pytest.approx(rows[row]["loss"], rel=1e-4), (edge, row)
    assert [edge["steps"] for edge in summary["edges"]] == [edge["steps"] for edge in undisturbed["edges"]]
    model = load(tmp_path / "run")
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any(torch.any(weight != 0) for name, weight in weights.items() if "lora_B" in name)
    assert model.active_adapters


def _steps(fleet: LoopbackFleet) -> int:
    logs = [fleet.folder / "fleet" / "edges" / edge / "events.jsonl" for edge in fleet.edges]
    return sum(log.read_text().count('"step_done"') for log in logs if log.exists())
