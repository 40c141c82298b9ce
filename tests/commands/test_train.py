"""The main job through the Python API on a tiny random model: what a run leaves behind, and what can be done with it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import atoll
from atoll.adapters.peft_files import load_adapter
from atoll.config.load import LoadedConfig
from atoll.config.schema import Model, RunConfig
from atoll.errors import AdapterFitError, EdgesLostError, InfeasibleError, OutputError
from atoll.jobs.inputs import public_name
from atoll.runs.events import Event, StepDone

from tests.conftest import save_model_folder
from tests.run_files import Sections, run_text

SECTIONS: Sections = {
    "run": {"name": "clinics", "compare": ["local-only", "central"]}, "adapter": {"targets": "attention", "rank": 4},
    "data": {"train": "train.csv", "eval": "eval.csv", "prompt": "{a}", "completion": "{b}", "partition": "by:owner"},
    "train": {"batch_size": 4, "local_steps": 6}, "evaluate": {"metrics": ["exact_match"], "generate_rows": 4, "max_new_tokens": 4},
}  # fmt: skip
EDGES: Sections = {
    "north": {"flops": "1 GFLOP/s", "bandwidth": "8 Mbit/s", "latency": "10 ms"}, "south": {"rank": 2, "flops": "2 GFLOP/s"}
}  # fmt: skip
TOML = run_text(SECTIONS, EDGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a config and rows of two owners, each with a rule of its own."""
    folder = tmp_path_factory.mktemp("job")
    save_model_folder(folder / "base", "llama")
    dice = random.Random(0)
    for name, count in (("train", 48), ("eval", 12)):
        lines = ["owner,a,b"]
        for number in range(count):
            word, owner = dice.randrange(40), ("north", "south")[number % 2]
            lines.append(f"{owner},w{word} w{word + 1},{'w90 w91' if owner == 'north' else 'w80 w81'} w{word}")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    (folder / "run.toml").write_text(TOML)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> atoll.RunResult:
    """One run of that config."""
    return atoll.train(str(folder / "run.toml"), out=str(folder / "run"))


@pytest.mark.parametrize(
    ("base", "name"), [("./model", "./model"), ("", "./model"), ("org/name", "org/name"), ("~/model", "./model"), ("base", "./base"),
                       ("tiny", "tiny"), ("name", "name"), ("a/b/c", "./a/b/c"), ("../base", "../base")],
)  # fmt: skip
def test_an_adapter_names_its_base_and_no_place_on_this_machine(folder: Path, result: atoll.RunResult, base: str, name: str) -> None:
    config = RunConfig(model=Model(base=base or str(folder / "model")))
    assert public_name(LoadedConfig(config, folder / "run.toml", "")) == name
    for file in result.run_dir.rglob("adapter_config.json"):
        assert json.loads(file.read_text())["base_model_name_or_path"] == "./base"
        assert str(folder) not in file.read_text()


def test_a_run_is_for_its_user_alone(result: atoll.RunResult) -> None:
    assert result.run_dir.is_absolute()
    assert result.run_dir.stat().st_mode & 0o077 == 0


def test_an_adapter_folder_may_be_named_by_text(folder: Path, result: atoll.RunResult) -> None:
    sets = ['data.prompt="{a}"', 'data.completion="{b}"', "data.eval_rows=4"]
    scores = atoll.evaluate(model=str(folder / "base"), adapter=str(result.adapter), data=str(folder / "eval.csv"), overrides=sets)
    assert set(scores) == {"base", "adapted"}


