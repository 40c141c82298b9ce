"""The tasks of the comparison of module choices: rows drawn once from ../shared/data, and a run.toml for each of them.

Dev rows choose learning rates, test rows are reported; rows are drawn in the order of a hash, so that a sample needs no seed.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sides import kr_ideas
from sides.needs import shared
from sides.task import model_folder

MODEL = "house-4M"
MOST_TRAIN_ROWS = 16000
PARTS = ("train", "dev", "test")
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """Where rows come from, how they become tokens, and what is scored beside the loss."""

    name: str
    title: str
    rows: Callable[[], Mapping[str, Sequence[Row]]]
    """Rows by part: "train", "dev", "test"."""
    prompt: str
    completion: str
    max_length: int
    metric: str | None
    evaluate: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is trained, and for how long."""

    model: str = MODEL
    batch_size: int = 2
    steps: int = 240
    epochs: int = 2
    """The rows are as many as make so many passes."""
    rank: int = 8
    alpha: float = 16
    scored_rows: int = 10**6
    """At most so many dev rows and test rows."""
    curve_steps: int | None = None
    """After every so many steps the first dev rows are scored, and the run can go on from there; None: only at its end."""

    @property
    def train_rows(self) -> int:
        """Rows that are used."""
        return self.steps // self.epochs * self.batch_size

    @property
    def round_steps(self) -> int:
        """A run is so many equal rounds; of one device alone they are plain training, and what can be scored and gone on from."""
        return self.curve_steps or self.steps


MODELS = {
    MODEL: Sizes(),
    "SmolLM2-135M": Sizes("SmolLM2-135M", batch_size=8, steps=600, epochs=1, scored_rows=400, curve_steps=50),
}
CURVE_ROWS = 64


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _drawn(rows: Iterable[Row], key: str, count: int) -> list[Row]:
    """The first rows in the order of a hash of one column, rows of equal hash in their own order."""
    return sorted(rows, key=lambda row: _hash(row[key]))[:count]


