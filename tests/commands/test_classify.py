"""A classifier as a run: trained by several edges, scored, loaded by PEFT, merged; and what run.toml may not ask of it."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import atoll
from atoll.adapters.attach import attached
from atoll.adapters.peft_files import load_adapter, read_labels, save_adapter
from atoll.base.classifier import class_logits_BK, load_classifier
from atoll.commands.evaluate import evaluate
from atoll.commands.generate import generate
from atoll.commands.plan import plan
from atoll.config.load import load
from atoll.errors import AtollError, BadRowError, BadValueError, ColumnError, ConflictError, ManyErrors
from atoll.jobs.job import prepare
from atoll.jobs.split import HostAccess
from atoll.report.tables import comparison_table

from tests.base.test_classifier import batch
from tests.classifiers import LABELS, library_model, save_base, write_rows
from tests.run_files import Sections, write_run

SECTIONS: Sections = {
    "model": {"task": "classify"}, "data": {"text": "{text}", "label": "kind", "partition": "by:owner"}, "adapter": {"rank": 4},
    "train": {"local_steps": 12, "batch_size": 6},
}  # fmt: skip


def made(folder: Path, family: str) -> Path:
    """run.toml beside a base and rows."""
    save_base(folder / "base", family)
    write_rows(folder / "rows.jsonl")
    return write_run(folder, SECTIONS)


def last_event(run_dir: Path, kind: str) -> dict[str, object]:
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == kind][-1]


@pytest.mark.parametrize("family", ["bert", "bert without a pooler", "llama", "gpt2"])
def test_a_run_learns_and_ends_in_a_folder_that_peft_loads(family: str, tmp_path: Path) -> None:
    config = made(tmp_path, family)
    result = atoll.train(config, out=tmp_path / "out")
    rows = result.summary.eval
    assert rows.base is not None
    assert rows.adapted is not None
    assert set(rows.adapted) == {"loss", "accuracy", "macro_f1", "num_rows"}
    table = comparison_table(result.summary)
    assert table is not None
    assert table.header == ("", "loss (nats/row)", "accuracy", "macro f1")
    assert rows.base["loss"] == pytest.approx(math.log(3), rel=0.5), "nats per row"
    assert (rows.adapted["accuracy"] or 0) > 0.6 > (rows.base["accuracy"] or 0)
    assert json.loads((result.run_dir / "config.json").read_text())["id2label"] == {"0": "animal", "1": "plant", "2": "stone"}
    assert read_labels(result.adapter) == LABELS
    state, base = load_adapter(result.adapter), load_classifier(str(tmp_path / "base"), LABELS)
    with torch.no_grad(), attached(base.model, state):
        ours = class_logits_BK(base.model, batch())
    real = (torch.arange(9) < torch.tensor([4, 9])[:, None]).long()
    merged = AutoModelForSequenceClassification.from_pretrained(atoll.merge(result.run_dir, out=tmp_path / "merged")).eval()
    for model in (PeftModel.from_pretrained(library_model(tmp_path / "base"), result.adapter).eval(), merged, atoll.load(result.run_dir)):
        with torch.no_grad():
            theirs = model(input_ids=batch().input_ids_BT, attention_mask=real).logits
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert merged.config.id2label == dict(enumerate(LABELS))
    again = evaluate(run_dir=result.run_dir)
    for row, scores in (("base", rows.base), ("adapted", rows.adapted)):
        assert dict(again[row]) == pytest.approx(dict(scores), rel=1e-6)
    by_hand = evaluate(
        model=str(tmp_path / "base"), adapter=result.adapter, data=str(tmp_path / "rows.jsonl"),
        overrides=["model.task=classify", "data.text={text}", "data.label=kind", "data.max_length=16"],
    )  # fmt: skip
    assert by_hand["adapted"]["accuracy"] == rows.adapted["accuracy"]
    with pytest.raises(ConflictError, match="writes no text"):
        generate(result.run_dir, "w1")


def test_the_folder_comes_back_as_it_was_and_is_a_start(tmp_path: Path) -> None:
    config = made(tmp_path, "bert")
    start = prepare(config).start
    head = tuple(load_classifier(str(tmp_path / "base"), LABELS).head)
    save_adapter(start, tmp_path / "adapter", base_name="x", head=head, labels=LABELS)
    assert load_adapter(tmp_path / "adapter").digest() == start.digest()
    assert prepare(config, ["adapter.start=adapter"]).start.digest() == start.digest()
    kind = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (kind["task_type"], kind["modules_to_save"]) == ("SEQ_CLS", ["classifier"])


@pytest.mark.parametrize("overrides", [
    ["adapter.kind=full"], ["adapter.kind=bottleneck"], ["federated.aggregation=stack"], ["federated.aggregation=zero-pad"],
    ["select.policy=kill-and-revive", "select.observe_steps=2", "select.every=6", "select.keep=0.5"], ["model.precision=bf16"],
    ["edge.north.bits=8", "edge.south.bits=4"], ["edge.south.mode=cloud"], ["plan.policy=fedadapter", "plan.ranks=[2]"],
    ["plan.policy=fedpipe", "plan.warmup_steps=3", "edge.north.bits=8", "run.compare=[\"homogeneous\", \"local-only\", \"central\"]"],
])  # fmt: skip
def test_it_goes_with_what_else_a_run_may_ask(overrides: list[str], tmp_path: Path) -> None:
    result = atoll.train(made(tmp_path, "llama"), out=tmp_path / "out", overrides=[*overrides, "run.rounds=1"])
    rows = result.summary.eval
    assert rows.base is not None
    assert rows.adapted is not None
    assert (rows.adapted["loss"] or 9) < (rows.base["loss"] or 0)
    assert "score" in load_adapter(result.adapter).full_weights
    if "plan.policy=fedpipe" in overrides:
        assert rows.central is not None
        scores = json.loads((result.run_dir / "importance.json").read_text())["scores"]
        assert len(scores) == 14
        assert not any("score" in name for name in scores)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_what_is_counted_is_what_the_formula_says(family: str, tmp_path: Path) -> None:
    """Rows of one length, so that there is no padding; but for the one product by which fused attention makes its scores anew."""
    config = made(tmp_path, family)
    rows = [{"owner": ("north", "south")[n % 2], "text": f"w{n % 3} w5 w6 w7", "kind": LABELS[n % 3]} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = atoll.train(config, out=tmp_path / "out", overrides=["run.rounds=1", "adapter.kind=full", "train.local_steps=1"])
    tokens = int(str(last_event(result.run_dir, "step_done")["num_tokens"]))
    flops = result.summary.edges[0].first_step_flops
    assert flops is not None
    assert flops.counted_head == flops.formula_head == 0, "the head is trained, and counted with what is trained"
    assert flops.counted - 2 * 2 * 6 * (tokens // 6) ** 2 * 32 == flops.formula > 0


def test_the_plan_counts_the_head(tmp_path: Path) -> None:
    config = made(tmp_path, "bert")
    planned = plan(config)
    head, pairs = 3 * 32 + 3, sum(4 * (module_in + out) for module_in, out in [(32, 32)] * 8 + [(32, 48), (48, 32)] * 2)
    assert planned.num_trainable == pairs + head
    assert planned.edges[0].up_bytes == 4 * (pairs + head)
    assert plan(config, overrides=["plan.policy=fedpipe", "edge.north.memory=2 GB"]).num_trainable > head


@pytest.mark.parametrize(("overrides", "where"), [
    (["data.prompt={text}", "data.completion=x"], "data.prompt"), (["data.batching=pack"], "data.batching"),
    (["evaluate.metrics=[\"bleu\"]"], "evaluate.metrics"), (["run.placement=split"], "model.task"),
    (["edge.north.mode=split"], "model.task"),
    (["evaluate.labels=[\"animal\", \"animal\"]"], "evaluate.labels"), (["model.task=generate"], "data.label"),
])  # fmt: skip
def test_what_a_classifier_excludes_is_refused(overrides: list[str], where: str, tmp_path: Path) -> None:
    config = write_run(tmp_path, SECTIONS)
    with pytest.raises((ConflictError, ManyErrors)) as caught:
        load(config, overrides)
    assert where in caught.value.page()
    assert "classify" in caught.value.page()


def test_rows_without_a_known_class_are_refused(tmp_path: Path) -> None:
    config = made(tmp_path, "llama")
    wrong: list[tuple[list[str], type[AtollError], str]] = [
        (["data.label=kinds"], ColumnError, "kind"), (["data.train=one.jsonl"], BadValueError, "classes"),
        (["evaluate.labels=[\"animal\", \"plant\"]"], BadRowError, "2 classes"), (["data.text={words}"], ColumnError, "words"),
    ]  # fmt: skip
    one = [{"owner": owner, "text": "w1 w2", "kind": "animal"} for owner in ("north", "south")]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one))
    for overrides, error, words in wrong:
        with pytest.raises(error) as caught:
            prepare(config, overrides)
        assert words in caught.value.page()
    with pytest.raises(ConflictError, match="whole base"):
        prepare(config, host=HostAccess("127.0.0.1:9"))


def test_labels_keep_the_order_that_is_asked_for(tmp_path: Path) -> None:
    job = prepare(made(tmp_path, "llama"), ["evaluate.labels=[\"stone\", \"animal\", \"plant\", \"cloud\"]"])
    assert job.base.labels == ("stone", "animal", "plant", "cloud")
    assert job.edges[0].examples[0].label == 1
    assert job.start.full_weights["score"].size == (32, 4)


def test_a_pretrained_base_on_newsgroups_scores_as_peft_and_the_library_say(shared: Path, tmp_path: Path) -> None:
    base, data = shared / "models" / "house-4M", shared / "data" / "20news" / "20news.jsonl.gz"
    if not base.is_dir() or not data.is_file():
        pytest.skip("no such base or data in ../shared")
    with gzip.open(data, "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["label"] in ("rec.autos", "sci.space", "talk.politics.guns")]
    for name, part in (("train", rows[0::40]), ("eval", rows[5::120])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    sections: Sections = {
        "run": {"rounds": 1}, "model": {"base": str(base), "task": "classify"}, "adapter": {"rank": 4}, "train": {"local_steps": 8},
        "data": {"train": "train.jsonl", "eval": "eval.jsonl", "text": "{text:.200}", "label": "label", "max_length": 32},
    }  # fmt: skip
    run = atoll.train(write_run(tmp_path, sections, {}, over={}), out=tmp_path / "run")
    adapted, labels = run.summary.eval.adapted or {}, sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=3), str(run.adapter)).eval()
    losses, hits = [], 0
    for row in rows[5::120]:
        ids = tokenizer(row["text"][:200], truncation=True, max_length=32, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits, label = model(input_ids=ids).logits, labels.index(row["label"])
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([label]))))
        hits += int(logits.argmax()) == label
    assert adapted["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert adapted["accuracy"] == pytest.approx(hits / len(losses))
    assert adapted["num_rows"] == len(losses)