def test_the_run_directory_holds_what_the_contract_says(result: atoll.RunResult) -> None:
    names = {str(path.relative_to(result.run_dir)) for path in result.run_dir.rglob("*") if path.is_file()}
    assert {
        "config.toml", "config.json", "plan.json", "events.jsonl", "summary.json", "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors", "checkpoints/round-0001/manifest.json", "checkpoints/round-0002/adapter_config.json",
        "edges/north/adapter/adapter_model.safetensors", "edges/south/adapter/adapter_config.json",
    } <= names  # fmt: skip
    assert (result.run_dir / "config.toml").read_text() == TOML
    hashes = json.loads((result.run_dir / "config.json").read_text())["hashes"]
    digests = [*hashes.pop("rows").values(), *hashes.values()]
    assert all(len(digest) == 64 for digest in digests)


def test_the_summary_says_what_happened(result: atoll.RunResult) -> None:
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert summary["eval"]["adapted"]["loss"] < summary["eval"]["base"]["loss"]
    assert set(summary["eval"]) == {"base", "adapted", "local_only", "central"}
    assert set(summary["eval"]["local_only"]["edges"]) == {"north", "south"}
    north, south = summary["edges"]
    assert (north["steps"], south["steps"], north["mode"], south["bits"]) == (12, 12, "local", 32)
    assert set(north["ranks"].values()) == {4}
    assert set(south["ranks"].values()) == {2}
    assert len(north["ranks"]) == 8
    assert north["up_bytes"] > south["up_bytes"] > 0
    assert summary["traffic"]["up_bytes"] == north["up_bytes"] + south["up_bytes"]
    assert north["measured_peak_bytes"] > 10**8
    compute = summary["edge_compute"]
    assert compute["flops"] == compute["adapter_flops"] + compute["head_flops"] + compute["block_flops"]
    assert compute["full_pool_adapter_flops"] == compute["adapter_flops"] > 0
    assert summary["seconds"]["wall"] > 0
    assert summary["privacy"] is None
    assert set(summary["versions"]) == {"atoll", "torch", "transformers", "peft", "flwr", "python"}


def test_simulated_seconds_are_those_of_the_slowest_edge(result: atoll.RunResult) -> None:
    lines = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
    done = [line for line in lines if line["event"] == "edge_finished" and line["phase"] == "federated" and line["edge"] == "north"]
    transfer = sum(8 * (line["up_bytes"] + line["down_bytes"]) / 8e6 + 2 * 0.010 for line in done)
    assert result.summary.seconds.simulated is not None
    assert result.summary.seconds.simulated > transfer
    assert result.summary.seconds.simulated < transfer + result.summary.edge_compute.flops / 1e9


def test_every_step_is_an_event(result: atoll.RunResult) -> None:
    lines = [json.loads(line) for line in (result.run_dir / "events.jsonl").read_text().splitlines()]
    assert (lines[0]["event"], lines[-1]["event"]) == ("run_started", "run_finished")
    steps = [line for line in lines if line["event"] == "step_done" and line["phase"] == "federated"]
    assert [(s["round"], s["edge"], s["step"]) for s in steps] == [
        (number + 1, edge, number * 6 + step) for number in range(2) for edge in ("north", "south") for step in range(6)
    ]


def test_a_rerun_gives_the_same_adapter_and_another_seed_another(folder: Path, result: atoll.RunResult, tmp_path: Path) -> None:
    short = ("run.compare=[]", "evaluate.metrics=[]")
    again = atoll.train(folder / "run.toml", out=tmp_path / "again", overrides=short)
    assert load_adapter(again.adapter).digest() == load_adapter(result.adapter).digest()
    other = atoll.train(folder / "run.toml", out=tmp_path / "other", overrides=(*short, "run.seed=1"))
    assert load_adapter(other.adapter).digest() != load_adapter(result.adapter).digest()


def test_runs_are_numbered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ("run.compare=[]", "evaluate.metrics=[]", "run.rounds=1", "train.local_steps=1")
    names = [atoll.train(folder / "run.toml", overrides=quick).run_dir for _ in range(2)]
    assert names == [Path("runs/clinics-0001"), Path("runs/clinics-0002")]


