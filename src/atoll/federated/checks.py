"""What an edge's answer must be like before it counts. Every refusal names the edge, what came, and what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.low_rank import squared_norm
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.errors import AdapterFitError, UpdateRefusedError
from atoll.federated.aggregation.edge_parts import LARGEST_FP16, Precision
from atoll.federated.aggregation.spool import Contribution

_LARGEST = math.sqrt(torch.finfo(torch.float32).max)
"""The square of a larger number is none in fp32: no optimizer and no norm could go on from it."""
_MOST_EXAMPLES = 2**40
_SAME_BASE = "use the same base and [adapter] on every edge"


def check_update(contribution: Contribution, sent: AdapterState, max_norm: float | None = None, precision: Precision = "fp32") -> None:
    """Refuse an update that must not be averaged; `sent` is what the edge was given, `max_norm` the most that a module may come to.

    In fp16 no number may be larger than what can be sent on, whatever it came in.

    Raises: UpdateRefusedError, AdapterFitError; both name edge and module.
    """
    where = f"edge {contribution.edge}"
    state = contribution.state
    if state.kind != sent.kind:
        raise AdapterFitError(
            "an update does not fit the common adapter", where=where, got=f"a {state.kind} adapter", expected=f"a {sent.kind} adapter",
            do=_SAME_BASE,
        )  # fmt: skip
    for name, adapter in state.modules.items():
        given = sent.modules.get(name)
        if given is None or _form(adapter) != _form(given):
            raise AdapterFitError(
                "an update does not fit the common adapter", where=where, got=f"{name}: {_form(adapter)}",
                expected="a module that the edge was given" if given is None else _form(given), do=_SAME_BASE,
            )  # fmt: skip
    for name, change in state.full_weights.items():
        start = sent.full_weights.get(name)
        if start is None or [(t.shape, t.dtype) for t in change.tensors] != [(t.shape, t.dtype) for t in start.tensors]:
            raise AdapterFitError(
                "an update does not fit what the edges share", where=where, got=f"the weight of {name}, {change.size}",
                expected="weights that the edge was given, of their sizes", do=_SAME_BASE,
            )  # fmt: skip
    _check_numbers(where, state, max_norm, LARGEST_FP16 if precision == "fp16" else _LARGEST)


def check_examples(edge: str, num_examples: int, declared: int | None) -> None:
    """Refuse a number of examples that cannot be, or another than in the edge's first answer: its update weighs by it.

    Raises: UpdateRefusedError.
    """
    if not 0 < num_examples <= _MOST_EXAMPLES:
        what = "an update of more data than there can be" if num_examples > 0 else "an update without data"
        raise UpdateRefusedError(
            what, where=f"edge {edge}", got=f"{num_examples} examples", expected=f"1 to {_MOST_EXAMPLES}", do="check the edge's data",
        )  # fmt: skip
    if declared is not None and num_examples != declared:
        raise UpdateRefusedError(
            "an edge's number of examples changed during the run", where=f"edge {edge}", got=f"{num_examples} examples",
            expected=f"{declared}, as in its first answer", do="start a new run when an edge's data change",
        )  # fmt: skip


def whole_number(numbers: Mapping[str, object], key: str) -> int:
    """A count that an edge reports.

    Raises: KeyError, ValueError.
    """
    value = numbers[key]
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} = {value!r} where a whole number of 0 or more belongs")
    return value


def bad_figures(edge: str, problem: Exception) -> UpdateRefusedError:
    """The refusal of an answer whose figures are missing or of the wrong type."""
    got = f"no {problem.args[0]}" if isinstance(problem, KeyError) else str(problem)
    return UpdateRefusedError(
        "an update's figures cannot be used", where=f"edge {edge}", got=got, expected="whole numbers of 0 or more, and a loss",
        do="run the same version of Atoll everywhere",
    )  # fmt: skip


def _form(adapter: ModuleAdapter) -> str:
    dtypes = " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in adapter.tensors}))
    return f"(inputs, outputs) = {adapter.size}, rank {adapter.rank}, scaling {adapter.scaling!r}, {dtypes}"


def _check_numbers(where: str, state: AdapterState, max_norm: float | None, most: float) -> None:
    for name, part in state.parts.items():
        if not all(bool(tensor.isfinite().all()) for tensor in part.tensors):
            raise UpdateRefusedError(
                "an update holds numbers that are not finite", where=where, got=f"NaN or infinity in {name}", expected="finite numbers",
                do="lower learning_rate, or set grad_clip",
            )  # fmt: skip
        largest = max(_largest(tensor) for tensor in part.tensors)
        if largest > most:
            raise UpdateRefusedError(
                "an update is too large", where=where, got=f"{largest:.3g} in {name}", expected=f"numbers of at most {most:.3g}",
                do="lower learning_rate, or set grad_clip",
            )  # fmt: skip
        norm = 0.0 if max_norm is None else _norm(part)
        if max_norm is not None and norm > max_norm:
            raise UpdateRefusedError(
                "an update is too large", where=where, got=f"{name} comes to a norm of {norm:.4g}", expected=f"at most {max_norm:g}",
                do="raise max_norm below [federated], or leave the edge out if it cannot be trusted",
            )  # fmt: skip


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _norm(part: ModuleAdapter | FullWeightDelta) -> float:
    if isinstance(part, ModuleAdapter):
        return math.sqrt(squared_norm(part.up_OR.double() * part.scaling, part.down_RI.double()))
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in part.tensors))
