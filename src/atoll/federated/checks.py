"""What an edge's answer must be like before it counts. Every refusal names the edge, what came, and what was expected."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.errors import AdapterFitError, UpdateRefusedError
from atoll.federated.aggregation.norms import LARGEST_NORM, factor_norm, product_norm
from atoll.federated.aggregation.spool import Contribution
from atoll.federated.figures import shown
from atoll.federated.flower import ArrayRecord, RecordDict
from atoll.units import counted

_MOST_EXAMPLES = 2**40
_FEW_BYTES, _MODULE_BYTES = 2**16, 2**10
"""Room for figures and receipt, and for what is said of a module by its name."""
_SAME_BASE = "use the same base and [adapter] on every edge"


def check_contents(
    edge: str, content: RecordDict, records: Collection[str], arrays: Mapping[str, Mapping[str, int]], num_modules: int
) -> None:  # fmt: skip
    """Refuse an answer that holds more than was asked for, before any of it is read; `records` are those that may be in it.

    `arrays` are the most bytes of every array, by record and name. The rest has a room of its own for so many modules.

    Raises: UpdateRefusedError; what counting a foreign record's bytes raises.
    """
    where, most = f"edge {edge}", _FEW_BYTES + num_modules * _MODULE_BYTES
    for name, record in content.items():
        allowed = arrays.get(name, {})
        if name not in records or (isinstance(record, ArrayRecord) and name not in arrays):
            raise _unasked(where, f"a record {shown(name)}", f"of {', '.join(sorted(records))}")
        for key, array in record.items() if isinstance(record, ArrayRecord) else ():
            if key not in allowed:
                raise _unasked(where, f"an array {shown(key)}", "arrays of a module that the edge was given")
            if len(array.data) > allowed[key]:
                raise _unasked(where, f"{shown(key)} of {len(array.data)} bytes", f"at most {allowed[key]} bytes")
    rest = sum(record.count_bytes() for record in content.values() if not isinstance(record, ArrayRecord))
    if rest > most:
        raise _unasked(where, f"{counted(rest, 'byte')} beside its arrays", f"at most {most}")


def _unasked(where: str, got: str, expected: str) -> UpdateRefusedError:
    return UpdateRefusedError(
        "an answer holds what was not asked for", where=where, got=got, expected=expected,
        do="run the same version of Atoll everywhere; leave the edge out if it cannot be trusted",
    )  # fmt: skip


def check_update(contribution: Contribution, sent: AdapterState, max_norm: float | None = None) -> None:
    """Refuse an update that must not be averaged; `sent` is what the edge was given, `max_norm` the most that a module may come to.

    Without one it is LARGEST_NORM: nothing that is counted brings others' training to numbers that are not finite.

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
    _check_numbers(where, state, max_norm)


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


def _form(adapter: ModuleAdapter) -> str:
    dtypes = " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in adapter.tensors}))
    return f"(inputs, outputs) = {adapter.size}, rank {adapter.rank}, scaling {adapter.scaling!r}, {dtypes}"


def _check_numbers(where: str, state: AdapterState, max_norm: float | None) -> None:
    for name, part in state.parts.items():
        if not all(bool(tensor.isfinite().all()) for tensor in part.tensors):
            raise UpdateRefusedError(
                "an update holds numbers that are not finite", where=where, got=f"NaN or infinity in {name}", expected="finite numbers",
                do="lower learning_rate, or set grad_clip",
            )  # fmt: skip
        for what, norm, most in (
            ("a norm", product_norm(part, state.kind), max_norm or LARGEST_NORM),
            ("factors with a norm", factor_norm(part), max(LARGEST_NORM, max_norm or 0.0)),
        ):
            if norm > most:
                raise UpdateRefusedError(
                    "an update is too large", where=where, got=f"{name} comes to {what} of {norm:.4g}", expected=f"at most {most:g}",
                    do="lower learning_rate, or raise max_norm below [federated]; leave the edge out if it cannot be trusted",
                )  # fmt: skip
