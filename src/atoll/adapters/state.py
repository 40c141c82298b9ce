"""What an update is: the adapters of some modules, as a value with an algebra.

Shape suffixes: R rank, I inputs, O outputs of the adapted module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.low_rank import singular_factors
from atoll.errors import AdapterFitError

Kind = Literal["lora", "bottleneck"]


@dataclass(frozen=True, slots=True, eq=False)
class ModuleAdapter:
    """The adapter of one module: x -> scaling * up_OR f(down_RI x), f the identity (lora) or relu (bottleneck)."""

    down_RI: Tensor
    up_OR: Tensor
    scaling: float

    def __post_init__(self) -> None:
        if self.down_RI.ndim != 2 or self.up_OR.ndim != 2 or self.down_RI.shape[0] != self.up_OR.shape[1]:
            raise AdapterFitError(
                "the two matrices of an adapter do not fit each other",
                got=f"down {tuple(self.down_RI.shape)}, up {tuple(self.up_OR.shape)}",
                expected="down (rank, inputs) and up (outputs, rank)",
                do="save the adapter again from the run that made it",
            )

    @property
    def rank(self) -> int:
        """Width of the adapter."""
        return self.down_RI.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(inputs, outputs) of the module this adapter fits."""
        return self.down_RI.shape[1], self.up_OR.shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """down, then up."""
        return self.down_RI, self.up_OR

    @property
    def num_parameters(self) -> int:
        """Numbers in both matrices."""
        return self.down_RI.numel() + self.up_OR.numel()

    def delta_OI(self) -> Tensor:
        """The dense change of the module's weight (lora only has one).

        Shapes: (outputs, inputs), fp64.
        """
        return self.scaling * (self.up_OR.double() @ self.down_RI.double())