def _e2e() -> Mapping[str, Sequence[Row]]:
    """Train and dev rows one by one; of the test set whole questions, each with all its references, for BLEU."""

    def read(name: str) -> list[Row]:
        with open(shared("data", "e2e", f"{name}.csv"), encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    test = read("testset_w_refs")
    asked = set(sorted({row["mr"] for row in test}, key=_hash)[:60])
    return {
        "train": _drawn(read("trainset"), "ref", MOST_TRAIN_ROWS), "dev": _drawn(read("devset"), "ref", 300),
        "test": _drawn((row for row in test if row["mr"] in asked), "mr", len(test)),
    }  # fmt: skip


def _newsgroups() -> Mapping[str, Sequence[Row]]:
    """Subject and the beginning of the body, as headers name the group; a fifth by hash of the id is test, another one dev."""
    parts: dict[str, dict[str, Row]] = {"train": {}, "dev": {}, "test": {}}
    with gzip.open(shared("data", "20news", "20news.jsonl.gz"), "rt", encoding="utf-8") as file:
        for line in file:
            post = json.loads(line)
            header, _, body = post["text"].partition("\n\n")
            subjects = [line[8:].strip() for line in header.split("\n") if line.startswith("Subject:")]
            text = " ".join(f"{subjects[0] if subjects else ''}: {body}".split())[:220]
            part = {0: "test", 1: "dev"}.get(_hash(post["id"]) % 5, "train")
            parts[part][text] = {"text": text, "label": post["label"], "topic": post["label"].split(".")[0]}
    for part in ("dev", "test"):
        parts[part] = {text: row for text, row in parts[part].items() if text not in parts["train"]}
    counts = {"train": MOST_TRAIN_ROWS, "dev": 400, "test": 200}
    return {part: _drawn(parts[part].values(), "text", count) for part, count in counts.items()}


def _openbookqa() -> Mapping[str, Sequence[Row]]:
    """The train file less 400 rows, which are dev; the test file whole."""

    def read(name: str) -> list[Row]:
        return json.loads(shared("data", "commonsense", "openbookqa", f"{name}.json").read_text(encoding="utf-8"))

    train = _drawn(read("train"), "instruction", 10**9)
    return {"dev": train[:400], "train": train[400:][:MOST_TRAIN_ROWS], "test": read("test")}


def _questions(name: str) -> Callable[[], Mapping[str, Sequence[Row]]]:
    """Question and answers as texts, without the choices in the prompt; 400 rows of the train file are dev."""

    def row(one: Row) -> Row:
        asked, _, rest = one["instruction"].partition("\n\n")
        choices = [" " + part.strip() for part in re.split(r"Answer\d:", rest.partition("\n\n")[0])[1:]]
        number = int(one["answer"].removeprefix("answer")) - 1
        return {"question": asked.partition("question: ")[2].strip(), "choices": choices, "right": choices[number]}

    def read(part: str) -> Iterator[Row]:
        rows = json.loads(shared("data", "commonsense", name, f"{part}.json").read_text(encoding="utf-8"))
        return map(row, _drawn(rows, "instruction", len(rows)))

    def parts() -> Mapping[str, Sequence[Row]]:
        train = list(read("train"))
        return {"dev": train[:400], "train": train[400:], "test": list(read("test"))}

    return parts


def _alpaca() -> Mapping[str, Sequence[Row]]:
    """Instructions with an input in one column; 400 rows are dev, 400 test."""
    whole = json.loads(shared("data", "alpaca", "alpaca_5000.json").read_text(encoding="utf-8"))
    rows = [{"ask": " ".join(f"{row['instruction']} {row['input']}".split())[:220], "output": row["output"]} for row in whole]
    drawn = _drawn((row for row in rows if row["output"].strip()), "ask", 10**9)
    return {"dev": drawn[:400], "test": drawn[400:800], "train": drawn[800:][:MOST_TRAIN_ROWS]}


ANSWERS = [f" the correct answer is answer{number}" for number in (1, 2, 3, 4)]
TASKS = {
    task.name: task
    for task in (
        Task("e2e", "E2E", _e2e, "{mr} ->", " {ref}", 128, "bleu", {"generate_rows": 60, "max_new_tokens": 48}),
        Task("20news", "20 Newsgroups", _newsgroups, "{text}\\nGroup:", " {label}", 256, "label_accuracy", {}),
        Task("openbookqa", "OpenBookQA", _openbookqa, "{instruction}\\n", " {output}", 256, "label_accuracy", {}),
        Task("openbookqa-text", "OpenBookQA, answers as texts", _questions("openbookqa"), "Question: {question}\\nAnswer:", "{right}", 256,
             "choice_accuracy", {"choices": "choices", "answer": "right"}),
        Task("arc-easy", "ARC-Easy, answers as texts", _questions("ARC-Easy"), "Question: {question}\\nAnswer:", "{right}", 256,
             "choice_accuracy", {"choices": "choices", "answer": "right"}),
        Task("alpaca", "Alpaca", _alpaca, "{ask}\\n", "{output}", 128, None, {}),
    )
}


def prepare(work: Path, names: Sequence[str], sizes: Sizes, anew: bool) -> None:
    """Write TASK.toml for every task, and data/TASK-PART.jsonl where it is missing or to be made anew."""
    (work / "data").mkdir(parents=True, exist_ok=True)
    base = (work / sizes.model).absolute()
    if not base.exists():
        base.symlink_to(model_folder(sizes.model, work / "random"))
    shutil.copy(kr_ideas.__file__, work)
    for task in (TASKS[name] for name in names):
        (work / f"{task.name}.toml").write_text(_toml(task, sizes, base), encoding="utf-8")
        files = {part: work / "data" / f"{task.name}-{part}.jsonl" for part in PARTS}
        if anew or not all(file.exists() for file in files.values()):
            for part, rows in task.rows().items():
                some = rows if part == "train" else rows[: sizes.scored_rows]
                files[part].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some), encoding="utf-8")


def _toml(task: Task, sizes: Sizes, base: Path) -> str:
    held_out = scored = ""
    if sizes.curve_steps:
        held_out, scored = f'eval = "data/{task.name}-dev.jsonl"\neval_rows = {CURVE_ROWS}\n', "\n[evaluate]\nevery = 1\n"
    return f"""# One device trains on {task.title} against a host on loopback; embedding, last norm and head stay on the device.
[run]
name = "{task.name}"
rounds = {sizes.steps // sizes.round_steps}

[model]
base = "{base}"
cut = {{ front = 0, back = 0 }}

[data]
train = "data/{task.name}-train.jsonl"
{held_out}prompt = "{task.prompt}"
completion = "{task.completion}"
max_length = {task.max_length}
train_rows = {sizes.train_rows}

[adapter]
targets = ["q_proj", "k_proj", "v_proj"]
rank = {sizes.rank}
alpha = {sizes.alpha}

[train]
batch_size = {sizes.batch_size}
local_steps = {sizes.round_steps}
{scored}
[wire]
mode = "dense"
codec = "fp32"

[[edge]]
name = "device"
mode = "split"
"""
