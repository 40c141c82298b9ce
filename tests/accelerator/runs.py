"""Whole runs on an accelerator, each beside the same run on the CPU: python -m tests.accelerator.runs [--real] FOLDER [CASE...]

The accelerator is a pretended one, or with --real whatever torch finds. A process of its own, as torch keeps a backend that it once knows.
Prints a JSON line for each case.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

import atoll
from atoll.commands.edge import edge
from atoll.commands.host import HostSettings, host
from atoll.jobs.split import HostAccess
from atoll.tasks.batches import Batch

from tests.accelerator.pretended import LEDGER, as_cuda, install
from tests.run_files import Sections, merged, run_text

RUN: Sections = {
    "run": {"rounds": 1}, "model": {"base": "tiny"}, "data": {"train": "rows.jsonl", "eval": "rows.jsonl", "max_length": 40},
    "adapter": {"rank": 4}, "train": {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-2},
    "evaluate": {"max_new_tokens": 3, "generate_rows": 2},
}  # fmt: skip
TEXT: Sections = {"data": {"prompt": "{prompt}", "completion": "{completion}"}, "evaluate": {"metrics": ["exact_match"]}}
CHOICES: Sections = merged(TEXT, {"evaluate": {"metrics": ["choice_accuracy"], "choices": "choices", "answer": "answer"}})
CLASSES: Sections = {"model": {"task": "classify"}, "data": {"text": "{prompt}", "label": "label"}}
ALONE: Sections = {"device": {}}
TWO: Sections = {"north": {"memory": "900 MB", "flops": "1 GFLOP/s"}, "south": {"memory": "800 MB", "flops": "1 GFLOP/s"}}
KILL = ("select.observe_steps=1", "select.keep=0.5", "train.local_steps=4")
SPLIT = "run.placement=split"
CASES: Mapping[str, tuple[Sections, Sections, tuple[str, ...]]] = {
    "local": (TEXT, ALONE, ()),
    "bf16": (TEXT, ALONE, ("model.precision=bf16",)),
    "16 bits": (TEXT, ALONE, ("model.quantize=16",)),
    "packed": (TEXT, ALONE, ("data.batching=pack",)),
    "packed, bf16": (TEXT, ALONE, ("data.batching=pack", "model.precision=bf16")),
    "checkpointing, dropout": (TEXT, ALONE, ("train.gradient_checkpointing=true", "adapter.dropout=0.1")),
    "bottleneck": (TEXT, ALONE, ("adapter.kind=bottleneck",)),
    "whole weights": (TEXT, ALONE, ("adapter.kind=full",)),
    "embedding and head": (TEXT, ALONE, ('adapter.targets=["embed_tokens","lm_head","q_proj"]',)),
    "killed, left out": (TEXT, ALONE, ("select.policy=kill-and-revive", "select.every=2", "select.killed=skip", *KILL)),
    "killed, merged": (TEXT, ALONE, ("select.policy=early-kill", "select.killed=merge", *KILL)),
    "choices, bf16": (CHOICES, ALONE, ("model.precision=bf16",)),
    "stacked beneath": (TEXT, TWO, ("run.rounds=2", "federated.aggregation=stack")),
    "planned, warm-up": (TEXT, TWO, ("plan.policy=fedpipe", "plan.warmup_steps=2")),
    "classes": (CLASSES, ALONE, ()),
    "split": (TEXT, ALONE, (SPLIT,)),
    "split, factored, bf16": (TEXT, ALONE, (SPLIT, "wire.mode=factored", "wire.codec=bf16", "model.precision=bf16")),
    "split, int8, block behind": (TEXT, ALONE, (SPLIT, "wire.codec=int8", "model.cut.front=0", "model.cut.back=1")),
    "split, lent": (TEXT, ALONE, (SPLIT, "wire.mode=lent")),
    "split, lent in fp16, bf16": (TEXT, ALONE, (SPLIT, "wire.mode=lent", "wire.adapters=fp16", "model.precision=bf16")),
    "split, lent, killed": (TEXT, ALONE, (SPLIT, "wire.mode=lent", "select.policy=early-kill", *KILL)),
    "split, packed": (TEXT, ALONE, (SPLIT, "data.batching=pack")),
    "split, killed in the host": (TEXT, ALONE, (SPLIT, "select.policy=early-kill", *KILL)),
}
TWO_ACCELERATORS = "a host over two accelerators"
WAITS = "what a step waits for"
PLANTED = "a batch that stays on the CPU"
Waits = Counter[str]
REAL = "--real"


def accelerated(count: int = 1) -> AbstractContextManager[None]:
    """Where the accelerator is found."""
    return nullcontext() if REAL in sys.argv else as_cuda(count)


@contextmanager
def without_cuda() -> Iterator[None]:
    """Where none is."""
    found = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = found


def one(folder: Path, name: str) -> dict[str, Any]:
    """The losses on the CPU and on the accelerator."""
    if name == WAITS:
        return {"waits": _waits_of_a_step(folder)}
    if name == PLANTED:
        Batch.to = lambda self, device: self  # type: ignore[method-assign]
        name = "local"
    if name == TWO_ACCELERATORS:
        write(folder, TEXT, ALONE)
        there, here = (_against_a_host(folder, others) for others in ({"model.layers.1": 1, "model.norm": 1}, None))
    else:
        sections, edges, overrides = CASES[name]
        path = write(folder, sections, edges)
        with without_cuda():
            here = atoll.train(path, out=folder / "cpu", overrides=overrides)
        with accelerated():
            there = atoll.train(path, out=folder / "accelerator", overrides=overrides)
    return {"losses": [run.summary.eval.adapted["loss"] for run in (here, there)]}


def write(folder: Path, sections: Sections, edges: Sections) -> Path:
    """run.toml, and rows for all forms of it."""
    rows = [
        {"prompt": f"name[Bo{n}], ward[eye] ->", "completion": f" Bo{n} is in" + " now" * (n % 3), "label": "ab"[n % 2],
         "choices": [" x y", " Bo"], "answer": str(n % 2)}
        for n in range(16)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(run_text(sections, edges, RUN))
    return folder / "run.toml"


def _waits_of_a_step(folder: Path) -> Waits:
    """What two more steps of a round add: by why, and the file of Atoll's."""
    path, seen = write(folder, {**TEXT, "evaluate": {}}, ALONE), []
    for steps in (2, 4):
        before = Counter(LEDGER.waits)
        with accelerated():
            atoll.train(path, out=folder / str(steps), overrides=(f"train.local_steps={steps}",))
        seen.append(LEDGER.waits - before)
    more: Waits = Counter()
    for place, count in (seen[1] - seen[0]).items():
        more[place.rpartition(":")[0]] += count
    return more


