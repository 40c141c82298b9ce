"""Planned and measured peak memory of an edge whose base is kept in 32, 16, 8 or 4 bits; and that a hard limit at the plan holds.

Every row is a random Llama of 103 M parameters in its blocks, loaded from a folder and trained for two rounds of some steps, with messages
and moments as on an edge, each time in a process of its own: once free, for its peak; once under a hard limit of 1.1 times the plan, which
it must survive; and once under 0.8 times the plan, which must kill it. The last case is what the planner makes of an edge with four fifths
of the memory that the first one takes. The limit is a memory control group of its own (version 1). Pages of library files are charged to
the group that read them first, so that those which the free process had mapped are taken off both limits.

Usage: python benchmarks/planned_memory.py [--steps 2] [--bits 32 16 8 4] [--cases 0 1 2 3] [--more] [--free]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

from atoll.base.read_shapes import read_shapes
from atoll.config.schema import RunConfig
from atoll.planner.feasibility import Setting
from atoll.planner.plan_fleet import plan_fleet
from atoll.shapes import BaseShapes
from sides import results

SIZES: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
    "vocab_size": 2048, "max_position_embeddings": 1024, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
UNIFORM = [(4, 128, 8, False), (4, 256, 32, True), (2, 256, 4, False)]
"""Rows, tokens a row, rank of all weights, gradient checkpointing."""
TIGHT = 0.8
"""Of what the first takes, the memory of the edge that the planner plans for."""
SURVIVES, DIES = 1.1, 0.8
GROUPS = Path("/sys/fs/cgroup/memory")
PRECISION_BYTES = 4
ROUNDS = 2
"""In the second an edge has moments from the first."""


@dataclass(frozen=True, slots=True)
class Case:
    """What one process trains."""

    rows: int
    tokens: int
    ranks: Mapping[str, int]
    checkpointing: bool
    budget_bytes: int | None = None
    """The edge's memory, where a planner chose the rest."""

    def setting(self, shapes: BaseShapes, bits: int) -> Setting:
        """What the plan is asked about."""
        return Setting(shapes, self.ranks, bits, self.rows, self.tokens, self.checkpointing, activation_bytes=PRECISION_BYTES)


def case_of(number: int, shapes: BaseShapes, bits: int) -> Case:
    """One of UNIFORM, or after these the planner's."""
    if number < len(UNIFORM):
        rows, tokens, rank, checkpointing = UNIFORM[number]
        return Case(rows, tokens, {module.name: rank for module in shapes.modules}, checkpointing)
    like = case_of(0, shapes, bits)
    budget = int(TIGHT * like.setting(shapes, bits).peak_bytes)
    config = RunConfig.model_validate({
        "data": {"max_length": like.tokens}, "adapter": {"targets": "all-linear"}, "train": {"batch_size": like.rows},
        "plan": {"policy": "fedpipe", "ranks": (2, 4, 8, 16, 32, 64, 128, 256)},
        "edge": ({"name": "edge", "mode": "local", "memory": budget, "bits": bits},),
    })  # fmt: skip
    (plan,) = plan_fleet(config, shapes, None).edges
    return Case(plan.batch_size, like.tokens, plan.ranks, plan.gradient_checkpointing, budget)


