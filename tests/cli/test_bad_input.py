"""Wrong configs and wrong command lines through the real command: exit 2, one readable page, nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest


@dataclass(frozen=True, slots=True)
class Bad:
    """A run.toml (or --set) that is wrong, and what the page must say."""

    name: str
    toml: str
    says: tuple[str, ...]
    sets: tuple[str, ...] = ()


TWO_EDGES = '[[edge]]\nname = "north"\n[[edge]]\nname = "south"\n'
CONFIGS = (
    Bad("syntax", "[train\nrank = 1", ("C101", "line 1, column 7")),
    Bad("no quotes", "[model]\nbase = tiny", ("C101", "line 2, column 8", "quotes")),
    Bad("key twice", "[run]\nseed = 1\nseed = 2", ("C101", "line 3")),
    Bad("misspelt key", "[train]\n\nlearnin_rate = 1e-3", ("C102", "line 3", "train.learnin_rate", "did you mean learning_rate?")),
    Bad("misspelt section", "[trian]\nbatch_size = 8", ("C102", "line 1", "did you mean [train]?")),
    Bad("key of another section", "[train]\nrank = 8", ("C102", "train.rank", "did you mean adapter.rank?")),
    Bad("name of another tool", "[adapter]\nlora_alpha = 8", ("C102", "adapter.lora_alpha", "alpha")),
    Bad("key without section", 'base = "tiny"', ("C102", "line 1", "did you mean base, below [model]?")),
    Bad("key of no kind", "[run]\nxyzzy = 1", ("C102", "run.xyzzy", "name, seed, rounds, placement, compare", "take xyzzy out")),
    Bad("key in an inline table", "[model]\ncut = { fornt = 1 }", ("C102", "model.cut.fornt", "did you mean front?")),
    Bad("edge in single brackets", '[edge]\nname = "north"', ("C103", "line 1", "[[edge]]")),
    Bad("section in double brackets", "[[train]]\nbatch_size = 2", ("C103", "line 1", "[train]", "[[train]]")),
    Bad("section as value", "data = 3", ("C103", "line 1", "[data]")),
    Bad("edges as text", 'edge = "north"', ("C103", "[[edge]]")),
    Bad("text for a whole number", '[run]\nrounds = "3"', ("C103", "line 2", "run.rounds", "a whole number, 1 or more", "rounds = 3")),
    Bad("text for a number", '[train]\nlearning_rate = "3e-4"', ("C103", "train.learning_rate", "learning_rate = 3e-4")),
    Bad("fraction for a whole number", "[train]\nbatch_size = 2.5", ("C103", "train.batch_size", "2.5", "a whole number")),
    Bad("number for text", "[run]\nname = 7", ("C103", "run.name", 'name = "7"')),
    Bad("true for a number", "[train]\nbatch_size = true", ("C103", "train.batch_size", "true")),
    Bad("zero", "[run]\nrounds = 0", ("C103", "run.rounds", "1 or more")),
    Bad("negative", "[train]\nlearning_rate = -1e-3", ("C103", "train.learning_rate", "above 0")),
    Bad("not a number", "[train]\nlearning_rate = nan", ("C103", "train.learning_rate", "nan")),
    Bad("infinite", "[adapter]\nalpha = inf", ("C103", "adapter.alpha", "inf")),
    Bad("above the range", "[adapter]\ndropout = 1.0", ("C103", "adapter.dropout", "below 1")),
    Bad(
        "no such choice",
        '[train]\nschedule = "cosin"',
        ("C103", "train.schedule", '"cosine", "linear", "constant"', 'did you mean "cosine"?'),
    ),
    Bad("no such metric", '[evaluate]\nmetrics = ["blue"]', ("C103", "evaluate.metrics", '"bleu"')),
    Bad("text for a list", '[run]\ncompare = "central"', ("C103", "run.compare", "a list")),
    Bad("number for targets", "[adapter]\ntargets = 3", ("C103", "adapter.targets", "text, not empty or a list")),
    Bad("no targets", "[adapter]\ntargets = []", ("C103", "adapter.targets", "not empty")),
    Bad("empty text", '[data]\ntrain = ""', ("C103", "data.train", "not empty")),
    Bad("name with a slash", '[run]\nname = "a/b"', ("C103", "run.name", "a/b", "letters, digits")),
    Bad("edge without a name", '[[edge]]\nmemory = "2 GB"', ("C103", "line 1", "edge[1].name", "missing")),
    Bad("edge name with a space", '[[edge]]\nname = "the north"', ("C103", "the north", "letters, digits")),
    Bad("size without unit", '[[edge]]\nname = "north"\nmemory = "2"', ("C103", "line 3", "edge.north.memory", "'2 GB'")),
    Bad("rate in words", '[[edge]]\nname = "north"\nbandwidth = "fast"', ("C103", "edge.north.bandwidth", "'100 Mbit/s'")),
    Bad("speed as time", '[[edge]]\nname = "north"\nflops = "3 s"', ("C103", "edge.north.flops", "'500 GFLOP/s'")),
    Bad("time as size", '[federated]\nround_timeout = "3 GB"', ("C103", "federated.round_timeout", "'1 h'")),
    Bad("time of nothing", '[plan]\nround_deadline = "0 s"', ("C103", "plan.round_deadline", "a time above 0, such as '20 ms', '60 s'")),
    Bad("time in words", '[wire]\ntimeout = "sixty"', ("C103", "wire.timeout", "a time above 0, such as '20 ms', '60 s'")),
    Bad("size of nothing", '[[edge]]\nname = "north"\nmemory = "0 GB"', ("C103", "edge.north.memory", "a size above 0, such as '2 GB'")),
    Bad("size below 0", '[[edge]]\nname = "north"\nprocess_memory = "-1 MB"', ("C103", "north.process_memory", "a size such as '2 GB'")),
    Bad("date", "[run]\nseed = 2024-01-01", ("C103", "run.seed", "2024-01-01")),
    Bad("prompt alone", '[data]\nprompt = "{a}"', ("C104", "line 2", "data.completion")),
    Bad("completion alone", '[data]\ncompletion = "{a}"', ("C104", "data.prompt")),
    Bad("text with prompt", '[data]\ntext = "{a}"\nprompt = "{b}"\ncompletion = "{c}"', ("C104", "prompt and completion and text")),
    Bad("text with messages", '[data]\ntext = "{a}"\nmessages = "b"', ("C104", "line 3", "text and messages")),
    Bad("steps with epochs", "[train]\nlocal_steps = 5\nlocal_epochs = 1", ("C104", "train.local_epochs", "5 steps and 1 epoch")),
    Bad(
        "endless warm-up", "[run]\nrounds = 2\n[train]\nlocal_steps = 5\nwarmup_steps = 10", ("C104", "train.warmup_steps", "fewer than 10")
    ),
    Bad("edges of one name", TWO_EDGES.replace("south", "north"), ("C104", "line 4", "edge.north.name")),
    Bad("too few edges", "[federated]\nmin_edges = 3\n" + TWO_EDGES, ("C104", "federated.min_edges", "at most 2")),
    Bad("no edges", "[federated]\nmin_edges = 2", ("C104", "federated.min_edges", "at most 1")),
    Bad("unequal bottlenecks", '[adapter]\nkind = "bottleneck"\n' + TWO_EDGES + "rank = 4", ("C104", "adapter.kind", "ranks 4, 8")),
    Bad("slots unnamed", '[data]\ntrain = "a.csv"\neval = "b.csv"\n[evaluate]\nmetrics = ["slot_accuracy"]', ("C104", "evaluate.slots")),
    Bad("choices unnamed", '[evaluate]\nmetrics = ["choice_accuracy"]', ("C104", "evaluate.choices and evaluate.answer")),
    Bad("threshold without value", '[select]\npolicy = "early-kill"\nthreshold = "absolute"', ("C104", "line 3", "select.least_variation")),
    Bad(
        "value of another threshold",
        '[select]\npolicy = "early-kill"\nleast_variation = 0.1',
        ("C104", "select.least_variation", 'threshold = "keep"'),
    ),
    Bad("threshold of nothing", '[select]\npolicy = "random"\nthreshold = "mean"', ("C104", "line 3", "select.threshold", '"keep"')),
    Bad(
        "lottery without a number",
        '[select]\npolicy = "early-kill"\nthreshold = "mean"\ndraw = "lottery"',
        ("C104", "line 4", "select.draw", 'threshold = "keep"'),
    ),
    Bad("lottery without scores", '[select]\npolicy = "random"\ndraw = "lottery"', ("C104", "line 3", "select.draw", "no scores")),
    Bad(
        "product of a bottleneck",
        '[adapter]\nkind = "bottleneck"\n[select]\npolicy = "early-kill"\nvariation = "product-change"',
        ("C104", "line 5", "select.variation", '"lora"'),
    ),
    Bad(
        "merged bottleneck",
        '[adapter]\nkind = "bottleneck"\n[select]\npolicy = "random"\nkilled = "merge"',
        ("C104", "select.killed", '"lora"'),
    ),
    Bad(
        "endless window",
        '[select]\npolicy = "kill-and-revive"\nobserve_steps = 5\nevery = 5',
        ("C104", "line 4", "select.every", "observe_steps = 5, every = 5"),
    ),
    Bad("metric twice", '[evaluate]\nmetrics = ["bleu", "bleu"]', ("C104", "evaluate.metrics", "twice")),
    Bad("comparison of nothing", '[data]\ntrain = "a.csv"\n[run]\ncompare = ["central"]', ("C104", "run.compare", "held-out")),
    Bad("deadline for nobody", '[federated]\nlate = "cut"', ("C104", "line 2", "federated.late", "round_deadline")),
    Bad("setting of the planner", "[plan]\nrefresh = 5", ("C104", "line 2", "plan.refresh", 'policy = "fedpipe"')),
    Bad("blind warm-up", '[plan]\npolicy = "fedpipe"\nwarmup_steps = 1', ("C104", "line 3", "plan.warmup_steps", "gradient-weight")),
    Bad("more stages than rounds", '[plan]\npolicy = "fedadapter"', ("C104", "plan.ranks", "3 rounds, 4 ranks")),
    Bad(
        "stacked bottlenecks",
        '[adapter]\nkind = "bottleneck"\n[federated]\naggregation = "stack"',
        ("C104", "line 4", "federated.aggregation", '"lora"'),
    ),
    Bad(
        "residual in a host",
        '[federated]\naggregation = "residual"\n' + TWO_EDGES + 'mode = "split"',
        ("C104", "line 2", "federated.aggregation", 'mode = "split": south', '"zero-pad"'),
    ),
    Bad(
        "everything in a host",
        '[run]\nplacement = "split"\n[federated]\naggregation = "stack"',
        ("C104", "federated.aggregation", 'run.placement = "split"'),
    ),
    Bad("privacy", "[privacy]\nclip = 1.0", ("C105", "line 2", "privacy.clip", "the key left out", "reserves")),
    Bad("fleet that is not there", '[run]\nfleet = "five.toml"', ("C101", "line 2: run.fleet", "five.toml")),
    Bad("profile that is not there", '[[edge]]\nname = "north"\nprofile = "north.json"', ("C101", "line 3", "doctor --profile north.json")),
    Bad("set without value", "", ("C106", "--set train.batch_size"), ("train.batch_size",)),
    Bad("set to nothing", "", ("C106", "--set train.batch_size="), ("train.batch_size=",)),
    Bad("set without section", "", ("C106", "--set rank=4", "section"), ("rank=4",)),
    Bad("set for no edge", TWO_EDGES, ("C106", "nort", "did you mean edge.north.rank?"), ("edge.nort.rank=4",)),
    Bad("set to a wrong value", "", ("C103", "--set train.batch_size=many", "a whole number"), ("train.batch_size=many",)),
    Bad("set of an unknown key", "", ("C102", "--set train.batchsize=4", "did you mean batch_size?"), ("train.batchsize=4",)),
    Bad("set of a reserved key", "", ("C105", "--set privacy.clip=1.0"), ("privacy.clip=1.0",)),
)


@pytest.mark.parametrize("bad", CONFIGS, ids=lambda bad: bad.name.replace(" ", "-"))
def test_a_wrong_config_is_a_page_and_exit_2(bad: Bad, atoll: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(bad.toml)
    outcome = atoll("train", "run.toml", *(part for text in bad.sets for part in ("--set", text)))
    _is_a_page(outcome, ("run.toml" if not bad.sets else "--set", "do  ", *bad.says))
    assert os.listdir(tmp_path) == ["run.toml"]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A command line that is wrong, and what the page must say."""

    arguments: tuple[str, ...]
    says: tuple[str, ...]


