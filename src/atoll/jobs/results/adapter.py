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
from atoll.errors import OtherBaseError, RunFolderError
from atoll.jobs.inputs import public_name, public_revision
from atoll.jobs.results.config import run_config
from atoll.jobs.results.trained_on import check_trained_on, run_of
from atoll.runs.events import Advised, Event


def written_form(base: Base, loaded: LoadedConfig) -> Form:
    """What a state of this base is written with."""
    embeddings = {name for name, module in base.model.named_modules() if isinstance(module, nn.Embedding)}
    return Form(
        public_name(loaded), base.transposed, tuple(base.head), base.labels, frozenset(embeddings), public_revision(loaded),
    )  # fmt: skip


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


def check_start(loaded: LoadedConfig, base: Base) -> tuple[Event, ...]:
    """Look at the adapter that run.toml starts from, if any; what is to be told: that its run had another base, which may be meant.

    Raises: AdapterFolderError, AdapterFitError.
    """
    if loaded.config.adapter.start is None:
        return ()
    folder = loaded.resolve(loaded.config.adapter.start)
    check_given(folder, base)
    run = run_of(folder)
    try:
        # In another precision the same weights have another hash.
        if run is not None and run_config(run, trust=True).config.model.precision == loaded.config.model.precision:
            check_trained_on(run, base, loaded.config)
    except OtherBaseError as problem:
        return (Advised("", f"the adapter to start from was trained on another base: {problem.got}; {problem.expected}"),)
    except RunFolderError:
        return (Advised("", f"what {folder} was trained on is not known: the run that it lies in cannot be read"),)
    return ()


def _skeleton(base: Base) -> nn.Module:
    # As the library makes it, without weights: blocks that run in a host are in it, too.
    with torch.device("meta"):
        return type(base.model)(copy.deepcopy(base.model.config))
