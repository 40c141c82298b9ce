"""Whether a row was trained on, from the finished adapter: rows that it helped more than others were.

Source: the loss-ratio attack with the base as its reference (Carlini et al. 2022, "Membership inference attacks from first principles",
without shadow models).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata
from transformers import PreTrainedModel

from atoll.adapters.attach import attached
from atoll.adapters.state import AdapterState
from atoll.base.head import token_losses_N
from atoll.tasks.batches import pad_batch
from atoll.tasks.tokens import Example

_DRAWS = 1000


def row_losses(model: PreTrainedModel, examples: Sequence[Example], pad_id: int, seconds: float = math.inf) -> np.ndarray:
    """Mean loss of each row's labels, in nats; of as many rows as there is time for."""
    until, found = time.monotonic() + seconds, []
    for example in examples:
        found.append(float(token_losses_N(model, pad_batch([example], pad_id).to(model.device)).mean()))
        if time.monotonic() > until:
            break
    return np.array(found)


def gains(model: PreTrainedModel, adapter: AdapterState, examples: Sequence[Example], pad_id: int, seconds: float) -> np.ndarray:
    """How much an adapter helps each row, of as many as there is time for: the loss of the base over that with it, as a logarithm."""
    before = row_losses(model, examples, pad_id, seconds / 3)
    with attached(model, adapter):
        after = row_losses(model, examples[: len(before)], pad_id)
    return np.log(np.maximum(before, 1e-6)) - np.log(np.maximum(after, 1e-6))


def area_under_curve(members: np.ndarray, others: np.ndarray) -> float:
    """Chance that a member scores higher than another row; ties count one half.

    >>> area_under_curve(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    0.875
    """
    ranks = rankdata(np.concatenate([members, others]))[: len(members)]
    return float((ranks.sum() - len(members) * (len(members) + 1) / 2) / (len(members) * len(others)))


def curve_interval(members: np.ndarray, others: np.ndarray, seed: int) -> tuple[float, float]:
    """A 95 % interval of the area, by drawing both sides' rows anew."""
    random = np.random.default_rng(seed)
    areas = [
        area_under_curve(random.choice(members, len(members)), random.choice(others, len(others))) for _ in range(_DRAWS)
    ]
    return float(np.quantile(areas, 0.025)), float(np.quantile(areas, 0.975))


def found_at(members: np.ndarray, others: np.ndarray, wrong: float = 0.01) -> float:
    """Share of members that are found when so many of the others may be taken for some."""
    return float((members > np.quantile(others, 1 - wrong, method="higher")).mean())
