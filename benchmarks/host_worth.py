"""What ranks are worth in each place where a base can run: on the edge in 16, 8 and 4 bits, and in a host by wire mode and codec.

From one adapter, trained a little so that no factor is zero, every place does the same steps on the same batches of the demo. The cosine
is between the adapters' gradients of the first step there and on the whole unquantized base here (the mean over seeds, and the least);
the loss is that of rows that nobody trained on, after all steps. The planner's FIDELITY and HOSTED are such cosines.

Usage: python benchmarks/host_worth.py [--seeds 3] [--steps 5]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import dataclasses
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, get_args

import torch

from atoll.adapters.attach import attached
from atoll.adapters.fresh import fresh_adapters
from atoll.adapters.state import AdapterState
from atoll.base.head import loss_sum
from atoll.base.load import Base, load_base
from atoll.base.read_shapes import read_shapes
from atoll.config.schema import Cut, Model, RunConfig, Train, Wire
from atoll.embedded import tiny_path
from atoll.jobs.split import HostAccess, join, serve, start_host
from atoll.split.host.tenants import HostLimits
from atoll.tasks.batches import BatchStream
from atoll.tasks.tokens import pad_id
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, TrainState, Update
from atoll.wire.byte_formulas import WireMode
from sides import results, task
from sides.options import Options

ROWS, TOKENS, HELD_OUT, WARM_STEPS, RATE = 4, 256, 32, 10, 2e-3
CODECS = ("fp32", "bf16", "int8")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the base runs."""

    name: str
    bits: int | None = None
    """In which an edge holds it; None: in full precision."""
    wire: Wire | None = None


def places() -> Iterator[Place]:
    """All that are compared, the reference first."""
    yield Place("here, 32 bits")
    yield from (Place(f"here, {bits} bits", bits) for bits in (8, 4))
    for mode, codec in product(get_args(WireMode), CODECS):
        yield Place(f"host, {mode}, {codec}", wire=Wire(mode=mode, codec=codec))
    yield Place("host, lent as fp16, fp32", wire=Wire(mode="lent", adapters="fp16"))
    yield Place("host, lent as bf16, fp32", wire=Wire(mode="lent", adapters="bf16"))


@contextmanager
def base_at(place: Place, access: HostAccess) -> Iterator[tuple[Base, Any]]:
    """The base there, and how a step is done."""
    source = str(tiny_path())
    if place.wire is None:
        yield load_base(source, bits=place.bits), lambda step: step()  # type: ignore[arg-type]
        return
    side = join(source, RunConfig(model=Model(cut=Cut(front=0, back=0)), wire=place.wire), access, ROWS * TOKENS)
    yield side.base, side.client.retrying
    side.close()


def fit(base: Base, attempt: Any, start: AdapterState, stream: BatchStream, steps: int, seed: int) -> Update:
    """The same steps, wherever the base is."""
    trainer = LocalTrainer(base, Train(learning_rate=RATE, schedule="constant", grad_clip=0.0), steps, 0.0, seed, "edge", attempt=attempt)
    return trainer.fit(TrainState(start, {}, 0), stream, FitPlan(steps, 1, False), lambda report: None)


def gradient(update: Update) -> torch.Tensor:
    """Of all adapters after one step, but for a factor: what Adam's first moments are then."""
    return torch.cat([update.state.optimizer[name].first.flatten() for name in sorted(update.state.optimizer)]).double()


def main() -> None:
    """Measure, print, and write the result."""
    options = Options(__doc__)
    options.size("--seeds", 3, 1)
    options.size("--steps", 5, 1)
    asked = options.parse()
    torch.set_num_threads(1)
    whole, limits = load_base(str(tiny_path())), HostLimits(max_tokens=ROWS * TOKENS)
    host = start_host(serve(whole, str(tiny_path()), "fp32", 32, limits), limits, "127.0.0.1:0", None)
    modules = read_shapes(str(tiny_path())).modules
    sizes = {module.name: (module.d_in, module.d_out) for module in modules}
    examples = task.examples_for(task.TINY, whole.tokenizer, HELD_OUT + 40 * ROWS, TOKENS)
    held_out = dataclasses.replace(examples, items=examples.items[:HELD_OUT])
    trained_on = dataclasses.replace(examples, items=examples.items[HELD_OUT:])
    (scored,) = [BatchStream(held_out, HELD_OUT, 0, "scored", "bucket", pad_id(whole.tokenizer)).batch(0)]
    found = dict[str, dict[str, list[float]]]()
    for seed in range(asked.seeds):
        stream = BatchStream(trained_on, ROWS, seed, "edge", "bucket", pad_id(whole.tokenizer))
        fresh = fresh_adapters("lora", sizes, dict.fromkeys(sizes, 8), 16, seed)
        start = fit(whole, lambda step: step(), fresh, stream, WARM_STEPS, seed).state.adapter
        reference = torch.zeros(0)
        for place in places():
            with base_at(place, HostAccess(f"127.0.0.1:{host.port}")) as (base, attempt):
                first = gradient(fit(base, attempt, start, stream, 1, seed))
                end = fit(base, attempt, start, stream, asked.steps, seed).state.adapter
            reference = first if len(reference) == 0 else reference
            with attached(whole.model, end), torch.no_grad():
                loss = float(loss_sum(whole.model, scored)) / scored.num_label_tokens
            row = found.setdefault(place.name, {"cosines": [], "losses": []})
            row["cosines"].append(1.0 if torch.equal(first, reference) else float(torch.cosine_similarity(first, reference, dim=0)))
            row["losses"].append(loss)
    host.stop()
    rows: list[dict[str, Any]] = [
        {"place": name, "cosine": statistics.mean(row["cosines"]), "least_cosine": min(row["cosines"]), **row}
        for name, row in found.items()
    ]
    for row in rows:
        loss = statistics.mean(row["losses"])
        print(f"{row['place']:<28} cosine {row['cosine']:.6f} (least {row['least_cosine']:.6f})  loss {loss:.4f}", flush=True)
    config = {"base": "tiny", "seeds": asked.seeds, "steps": asked.steps, "rows": ROWS, "rank": 8, "learning_rate": RATE}
    results.write(asked.out, "host_worth", config, {"places": rows})


if __name__ == "__main__":
    main()
