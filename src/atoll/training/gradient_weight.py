"""|parameter x gradient|, over the cost of training the weight: the alternative of FedPipe's authors in later work.

Shape suffixes: O outputs and I inputs of a module, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atoll.adapters.fresh import fresh_adapters
from atoll.training.importance_score import WarmUpModule


class GradientWeight:
    """[plan] importance = "gradient-weight": B A, with the mean over the steps of the sum of |parameter x gradient|."""

    per_parameter = True

    def __init__(self, module: WarmUpModule) -> None:
        fresh = fresh_adapters("lora", {module.name: module.size}, {module.name: module.rank}, module.alpha, module.seed)
        adapter = fresh.modules[module.name]
        self.up_OR, self.down_RI = (nn.Parameter(matrix.to(module.device)) for matrix in (adapter.up_OR, adapter.down_RI))
        self.parameters: tuple[nn.Parameter, ...] = (self.up_OR, self.down_RI)
        self._total, self._num_steps = torch.zeros((), dtype=torch.float64, device=module.device), 0

    def factors(self) -> tuple[Tensor, Tensor]:
        """B and A themselves."""
        return self.up_OR.data, self.down_RI.data

    def take(self, grad_up_OR: Tensor, grad_down_RI: Tensor) -> None:
        """Add |parameter x gradient| up."""
        for parameter, grad in zip(self.parameters, (grad_up_OR, grad_down_RI), strict=True):
            self._total += (parameter.data * grad).abs().sum(dtype=torch.float64)
            parameter.grad = grad.clone()
        self._num_steps += 1

    def score(self) -> float:
        """The mean over the steps."""
        return float(self._total) / max(1, self._num_steps)
