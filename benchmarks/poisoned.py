"""Federated training with poisoned edges: held-out loss by the mean, the mean of clipped updates, the median and the trimmed mean.

Five edges with rows of the demo, dealt at random, train the built-in base; none, one or two of them send something else than what they
trained. And what is refused at once, with the words of its refusal.

Usage: python benchmarks/poisoned.py
"""

from __future__ import annotations

import os

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch

import itertools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from atoll.adapters.attach import attached
from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.base.load import load_base
from atoll.base.read_shapes import read_shapes
from atoll.config.schema import Data, Evaluate, Train
from atoll.cost.work import Work
from atoll.embedded import tiny_path
from atoll.federated.aggregation.robust import Robust
from atoll.federated.client import EdgeWork, client_app
from atoll.federated.flower import ConfigRecord, Context, Message, RecordDict
from atoll.federated.grid import InProcessGrid
from atoll.federated.payload import get_adapter, put_adapter
from atoll.federated.strategy import AdapterStrategy, Observer
from atoll.tasks.batches import BatchStream
from atoll.tasks.evaluate import evaluate
from atoll.tasks.rows import load_rows
from atoll.tasks.text import text_form
from atoll.tasks.tokens import Examples, pad_id, tokenize
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan
from sides import results

EDGES, ROUNDS, LOCAL_STEPS, BATCH, RANK, ROWS, HELD_OUT, LEARNING_RATE = 5, 3, 5, 4, 4, 200, 32, 5e-3
RULES = {
    "mean": Robust(), "mean, clip_update = auto": Robust(clip="auto"), "median": Robust("median"), "trimmed-mean, trim = 0.2":
    Robust("trimmed-mean", 0.2),
}  # fmt: skip
Poison = Callable[[AdapterState, AdapterState], AdapterState]
"""Given what was sent to the edge and what it trained."""


def flipped(sent: AdapterState, trained: AdapterState) -> AdapterState:
    """Ten times as far, in the other direction: B0 - 10 (B - B0)."""
    def one(name: str) -> ModuleAdapter:
        before, after = sent.modules[name], trained.modules[name]
        return ModuleAdapter(after.down_RI, before.up_OR - 10 * (after.up_OR - before.up_OR), after.scaling)

    return AdapterState(trained.kind, {name: one(name) for name in trained.modules})


def noise(sent: AdapterState, trained: AdapterState) -> AdapterState:
    """Random factors, each module with 100 times the norm of its product."""
    generator = torch.Generator().manual_seed(0)

    def one(adapter: ModuleAdapter) -> ModuleAdapter:
        down, up = (torch.randn(tensor.shape, generator=generator) for tensor in adapter.tensors)
        drawn = ModuleAdapter(down, up, adapter.scaling)
        return ModuleAdapter(down, up * float(100 * adapter.delta_OI().norm() / drawn.delta_OI().norm()), adapter.scaling)

    return AdapterState(trained.kind, {name: one(adapter) for name, adapter in trained.modules.items()})


POISONS: dict[str, Poison] = {"sign flipped, x10": flipped, "noise, x100": noise}


