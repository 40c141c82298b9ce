"""What one update costs the coordinator: memory, processor time, bytes and disk, for 10, 100 and 1,000 edges.

Updates are made up and go through the real strategy (checks, spool, exact-svd) over the grid within the process; nothing is trained. The
adapter is LoRA of rank 8 on the q, k, v and o projections of 4 blocks, 512 wide (0.5 MB); once also 1,024 wide, which shows how the cost
grows with the sizes. Every row is a process of its own on one thread. Making an update is the edges' work and not counted.

Usage: python benchmarks/scale.py [--edges 10 100 1000]
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch

from sides import child, results, scale_table
from sides.options import Options

RANK, BLOCKS, PROJECTIONS = 8, 4, ("q", "k", "v", "o")
WIDTH, WIDE = 512, 1024
LIMIT_SECONDS = 600


def measure(width: int, num_edges: int) -> dict[str, Any]:
    """One round."""
    import torch

    from atoll.adapters.fresh import fresh_adapters
    from atoll.adapters.state import AdapterState, ModuleAdapter
    from atoll.cost.meters import resident_bytes, resident_peak_bytes
    from atoll.cost.work import Work
    from atoll.federated.flower import ClientApp, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from atoll.federated.grid import InProcessGrid
    from atoll.federated.payload import get_adapter, num_bytes, put_adapter
    from atoll.federated.receipts import put_receipt
    from atoll.federated.strategy import AdapterStrategy, EdgeResult, Observer

    torch.set_num_threads(1)
    sizes = {f"model.layers.{block}.self_attn.{one}_proj": (width, width) for block in range(BLOCKS) for one in PROJECTIONS}
    ranks = dict.fromkeys(sizes, RANK)
    initial = fresh_adapters("lora", sizes, ranks, alpha=16.0, seed=0)
    nodes = {number: f"edge{number:05}" for number in range(1, num_edges + 1)}
    seconds, sent = {"answers made": 0.0}, {"up": 0, "down": 0}
    app = ClientApp()

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        start = time.process_time()
        given, reply = get_adapter(message.content), RecordDict()
        generator = torch.Generator().manual_seed(message.metadata.dst_node_id)
        put_receipt(reply, message.content, nodes[message.metadata.dst_node_id], "")
        put_adapter(reply, AdapterState("lora", {
            name: ModuleAdapter(one.down_RI, torch.randn(one.up_OR.shape, generator=generator) * 0.01, one.scaling)
            for name, one in given.modules.items()
        }))  # fmt: skip
        counts = dict.fromkeys(("num_steps", "num_tokens", "num_label_tokens", "peak_bytes"), 1)
        reply["metrics"] = MetricRecord({"num_examples": 100, "mean_loss": 1.0, **counts, **Work().to_numbers()})
        reply["wire_up"], reply["wire_down"] = MetricRecord(), MetricRecord()
        sent["up"], sent["down"] = num_bytes(reply), num_bytes(message.content)
        done = Message(reply, reply_to=message)
        seconds["answers made"] += time.process_time() - start
        return done

    contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in nodes}
    grid = InProcessGrid(app, contexts)
    finished: list[EdgeResult] = []
    observer = Observer(lambda *_: None, lambda _, result: finished.append(result), lambda *why: sys.exit(str(why)), lambda *_: None)
    strategy = AdapterStrategy(initial, dict.fromkeys(nodes.values(), ranks), nodes, num_edges, observer)
    spooled: list[int] = []

    def replies(messages: Iterable[Message]) -> Iterator[Message]:
        yield from grid.send_and_receive(messages)
        seconds["asked and spooled"] = time.process_time() - begin - seconds["answers made"]
        spooled.append(sum(file.stat().st_size for file in Path(tempfile.gettempdir()).rglob("*") if file.is_file()))

    ready, begin, wall = resident_bytes(), time.process_time(), time.perf_counter()
    strategy.aggregate_train(1, replies(strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid)))
    whole = time.process_time() - begin - seconds["answers made"]
    return {
        "ready_bytes": ready, "peak_bytes": resident_peak_bytes(), "up_bytes": sent["up"], "down_bytes": sent["down"],
        "spool_bytes": spooled[0], "asked_and_spooled_seconds": seconds["asked and spooled"],
        "aggregated_seconds": whole - seconds["asked and spooled"], "wall_seconds": time.perf_counter() - wall,
        "numbers": initial.num_parameters, "dense_numbers": sum(d_in * d_out for d_in, d_out in sizes.values()), "edges": len(finished),
    }  # fmt: skip


def main() -> None:
    """Measure, print and keep."""
    options = Options(__doc__)
    options.size("--edges", [10, 100, 1000], [2])
    options.size("--wide-edges", [10, 300], [])
    given, found = options.parse(), {}
    for width, num_edges in [*((WIDTH, number) for number in given.edges), *((WIDE, number) for number in given.wide_edges)]:
        with tempfile.TemporaryDirectory() as spool:
            row = child.figures(__file__, width, num_edges, environment={"TMPDIR": spool}, limit_seconds=LIMIT_SECONDS)
        found[f"{width} wide, {num_edges} edges"] = row
        per_edge = {key: 1e3 * row[f"{key}_seconds"] / num_edges for key in ("asked_and_spooled", "aggregated")}
        print(
            f"{width} wide, {num_edges:6} edges: ready {row['ready_bytes'] / 1e6:.0f} MB, peak {row['peak_bytes'] / 1e6:.0f} MB, "
            f"spool {row['spool_bytes'] / 1e6:.1f} MB, up {row['up_bytes'] / 1e6:.3f} MB; an edge: "
            + ", ".join(f"{key} {value:.1f} ms" for key, value in per_edge.items()), flush=True,
        )  # fmt: skip
    config = {"edges": given.edges, "rank": RANK, "blocks": BLOCKS, "projections": PROJECTIONS, "widths": [WIDTH, WIDE], "threads": 1}
    results.write(given.out, "scale", config, found)
    if found.keys() >= scale_table.NEEDS:
        scale_table.write(given.out)


if __name__ == "__main__":
    child.run(main, measure)
