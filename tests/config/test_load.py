"""What run.toml, its overrides and its paths come to."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from atoll.config import schema
from atoll.config.load import changed, config_hash, load, load_config, resolve_path, resolved, restored
from atoll.errors import (
    AtollError,
    BadValueError,
    ConflictError,
    InputError,
    ManyErrors,
    OverrideError,
    UnavailableError,
    UnknownKeyError,
)  # fmt: skip
from atoll.registry.methods import METHODS

# The canonical file of the contract: every key with a fixed name.
CANONICAL = """
[run]
name = "clinics"
seed = 0
rounds = 5
compare = ["local-only", "central"]
[model]
base = "tiny"
quantize = "auto"
cut = { front = 1, back = 0 }
precision = "fp32"
[data]
train = "notes.csv"
eval = "notes-eval.csv"
prompt = "{mr} ->"
completion = " {ref}"
max_length = 256
train_rows = 2000
eval_rows = 200
partition = "iid"
[adapter]
kind = "lora"
targets = ["q_proj", "k_proj", "v_proj"]
rank = 8
alpha = 16
dropout = 0.0
[select]
policy = "kill-and-revive"
keep = 0.125
observe_steps = 10
every = "epoch"
killed = "offload"
[train]
learning_rate = 3e-4
schedule = "cosine"
warmup_steps = 0
batch_size = 8
local_steps = 50
weight_decay = 0.0
grad_clip = 1.0
[federated]
aggregation = "exact-svd"
min_edges = 1
round_timeout = "1 h"
[wire]
mode = "dense"
codec = "fp32"
[[edge]]
name = "north"
mode = "auto"
memory = "2 GB"
flops = "500 GFLOP/s"
bandwidth = "100 Mbit/s"
latency = "20 ms"
data = "north.csv"
"""
RESERVED = """
[plan]
importance = "svd-sensitivity"
warmup_steps = 10
ranks = [2, 4, 8, 16]
batch_sizes = [1, 2, 4, 8]
bits = [4, 8, 16]
round_deadline = "60 s"
[privacy]
clip = 1.0
noise_multiplier = 0.8
delta = 1e-5
secure_sum = false
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def _leaves(error: AtollError) -> tuple[InputError, ...]:
    return error.errors if isinstance(error, ManyErrors) else (error,)


def test_the_canonical_file_is_understood(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, CANONICAL))
    edge = config.edge[0]
    assert (edge.memory, edge.flops, edge.bandwidth, edge.latency) == (2_000_000_000, 5e11, 1e8, 0.02)
    assert config.adapter.targets == ("q_proj", "k_proj", "v_proj")
    assert config.federated.round_timeout == 3600.0
    assert config.run.compare == ("local-only", "central")


def test_reserved_options_of_the_canonical_file_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ManyErrors) as caught:
        load(_write(tmp_path, CANONICAL + RESERVED))
    assert all(isinstance(leaf, UnavailableError) for leaf in caught.value.errors)
    named = {leaf.where.rpartition(": ")[2] for leaf in caught.value.errors}
    assert named == {"privacy.clip", "privacy.noise_multiplier"}


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(_write(tmp_path, "")) == schema.RunConfig()


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert load_config(_write(tmp_path, "\ufeff[run]\nseed = 3")).run.seed == 3


def test_what_is_loaded_keeps_the_text_and_the_path(tmp_path: Path) -> None:
    path = _write(tmp_path, "[run]\nseed = 3\n# note\n")
    loaded = load(path, ["run.seed=4"])
    assert (loaded.toml_text, loaded.path, loaded.config.run.seed) == ("[run]\nseed = 3\n# note\n", path, 4)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.batch_size=4", "train", "batch_size", 4),
        ("train.learning_rate=1e-4", "train", "learning_rate", 1e-4),
        ("train.schedule=linear", "train", "schedule", "linear"),
        ('train.schedule="linear"', "train", "schedule", "linear"),
        ("run.name=2024", "run", "name", "2024"),
        ("data.prompt={mr} ->", "data", "prompt", "{mr} ->"),
        ("data.train=a=b.csv", "data", "train", "a=b.csv"),
        ('adapter.targets=["q_proj", "v_proj"]', "adapter", "targets", ("q_proj", "v_proj")),
        ("adapter.targets=attention", "adapter", "targets", "attention"),
        ("federated.round_timeout=5 min", "federated", "round_timeout", 300.0),
        ("train.gradient_checkpointing=true", "train", "gradient_checkpointing", True),
        ("model.cut.front=1", "model", "cut", schema.Cut()),
    ],
)
def test_an_override_is_toml_or_else_text(tmp_path: Path, override: str, section: str, key: str, value: object) -> None:
    config = load_config(_write(tmp_path, '[data]\ncompletion = "{ref}"\nprompt = ""'), [override])
    assert getattr(getattr(config, section), key) == value


