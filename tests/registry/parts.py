"""Parts of somebody else's, as files in a folder: small ones of every kind, each beside what Atoll has."""

from __future__ import annotations

from pathlib import Path

MARK = "imported.txt"
"""What a module writes beside itself when it is imported, so that one sees that it was."""

_HEAD = f"from pathlib import Path\n(Path(__file__).parent / {MARK!r}).touch()\n"

POLICY = """
from atoll.registry.options import Options as PartOptions
from atoll.selection.schedule import Schedule

class FirstOnes:
    observes = False
    class Options(PartOptions):
        count: int = 1
        \"\"\"How many.\"\"\"
    def __init__(self, options):
        self.count = options.count
    def measures(self, select):
        return None
    def schedule(self, select, epoch_steps):
        return Schedule.at_start()
    def choose(self, pool, scores, choice):
        return [module.name for module in pool[: self.count]]
"""

PLANNER = """
from atoll.planner.as_written import planned_at

class Halves:
    def plan(self, request):
        rank = request.config.adapter.rank
        return planned_at(request, lambda edge: {name: max(1, rank // 2) for name in request.pool})
"""

IMPORTANCE = """
import torch
from torch import nn
from atoll.adapters.fresh import fresh_adapters

class Norm:
    def __init__(self, module):
        fresh = fresh_adapters("lora", {module.name: module.size}, {module.name: module.rank}, module.alpha, module.seed)
        pair = fresh.modules[module.name]
        self.up, self.down = nn.Parameter(pair.up_OR), nn.Parameter(pair.down_RI)
        self.parameters, self.total = (self.up, self.down), 0.0
    def factors(self):
        return self.up.data, self.down.data
    def take(self, grad_up_OR, grad_down_RI):
        self.total += float(grad_up_OR.norm())
        self.up.grad, self.down.grad = grad_up_OR.clone(), grad_down_RI.clone()
    def score(self):
        return self.total
"""

RULE = """
from atoll.adapters.low_rank import row_length
from atoll.federated.aggregation.sums import ProductSum

class Equal:
    works_on_products = True
    sends_best_rank = True
    def begin(self, module):
        return Votes(module)

class Votes:
    def __init__(self, module):
        self.module, self.products, self.lengths = module, ProductSum(module.old.size), []
    def add(self, adapter, weight, sent):
        self.products.add(adapter, 1.0)
        self.lengths.append(row_length(adapter.down_RI))
    def finish(self):
        return self.module.cut(self.products.mean_product(), self.lengths)
"""

CODEC = """
import math
import torch

class Half:
    def num_bytes(self, shape):
        return 2 * math.prod(shape)
    def encode(self, values):
        return values.clamp(-65504, 65504).half().cpu().contiguous().view(-1).view(torch.uint8).numpy().data.toreadonly()
    def decode(self, data, shape, dtype, device):
        return data.view(torch.float16).view(shape).to(device=device, dtype=dtype)
    def error_bound(self, values):
        values = values.detach().float()
        largest = values.abs().amax(dim=-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])
        return largest * 2.0**-11 + 2.0**-24 + (largest - 65504).clamp_min(0)
"""

READER = """
from atoll.tasks.readers.reader import FileRows

class Lines:
    suffixes = (".pairs",)
    def read(self, origin, on_bad_row):
        lines = [line for line in origin.path.read_text().splitlines() if line]
        return FileRows.of(dict(zip(("q", "a"), line.split(" => "), strict=True)) for line in lines)
"""

METRIC = """
class Length:
    def score(self, answers):
        return {"length": sum(map(len, answers.generated)) / len(answers.generated)}
"""

TRACKER = """
class Log:
    def start(self, run):
        self.file = run.run_dir / "tracked.txt"
        self.file.write_text(f"start {run.name} {run.config['run']['seed']}\\n")
    def event(self, event):
        with self.file.open("a") as file:
            print(event.kind(), file=file)
    def finish(self, status):
        with self.file.open("a") as file:
            print("finish", status, file=file)

class Falls(Log):
    def event(self, event):
        raise RuntimeError("no network")
"""

TRANSFORM = """
class Shrink:
    def apply(self, update, context):
        return update.scale(0.5)
"""

PARTS = {
    "policy": (POLICY, "FirstOnes"), "planner": (PLANNER, "Halves"), "importance": (IMPORTANCE, "Norm"), "aggregation": (RULE, "Equal"),
    "codec": (CODEC, "Half"), "reader": (READER, "Lines"), "metric": (METRIC, "Length"), "tracker": (TRACKER, "Log"),
    "transform": (TRANSFORM, "Shrink"),
}  # fmt: skip


def write_part(folder: Path, kind: str, module: str) -> str:
    """A part of this kind as a module in the folder; its reference."""
    text, name = PARTS[kind]
    (folder / f"{module}.py").write_text(_HEAD + text)
    return f"{module}:{name}"


def was_imported(folder: Path) -> bool:
    """Whether any module that `write_part` wrote there was."""
    return (folder / MARK).exists()
