"""atoll.plan from a file: rows are counted, start adapters read, no weights, and what training would refuse is refused with its page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.peft_files import save_adapter
from atoll.base.read_shapes import read_shapes
from atoll.commands.plan import plan
from atoll.errors import AdapterFolderError, AtollError, InfeasibleError, WeightsError
from atoll.jobs.job import prepare
from atoll.jobs.personal.held_out import check_own_rows

from tests.conftest import save_model_folder


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    save_model_folder(tmp_path / "base", "llama")
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


def test_sizes_and_numbers_are_planned_without_torch(run_toml: Path) -> None:
    script = (
        "import sys\nfrom atoll.commands.plan import plan_at_once\nfrom atoll.config.load import load\n"
        f"fleet = plan_at_once(load({str(run_toml)!r}))\n"
        "print(len(fleet.edges), sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2 []", done.stderr


ROWS = "owner,text\n" + "".join(f"{'ab'[i % 2]},w{i} w1\n" for i in range(8))
REFUSED: dict[str, tuple[dict[str, str], list[str]]] = {
    "held-out rows that are not there": ({}, ['data.eval="absent.csv"']),
    "held-out rows with other columns": ({"eval.csv": "owner,words\na,w1 w2\n"}, ['data.eval="eval.csv"']),
    "a held-out row without a value": ({"eval.jsonl": '{"text": "w1 w2"}\n{"text": null}\n'}, ['data.eval="eval.jsonl"']),
    "a metric that plain text cannot have": ({"eval.csv": ROWS}, ['data.eval="eval.csv"', 'evaluate.metrics=["bleu"]']),
    "an edge's own held-out rows": ({"b.csv": "owner,words\na,w1\n"}, ['edge.b.eval="b.csv"', "federated.personal_steps=1"]),
    "a row without a value": ({"notes.jsonl": '{"text": "w1 w2"}\n{"text": null}\n'}, ['data.train="notes.jsonl"', "data.partition=iid"]),
    "a row of one token": ({"notes.csv": ROWS + "a,\n"}, []),
    "a completion that is cut off": (
        {"notes.csv": ROWS}, ['data.prompt="w1 w1 w1 {text}"', 'data.completion=" {owner}"', "data.max_length=3"]
    ),
    "no row that can be used": ({"notes.csv": "owner,text\n" + "a,\nb,\n" * 3}, ["data.on_bad_row=skip"]),
    "no tokenizer": ({"base/tokenizer.json": "", "base/tokenizer_config.json": "{}"}, []),
    "more tokens than embeddings": ({"base/tokenizer.json": "MORE"}, []),
    "an adapter of another kind": ({}, ['adapter.start="dora"']),
    "an adapter of another base": ({}, ['adapter.start="other"']),
    "a window that is no shorter than an epoch": ({}, ["select.policy=kill-and-revive", "select.observe_steps=9", "train.local_steps=20"]),
    "a policy's tracker": ({}, ['track.to=["nowhere:Tracker"]']),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_training_refuses_is_refused_with_the_same_page(case: str, run_toml: Path) -> None:
    files, overrides = REFUSED[case]
    folder = run_toml.parent
    (folder / "notes.csv").write_text(ROWS)
    if "data.prompt" in str(overrides):
        run_toml.write_text(run_toml.read_text().replace('text = "{text}"\n', ""))
    _write_adapters(folder)
    for name, text in files.items():
        path = folder / name
        path.write_text(path.read_text().replace('"w92"', '"w92": 95000, "w93"') if text == "MORE" else text)
    pages = []
    for command in (plan, _until_the_first_step):
        with pytest.raises(AtollError) as caught:
            command(run_toml, overrides=overrides)
        pages.append((type(caught.value), caught.value.page(), caught.value.exit_status))
    assert pages[0] == pages[1]


@pytest.mark.parametrize("overrides", [
    [], ['adapter.start="start"'], ["adapter.kind=full"], ["adapter.kind=bottleneck"], ["run.placement=split"], ["plan.policy=fedpipe"],
    ["model.quantize=8"], ['run.compare=["central"]', 'data.eval="notes.csv"'], ["data.on_bad_row=skip"],
    ["model.task=classify", "data.label=owner"],
])  # fmt: skip
def test_what_training_takes_is_planned_as_it_is_trained(overrides: list[str], run_toml: Path) -> None:
    (run_toml.parent / "notes.csv").write_text(ROWS + ("a,\n" if "data.on_bad_row=skip" in overrides else ""))
    _write_adapters(run_toml.parent)
    job = prepare(run_toml, overrides)
    try:
        assert plan(run_toml, overrides=overrides).edges == job.plan.edges
    finally:
        job.close()


def test_weights_are_not_read(run_toml: Path) -> None:
    weights = run_toml.parent / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-64:] = b"\xff" * 64
    weights.write_bytes(content)
    assert len(plan(run_toml).edges) == 2
    with pytest.raises(WeightsError):
        prepare(run_toml)


def _until_the_first_step(run_toml: Path, overrides: list[str]) -> None:
    job = prepare(run_toml, overrides)
    try:
        check_own_rows(job)
    finally:
        job.close()


def _write_adapters(folder: Path) -> None:
    """One that fits, one of a kind that Atoll does not train, and one of other sizes."""
    modules = [module for module in read_shapes(str(folder / "base")).modules if module.name.endswith("q_proj")]
    for name, wider in (("start", 0), ("dora", 0), ("other", 8)):
        sizes = {module.name: (module.d_in + wider, module.d_out) for module in modules}
        save_adapter(fresh_adapters("lora", sizes, dict.fromkeys(sizes, 2), 16.0, 0), folder / name, base_name="base")
    config = folder / "dora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