def test_an_override_of_one_edge_and_the_later_of_two_wins(tmp_path: Path) -> None:
    path = _write(tmp_path, '[[edge]]\nname = "north"\n[[edge]]\nname = "st.ives"\n')
    config = load_config(path, ["edge.st.ives.memory=1 GB", "edge.st.ives.memory=2 GB", "edge.north.rank=4"])
    assert [(edge.memory, edge.rank) for edge in config.edge] == [(None, 4), (2_000_000_000, None)]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_switch_and_what_is_set_after_it_counts(tmp_path: Path, name: str) -> None:
    path, later = _write(tmp_path, "[run]\nrounds = 6\n"), ["adapter.alpha=8", "run.placement=local"]
    config = load_config(path, [f"method={name}", *later])
    assert config == load_config(path, [*METHODS[name], *later])
    assert (config.adapter.alpha, config.run.placement) == (8, "local")


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_written_for_one_method_goes_with_any_other(tmp_path: Path, name: str) -> None:
    text = '[run]\nrounds = 6\n[plan]\npolicy = "fedpipe"\nrefresh = 2\n[federated]\nclip_update = "auto"\n'
    plan = load_config(_write(tmp_path, text), [f"method={name}"]).plan
    assert plan.refresh == (2 if plan.policy == "fedpipe" and plan.importance != "none" else None)
    with pytest.raises(ConflictError, match="clip_update"):
        load_config(_write(tmp_path, text), ["method=hetlora", "federated.clip_update=1.0"])


def test_a_run_written_for_few_bits_has_a_method_without_them(tmp_path: Path) -> None:
    path = _write(tmp_path, '[model]\nquantize = 4\n[plan]\npolicy = "fedpipe"\n')
    config = load_config(path, ["method=fedpipe-without-quantization"])
    assert (config.plan.bits, config.model.quantize) == ((16,), "auto")
    again = changed(load(path), ["train.batch_size=4"]).config
    assert (again.plan.bits, again.model.quantize) == ((4, 8, 16), 4)


def test_methods_are_documented_with_their_settings() -> None:
    rows = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    written = {cells[1].strip().strip("`"): re.findall("`([^`]+)`", cells[3]) for row in rows if len(cells := row.split("|")) == 5}
    known = {name: [setting for word in written[name] for setting in METHODS.get(word, (word,))] for name in METHODS}
    assert {name: dict(word.split("=") for word in words) for name, words in known.items()} == {
        name: dict(word.split("=") for word in words) for name, words in METHODS.items()
    }


def test_a_method_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(OverrideError) as caught:
        load(_write(tmp_path, ""), ["method=hetlor"])
    assert (caught.value.where, caught.value.got, caught.value.do) == ("--method", "hetlor", "did you mean hetlora?")
    assert "fedpipe-without-filling" in caught.value.expected


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    assert resolve_path(Path("sub/run.toml"), "a.csv") == Path("sub/a.csv")
    assert resolve_path(Path("sub/run.toml"), "/data/a.csv") == Path("/data/a.csv")
    assert resolve_path(Path("run.toml"), "~/a.csv") == Path.home() / "a.csv"
    assert load(_write(tmp_path, "")).resolve("a.csv") == tmp_path / "a.csv"


def test_the_resolved_config_comes_back_equal(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, CANONICAL))
    assert restored(resolved(config)) == config


def test_a_config_can_be_changed_and_is_checked_again(tmp_path: Path) -> None:
    loaded = load(_write(tmp_path, CANONICAL))
    after = changed(loaded, ["data.eval=other.csv", "edge.north.rank=4"])
    assert (after.config.data.eval, after.config.edge[0].rank, after.path) == ("other.csv", 4, loaded.path)
    assert changed(loaded, []) == loaded
    with pytest.raises(ConflictError):
        changed(loaded, ["data.text={ref}"])
    with pytest.raises(UnavailableError):
        changed(loaded, ["privacy.clip=1.0"])


