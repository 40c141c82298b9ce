"""atoll edge: train this machine's adapter against a host; data and adapter stay here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from atoll.commands.train import RunResult, train_job
from atoll.config.load import LoadedConfig, load
from atoll.errors import ConflictError
from atoll.jobs.job import prepared
from atoll.jobs.split import HostAccess, with_fetched_base
from atoll.runs.events import Event


def edge(
    config_path: str | Path, host: HostAccess, *, name: str | None = None, fetch_base: Path | None = None, out: Path | None = None,
    overrides: Sequence[str] = (), observers: Sequence[Callable[[Event], None]] = (),
) -> RunResult:  # fmt: skip
    """Train the edge called `name` (needed where run.toml has several) with the blocks of the base in the host.

    With `fetch_base` the device's part of the base is what lies in that folder; where nothing does, it is fetched from the host first.

    Raises: as `atoll.train`; HostRefusedError, HostLostError.
    """
    loaded = load(Path(config_path), overrides)
    only = _which(loaded, name)
    if fetch_base is not None:
        loaded = with_fetched_base(loaded, host, fetch_base)
    return train_job(prepared(loaded, host, only), out, observers)


def _which(loaded: LoadedConfig, name: str | None) -> str | None:
    """Which of the edges this machine is; None where the config has none.

    Raises: ConflictError where that is not clear, or the edge is to train locally.
    """
    edges = loaded.config.edge
    names = ", ".join(edge.name for edge in edges)
    if not edges and name is None:
        _check_split("[run]", "placement", loaded.config.run.placement)
        return None
    chosen = [edge for edge in edges if edge.name == name or (name is None and len(edges) == 1)]
    if not chosen:
        raise ConflictError(
            "it is not clear which edge this machine is", where="atoll edge", got=name or "no --edge",
            expected=f"one of {names}" if names else "no --edge, as run.toml has no [[edge]]", do="name it with --edge NAME",
        )  # fmt: skip
    _check_split(f"edge {chosen[0].name}", "mode", chosen[0].mode)
    if chosen[0].mode == "auto":
        _check_split("[run]", "placement", loaded.config.run.placement)
    return chosen[0].name


def _check_split(where: str, key: str, value: str) -> None:
    if value not in ("auto", "split"):
        raise ConflictError(
            "the edge is not to train against a host", where=where, got=f'{key} = "{value}"', expected='"split" or "auto"',
            do=f"use `atoll train`, or change the {key}",
        )  # fmt: skip
