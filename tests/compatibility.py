"""What a family of models can be used for, tried on a tiny one: a row of docs/compatibility.md."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import atoll
from atoll.adapters.attach import attached
from atoll.adapters.peft_files import load_adapter
from atoll.base.load import load_base
from atoll.base.quantize import BITS
from atoll.base.skeleton.build import auto_class_of
from atoll.commands.train import RunResult
from atoll.errors import AtollError
from atoll.runs.events import Advised

from tests.families import save
from tests.run_files import write_rows, write_run

COLUMNS = ("train", "split", "quantize", "PEFT", "merge", "pack")
RUN = {
    "run": {"rounds": 1}, "data": {"eval": None, "max_length": 48}, "adapter": {"rank": 2},
    "train": {"local_steps": 2, "batch_size": 2, "learning_rate": 0.05},
}  # fmt: skip
_IDS = torch.arange(40, 52)[None]


class _Family:
    """One family in a folder; each column is tried once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder, self.base = folder, str(folder / "base")
        self.left_out = False
        save(name, folder / "base")
        write_rows(folder / "rows.jsonl", 6)

    @functools.cached_property
    def run(self) -> RunResult:
        return self._run()

    def _run(self, **sections: Mapping[str, object]) -> RunResult:
        merged = {name: {**RUN.get(name, {}), **sections.get(name, {})} for name in (*RUN, "model")}
        observers = [lambda event: self._hear(event)]
        return atoll.train(write_run(self.folder, merged, {"x": {}}), observers=observers)

    def _hear(self, event: object) -> None:
        self.left_out |= isinstance(event, Advised) and event.advice.startswith("left out of")

    def train(self) -> str:
        """Whether a run completes, and whether everything in the blocks has an adapter."""
        assert self.run.summary.status == "complete"
        return "but for experts and the like" if self.left_out else "yes"

    def split(self) -> str:
        """Whether a run with a host ends with the adapter of a run without."""
        split = self._run(run={"placement": "split"}, model={"cut": {"front": 1, "back": 0}})
        ours, theirs = (load_file(run.adapter / "adapter_model.safetensors") for run in (split, self.run))
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[name], theirs[name], rtol=1e-2, atol=1e-4) for name in theirs)
        return "yes"

    def quantize(self) -> str:
        """The bits that a base can be kept in."""
        kept = [str(bits) for bits in BITS[::-1] if _loads(self.base, bits)]
        return ", ".join(kept) or "no (B302)"

    def peft(self) -> str:
        """Whether PEFT, with the model as the library loads it, has the logits that Atoll has."""
        model = PeftModel.from_pretrained(self._plain(self.base), self.run.adapter)
        torch.testing.assert_close(_logits(model), self._adapted, rtol=1e-3, atol=1e-4)
        return "yes"

    def merge(self) -> str:
        """Whether the merged model has them."""
        merged = atoll.merge(self.run.run_dir, out=self.folder / "merged")
        torch.testing.assert_close(_logits(self._plain(str(merged))), self._adapted, rtol=1e-3, atol=1e-4)
        return "yes"

    def pack(self) -> str:
        """Whether rows can be packed; that their losses are those of rows alone is tried by every run that packs."""
        self._run(data={"batching": "pack"})
        return "yes"

    @functools.cached_property
    def _adapted(self) -> Tensor:
        model = load_base(self.base).model
        plain = _logits(model)
        with attached(model, load_adapter(self.run.adapter)):
            adapted = _logits(model)
        assert not torch.allclose(plain, adapted), "an adapter that does nothing shows nothing"
        return adapted

    def _plain(self, folder: str) -> torch.nn.Module:
        config = load_base(folder).model.config
        model: torch.nn.Module = auto_class_of(config).from_pretrained(folder, dtype=torch.float32)
        return model.eval()


def row(name: str, folder: Path) -> tuple[str, ...]:
    """The cells of a family, in the order of COLUMNS.

    Raises: whatever is neither success nor one of Atoll's own errors.
    """
    family = _Family(name, folder)
    tries: tuple[Callable[[], str], ...] = (family.train, family.split, family.quantize, family.peft, family.merge, family.pack)
    return tuple(_cell(one) for one in tries)


def _cell(one: Callable[[], str]) -> str:
    try:
        return one()
    except AtollError as problem:
        return f"no ({problem.code})"


def _loads(folder: str, bits: int) -> bool:
    try:
        load_base(folder, bits=bits)  # type: ignore[arg-type]
    except AtollError:
        return False
    return True


def _logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=_IDS, use_cache=False).logits
    return logits
