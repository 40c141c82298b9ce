"""Adapters and optimizer states as Flower records: raw little-endian bytes with their dtype, never through numpy or pickle."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from atoll.adapters.state import AdapterState, Kind, ModuleAdapter
from atoll.engines.federated.flower import Array, ArrayRecord, ConfigRecord, RecordDict
from atoll.engines.trainer import OptimizerState
from atoll.errors import UpdateRefusedError

RAW = "atoll.raw.le"
"""Flower's `stype` of our arrays: plain little-endian bytes, row by row."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

assert sys.byteorder == "little", "tensors travel in memory order, which must be little-endian"


def put_adapter(record: RecordDict, state: AdapterState) -> None:
    """Write a state into a record, under "adapter" and "adapter_config"."""
    arrays = {}
    for name, adapter in state.modules.items():
        arrays[f"{name}/down"], arrays[f"{name}/up"] = to_array(adapter.down_RI), to_array(adapter.up_OR)
    record["adapter"] = ArrayRecord(arrays)
    scalings = [adapter.scaling for adapter in state.modules.values()]
    record["adapter_config"] = ConfigRecord({"kind": state.kind, "modules": list(state.modules), "scalings": scalings})


def get_adapter(record: RecordDict) -> AdapterState:
    """Read what `put_adapter` wrote.

    Raises: UpdateRefusedError where records or arrays are missing or malformed.
    """
    try:
        arrays, config = record.array_records["adapter"], record.config_records["adapter_config"]
        names, scalings, kind = _list_of(config, "modules"), _list_of(config, "scalings"), _kind_of(config)
        pairs = [(to_tensor(arrays[f"{name}/down"]), to_tensor(arrays[f"{name}/up"])) for name in names]
        modules = {
            str(name): ModuleAdapter(down, up, float(scaling))
            for name, scaling, (down, up) in zip(names, scalings, pairs, strict=True)
        }
    except (KeyError, ValueError, RuntimeError) as problem:
        raise UpdateRefusedError(
            "a message does not hold an adapter", got=f"{type(problem).__name__}: {problem}",
            expected="the records that Atoll's payload writes", do="run the same version of Atoll everywhere",
        ) from None  # fmt: skip
    return AdapterState(kind, modules)


def put_optimizer(record: RecordDict, state: OptimizerState) -> None:
    """Write Adam's moments into a record, under "optimizer" and "optimizer_config"."""
    record["optimizer"] = ArrayRecord({"first": to_array(state.first_moment), "second": to_array(state.second_moment)})
    record["optimizer_config"] = ConfigRecord({"num_steps": state.num_steps})


def get_optimizer(record: RecordDict) -> OptimizerState | None:
    """Read what `put_optimizer` wrote; None where nothing was written yet."""
    if "optimizer" not in record:
        return None
    arrays, num_steps = record.array_records["optimizer"], record.config_records["optimizer_config"]["num_steps"]
    assert isinstance(num_steps, int)
    return OptimizerState(to_tensor(arrays["first"]), to_tensor(arrays["second"]), num_steps)


def to_array(tensor: Tensor) -> Array:
    """A tensor as a Flower array of raw bytes; fp32 and bf16 keep every bit."""
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
        raise ValueError(f"{len(array.data)} bytes for shape {tuple(array.shape)} of {array.dtype}")
    return torch.frombuffer(bytearray(array.data), dtype=dtype).view(*array.shape) if numel else torch.empty(array.shape, dtype=dtype)


def num_bytes(record: RecordDict) -> int:
    """Bytes of all records, as Flower counts them: names, numbers and arrays."""
    return sum(part.count_bytes() for part in record.values())


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
