"""--method NAME: what published methods come to on one fleet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atoll.__main__ import main
from atoll.registry.methods import METHODS

from tests.run_files import write_run

FLEET = Path(__file__).parents[2] / "examples" / "fleets" / "heterogeneous-5.toml"


UNEQUAL = {name for name, settings in METHODS.items() if "adapter.kind=lora" in settings}
"""Methods whose edges may have ranks of their own."""


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_planned(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(tmp_path, {"run": {"rounds": 6, "fleet": str(FLEET)}}, {}, over={})
    rank = ["--set", "edge.five.rank=16"] * (name in UNEQUAL)
    assert main(["plan", str(config), "--method", name, *rank, "--json"]) == 0
    edges = json.loads(capsys.readouterr().out)["edges"]
    assert len(edges) == 5
    assert {edge["mode"] for edge in edges} == {"split" if name == "dlora" else "local"}
    assert all((edge["down_bytes"] > edge["up_bytes"]) == (name == "flora") for edge in edges), "what was stacked travels"
    filled = name.startswith("fedpipe") and name != "fedpipe-without-filling"
    assert (len({edge["num_steps"] for edge in edges}) > 1) == filled
    if "plan.policy=fedpipe" not in METHODS[name]:
        ranks = [max(edge["ranks"].values()) for edge in edges]
        assert ranks == {"full": [160] * 5, "fedadapter": [2] * 5}.get(name, [8, 8, 8, 8, 16])
