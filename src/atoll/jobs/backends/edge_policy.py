"""What an edge does for a coordinator at most: by its own run.toml, and by policy.toml, which its owner may make narrower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError

from atoll.config.document import Document, nearest, read_document
from atoll.config.keys import as_toml
from atoll.config.load import raise_all, tuples
from atoll.config.named_parts import wrong_key
from atoll.config.quantities import Bytes, Seconds
from atoll.config.schema import PRECISION_BITS, Edge, RunConfig, Section
from atoll.errors import BadValueError, InputError, UnknownKeyError
from atoll.planner.plan_fleet import steps_per_round
from atoll.registry.parts import find

POLICY_FILE, POLICY_SECTION = "policy.toml", "edge-policy"
Task = Literal["federated", "local-only", "homogeneous", "importance", "personal"]
_EXAMPLES: Final[Mapping[str, object]] = {
    "steps": 50, "seconds": "1 h", "bytes": "1 GB", "bits": (32,), "modes": ("local",), "rank": 16, "batch_size": 8,
    "tasks": ("federated",),
}  # fmt: skip
_HEAD = """\
# What this edge does for a coordinator at most. What run.toml in this folder says holds in any case: an order beyond it, or beyond this
# file, is refused, and both sides are told. These limits are those that run.toml had when this was written, and stay when run.toml changes:
# then change them, too, or take a line out. `atoll fleet join` reads them when it starts.
"""


class EdgePolicy(Section):
    """[edge-policy] what an edge does at most; a key that is not there is no limit beside those of run.toml."""

    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps of one round."""
    seconds: Seconds | None = None
    """Of one round's training, by this machine's clock; what takes longer is given up."""
    bytes: Bytes | None = None
    """Of one message from the coordinator."""
    bits: Annotated[tuple[Literal[4, 8, 16, 32], ...], Field(min_length=1)] | None = None
    """Widths in which the base is held."""
    modes: Annotated[tuple[Literal["local", "split"], ...], Field(min_length=1)] | None = None
    """Whether the whole base is held, or a part of it beside a host."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Of an adapter."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Rows of one micro-batch."""
    tasks: Annotated[tuple[Task, ...], Field(min_length=1)] | None = None
    """What is done: rounds, a comparison's rows ("local-only", "homogeneous"), scores of weights ("importance"), a copy ("personal")."""


def policy_of(config: RunConfig, edge: Edge, num_rows: int | None = None) -> EdgePolicy:
    """What run.toml can lead to for an edge with so many rows; a planner that is not built in may choose freely."""
    plan, train, alike = config.plan, config.train, "homogeneous" in config.run.compare
    planner = find("planner", plan.policy)
    decides, grows = planner.trait("decides"), planner.trait("grows")
    tasks: list[Task] = ["federated", *(name for name in config.run.compare if name != "central")]
    tasks += ["importance"] if plan.warms_up else []
    tasks += ["personal"] if config.federated.personal_steps is not None else []
    if not planner.is_built_in:
        return EdgePolicy(tasks=tuple(tasks))
    known_steps = train.local_epochs is None or num_rows is not None
    steps = steps_per_round(config, num_rows) if known_steps else None
    if steps is not None and decides and plan.steps == "fill":
        steps = int(plan.most_steps * steps)
    rank = edge.rank or (max(plan.ranks) if decides else config.adapter.rank)
    rank = max(plan.ranks) if grows else rank
    free = config.adapter.start is not None or config.adapter.kind == "full"  # Its ranks are those of a file, or of the weights.
    return EdgePolicy(
        steps=steps, bits=_bits(config, edge, decides=decides, alike=alike), modes=_modes(config, edge, decides=decides, alike=alike),
        rank=None if free else max(rank, config.adapter.rank if alike else 0),
        batch_size=max(train.batch_size * train.accumulate, min(plan.batch_sizes)) if decides else train.batch_size, tasks=tuple(tasks),
    )  # fmt: skip


def _bits(config: RunConfig, edge: Edge, *, decides: bool, alike: bool) -> tuple[Literal[4, 8, 16, 32], ...]:
    asked = config.model.quantize if edge.bits is None else edge.bits
    chosen = [*(config.plan.bits if decides and asked == "auto" else ()), *([max(config.plan.bits)] if alike else [])]
    chosen += [asked] if asked != "auto" else []
    # Beside a host, and where nothing else is asked for, the base has the width of its precision.
    return tuple(sorted({*chosen, PRECISION_BITS[config.model.precision]}))  # type: ignore[arg-type]


def _modes(config: RunConfig, edge: Edge, *, decides: bool, alike: bool) -> tuple[Literal["local", "split"], ...]:
    asked = config.run.placement if edge.mode == "auto" else edge.mode
    may_split = asked == "split" or (asked == "auto" and decides)
    may_be_local = asked != "split" or alike
    return tuple(mode for mode, may in (("local", may_be_local), ("split", may_split)) if may)  # type: ignore[misc]


def policy_toml(config: RunConfig, edge: Edge) -> str:
    """policy.toml as it is written first: the limits of run.toml, with a line on each."""
    policy = policy_of(config, edge).model_copy(update={"seconds": config.federated.round_timeout or None})
    if policy.steps is not None and config.federated.personal_steps is not None:
        policy = policy.model_copy(update={"steps": max(policy.steps, config.federated.personal_steps)})
    lines = [f"[{POLICY_SECTION}]"]
    for key, field in EdgePolicy.model_fields.items():
        value = getattr(policy, key)
        line = f"{key} = {as_toml(value)}" if value is not None else f"# {key} = {as_toml(_EXAMPLES[key])}"
        lines += ["", f"# {field.description}", line]
    return _HEAD + "\n".join(lines) + "\n"


def read_policy(path: Path) -> EdgePolicy:
    """The policy at `path`; without the file, no limit beside those of run.toml.

    Raises: ConfigFileError, UnknownKeyError, BadValueError; ManyErrors with all of them.
    """
    if not path.exists():
        return EdgePolicy()
    document = read_document(path)
    errors: list[InputError] = [_outside(key, document) for key in document.table if key != POLICY_SECTION]
    table = document.table.get(POLICY_SECTION, {})
    if not isinstance(table, Mapping):
        errors.append(BadValueError(
            f"{POLICY_SECTION} must be written as [{POLICY_SECTION}]", where=document.where((POLICY_SECTION,)), got=as_toml(table),
            expected=f"[{POLICY_SECTION}]", do=f"write [{POLICY_SECTION}] and its keys below it",
        ))  # fmt: skip
        table = {}
    try:
        policy = EdgePolicy.model_validate(tuples(table))
    except ValidationError as error:
        items = {item["loc"][0]: item for item in reversed(error.errors(include_url=False))}
        errors += [wrong_key(f"[{POLICY_SECTION}]", (POLICY_SECTION,), EdgePolicy, items[key], document) for key in reversed(items)]
    raise_all(errors)
    return policy


def _outside(key: str, document: Document) -> UnknownKeyError:
    do = f"did you mean [{POLICY_SECTION}]?" if nearest(key, [POLICY_SECTION]) else f"write it below [{POLICY_SECTION}], or take it out"
    return UnknownKeyError(
        f"{key!r} stands outside [{POLICY_SECTION}]", where=document.where((key,)), got=key, expected=f"[{POLICY_SECTION}]", do=do
    )
