"""A base without weights: tokenizer and modules, for who asks whether a run would begin."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from atoll.adapters.state import AdapterState
from atoll.base.load import (
    DTYPES,
    Base,
    check_folder,
    check_vocabulary,
    check_whole,
    load_causal_config,
    load_config,
    load_tokenizer,
    quiet,
)
from atoll.base.quantize import how_to_keep
from atoll.base.skeleton.build import build
from atoll.config.load import LoadedConfig
from atoll.config.schema import PRECISION_BITS
from atoll.embedded import tiny_path
from atoll.jobs.inputs import base_source
from atoll.jobs.results.adapter import check_given, check_result
from atoll.planner.edge_plan import FleetPlan


def unweighted_base(loaded: LoadedConfig, classifies: bool) -> Base:
    """The base that a config names, its weights on no device and unread; of a classifier without the head's.

    Raises: what loading it raises, but for what its weights alone tell.
    """
    name = base_source(loaded)
    source = str(tiny_path()) if name == "tiny" else name
    check_folder(source)
    check_whole(source)
    with quiet():
        config = load_config(source) if classifies else load_causal_config(source)
        tokenizer, model = load_tokenizer(name), _classifier(config) if classifies else build(source, config)
    check_vocabulary(source, model, tokenizer)
    return Base(name, model, tokenizer, any(isinstance(module, Conv1D) for module in model.modules()))


def check_bits(loaded: LoadedConfig, plan: FleetPlan) -> None:
    """Whether what keeps weights in the bits of a plan is installed.

    Raises: UnavailableError.
    """
    model = loaded.config.model
    for bits in sorted({edge.bits for edge in plan.edges if edge.mode == "local"} - {PRECISION_BITS[model.precision]}):
        how_to_keep(bits, DTYPES[model.precision])  # type: ignore[arg-type]


def check_without_weights(loaded: LoadedConfig, base: Base, start: AdapterState) -> None:
    """Whether the adapter to start from, and what a run would write, mean to PEFT what they mean here.

    Raises: AdapterFolderError, AdapterFitError.
    """
    if loaded.config.model.task == "classify":
        return
    if loaded.config.adapter.start is not None:
        check_given(loaded.resolve(loaded.config.adapter.start), base)
    check_result(base, start, loaded)


def _classifier(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