@dataclass(frozen=True, slots=True, eq=False)
class AdapterState:
    """Adapters by full module name; immutable, all tensors fp32 on the CPU.

    Laws (lora: of the dense change; bottleneck: of the function): (a + b) is the sum, a.scale(c) is c times a, a.truncate(r) is the
    best approximation of rank r, a.truncate(r) is a itself where the rank is r or less, and a.compacted() is a. Full weights have no
    rank: they obey the first two, and the others leave them as they are.
    """

    kind: Kind
    modules: Mapping[str, ModuleAdapter]
    full_weights: Mapping[str, FullWeightDelta] = field(default_factory=dict)
    """Modules whose full weights are trained, beside those with an adapter."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", MappingProxyType(dict(self.modules)))
        object.__setattr__(self, "full_weights", MappingProxyType(dict(self.full_weights)))
        both = sorted(self.modules.keys() & self.full_weights.keys())
        if both:
            raise AdapterFitError(
                "a module has an adapter, and its full weight is trained", got=both[0], expected="one of the two",
                do="give every edge the same [adapter] kind",
            )  # fmt: skip

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by module name; of a full weight, the most that its change can have."""
        return {name: part.rank if isinstance(part, ModuleAdapter) else min(part.size) for name, part in self.parts.items()}

    @property
    def parts(self) -> dict[str, ModuleAdapter | FullWeightDelta]:
        """All that is trained, by module name."""
        return {**self.modules, **self.full_weights}

    @property
    def num_parameters(self) -> int:
        """Trainable numbers in all modules."""
        return sum(part.num_parameters for part in self.parts.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return 4 * self.num_parameters

    def __add__(self, other: AdapterState) -> AdapterState:
        """The exact sum: ranks add up where both have a module.

        Raises: AdapterFitError where kinds or module sizes differ.
        """
        self._check_kind(other)
        modules = dict(self.modules)
        for name, adapter in other.modules.items():
            modules[name] = _concatenate(name, modules[name], adapter) if name in modules else adapter
        full_weights = dict(self.full_weights)
        for name, change in other.full_weights.items():
            full_weights[name] = full_weights[name].plus(change, name) if name in full_weights else change
        return AdapterState(self.kind, modules, full_weights)

    def scale(self, factor: float) -> AdapterState:
        """This state times a number; ranks and scalings stay, `up` is multiplied."""
        modules = {name: ModuleAdapter(a.down_RI, a.up_OR * factor, a.scaling) for name, a in self.modules.items()}
        return AdapterState(self.kind, modules, {name: c.of(tuple(t * factor for t in c.tensors)) for name, c in self.full_weights.items()})

    def truncate(self, ranks: int | Mapping[str, int]) -> AdapterState:
        """The best approximation with at most this rank (Eckart-Young), for every module or by module name.

        Raises: AdapterFitError for bottleneck adapters, whose relu has no such approximation.
        """
        modules = {}
        for name, adapter in self.modules.items():
            rank = ranks if isinstance(ranks, int) else ranks.get(name, adapter.rank)
            modules[name] = adapter if rank >= adapter.rank else self._truncated(name, adapter, rank)
        return AdapterState(self.kind, modules, self.full_weights)

    def compacted(self) -> AdapterState:
        """The same change; a module whose rank exceeds min(inputs, outputs) gets other factors, of no higher rank than the change has.

        Raises: AdapterFitError for bottleneck adapters, whose width is what they compute.
        """
        wide = [name for name, adapter in self.modules.items() if adapter.rank > min(adapter.size)]
        if wide and self.kind != "lora":
            raise AdapterFitError(
                f"the bottleneck adapter of {wide[0]} has no other factors", got=f"width {self.modules[wide[0]].rank}",
                expected='an adapter of kind "lora"', do='write kind = "lora" in [adapter]',
            )  # fmt: skip
        return AdapterState(self.kind, {**self.modules, **{name: _compacted(self.modules[name]) for name in wide}}, self.full_weights)

    def as_full_weights(self) -> AdapterState:
        """The same change with no adapter left: every product as one change of its module's weight.

        Raises: AdapterFitError for bottleneck adapters, which have no product.
        """
        if self.modules and self.kind != "lora":
            raise AdapterFitError("a bottleneck adapter is no change of a weight", got=self.kind, expected="lora", do='use kind = "lora"')
        deltas = {name: FullWeightDelta(adapter.delta_OI().float()) for name, adapter in self.modules.items()}
        return AdapterState(self.kind, {}, {**deltas, **self.full_weights})

    def digest(self) -> str:
        """SHA-256 over kind, names, shapes, scalings and every bit of every tensor; equal states have equal digests."""
        hasher = hashlib.sha256(self.kind.encode())
        for name in sorted(self.modules):
            adapter = self.modules[name]
            hasher.update(f"\n{name} {adapter.size} {adapter.rank} {adapter.scaling!r}\n".encode())
            for tensor in adapter.tensors:
                hasher.update(tensor.contiguous().numpy().tobytes())
        for name in sorted(self.full_weights):
            hasher.update(f"\n{name} {self.full_weights[name].size} whole\n".encode())
            for tensor in self.full_weights[name].tensors:
                hasher.update(tensor.contiguous().numpy().tobytes())
        return hasher.hexdigest()

    def is_finite(self) -> bool:
        """Whether every number is finite."""
        return all(bool(torch.isfinite(tensor).all()) for part in self.parts.values() for tensor in part.tensors)

    def _check_kind(self, other: AdapterState) -> None:
        if self.kind != other.kind:
            raise AdapterFitError(
                "adapters of different kinds cannot be combined",
                got=other.kind, expected=self.kind, do="give every edge the same [adapter] kind",
            )  # fmt: skip

    def _truncated(self, name: str, adapter: ModuleAdapter, rank: int) -> ModuleAdapter:
        if self.kind != "lora":
            raise AdapterFitError(
                f"the bottleneck adapter of {name} cannot be truncated",
                got=f"width {adapter.rank}", expected=f"width {rank}", do="give every edge the same rank, or use kind = \"lora\"",
            )  # fmt: skip
        factors = singular_factors(adapter.up_OR, adapter.down_RI)
        up, down = factors.up_OR[:, :rank] * factors.values_R[:rank], factors.down_RI[:rank]
        return ModuleAdapter(down.float().contiguous(), up.float().contiguous(), adapter.scaling)


def _concatenate(name: str, a: ModuleAdapter, b: ModuleAdapter) -> ModuleAdapter:
    if a.size != b.size:
        raise AdapterFitError(
            f"two adapters of {name} are for modules of different size",
            got=f"(inputs, outputs) = {b.size}", expected=f"{a.size}", do="use the same base model on every edge",
        )  # fmt: skip
    up = torch.cat([a.up_OR, b.up_OR * (b.scaling / a.scaling)], dim=1)
    return ModuleAdapter(torch.cat([a.down_RI, b.down_RI]), up, a.scaling)


def _compacted(adapter: ModuleAdapter) -> ModuleAdapter:
    factors = singular_factors(adapter.up_OR, adapter.down_RI)
    values = factors.values_R
    # Below this a singular value is rounding. One is kept in any case: no file holds an adapter of rank 0.
    rank = max(1, int((values > values[0] * torch.finfo(values.dtype).eps * max(adapter.size)).sum()))
    root_R = values[:rank].sqrt()
    up, down = factors.up_OR[:, :rank] * root_R, root_R[:, None] * factors.down_RI[:rank]
    return ModuleAdapter(down.float().contiguous(), up.float().contiguous(), adapter.scaling)
