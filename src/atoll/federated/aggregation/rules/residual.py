"""As zero-pad, and what that misses of the exact mean is kept as a frozen delta.

Source: FedEx-LoRA (Singhal et al., 2025).
"""

from __future__ import annotations

import torch

from atoll.adapters.low_rank import singular_factors
from atoll.adapters.state import ModuleAdapter
from atoll.federated.aggregation.rule import Merged, ModuleInRound, ModuleSum, adapter_of
from atoll.federated.aggregation.rules.zero_pad import PaddedModule
from atoll.federated.aggregation.sums import Factors


class Residual:
    """[federated] aggregation = "residual"."""

    keeps_frozen_delta = True
    pads = True

    def begin(self, module: ModuleInRound) -> ModuleSum:
        """The two sums, and the exact one."""
        return _Residual(module)


class _Residual(PaddedModule):
    def with_rest(self, trained: ModuleAdapter, rest: Factors, exact: float) -> Merged:
        """What is missed goes to the frozen delta."""
        factors = singular_factors(*rest)
        # Less than the rounding of the padded mean itself is not worth a column.
        rank = int((factors.values_R > exact**0.5 * torch.finfo(torch.float32).eps / 2).sum())
        kept = factors.up_OR[:, :rank] * factors.values_R[:rank], factors.down_RI[:rank]
        return Merged(trained, adapter_of(kept, trained.scaling) if rank else None, exact=exact)