def child(folder: str, bits: int, case: Case, steps: int, group: str) -> None:
    """Enter the group, load, train two rounds as an edge does, and print the peak of this process."""
    if group:
        (Path(group) / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")
    import datasets  # noqa: F401  what a run has loaded besides
    import rich.progress  # noqa: F401
    import torch

    from atoll.adapters.fresh import fresh_adapters
    from atoll.base.load import load_base
    from atoll.config.schema import Train
    from atoll.cost.meters import resident_peak_bytes
    from atoll.cost.work import Work
    from atoll.federated.client import EdgeWork, client_app
    from atoll.federated.flower import Context, Message, MessageType, RecordDict, assume_identity
    from atoll.federated.payload import put_adapter
    from atoll.federated.receipts import Ask
    from atoll.federated.store import EdgeStates
    from atoll.tasks.batches import Batch
    from atoll.training.local_trainer import LocalTrainer
    from atoll.training.trainer import FitPlan

    base = load_base(folder, bits=None if bits == 32 else bits)  # type: ignore[arg-type]
    loading = resident_peak_bytes()
    sizes = {module.name: (module.d_in, module.d_out) for module in read_shapes(folder).modules}
    ids = torch.randint(3, 2000, (case.rows, case.tokens))
    positions = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
    batch = Batch(ids, positions, ids.flatten()[positions + 1], None, None, (case.tokens,) * case.rows)

    class SameBatch:
        def batch(self, step: int) -> Batch:
            return batch

    trainer = LocalTrainer(base, Train(), ROUNDS * steps, 0.0, 0, "edge")
    plan = FitPlan(steps, 1, case.checkpointing)
    work = EdgeWork("edge", trainer, SameBatch(), 1, plan, True, lambda report: Work(), lambda *_: None)
    app, states = client_app(lambda context: work), EdgeStates({1: "edge"})
    assume_identity(1, 0)

    def asked(number: int) -> Message:
        content = RecordDict()
        ranks = {name: sizes[name] for name in case.ranks}
        put_adapter(content, fresh_adapters("lora", ranks, case.ranks, 16.0, number))
        Ask("", number, "federated", "edge").put(content)
        return Message(content, 1, MessageType.TRAIN, group_id=str(number))

    def answer(number: int, context: Context) -> Context:
        app(asked(number), context)
        return context

    for number in range(1, ROUNDS + 1):
        states[1] = answer(number, states[1])
    states.close()
    print(json.dumps({"loading_peak_bytes": loading, "peak_bytes": resident_peak_bytes(), "file_bytes": mapped_file_bytes()}))


def mapped_file_bytes() -> int:
    """Resident pages of files, which for this process are libraries."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile:"))


@contextmanager
def limited(num_bytes: int) -> Iterator[Path]:
    """A control group that may hold so much."""
    group = GROUPS / f"planned_memory_{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(num_bytes), encoding="ascii")
        yield group
    finally:
        group.rmdir()


def run(folder: str, bits: int, case: Case, steps: int, group: Path | None = None) -> dict[str, int] | None:
    """The figures of one process; None where it was killed.

    Raises: RuntimeError where it ended in another way.
    """
    told = json.dumps([folder, bits, asdict(case), steps, str(group or "")])
    done = subprocess.run([sys.executable, __file__, "--child", told], capture_output=True, text=True, check=False)
    if done.returncode == -9 and group is not None:
        return None
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(folder: str, bits: int, case: Case, steps: int, *, free_only: bool) -> dict[str, Any]:
    """Plan and measurements of one setting."""
    asked = case.setting(read_shapes(folder), bits)
    free = run(folder, bits, case, steps)
    assert free is not None
    planned = asked.peak_bytes
    parts = {name: getattr(asked.memory, name) for name in asked.memory.__slots__}
    ranks = {str(rank): number for rank, number in sorted(Counter(case.ranks.values()).items())}
    found: dict[str, Any] = {"bits": bits} | asdict(case) | {"ranks": ranks}
    found |= {"planned_bytes": planned, "parts": parts, **free, "measured_to_planned": free["peak_bytes"] / planned}
    for factor, name in () if free_only else ((SURVIVES, "survives"), (DIES, "dies")):
        with limited(int(factor * planned) - free["file_bytes"]) as group:
            ended = run(folder, bits, case, steps, group)
        found[name] = (ended is not None) == (name == "survives")
    return found


def write_model(folder: str) -> None:
    """The random Llama, with a tokenizer of words "w0", "w1", ..."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n + 3 for n in range(2000)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>").save_pretrained(folder)


def kept_rows(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the results file, where it has the same settings."""
    file = results.RESULTS / "planned_memory.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return list(found["results"]["rows"]) if found.get("config") == settings else []


def shown(found: Mapping[str, Any]) -> str:
    """One line for a row."""
    limits = "".join(f"  {name} {found[name]}" for name in ("survives", "dies") if name in found)
    ranks = sorted(map(int, found["ranks"]))
    return (
        f"{found['bits']:2} bits {found['rows']} x {found['tokens']} rank {ranks[0]} to {ranks[-1]} on {sum(found['ranks'].values())}"
        f" {'checkpointed' if found['checkpointing'] else '':12}"
        f" planned {found['planned_bytes'] / 1e6:6.0f} MB  measured {found['peak_bytes'] / 1e6:6.0f} MB"
        f" (loading {found['loading_peak_bytes'] / 1e6:.0f})  ratio {found['measured_to_planned']:.3f}{limits}"
    )


def main() -> None:
    """Measure all rows and write; or be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--bits", type=int, nargs="+", default=[32, 16, 8, 4])
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(UNIFORM) + 1)))
    parser.add_argument("--free", action="store_true", help="without limits")
    parser.add_argument("--more", action="store_true", help="add rows to those of the results file, measured with the same settings")
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child is not None:
        folder, bits, case, steps, group = json.loads(given.child)
        child(folder, bits, Case(**case), steps, group)
        return
    settings = {
        "model": SIZES, "rounds": ROUNDS, "steps": given.steps, "limit": "cgroup v1 memory.limit_in_bytes", "survives": SURVIVES,
        "dies": DIES,
    }  # fmt: skip
    rows = kept_rows(settings) if given.more else []
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder)
        shapes = read_shapes(folder)
        for number in given.cases:
            for bits in (bits for bits in given.bits if number < len(UNIFORM) or bits < 32):
                rows.append(row(folder, bits, case_of(number, shapes, bits), given.steps, free_only=given.free))
                print(shown(rows[-1]), flush=True)
                results.write("planned_memory", settings, {"rows": rows})


if __name__ == "__main__":
    main()
