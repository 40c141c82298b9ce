"""A finished run, opened again: its config, base and adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from atoll.adapters.peft_files import load_adapter, read_labels
from atoll.adapters.state import AdapterState
from atoll.base.classifier import load_classifier
from atoll.base.load import Base, load_base
from atoll.base.quantize import Bits
from atoll.config.conflicts import classes_in_a_host
from atoll.config.load import LoadedConfig, restored
from atoll.cost.split_traffic import largest_batch_tokens
from atoll.errors import RunFolderError
from atoll.jobs.inputs import base_source
from atoll.jobs.split import HostAccess, join
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


def open_run(run_dir: Path, host: HostAccess | None = None) -> FinishedRun:
    """The run at `run_dir`, with its base loaded; with a `host`, the device's part of it alone.

    Raises: RunFolderError where it is no run directory or has no adapter yet; what load_base and load_adapter raise.
    """
    run = RunDirectory.open(run_dir)
    loaded = run_config(run)
    if not run.adapter.is_dir():
        raise RunFolderError(
            "the run has no adapter", where=str(run.path), got="a run that did not end", expected="a finished run, with adapter/",
            do="give another run, or one of its checkpoints with --model and --adapter",
        )  # fmt: skip
    adapter = load_adapter(run.adapter)
    base, close = base_of(loaded, host, read_labels(run.adapter))
    return FinishedRun(run, loaded, base, adapter, close)


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
    if host is None:
        return loaded_base(loaded, labels), lambda: None
    if labels:
        raise classes_in_a_host(host.address)
    split = join(base_source(loaded), loaded.config, host, largest_batch_tokens(loaded.config, 1, scores=True))
    return split.base, split.close


def run_config(run: RunDirectory) -> LoadedConfig:
    """The config that the run was started with.

    Raises: RunFolderError where config.json is damaged or of another version.
    """
    values = run.read_config()
    config, folder = values.get("config"), values.get("folder")
    try:
        if not isinstance(config, dict) or not isinstance(folder, str):
            raise ValueError("no config, or no folder")
        return LoadedConfig(restored(config), Path(folder) / "run.toml", run.config_toml.read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        raise RunFolderError(
            "config.json cannot be used", where=str(run.config_json), got=str(problem).splitlines()[0],
            expected="the file as the run wrote it", do="run again with this version, from config.toml",
        ) from None  # fmt: skip
