"""Adapters and optimizer states as Flower records: raw little-endian bytes with their dtype, never through numpy or pickle."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from atoll.adapters.full_weights import FullWeightDelta
from atoll.adapters.state import AdapterState, Kind, ModuleAdapter
from atoll.errors import UpdateRefusedError
from atoll.federated.aggregation.edge_parts import Precision
from atoll.federated.figures import MALFORMED, said
from atoll.federated.flower import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from atoll.training.trainer import ModuleStatistics, Moments, OptimizerState
from atoll.units import counted

RAW = "atoll.raw.le"
"""Flower's `stype` of our arrays: plain little-endian bytes, row by row."""
ADAPTER = "adapter"
"""Key of what is trained, in a message to an edge and in its answer."""
FROZEN_DELTA = "frozen_delta"
"""Key of the frozen delta, in a message to an edge; absent where there is no such part."""
WORK_ORDER = "work_order"
"""Key of what an edge on another machine is to do, in a message to it."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

assert sys.byteorder == "little", "tensors travel in memory order, which must be little-endian"


def put_adapter(record: RecordDict, state: AdapterState, key: str = ADAPTER, precision: Precision = "fp32") -> None:
    """Write a state into a record, under the key and the key with "_config"."""
    tensors = _named(state)
    record[key] = ArrayRecord({name: to_array(tensor.half() if precision == "fp16" else tensor) for name, tensor in tensors.items()})
    config = ConfigRecord({"kind": state.kind})
    # Flower cannot count the bytes of an empty list.
    if state.modules or not state.full_weights:
        config["modules"], config["scalings"] = list(state.modules), [adapter.scaling for adapter in state.modules.values()]
    if state.full_weights:
        config["whole"] = list(state.full_weights)
    record[f"{key}_config"] = config


def array_bytes(state: AdapterState) -> dict[str, int]:
    """The most that the arrays of this state can have, by the names that `put_adapter` gives them."""
    return {name: torch.float32.itemsize * tensor.numel() for name, tensor in _named(state).items()}


def precision_of(record: RecordDict, key: str = ADAPTER) -> Precision:
    """How `put_adapter` wrote the numbers."""
    return "fp16" if any(array.dtype == "float16" for array in record.array_records[key].values()) else "fp32"


def get_adapter(record: RecordDict, key: str = ADAPTER) -> AdapterState:
    """Read what `put_adapter` wrote; fp16 becomes fp32.

    Raises: UpdateRefusedError where records or arrays are missing or malformed.
    """
    try:
        arrays, config = record.array_records[key], record.config_records[f"{key}_config"]
        kind, alone = _kind_of(config), "whole" in config and "modules" not in config
        names, scalings = ([], []) if alone else (_list_of(config, "modules"), _list_of(config, "scalings"))
        pairs = [(_number(arrays[f"{name}/down"]), _number(arrays[f"{name}/up"])) for name in names]
        modules = {
            str(name): ModuleAdapter(down, up, float(scaling))
            for name, scaling, (down, up) in zip(names, scalings, pairs, strict=True)
        }
        full_weights = {
            str(name): FullWeightDelta(
                _number(arrays[f"{name}/change"]), _number(arrays[f"{name}/bias"]) if f"{name}/bias" in arrays else None
            )
            for name in (_list_of(config, "whole") if "whole" in config else ())
        }  # fmt: skip
    except MALFORMED as problem:
        raise UpdateRefusedError(
            "a message does not hold an adapter", got=said(problem), expected="the records that Atoll's payload writes",
            do="run the same version of Atoll everywhere",
        ) from None  # fmt: skip
    return AdapterState(kind, modules, full_weights)


def put_optimizer(record: RecordDict, state: OptimizerState) -> None:
    """Write Adam's moments into a record, under "optimizer" and "optimizer_steps"."""
    arrays = {}
    for name, moments in state.items():
        arrays[f"{name}/first"], arrays[f"{name}/second"] = to_array(moments.first), to_array(moments.second)
    record["optimizer"] = ArrayRecord(arrays)
    steps: dict[str, int | float | list[int] | list[float]] = {name: moments.num_steps for name, moments in state.items()}
    record["optimizer_steps"] = MetricRecord(steps)