def test_the_hash_is_of_what_holds_and_not_of_how_it_was_written(tmp_path: Path) -> None:
    plain = load_config(_write(tmp_path, ""))
    assert config_hash(load_config(_write(tmp_path, "[run]\nseed = 0 # the default"))) == config_hash(plain)
    assert config_hash(load_config(_write(tmp_path, "[run]\nseed = 1"))) != config_hash(plain)


def test_every_error_is_reported_once(tmp_path: Path) -> None:
    text = '[run]\nrounds = 0\nlr = 1\n[train]\ngradient_checkpointing = "yes"\n[select]\nevery = -1\n[model]\nquantize = 3\n'
    with pytest.raises(ManyErrors) as caught:
        load(_write(tmp_path, text), ["select.keep=7"])
    found = [(type(leaf), leaf.where.rpartition(": ")[2]) for leaf in caught.value.errors]
    assert found == [
        (BadValueError, "run.rounds"),
        (UnknownKeyError, "run.lr"),
        (BadValueError, "model.quantize"),
        (BadValueError, f"--set select.keep=7 (on top of {tmp_path / 'run.toml'})"),
        (BadValueError, "select.every"),
        (BadValueError, "train.gradient_checkpointing"),
    ]


@pytest.mark.parametrize("wrong", ["plan.bits=[3]", "plan.ranks=[0, -1]", "plan.batch_sizes=[]", "evaluate.labels=[1, 2]"])
def test_a_wrong_list_is_one_mistake_at_its_key(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(BadValueError) as caught:
        load(_write(tmp_path, ""), [wrong])
    key, _, value = wrong.partition("=")
    assert caught.value.what == f"{key} cannot be {value}"
    assert "a list, each item " in caught.value.expected


@pytest.mark.parametrize("text", ['[data]\ntext = "{a}"\n[evaluate]\nmetrics = ["bleu"]', "[data]\ntrain = 'a.csv'\neval_rows = 3"])
def test_more_conflicts(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConflictError):
        load(_write(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        'threshold = "absolute"\nleast_variation = 1e-4',
        'policy = "kill-and-revive"\nobserve_steps = 5\nevery = 6',
        'policy = "early-kill"\nobserve_steps = 5\nevery = 5',
        'policy = "kill-and-revive"\nobserve_steps = 5',
        'policy = "kill-and-revive"\nevery = 5',
        'policy = "magnitude"\nthreshold = "mean"',
        'policy = "last-layers"\nkeep = 0.5',
        'policy = "snip"\nkeep = 0.5\ndraw = "lottery"',
        'variation = "product-change"\nkilled = "merge"',
        'variation = "norm-change"\nkilled = "skip"\n[adapter]\nkind = "bottleneck"',
    ],
)
def test_selections_that_go_together_pass(tmp_path: Path, text: str) -> None:
    load(_write(tmp_path, f"[select]\n{text}"))


def test_metrics_with_their_columns_pass(tmp_path: Path) -> None:
    text = '[data]\ntrain = "a.csv"\neval = "b.csv"\n[evaluate]\nmetrics = ["slot_accuracy", "choice_accuracy"]\n'
    load(_write(tmp_path, text + 'slots = "mr"\nchoices = "c"\nanswer = "a"'))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('[model]\n\n\n"base" = 3', "line 4"),
        ("model.base = 3", "line 1"),
        ("[ model ]\nbase=3", "line 2"),
        ('[[edge]]\nname="a"\n\n[[edge]]\nname="b"\nrank=0', "line 6"),
        ('edge = [{ name = "a" }, { name = "b", rank = 0 }]', "line 1"),
        ("[run] # base = 3\n# base = 4\n[model]\nbase = 3", "line 4"),
    ],
)
def test_a_value_is_found_in_the_file(tmp_path: Path, text: str, where: str) -> None:
    tomllib.loads(text)
    with pytest.raises(AtollError) as caught:
        load(_write(tmp_path, text))
    assert f", {where}: " in _leaves(caught.value)[0].where


@pytest.mark.parametrize(("text", "do"), [
    ('[[edge]]\nname = "the north"', "give name such a value"),
    ("[run]\nrounds = 0", "give rounds such a value, or leave the key out for its default"),
])  # fmt: skip
def test_only_a_key_that_may_be_left_out_is_told_to_be(tmp_path: Path, text: str, do: str) -> None:
    with pytest.raises(BadValueError) as caught:
        load(_write(tmp_path, text))
    assert caught.value.do == do


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_named: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(InputError, match="cannot be read") as caught:
        load(tmp_path / "run.toml")
    assert caught.value.got == "Permission denied"