def _against_a_host(folder: Path, others: Mapping[str, int] | None) -> Any:
    """An edge whose host spreads the base over two accelerators; without `others`, both on the CPU."""
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *(f"model.layers.{n}" for n in range(_num_blocks()))]
    (folder / "map.json").write_text(json.dumps(dict.fromkeys(parts, 0) | dict(others or {})))
    lines, ready, stop = list[str](), threading.Event(), threading.Event()

    def told(line: str) -> None:
        lines.append(line)
        ready.set()

    where = None if others is None else str(folder / "map.json")
    thread = threading.Thread(target=host, args=(HostSettings("tiny", "127.0.0.1:0", device_map=where), told, stop), daemon=True)
    with accelerated(2) if others else without_cuda():
        thread.start()
        try:
            assert ready.wait(120), "the host did not start"
            access = HostAccess("127.0.0.1:" + lines[0].split("127.0.0.1:")[1].split()[0])
            return edge(folder / "run.toml", access, out=folder / f"edge-{'two' if others else 'cpu'}")
        finally:
            stop.set()
            thread.join(60)


def _num_blocks() -> int:
    from atoll.base.read_shapes import read_shapes

    return read_shapes("tiny").num_blocks


def main(folder: Path, names: Sequence[str], said: Callable[[str], None]) -> None:
    """All cases; one that fails does not stop the others."""
    torch.set_num_threads(1)
    known = None
    if REAL not in sys.argv:
        torch.backends.cuda.enable_flash_sdp(False)  # On both sides the attention that is written out, so that what differs is the device.
        known = install()
    for number, name in enumerate(names):
        (folder / str(number)).mkdir()
        try:
            found = one(folder / str(number), name)
        except Exception as problem:
            found = {"problem": f"{type(problem).__name__}: {problem}"}
        said(json.dumps({"case": name, **found}))
    del known


if __name__ == "__main__":
    given_folder, *given_names = [word for word in sys.argv[1:] if word != REAL]
    main(Path(given_folder), given_names or list(CASES), lambda line: print(line, flush=True))
