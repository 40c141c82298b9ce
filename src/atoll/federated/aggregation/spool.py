"""The updates of one round, on disk until all are there: so that their order of arrival does not matter, and memory holds one at a time.

Shape suffixes: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.scratch import scratch_folder


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """What one edge sends: its adapter, and what it weighs in the mean."""

    edge: str
    state: AdapterState
    weight: float


class Spool:
    """One file for each edge's update, in a folder of the system for temporary ones (TMPDIR) that only this user can open. A context."""

    def __init__(self) -> None:
        self._folder = scratch_folder("atoll-round-")
        self._files: dict[str, Path] = {}
        self._num_files = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._folder.cleanup()

    def __iter__(self) -> Iterator[Contribution]:
        """All updates in the order of their edges' names, one in memory at a time."""
        return (self.read(edge) for edge in self.edges)

    @property
    def edges(self) -> list[str]:
        """In order of their names."""
        return sorted(self._files)

    def put(self, contribution: Contribution) -> None:
        """Keep an edge's update, in place of an earlier one."""
        state, tensors = contribution.state, dict[str, Tensor]()
        for name, adapter in state.modules.items():
            tensors[f"{name}/down"], tensors[f"{name}/up"] = adapter.down_RI.contiguous(), adapter.up_OR.contiguous()
        for name, change in state.full_weights.items():
            tensors |= {f"{name}/{side}": tensor.contiguous() for side, tensor in zip(("change", "bias"), change.tensors, strict=False)}
        scalings = {name: adapter.scaling for name, adapter in state.modules.items()}
        head = {"kind": state.kind, "weight": contribution.weight, "scalings": scalings, "whole": list(state.full_weights)}
        self._num_files += 1
        file = Path(self._folder.name) / f"{self._num_files}.safetensors"
        save_file(tensors, file, metadata={"head": json.dumps(head)})
        self.drop(contribution.edge)
        self._files[contribution.edge] = file

    def drop(self, edge: str) -> None:
        """Forget an edge's update, if there is one."""
        if edge in self._files:
            self._files.pop(edge).unlink()

    def read(self, edge: str) -> Contribution:
        """The update as it was put, bit for bit."""
        with safe_open(self._files[edge], "pt") as file:
            head, names = _head(file), set(file.keys())
            modules = {
                name: ModuleAdapter(file.get_tensor(f"{name}/down"), file.get_tensor(f"{name}/up"), scaling)
                for name, scaling in head["scalings"].items()
            }
            full_weights = {
                name: FullWeightDelta(*(file.get_tensor(f"{name}/{side}") for side in ("change", "bias") if f"{name}/{side}" in names))
                for name in head["whole"]
            }
        return Contribution(edge, AdapterState(head["kind"], modules, full_weights), head["weight"])

    def voters(self) -> dict[str, list[str]]:
        """For each module the edges that trained it, in order of their names."""
        found: dict[str, list[str]] = {}
        for edge in self.edges:
            with safe_open(self._files[edge], "pt") as file:
                head = _head(file)
            for name in [*head["scalings"], *head["whole"]]:
                found.setdefault(name, []).append(edge)
        return found

    def adapter(self, edge: str, name: str) -> ModuleAdapter:
        """One module's adapter of one update."""
        with safe_open(self._files[edge], "pt") as file:
            return ModuleAdapter(file.get_tensor(f"{name}/down"), file.get_tensor(f"{name}/up"), _head(file)["scalings"][name])

    def product_rows(self, edge: str, name: str, start: int, stop: int) -> Tensor:
        """Some rows (outputs) of the dense product s B A of one module.

        Shapes: (stop - start, inputs), fp64.
        """
        with safe_open(self._files[edge], "pt") as file:
            up_OR, down_RI = file.get_slice(f"{name}/up")[start:stop], file.get_tensor(f"{name}/down")
            return _head(file)["scalings"][name] * (up_OR.double() @ down_RI.double())

    def full_weight_rows(self, edge: str, name: str, side: str, start: int, stop: int) -> Tensor:
        """Some rows of the "change" or "bias" of a module whose full weight is trained.

        Shapes: (stop - start, ...), fp64.
        """
        with safe_open(self._files[edge], "pt") as file:
            return file.get_slice(f"{name}/{side}")[start:stop].double()


def _head(file: Any) -> dict[str, Any]:
    return json.loads(file.metadata()["head"])
