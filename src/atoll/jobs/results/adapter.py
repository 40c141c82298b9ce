"""How a run's adapter is written, and whether PEFT would load it."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from atoll.adapters.peft_files import Form, check_adapter, check_peft_loads, check_peft_means
from atoll.adapters.state import AdapterState
from atoll.base.load import Base
from atoll.config.load import LoadedConfig
from atoll.jobs.inputs import public_name


def written_form(base: Base, loaded: LoadedConfig) -> Form:
    """What a state of this base is written with."""
    embeddings = {name for name, module in base.model.named_modules() if isinstance(module, nn.Embedding)}
    return Form(public_name(loaded), base.transposed, tuple(base.head), base.labels, frozenset(embeddings))


def check_result(base: Base, state: AdapterState, loaded: LoadedConfig) -> None:
    """Whether PEFT would load this state with the base that it is trained on.

    Raises: AdapterFitError.
    """
    if state.kind == "lora":
        check_peft_loads(state, written_form(base, loaded), _skeleton(base))


def check_given(folder: Path, base: Base) -> None:
    """Whether an adapter folder that is not this run's own means on this base what PEFT makes of it.

    Raises: AdapterFolderError, AdapterFitError.
    """
    check_adapter(folder, base.model)
    check_peft_means(folder, _skeleton(base))


def _skeleton(base: Base) -> nn.Module:
    # As the library makes it, without weights: blocks that run in a host are in it, too.
    with torch.device("meta"):
        return type(base.model)(copy.deepcopy(base.model.config))