LINES = (
    BadLine(("trian", "run.toml"), ("C107", "'trian'", "did you mean `atoll train`?")),
    BadLine(
        ("frobnicate",),
        ("C107", "init, plan, train, resume, compare, sweep, runs, edge, status, host, evaluate, generate, merge, audit, export, convert"),
    ),
    BadLine(("watch", "runs/x"), ("C107", "not in this version")),
    BadLine(("host",), ("C107", "missing option '--model'")),
    BadLine(("host", "--model", "tiny", "--quantize", "3"), ("C107", "--quantize 3", "16, 8 or 4")),
    BadLine(("host", "--model", "tiny", "--tenant", "north"), ("C107", "--tenant goes with --make-certificates")),
    BadLine(("host", "--model", "tiny", "--crl", "revoked.pem"), ("C107", "--crl goes with --client-ca")),
    BadLine(("host", "--model", "tiny", "--max-tenant-sessions", "2"), ("C107", "needs certificates", "--client-ca")),
    BadLine(("host", "--model", "tiny", "--max-tenant-rate", "2"), ("C107", "--max-tenant-rate needs certificates", "--client-ca")),
    BadLine(("host", "--model", "tiny", "--max-tenant-rate", "nan"), ("C107", "--max-tenant-rate is a number", "nan")),
    BadLine(("host", "--model", "tiny", "--cache", "lots"), ("C107", "--cache is a size", "'1 GB', or 0")),
    BadLine(("host", "--model", "tiny", "--silence", "inf"), ("C107", "--silence is a number", "inf")),
    BadLine(("host", "--model", "tiny", "--max-tenant-bytes", "1 GB/day"), ("C107", "needs certificates", "--client-ca")),
    BadLine(("host", "--model", "tiny", "--client-ca", "ca.pem", "--max-tenant-bytes", "1 GB"), ("C107", "size in a period", "20 GB/day")),
    BadLine(("host", "--model", "tiny", "--client-ca", "ca.pem", "--tenant-limits", "no.toml"), ("C101", "no.toml", "[tenant.NAME]")),
    BadLine(("host", "--model", "tiny", "--max-part", "1"), ("C107", "two numbers", "FRONT,BACK")),
    BadLine(("host", "--model", "tiny", "--metrics-tenants"), ("C107", "--metrics-tenants goes with --metrics")),
    BadLine(("generate", "runs/x", "Hello", "--ca", "ca.pem"), ("C107", "go with --host")),
    BadLine(("doctor", "--base", "tiny"), ("C107", "--base", "add --profile FILE")),
    BadLine(("doctor", "--insecure"), ("C107", "--insecure", "add --profile FILE")),
    BadLine(("audit",), ("C107", "missing argument 'RUN.toml|RUN_DIR'")),
    BadLine(("audit", "nowhere.toml"), ("C101", "nowhere.toml")),
    BadLine(("audit", "run.toml", "--minutes", "0"), ("C107", "--minutes")),
    BadLine(("audit", "run.toml", "--minutes", "lots"), ("C107", "--minutes")),
    BadLine(("train",), ("C107", "missing argument 'RUN.toml|RUN_DIR'", "atoll train [OPTIONS] RUN.toml|RUN_DIR")),
    BadLine(("train", "run.toml", "more"), ("C107", "more")),
    BadLine(("train", "run.toml", "--engine", "ray"), ("C107", "--engine", "'here', 'flower'")),
    BadLine(("train", "nowhere.toml", "--engine", "flower"), ("C101", "nowhere.toml", "no such file")),
    BadLine(("train", "run.toml", "--fleet", "coordinator"), ("C107", "--fleet goes with --engine flower")),
    BadLine(("train", "run.toml", "--engine", "flower", "--host", "big:7431"), ("C107", "--engine flower and --host", "atoll fleet init")),
    BadLine(("resume",), ("C107", "missing argument 'RUN_DIR'")),
    BadLine(("resume", "runs/x", "--fleet", "coordinator"), ("C107", "--fleet goes with --engine flower")),
    BadLine(("resume", "runs/x", "--engine", "flower", "--host", "big:7431"), ("C107", "--engine flower and --host")),
    BadLine(("fleet", "leave"), ("C107", "'leave'", "one of init, join, add, renew, remove")),
    BadLine(("fleet", "join"), ("C107", "missing argument 'DIR'")),
    BadLine(("fleet", "init", "run.toml", "--out", "fleet"), ("C107", "missing option '--address'")),
    BadLine(("fleet", "init", "nowhere.toml", "--out", "fleet", "--address", "a:1"), ("C101", "nowhere.toml", "no such file")),
    BadLine(("doctor", "--fleet", "fleet", "--profile", "north.json"), ("C107", "--profile and --fleet", "one of the two")),
    BadLine(("--verison",), ("C107", "--verison")),
    BadLine(("evaluate",), ("C107", "neither", "--model M")),
    BadLine(("evaluate", "runs/x", "--model", "tiny"), ("C107", "a run directory or a model")),
    BadLine(("evaluate", "runs/x", "--adapter", "a"), ("C107", "--adapter goes with --model")),
    BadLine(("generate", "runs/x", "Hello", "--max-new-tokens", "0"), ("C107", "0 is not in the range")),
    BadLine(("generate", "runs/x", "Hello", "--max-new-tokens", "many"), ("C107", "many")),
    BadLine(("generate", "runs/x", "Hello", "--temperature", "-1"), ("C107", "--temperature", "-1")),
    BadLine(("generate", "runs/x", "Hello", "--top-p", "2"), ("C107", "--top-p", "2")),
    BadLine(("generate", "runs/x"), ("C107", "missing argument 'PROMPT'")),
    BadLine(("merge", "runs/x"), ("C107", "missing option '--out'")),
    BadLine(("compare", "run.toml"), ("C107", "missing option '--methods'")),
    BadLine(("compare", "run.toml", "--methods", "lora", "--set", "run.seed=2"), ("C107", "run.seed", "--seeds")),
    BadLine(("compare", "run.toml", "--methods", "lora", "--seeds", "0", "x"), ("C107", "'x'")),
    BadLine(("compare", "nowhere.toml", "--methods", "lora"), ("C101", "nowhere.toml")),
    BadLine(("sweep", "run.toml"), ("C107", "missing option '--set'")),
    BadLine(("export", "runs/x", "--out", "o"), ("C107", "missing option '--for'")),
    BadLine(("export", "runs/x", "--for", "tgi", "--out", "o"), ("C107", "--for", "'transformers', 'vllm', 'llama.cpp', 'ollama'")),
    BadLine(("train", "nowhere.toml"), ("C101", "nowhere.toml", "no such file", "atoll init")),
    BadLine(("train", "no/such/run.toml"), ("C101", "no/such/run.toml", "check the path")),
    BadLine(("train", "."), ("C101", "folder", "atoll init")),
    BadLine(("plan", "nowhere.toml", "--json"), ("C101", "nowhere.toml")),
)


