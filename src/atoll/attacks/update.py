"""The tokens of a batch, from the update of an adapter after one optimizer step on it.

The gradient by `down` is a sum of rows, each a multiple of what one token's module read. In the lowest adapted block that is known for
every token of the vocabulary: it hardly depends on the others. So tokens are picked one by one, each time the one that explains most of
what is left of the update (orthogonal matching pursuit). It needs `up` not to be zero, as from the second round on; Adam's first step
keeps little more than the gradient's signs, and that is enough.

Shape suffixes: M rows of all matrices that read the same, I inputs, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atoll.adapters.state import AdapterState
from atoll.attacks.views import Front
from atoll.base.blocks import trace
from atoll.base.load import Base
from atoll.config.schema import Train
from atoll.tasks.batches import Batch, pad_batch
from atoll.tasks.tokens import Example, pad_id
from atoll.training.local_trainer import LocalTrainer
from atoll.training.trainer import FitPlan, TrainState

WARM_STEPS = 8
WARM_ROWS = 4


@dataclass(frozen=True, slots=True)
class _Given:
    """Batches by number, as a trainer asks for them."""

    batches: tuple[Batch, ...]

    def batch(self, step: int) -> Batch:
        return self.batches[step]


def stepped(base: Base, state: AdapterState, train: Train, batches: Sequence[Batch], dropout: float = 0.0) -> AdapterState:
    """The adapters after one optimizer step on each batch, as an edge takes them."""
    total = max(len(batches), 1) * 2  # No schedule has come to zero by then.
    trainer = LocalTrainer(base, train.model_copy(update={"warmup_steps": 0}), total, dropout, 0, "")
    return trainer.fit(TrainState(state, {}, 0), _Given(tuple(batches)), FitPlan(len(batches), 1, False), lambda _: None).state.adapter


def begun(base: Base, state: AdapterState, train: Train, public: Sequence[Tensor]) -> AdapterState:
    """The adapters, trained on a little public text where they are new: in its first round alone a run sends none that change nothing."""
    if any(bool(adapter.up_OR.any()) for adapter in state.modules.values()) or not state.modules:
        return state
    rows = [Example(row.numpy(), torch.arange(len(row)).numpy() > 0) for row in public if len(row) > 1][: WARM_STEPS * WARM_ROWS]
    pad = pad_id(base.tokenizer)
    return stepped(base, state, train, [pad_batch(rows[at : at + WARM_ROWS], pad) for at in range(0, len(rows), WARM_ROWS)])


@dataclass(frozen=True, slots=True, eq=False)
class Dictionary:
    """What the modules of the lowest adapted group read of each token."""

    names: tuple[str, ...]
    table_VI: Tensor

    @classmethod
    def of(cls, base: Base, state: AdapterState, num_tokens: int) -> Dictionary | None:
        """None where no module of a block is adapted."""
        trained = {**state.modules, **state.full_weights}
        group = next((names for group in trace(base.model).groups if (names := tuple(n for n in group if n in trained))), None)
        if group is None:
            return None
        return cls(group, Front(base.model, group[0]).of_each_token(num_tokens))

    def moved(self, before: AdapterState, after: AdapterState) -> Tensor:
        """How the rows that multiply what was read have moved. Shapes: (M, I)."""
        rows = []
        for name in self.names:
            if name in after.modules:
                rows.append(after.modules[name].down_RI - before.modules[name].down_RI)
            else:
                rows.append(after.full_weights[name].change_OI - before.full_weights[name].change_OI)
        return torch.cat(rows).float()


def picked_tokens(moved_MI: Tensor, table_VI: Tensor, count: int, excluded: Sequence[int] = ()) -> list[int]:
    """Tokens in the order in which they explain most of the update, as many as asked for."""
    mean_I = nn.functional.normalize(table_VI.mean(0), dim=0)
    moved_MI = nn.functional.normalize(_without(moved_MI, mean_I), dim=1)
    atoms_VI = nn.functional.normalize(_without(table_VI, mean_I), dim=1)
    left_MI, picked = moved_MI, list[int]()
    barred_V = torch.zeros(len(atoms_VI), dtype=torch.bool)
    barred_V[list(excluded)] = True
    basis_PI = torch.zeros(0, table_VI.shape[1])
    while len(picked) < min(count, len(atoms_VI) - len(excluded)):
        worth_V = (atoms_VI @ left_MI.T).pow(2).sum(1).masked_fill(barred_V, -1.0)
        best = int(worth_V.argmax())
        new_I = atoms_VI[best] - basis_PI.T @ (basis_PI @ atoms_VI[best])
        new_I = new_I - basis_PI.T @ (basis_PI @ new_I)
        picked.append(best)
        barred_V[best] = True
        if new_I.norm() > 1e-4:
            basis_PI = torch.cat([basis_PI, nn.functional.normalize(new_I, dim=0)[None]])
            left_MI = moved_MI - (moved_MI @ basis_PI.T) @ basis_PI
    return picked


def commonest(public: Sequence[Tensor], count: int) -> list[int]:
    """The commonest tokens of public text: what is known without an update."""
    return [token for token, _ in Counter(token for row in public for token in row.tolist()).most_common(count)]


def _without(rows: Tensor, direction_I: Tensor) -> Tensor:
    return rows - (rows @ direction_I)[..., None] * direction_I