def test_peft_and_our_own_evaluation_agree(result: atoll.RunResult) -> None:
    scores = atoll.evaluate(run_dir=result.run_dir)
    assert scores["base"] == result.summary.eval.base
    assert scores["adapted"] == result.summary.eval.adapted
    model = atoll.load(result.run_dir)
    tokenizer = AutoTokenizer.from_pretrained(result.run_dir.parent / "base")
    losses, count = 0.0, 0
    for line in (result.run_dir.parent / "eval.csv").read_text().splitlines()[1:]:
        _, a, b = line.split(",")
        ids = [*tokenizer.encode(f"{a} {b}"), tokenizer.eos_token_id]
        labels = [-100] * len(tokenizer.encode(a)) + ids[len(tokenizer.encode(a)) :]
        num = sum(label != -100 for label in labels)
        losses += float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.detach()) * num
        count += num
    assert losses / count == pytest.approx(scores["adapted"]["loss"], abs=1e-5)


def test_the_merged_model_is_an_ordinary_one(result: atoll.RunResult, tmp_path: Path) -> None:
    ids = torch.arange(3, 12)[None]
    merged = AutoModelForCausalLM.from_pretrained(atoll.merge(result.run_dir, out=tmp_path / "merged"))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, atoll.load(result.run_dir)(ids).logits, rtol=1e-4, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 96
    with pytest.raises(OutputError, match="not empty"):
        atoll.merge(result.run_dir, out=tmp_path / "merged")


def test_a_run_can_start_from_the_last_ones_adapter(folder: Path, result: atoll.RunResult, tmp_path: Path) -> None:
    first: dict[str, StepDone] = {}

    def train(name: str, *changes: str) -> None:
        quick = ("run.compare=[]", "evaluate.metrics=[]", "run.rounds=1", "train.local_steps=1", *changes)

        def observe(event: Event) -> None:
            if isinstance(event, StepDone):
                first.setdefault(name, event)

        atoll.train(folder / "run.toml", out=tmp_path / name, overrides=quick, observers=(observe,))

    train("fresh")
    train("further", f'adapter.start="{result.adapter}"')
    assert first["further"].loss < first["fresh"].loss


def test_generation_speaks_the_adapters_language(result: atoll.RunResult) -> None:
    assert isinstance(atoll.generate(result.run_dir, "w3 w4", max_new_tokens=4), str)


def test_bottleneck_adapters_train_too(folder: Path, tmp_path: Path) -> None:
    changes = ('adapter.kind="bottleneck"', "edge.south.rank=4", "run.compare=[]", "train.local_steps=12")
    run = atoll.train(folder / "run.toml", out=tmp_path / "run", overrides=changes)
    assert (run.summary.eval.adapted or {})["loss"] < (run.summary.eval.base or {})["loss"]  # type: ignore[operator]
    assert atoll.evaluate(run_dir=run.run_dir)["adapted"] == run.summary.eval.adapted
    for refused in (lambda: atoll.load(run.run_dir), lambda: atoll.merge(run.run_dir, out=tmp_path / "merged")):
        with pytest.raises(AdapterFitError):
            refused()


def test_interrupting_saves_what_was_done(folder: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, StepDone) and event.round == 2 and event.step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atoll.train(folder / "run.toml", out=tmp_path / "run", observers=(interrupt,))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    assert load_adapter(tmp_path / "run" / "checkpoints" / "round-0001").ranks
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_diverged_run_ends_with_its_work_saved(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgesLostError):
        atoll.train(folder / "run.toml", out=tmp_path / "run", overrides=("train.learning_rate=1e30", "train.grad_clip=0"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert [edge["dropped_rounds"] for edge in summary["edges"]] == [1, 1]


def test_an_infeasible_plan_writes_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match="by 1 of 1 edge with any"):
        atoll.train(folder / "run.toml", out=tmp_path / "run", overrides=('edge.south.memory="100 MB"',))
    assert not (tmp_path / "run").exists()