def get_optimizer(record: RecordDict) -> OptimizerState:
    """Read what `put_optimizer` wrote; empty where nothing was written yet."""
    if "optimizer" not in record:
        return {}
    arrays, steps = record.array_records["optimizer"], record.metric_records["optimizer_steps"]
    return {
        name: Moments(to_tensor(arrays[f"{name}/first"]), to_tensor(arrays[f"{name}/second"]), int(num_steps))  # type: ignore[arg-type]
        for name, num_steps in steps.items()
    }


def put_statistics(record: RecordDict, statistics: ModuleStatistics) -> None:
    """Write what the choice of modules goes on from, under "statistics...": the edge's own, like the moments."""
    record["statistics"] = MetricRecord(
        {"num_steps": statistics.num_steps, "num_tokens": statistics.num_tokens, "num_label_tokens": statistics.num_label_tokens}
    )
    for key in ("statistics_chosen", "statistics_moved", "statistics_moved_config"):
        if key in record:
            del record[key]
    if statistics.chosen is not None:
        record["statistics_chosen"] = ConfigRecord({"modules": list(statistics.chosen)})
    record["statistics_scores"], record["statistics_sums"] = MetricRecord(dict(statistics.scores)), MetricRecord(dict(statistics.sums))
    if statistics.moved is not None:
        put_adapter(record, statistics.moved, "statistics_moved")


def get_statistics(record: RecordDict) -> ModuleStatistics:
    """Read what `put_statistics` wrote; an empty one where nothing was written yet."""
    if "statistics" not in record:
        return ModuleStatistics()
    counts = {key: int(value) for key, value in record.metric_records["statistics"].items()}  # type: ignore[arg-type]
    scores, sums = ({k: float(v) for k, v in record.metric_records[key].items()} for key in ("statistics_scores", "statistics_sums"))  # type: ignore[arg-type]
    chosen = tuple(map(str, _list_of(record.config_records["statistics_chosen"], "modules"))) if "statistics_chosen" in record else None
    moved = get_adapter(record, "statistics_moved") if "statistics_moved" in record else None
    return ModuleStatistics(chosen, scores, moved, sums, counts["num_steps"], counts["num_tokens"], counts["num_label_tokens"])


def to_array(tensor: Tensor) -> Array:
    """A tensor as a Flower array of raw bytes: every bit is kept."""
    name = str(tensor.dtype).removeprefix("torch.")
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return Array(name, tuple(tensor.shape), RAW, data)


def to_tensor(array: Array) -> Tensor:
    """The tensor of an array that `to_array` made.

    Raises: ValueError where type, shape and number of bytes disagree.
    """
    if array.stype != RAW or array.dtype not in _DTYPES:
        raise ValueError(f"an array of type {array.stype}/{array.dtype}, not {RAW}/{' or '.join(_DTYPES)}")
    dtype, numel = _DTYPES[array.dtype], 1
    for size in array.shape:
        numel *= size
    if len(array.data) != numel * dtype.itemsize:
        raise ValueError(f"{counted(len(array.data), 'byte')} for shape {tuple(array.shape)} of {array.dtype}")
    return torch.frombuffer(bytearray(array.data), dtype=dtype).view(*array.shape) if numel else torch.empty(array.shape, dtype=dtype)


def num_bytes(record: RecordDict) -> int:
    """Bytes of all records, as Flower counts them: names, numbers and arrays."""
    return sum(part.count_bytes() for part in record.values())


def _named(state: AdapterState) -> dict[str, Tensor]:
    """All tensors of a state, by the names under which they travel."""
    tensors = dict[str, Tensor]()
    for name, adapter in state.modules.items():
        tensors[f"{name}/down"], tensors[f"{name}/up"] = adapter.down_RI, adapter.up_OR
    for name, change in state.full_weights.items():
        tensors |= {f"{name}/{side}": tensor for side, tensor in zip(("change", "bias"), change.tensors, strict=False)}
    return tensors


def _number(array: Array) -> Tensor:
    tensor = to_tensor(array)
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _list_of(config: Mapping[str, object], key: str) -> list[str | float]:
    value = config[key]
    if not isinstance(value, list):
        raise ValueError(f"{key} is not a list")
    return value


def _kind_of(config: Mapping[str, object]) -> Kind:
    match config["kind"]:
        case "lora":
            return "lora"
        case "bottleneck":
            return "bottleneck"
        case other:
            raise ValueError(f"an adapter of kind {other!r}")
