"""atoll.plan from a file: rows are counted, start adapters read, and torch never loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.peft_files import save_adapter
from atoll.base.read_shapes import read_shapes
from atoll.commands.plan import plan
from atoll.errors import AdapterFolderError, InfeasibleError
from atoll.jobs.job import prepare

from tests.conftest import random_model


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    random_model("llama").save_pretrained(tmp_path / "base")
    (tmp_path / "notes.csv").write_text("owner,text\n" + "".join(f"{'ab'[i % 2]},word {i}\n" for i in range(40)))
    file = tmp_path / "run.toml"
    file.write_text(
        '[model]\nbase = "./base"\n[data]\ntrain = "notes.csv"\ntext = "{text}"\npartition = "by:owner"\n'
        '[train]\nlocal_epochs = 1\nbatch_size = 4\n[[edge]]\nname = "a"\n[[edge]]\nname = "b"\n'
    )
    return file


def test_steps_follow_from_each_edges_rows(run_toml: Path) -> None:
    assert [edge.num_steps for edge in plan(run_toml).edges] == [5, 5]
    assert [edge.num_steps for edge in plan(run_toml, overrides=["train.batch_size=2"]).edges] == [10, 10]


def test_a_start_adapter_brings_its_ranks(run_toml: Path) -> None:
    shapes = read_shapes(str(run_toml.parent / "base"))
    ranks = {shapes.modules[0].name: 3, shapes.modules[5].name: 1}
    state = fresh_adapters("lora", {m.name: (m.d_in, m.d_out) for m in shapes.modules}, ranks, 16.0, 0)
    save_adapter(state, run_toml.parent / "start", base_name="base")
    assert plan(run_toml, overrides=['adapter.start="start"']).edges[0].ranks == ranks


def test_a_start_that_is_no_adapter_is_refused(run_toml: Path) -> None:
    with pytest.raises(AdapterFolderError):
        plan(run_toml, overrides=['adapter.start="base"'])


def test_more_edges_asked_for_than_can_take_part_is_infeasible_as_in_training(run_toml: Path) -> None:
    left_out = ['plan.infeasible="leave-out"', 'edge.b.memory="1 MB"']
    assert [edge.name for edge in plan(run_toml, overrides=left_out).edges] == ["a"]
    for command in (plan, prepare):
        with pytest.raises(InfeasibleError, match="a round needs more edges than can take part") as caught:
            command(run_toml, overrides=[*left_out, "federated.min_edges=2"])
        assert caught.value.got == "2, and 1 that can; left out: b"


def test_planning_never_loads_torch(run_toml: Path) -> None:
    script = (
        "import sys\nfrom atoll.commands.plan import plan\n"
        f"fleet = plan({str(run_toml)!r})\n"
        "print(len(fleet.edges), sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2 []", done.stderr