@pytest.mark.parametrize("bad", LINES, ids=lambda bad: " ".join(bad.arguments))
def test_a_wrong_command_line_is_a_page_and_exit_2(bad: BadLine, atoll: Callable[..., object], tmp_path: Path) -> None:
    outcome = atoll(*bad.arguments)
    if "--json" in bad.arguments:
        assert json.loads(outcome.out)["status"] == 2
        outcome = replace(outcome, out="")
    _is_a_page(outcome, ("do  ", *bad.says))
    assert os.listdir(tmp_path) == []


def test_a_missing_file_names_the_one_that_was_meant(atoll: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("")
    _is_a_page(atoll("train", "rnu.toml"), ("C101", "did you mean run.toml?"))


def test_a_folder_names_the_file_in_it(atoll: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "clinics").mkdir()
    (tmp_path / "clinics" / "run.toml").write_text("")
    _is_a_page(atoll("train", "clinics"), ("C101", "give the file: clinics/run.toml"))


def test_a_file_that_is_not_text(atoll: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\x89PNG\r\n")
    _is_a_page(atoll("train", "run.toml"), ("C101", "not UTF-8", "0x89"))


def test_all_errors_of_a_file_come_at_once(atoll: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[run]\nrounds = 0\n[trian]\nx = 1\n[privacy]\nclip = 1.0\n[train]\nschedule = "x"\nlr = 3\n')
    outcome = atoll("train", "run.toml", "--set", "rank=4")
    _is_a_page(outcome, ("run.rounds", "[trian]", "privacy.clip", "train.schedule", "train.lr", "--set rank=4", "6 errors"))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("resume", "runs/x"), "R501"), (("resume", "runs/x", "--engine", "flower"), "R501"), (("fleet", "join", "north"), "R505"),
        (("doctor", "--fleet", "north"), "R505"),
    ],
)  # fmt: skip
def test_a_folder_that_is_none_is_a_page_and_exit_2(
    arguments: tuple[str, ...], code: str, atoll: Callable[..., object], tmp_path: Path
) -> None:  # fmt: skip
    outcome = atoll(*arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error {code}")
    assert "do  " in outcome.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", [("train", "run.toml"), ("train", "run.toml", "--json"), ("audit", "x"), ("train", "absent.toml")])
def test_the_same_in_a_process_of_its_own(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[run]\nrounds = 0")
    done = subprocess.run([sys.executable, "-m", "atoll", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert json.loads(done.stdout)["code"] == "C103" if "--json" in arguments else done.stdout == ""
    assert done.stderr.startswith("error C")
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["run.toml"]


def _is_a_page(outcome: object, says: tuple[str, ...]) -> None:
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error C")
    assert "Traceback" not in outcome.err
    for words in says:
        assert words in outcome.err, f"{words!r} is not in:\n{outcome.err}"


def test_a_file_of_limits_is_read_also_without_certificates(tmp_path: Path, atoll: Callable[..., object]) -> None:
    path = tmp_path / "limits.toml"
    path.write_text("[tenant.north]\nsesions = 2\n")
    _is_a_page(atoll("host", "--model", "tiny", "--tenant-limits", path), ("C102", "sesions"))
    path.write_text("[tenant.north]\nsessions = 2\n")
    _is_a_page(atoll("host", "--model", "tiny", "--tenant-limits", path), ("needs certificates",))
