"""Settings of [plan] and [federated] that exclude each other: named by key, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.config.load import load
from atoll.errors import AtollError, ConflictError, ManyErrors

FEDADAPTER = '[run]\nrounds = 4\n[plan]\npolicy = "fedadapter"\n'
FEDPIPE = '[plan]\npolicy = "fedpipe"\n'
MERGE = '[select]\npolicy = "random"\nkilled = "merge"'
CONFLICTS = [
    ('[federated]\nlate = "drop"', "federated.late", "no round_deadline", 'late = "wait"'),
    ('[federated]\nlate = "cut"', "federated.late", "no round_deadline", "add round_deadline"),
    ('[plan]\nsteps = "fill"', "plan.steps", 'plan.policy = "as-written"', 'policy = "fedpipe"'),
    ("[plan]\ndepth = 4", "plan.depth", 'plan.policy = "as-written"', "take depth out"),
    (FEDPIPE + 'depth = "auto"\n[adapter]\nstart = "before"', "plan.depth", 'depth = "auto"', "adapter.start"),
    ("[plan]\nrefresh = 2", "plan.refresh", 'plan.policy = "as-written"', "take refresh out"),
    ('[plan]\nimportance_file = "i.json"', "plan.importance_file", 'plan.policy = "as-written"', "take importance_file out"),
    (FEDADAPTER + "refresh = 2", "plan.refresh", 'plan.policy = "fedadapter"', "take refresh out"),
    (FEDPIPE + '[adapter]\nkind = "bottleneck"', "plan.policy", 'adapter.kind = "bottleneck"', "choose another of the two"),
    (FEDPIPE + "warmup_steps = 1", "plan.warmup_steps", "warmup_steps = 1", "gradient-weight"),
    (FEDPIPE + "bits = [8, 16]\n[model]\nquantize = 4", "plan.bits", "quantize = 4 beside bits = [8, 16]", 'quantize = "auto"'),
    (FEDPIPE + "bits = [4, 8]\n[model]\nquantize = 4", "plan.bits", "quantize = 4 beside bits = [4, 8]", "take bits out"),
    (FEDPIPE + 'importance = "none"\nrefresh = 1', "plan.refresh", 'importance = "none"', "take refresh out"),
    (FEDPIPE + 'importance_file = "i.json"\nrefresh = 1', "plan.refresh", 'importance_file = "i.json"', "take refresh out"),
    (FEDADAPTER + "ranks = [1, 2, 3, 4, 5]", "plan.ranks", "4 rounds, 5 ranks", "raise run.rounds"),
    (FEDADAPTER + "ranks = [8, 4]", "plan.ranks", "[8, 4]", "in order"),
    (FEDADAPTER + '[adapter]\nstart = "before"', "adapter.start", 'plan.policy = "fedadapter"', "take it out"),
    (FEDADAPTER + '[[edge]]\nname = "a"\nrank = 3', "edge.a.rank", 'plan.policy = "fedadapter"', "take it out"),
    (FEDPIPE + MERGE, "select.killed", 'plan.policy = "fedpipe"', 'killed = "offload"'),
    ("[model]\nquantize = 8\n" + MERGE, "select.killed", "model.quantize = 8", 'killed = "offload"'),
    ('[run]\ncompare = ["homogeneous"]\n' + MERGE, "select.killed", "run.compare", 'killed = "offload"'),
    (MERGE + '\n[[edge]]\nname = "a"\nbits = 16', "select.killed", "bits = 16 of edge a", 'killed = "offload"'),
    ('[[edge]]\nname = "a"\nmode = "split"\nbits = 8', "edge.a.bits", 'bits = 8 beside mode = "split"', "take bits out"),
    ('[federated]\ncombine = "median"\naggregation = "stack"', "federated.combine", 'aggregation = "stack"', 'aggregation = "exact-svd"'),
    ('[federated]\ncombine = "trimmed-mean"\naggregation = "zero-pad"', "federated.combine", "zero-pad", "take combine out"),
    ('[federated]\ncombine = "median"\n[adapter]\nkind = "bottleneck"', "federated.combine", "bottleneck", 'kind = "lora"'),
    ('[federated]\nclip_update = 1.0\naggregation = "residual"', "federated.clip_update", "residual", 'aggregation = "stack"'),
    ('[federated]\nclip_update = "auto"\n[adapter]\nkind = "bottleneck"', "federated.clip_update", "bottleneck", 'kind = "lora"'),
    ('[federated]\ncombine = "median"\ntrim = 0.1', "federated.trim", 'combine = "median"', "take trim out"),
    (FEDADAPTER + '[select]\npolicy = "random"', "select.policy", 'policy = "random"', 'policy = "all"'),
]  # fmt: skip


def found(tmp_path: Path, text: str) -> list[AtollError]:
    (tmp_path / "run.toml").write_text(text)
    try:
        load(tmp_path / "run.toml")
    except ManyErrors as several:
        return list(several.errors)
    except AtollError as one:
        return [one]
    return []


@pytest.mark.parametrize(("text", "key", "got", "do"), CONFLICTS, ids=[f"{number}-{row[1]}" for number, row in enumerate(CONFLICTS)])
def test_what_excludes_each_other_is_one_page(tmp_path: Path, text: str, key: str, got: str, do: str) -> None:
    (error,) = found(tmp_path, text)
    assert isinstance(error, ConflictError)
    assert error.where.endswith(f": {key}")
    assert got in error.got
    assert do in error.do


@pytest.mark.parametrize(
    "text",
    [
        '[federated]\nlate = "drop"\n[plan]\nround_deadline = "60 s"', '[plan]\nround_deadline = "60 s"',
        FEDPIPE + 'steps = "fill"\nrefresh = 2', FEDPIPE + 'importance_file = "i.json"\nwarmup_steps = 1',
        FEDPIPE + 'importance = "gradient-weight"\nwarmup_steps = 1', FEDPIPE + 'importance = "none"\nwarmup_steps = 1',
        '[federated]\ncombine = "trimmed-mean"\ntrim = 0.1\nclip_update = 2.0\nmax_norm = 10.0', '[federated]\ncombine = "median"',
        '[federated]\nclip_update = "auto"\naggregation = "stack"', '[federated]\ncombine = "median"\n[adapter]\nkind = "full"',
        FEDPIPE + "[model]\nquantize = 4", FEDPIPE + "bits = [4]\n[model]\nquantize = 4", FEDPIPE + "bits = [4, 8]",
        "[plan]\nbits = [8]\n[model]\nquantize = 4", FEDPIPE + '[federated]\naggregation = "stack"', FEDADAPTER,
        FEDADAPTER + 'ranks = [4, 4]\n[adapter]\nkind = "bottleneck"',
    ],
)  # fmt: skip
def test_what_goes_together_passes(tmp_path: Path, text: str) -> None:
    assert found(tmp_path, text) == []
