"""A finished run, opened again: its config, base and adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.adapters.peft_files import check_adapter, load_adapter, read_labels
from atoll.adapters.state import AdapterState
from atoll.base.classifier import load_classifier
from atoll.base.load import Base, load_base
from atoll.base.quantize import Bits
from atoll.config.checks.whole_base import classes_in_a_host
from atoll.config.load import LoadedConfig
from atoll.cost.split_traffic import largest_batch_tokens
from atoll.errors import InputError
from atoll.jobs.inputs import base_source
from atoll.jobs.results.config import run_config, with_overrides
from atoll.jobs.results.trained_on import check_trained_on
from atoll.jobs.split import HostAccess, check_access, join
from atoll.runs.layout import RunDirectory


@dataclass(frozen=True, slots=True, eq=False)
class FinishedRun:
    """What a run directory holds for further use."""

    run: RunDirectory
    loaded: LoadedConfig
    """As it held when the run started; paths are still relative to where run.toml lay."""
    base: Base
    adapter: AdapterState
    close: Callable[[], None]
    """Ends the session with the host, where there is one."""


def open_run(
    run_dir: Path, host: HostAccess | None = None, *, trust: bool = False, other_base: bool = False, model: str | None = None,
    overrides: Sequence[str] = (),
) -> FinishedRun:  # fmt: skip
    """The run at `run_dir`, with its base loaded; with a `host`, the device's part of it alone.

    `model` is where the base is now, if it was moved; a path begins at the current folder. `overrides` change the config that held.

    Raises: TrustError where it names code and `trust` does not say that it may; RunFolderError where it is no run directory or has no
    adapter yet; OtherBaseError where the base's weights are not those of the run, and `other_base` does not say that they may; what
    load_base, load_adapter and check_adapter raise.
    """
    run = RunDirectory.open(run_dir)
    moved = [] if model is None else [f"model.base={Path(model).expanduser().absolute() if Path(model).expanduser().exists() else model}"]
    # Of all parts, only a codec is needed to go on with what a run left.
    loaded = with_overrides(run, run_config(run, trust=trust), [*overrides, *moved], trust=trust, imports=host is not None)
    run.check_finished()
    adapter = load_adapter(run.adapter)
    base, close = base_of(loaded, host, read_labels(run.adapter))
    try:
        if not other_base:
            check_trained_on(run, base, loaded.config)
        check_adapter(run.adapter, base.model)
    except InputError:
        close()
        raise
    return FinishedRun(run, loaded, base, adapter, close)


def is_chat(finished: FinishedRun) -> bool:
    """Whether the run was trained on chat messages.

    Raises: RunFolderError for a config.json that cannot be read.
    """
    return finished.run.read_config().get("form") == "messages" or finished.loaded.config.data.messages is not None


def loaded_base(loaded: LoadedConfig, labels: Sequence[str], bits: Bits | None = None) -> Base:
    """The whole base that a config names; with `labels`, as a classifier.

    Raises: what load_base and load_classifier raise.
    """
    source, model = base_source(loaded), loaded.config.model
    if labels:
        return load_classifier(source, labels, precision=model.precision, bits=bits, seed=loaded.config.run.seed)
    return load_base(source, precision=model.precision, bits=bits)


def base_of(loaded: LoadedConfig, host: HostAccess | None, labels: Sequence[str] = ()) -> tuple[Base, Callable[[], None]]:
    """The base that a config names, whole, or joined to a host; and what ends the session with the host.

    Raises: what loaded_base and join raise; ConflictError for a classifier in a host.
    """
    check_access(host)
    if host is None:
        return loaded_base(loaded, labels), lambda: None
    if labels:
        raise classes_in_a_host(host.address)
    split = join(base_source(loaded), loaded.config, host, largest_batch_tokens(loaded.config, 1, scores=True))
    return split.base, split.close