class Poisoned(InProcessGrid):
    """Some nodes' replies are changed on the way."""

    change: Callable[[Message, Message], Iterable[Message]] = staticmethod(lambda message, reply: [reply])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies, one by one."""
        for message in messages:
            for reply in super().send_and_receive([message], timeout=timeout):
                yield from self.change(message, reply)


class Fleet:
    """The base and the rows, once for all runs."""

    def __init__(self) -> None:
        self.base, shapes = load_base("tiny"), read_shapes(str(tiny_path()))
        sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules}
        self.start = fresh_adapters("lora", sizes, dict.fromkeys(sizes, RANK), 2.0 * RANK, 0)
        rows = load_rows("demo", base_dir=Path(), limit=ROWS, on_bad_row="error")
        self.held_out = load_rows("demo-eval", base_dir=Path(), limit=HELD_OUT, on_bad_row="error")
        self.form = text_form(Data(prompt="{mr} ->", completion=" {ref}"), rows.columns)
        examples = tokenize(rows, self.form, self.base.tokenizer, 256)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
        self.parts = [_picked(examples, order[number::EDGES]) for number in range(EDGES)]

    def loss(self, state: AdapterState | None) -> float:
        """Nats per completion token, on held-out rows."""
        if state is None:
            return evaluate(self.base, self.held_out, self.form, Evaluate(batch_size=16), max_length=256)["loss"]
        with attached(self.base.model, state):
            return self.loss(None)

    def train(self, robust: Robust, change: Callable[[Message, Message], Iterable[Message]], rounds: int = ROUNDS,
              steps: int = LOCAL_STEPS, max_norm: float | None = None) -> tuple[AdapterState, list[str]]:  # fmt: skip
        """The common adapter, and the pages of the answers that were refused."""
        names, pages = {number + 1: f"edge{number + 1}" for number in range(EDGES)}, list[str]()
        works = {
            name: EdgeWork(
                name, LocalTrainer(self.base, Train(learning_rate=LEARNING_RATE), ROUNDS * LOCAL_STEPS, 0.0, 0, name),
                BatchStream(part, BATCH, 0, name, "bucket", pad_id(self.base.tokenizer)), len(part), FitPlan(steps, 1, False), True,
                lambda report: Work(), lambda number, report: None, base_digest="the base",
            )
            for name, part in zip(names.values(), self.parts, strict=True)
        }  # fmt: skip
        observer = Observer(lambda _: None, lambda *_: None, lambda number, edge, page: pages.append(page), lambda _: None)
        coordinator = AdapterStrategy(
            self.start, dict.fromkeys(works, self.start.ranks), names, 1, observer, robust=robust, max_norm=max_norm, run_id="poisoned",
            base_digests=dict.fromkeys(works, "the base"),
        )  # fmt: skip
        contexts = {node: Context(1, node, {"edge": name}, RecordDict(), {}) for node, name in names.items()}
        grid = Poisoned(client_app(lambda context: works[str(context.node_config["edge"])]), contexts)
        grid.change = change
        coordinator.start(grid, coordinator.arrays(), rounds, 3600.0, ConfigRecord({}))
        return coordinator.state, pages


def _picked(examples: Examples, numbers: list[int]) -> Examples:
    items = tuple(examples[number] for number in numbers)
    return Examples(items, examples.row_numbers[numbers], examples.was_cut[numbers], 0, examples.max_length)


def poisoning(poison: Poison, num_bad: int) -> Callable[[Message, Message], Iterable[Message]]:
    """The first edges send poison."""
    def change(message: Message, reply: Message) -> Iterable[Message]:
        if reply.metadata.src_node_id <= num_bad:
            put_adapter(reply.content, poison(get_adapter(message.content), get_adapter(reply.content)))
        return [reply]

    return change


def refusals(fleet: Fleet) -> dict[str, str]:
    """What is refused at once, and the page that says so."""
    def bad(name: str) -> Callable[[Message, Message], Iterable[Message]]:
        def change(message: Message, reply: Message) -> Iterable[Message]:
            if reply.metadata.src_node_id == 1:
                return [reply, reply] if name == "answered twice" else [spoiled(name, reply)]
            return [reply]

        return change

    names = (*VALUES, *FORMS, *RECORDS, "answered twice")
    return {name: fleet.train(Robust(), bad(name), rounds=1, steps=1, max_norm=1e3)[1][0] for name in names}


VALUES = {"NaN": math.nan, "infinity": math.inf, "square overflows fp32": 1e20, "norm above max_norm": 1e6}
FORMS = ("wrong shape", "wrong rank", "unknown module", "wrong kind")
RECORDS = {
    "another base": ("receipt", {"base": "another"}), "replayed": ("receipt", {"round": 7}),
    "another run": ("receipt", {"nonce": "of another run"}),
    "no examples": ("metrics", {"num_examples": 0}), "half an example": ("metrics", {"num_examples": 0.5}),
}  # fmt: skip


def spoiled(name: str, reply: Message) -> Message:
    """A reply with one thing wrong."""
    content = reply.content
    if name in RECORDS:
        key, values = RECORDS[name]
        content[key].update(values)  # type: ignore[call-overload]
        return reply
    state = get_adapter(content)
    first, one = next(iter(state.modules.items()))
    kind = "bottleneck" if name == "wrong kind" else state.kind
    if name in VALUES:
        one = ModuleAdapter(one.down_RI, torch.full_like(one.up_OR, VALUES[name]), one.scaling)
    elif name == "wrong shape":
        one = ModuleAdapter(one.down_RI[:, 1:], one.up_OR, one.scaling)
    elif name == "wrong rank":
        one = ModuleAdapter(one.down_RI[1:], one.up_OR[:, 1:], one.scaling)
    put_adapter(content, AdapterState(kind, {**state.modules, "another" if name == "unknown module" else first: one}))
    return reply


def table(base: float, found: dict[str, dict[str, float]], refused: dict[str, str]) -> str:
    """As it stands in poisoned.md."""
    columns = list(next(iter(found.values())))
    lines = [
        "# Poisoned edges", "",
        f"Built-in base, {EDGES} edges, {ROUNDS} rounds of {LOCAL_STEPS} steps of {BATCH} rows, LoRA of rank {RANK}, one seed. Loss: nats"
        f" per completion token on {HELD_OUT} held-out rows; the base alone: {base:.3f}.", "",
        f"| rule | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|",
        *(f"| {rule} | {' | '.join(f'{loss:.3f}' for loss in row.values())} |" for rule, row in found.items()), "",
        "## Refused at once", "", "| sent | refusal | got | expected |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, page in refused.items():
        parts = dict(line.split(maxsplit=1) for line in page.splitlines()[1:])
        lines.append(f"| {name} | {page.splitlines()[0].split(': ', 1)[1]} | {parts['got']} | {parts['expected']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and keep."""
    fleet, begin, found = Fleet(), time.perf_counter(), dict[str, dict[str, float]]()
    for rule, robust in RULES.items():
        row = found.setdefault(rule, {})
        row["none poisoned"] = fleet.loss(fleet.train(robust, poisoning(flipped, 0))[0])
        for num_bad, (name, poison) in itertools.product((1, 2), POISONS.items()):
            row[f"{num_bad} of {EDGES}: {name}"] = fleet.loss(fleet.train(robust, poisoning(poison, num_bad))[0])
        print(f"{rule}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in row.items()), flush=True)
    base, refused = fleet.loss(None), refusals(fleet)
    text = table(base, found, refused)
    print(text)
    (results.RESULTS / "poisoned.md").write_text(text, encoding="utf-8")
    config = {"edges": EDGES, "rounds": ROUNDS, "local_steps": LOCAL_STEPS, "batch_size": BATCH, "rank": RANK, "rows": ROWS,
              "held_out": HELD_OUT, "learning_rate": LEARNING_RATE, "base": "tiny"}  # fmt: skip
    seconds = time.perf_counter() - begin
    results.write("poisoned", config, {"base_loss": base, "loss": found, "refusals": refused, "seconds": seconds})


if __name__ == "__main__":
    main()
