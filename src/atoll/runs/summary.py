"""summary.json: what a run came to, as programs may rely on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Literal

from atoll.errors import RunFolderError
from atoll.runs.files import write_json
from atoll.runs.layout import read_object

Scores = Mapping[str, float | None]  # "loss" in nats per completion token, "perplexity", and the task's metrics


@dataclass(frozen=True, slots=True)
class LocalOnly:
    """Every edge alone: the mean over edges, and each edge's scores."""

    mean: Scores
    edges: Mapping[str, Scores]


@dataclass(frozen=True, slots=True)
class Homogeneous:
    """One rank, batch and width for all edges that can hold them."""

    scores: Scores
    edges: tuple[str, ...]
    simulated_seconds: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The rows of the comparison; None where the run has no held-out rows or did not ask."""

    base: Scores | None = None
    adapted: Scores | None = None
    local_only: LocalOnly | None = None
    central: Scores | None = None
    homogeneous: Homogeneous | None = None
    personal: Mapping[str, Mapping[str, Scores]] | None = None
    """By edge, on its own held-out rows: "base", "federated", "personal", and "local_only" and "central" where the run compares."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Really written to sockets or handed to the engine, seen from the edges.

    Where edges train against a host, also the tensor bytes of their exchanges by formula, both ways together: what several modules read
    counted once (shared) or once for each of them (unshared), for the modules that were active and for the full pool all the time; and
    the bytes really written by message kind.
    """

    up_bytes: int = 0
    down_bytes: int = 0
    formula_shared_bytes: int | None = None
    formula_unshared_bytes: int | None = None
    full_pool_shared_bytes: int | None = None
    full_pool_unshared_bytes: int | None = None
    up_bytes_by_kind: Mapping[str, int] | None = None
    down_bytes_by_kind: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class EdgeCompute:
    """Floating-point operations on the edges, and their parts; `full_pool`: with every module active all the time."""

    flops: float = 0.0
    adapter_flops: float = 0.0
    head_flops: float = 0.0
    block_flops: float = 0.0
    full_pool_adapter_flops: float = 0.0
    full_pool_block_flops: float = 0.0


@dataclass(frozen=True, slots=True)
class Durations:
    """`simulated`: by the edges' declared speed and bandwidth; None where none is declared."""

    wall: float = 0.0
    simulated: float | None = None


@dataclass(frozen=True, slots=True)
class FirstStepFlops:
    """Floating-point operations of an edge's first step, as counted and by formula: of blocks and adapters, and of the head apart."""

    counted: int
    formula: int
    counted_head: int
    formula_head: int


@dataclass(frozen=True, slots=True)
class EdgeSummary:
    """One edge; `ranks` by module name."""

    name: str
    mode: Literal["local", "split", "cloud"]
    bits: int
    batch_size: int
    ranks: Mapping[str, int]
    steps: int
    predicted_peak_bytes: int | None
    measured_peak_bytes: int | None
    active_share: float
    up_bytes: int
    down_bytes: int
    dropped_rounds: int
    first_step_flops: FirstStepFlops | None = None
    """None where nothing is computed on the edge, or no step of it counted for a round."""
    num_trainable: int = 0
    """Numbers that it trains."""
    first_round: int = 1
    """From which on it takes part; later than 1 for one that joined while the run went on."""
    under_training: float = 0.0
    """Share of a round's steps that it cannot finish by the deadline, by declared speed and link."""


@dataclass(frozen=True, slots=True)
class WireSummary:
    """How adapters travelled between an edge and its host."""

    mode: str
    why: str


@dataclass(frozen=True, slots=True)
class LeftOutSummary:
    """An edge for which nothing fits."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class PrivacySpent:
    """The guarantee of the whole run, where it has one; and what attacks on it recovered, where `atoll audit` was asked."""

    epsilon: float | None = None
    delta: float | None = None
    audit: Mapping[str, object] | None = None
    """As `atoll audit --json` has it, without the rows that it shows."""


@dataclass(frozen=True, slots=True)
class Summary:
    """summary.json."""

    status: Literal["complete", "interrupted", "failed"]
    eval: Evaluation = field(default_factory=Evaluation)
    traffic: Traffic = field(default_factory=Traffic)
    edge_compute: EdgeCompute = field(default_factory=EdgeCompute)
    seconds: Durations = field(default_factory=Durations)
    edges: tuple[EdgeSummary, ...] = ()
    left_out: tuple[LeftOutSummary, ...] = ()
    privacy: PrivacySpent | None = None
    wire: Mapping[str, WireSummary] = field(default_factory=dict)
    """By edge that trains against a host."""
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """As summary.json holds it: local_only and homogeneous are scores with what is theirs beside them; rows not asked for are not."""
        value = dataclasses.asdict(self)
        value["traffic"] = {name: number for name, number in value["traffic"].items() if number is not None}
        value["eval"] = {name: scores for name, scores in value["eval"].items() if scores is not None or name in ("base", "adapted")}
        if self.eval.local_only is not None:
            value["eval"]["local_only"] = {**self.eval.local_only.mean, "edges": dict(self.eval.local_only.edges)}
        if self.eval.homogeneous is not None:
            row = self.eval.homogeneous
            value["eval"]["homogeneous"] = {**row.scores, "edges": row.edges, "simulated_seconds": row.simulated_seconds}
        return value


def write_summary(path: Path, summary: Summary) -> None:
    """Write summary.json whole or not at all."""
    write_json(path, summary.to_json())


def read_summary(path: Path) -> Summary:
    """What `write_summary` wrote; keys that a later version added are left out.

    Raises: RunFolderError if it is missing, damaged, or lacks a field.
    """
    from pydantic import TypeAdapter, ValidationError

    value = read_object(path)
    rows = value.get("eval")
    if isinstance(rows, dict):
        value["eval"] = rows = dict(rows)
        if isinstance(mean := rows.get("local_only"), dict):
            rows["local_only"] = {"edges": mean.pop("edges", {}), "mean": mean}
        if isinstance(scores := rows.get("homogeneous"), dict):
            own = {key: scores.pop(key) for key in ("edges", "simulated_seconds") if key in scores}
            rows["homogeneous"] = {**own, "scores": scores}
    try:
        return TypeAdapter(Summary).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        got = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        do = "the file was changed after the run, or another version wrote it; run `atoll train` again"
        raise RunFolderError("summary.json lacks what it must have", where=str(path), got=got, expected="a summary", do=do) from None


def versions() -> dict[str, str]:
    """Versions of what decides the result, without importing any of it."""
    found = {"python": python_version()}
    for name in ("atoll", "torch", "transformers", "peft", "flwr"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
