"""The frozen delta, planned and then sent, worked through and waited for in real runs."""

from __future__ import annotations

from pathlib import Path

import pytest

import atoll

from tests.conftest import FAMILIES, save_model_folder
from tests.jobs.conftest import Done, Workplace

WIDE = {"hidden_size": 128, "intermediate_size": 160}
RANKS = {"equal": (8, 8), "unequal": (8, 4), "soon as wide as the modules": (16, 16, 12, 8)}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose numbers are many beside the names that travel with them."""
    folder = tmp_path_factory.mktemp("wide")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "llama", {**FAMILIES["llama"], **WIDE})
        save_model_folder(folder, "llama")
    return folder


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(("rule", "precision"), [("stack", "fp32"), ("residual", "fp32"), ("stack", "fp16")])
def test_planned_bytes_are_measured_but_for_names(rule: str, precision: str, ranks: str, wide: Path, tmp_path: Path) -> None:
    """Formulas count numbers; a message also has names, below 5 % here, and a larger share of smaller numbers."""
    most = 1.1 if precision == "fp32" else 1.2
    edges = {f"edge-{number}": {"rank": rank} for number, rank in enumerate(RANKS[ranks])}
    sections = {"run": {"rounds": 3}, "federated": {"aggregation": rule, "precision": precision}}
    done = Workplace(wide, tmp_path).train(edges, sections)
    measured = done.result.summary.traffic
    planned = atoll.plan(tmp_path / "run.toml")
    assert planned.to_json()["down_bytes"] == planned.down_bytes
    assert 1.0 <= measured.down_bytes / planned.down_bytes <= most
    assert 1.0 <= measured.up_bytes / planned.up_bytes <= most
    assert planned.down_bytes > 1.5 * planned.up_bytes
    last = {str(event["edge"]): event["down_bytes"] for event in done.events("edge_finished") if event["round"] == 3}
    for edge in planned.edges:
        assert 1.0 <= last[edge.name] / edge.down_bytes <= most  # type: ignore[operator]


def seconds(done: Done) -> list[float]:
    return [float(event["simulated_seconds"]) for event in done.events("round_finished")]  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["stack", "residual"])
def test_a_deadline_is_kept_in_the_last_round_too(rule: str, wide: Path, tmp_path: Path) -> None:
    """Edges that are cut off do in every round what there is time for in the last one, when the frozen delta is largest."""
    place = Workplace(wide, tmp_path)
    edges = {name: {"flops": "100 MFLOP/s", "bandwidth": "2 Mbit/s"} for name in ("north", "south")}
    sections = {
        "run": {"rounds": 4}, "adapter": {"rank": 8}, "train": {"local_steps": 40}, "plan": {"round_deadline": "4 s"},
        "federated": {"aggregation": rule, "late": "cut"},
    }  # fmt: skip
    done = place.train(edges, sections)
    first, *_, last = seconds(done)
    assert first < last <= 4
    steps = {edge["num_steps"] for edge in done.plan["edges"]}  # type: ignore[attr-defined, index, union-attr]
    plain = atoll.plan(place.config(edges, {**sections, "federated": {"late": "cut"}}))
    assert 0 < max(steps) < plain.edges[0].num_steps < 40, "as many as for an adapter alone would take too long"
    assert last <= done.plan["edges"][0]["predicted_seconds"] <= 4  # type: ignore[index]


def test_time_counts_the_work_that_the_frozen_delta_takes(wide: Path, tmp_path: Path) -> None:
    """Only speed is declared: the first round of stack has no frozen delta, and each later one a larger."""
    done = Workplace(wide, tmp_path).train({"only": {"flops": "1 GFLOP/s"}}, {"run": {"rounds": 3}, "federated": {"aggregation": "stack"}})
    first, second, third = seconds(done)
    assert first < second < third
