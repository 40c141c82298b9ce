"""Help answers at once: it opens no library that takes long."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll import __version__, errors
from atoll.cli.boundary import STATUSES
from atoll.errors import AtollError

COMMANDS = (
    "init", "plan", "train", "resume", "compare", "sweep", "runs", "edge", "status", "host", "evaluate", "generate", "merge", "audit",
    "export", "convert", "doctor", "fleet",
)  # fmt: skip
IN_GROUPS = ("runs show", "runs compare", "runs rm", "host certify", "fleet init", "fleet join", "fleet add", "fleet renew", "fleet remove")
HEAVY = ("torch", "transformers", "peft", "datasets", "flwr", "pydantic", "numpy", "pyarrow", "huggingface_hub")


def test_help_names_the_commands_there_are(atoll: Callable[..., object]) -> None:
    outcome = atoll("--help")
    assert outcome.status == 0
    listed = outcome.out.partition("Commands:")[2].split("\n")
    assert tuple(line.strip().partition("  ")[0] for line in listed if line.strip()) == COMMANDS
    assert atoll().out == outcome.out
    assert "..." not in outcome.out.partition("Options:")[2], "a sentence is cut"


@pytest.mark.parametrize("command", COMMANDS + IN_GROUPS)
def test_every_command_has_its_help(command: str, atoll: Callable[..., object]) -> None:
    outcome = atoll(*command.split(), "--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith(f"Usage: atoll {command}")
    assert "\\" not in outcome.out


@pytest.mark.parametrize("words", [(), *(tuple(command.split()) for command in COMMANDS + IN_GROUPS)], ids=" ".join)
def test_help_is_one_letter_too_and_fits_every_terminal(
    words: tuple[str, ...], atoll: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in (80, 100, 140):
        monkeypatch.setenv("COLUMNS", str(columns))
        outcome = atoll(*words, "-h")
        assert (outcome.status, outcome.err) == (0, "")
        assert outcome == atoll(*words, "--help")
        lines = outcome.out.splitlines()
        assert max(len(line) for line in lines) <= columns
        assert not [line for line in lines if line.count("[") != line.count("]")], "a default is on two lines"


def test_help_says_the_statuses_that_the_errors_and_their_page_have(atoll: Callable[..., object]) -> None:
    listed = atoll("--help").out.partition("Exit statuses:\n")[2].partition("\n\n")[0]
    assert {int(status): means for status, means in re.findall(r"^  (\d+) +(.*)$", listed, flags=re.MULTILINE)} == STATUSES
    page = (Path(__file__).resolve().parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
    assert {int(status): means for status, means in re.findall(r"^\| (\d+) \| (.*) \|$", page, flags=re.MULTILINE)} == STATUSES
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AtollError)]
    assert {kind.exit_status for kind in kinds} < set(STATUSES)
    drawn = {name: int(status) for name, status in re.findall(r"(\w+Error) +exit (\d):", errors.__doc__ or "")}
    assert drawn == {kind.__name__: kind.exit_status for kind in kinds if kind.__base__ is AtollError}


def test_the_version(atoll: Callable[..., object]) -> None:
    assert atoll("--version").out == f"atoll {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["frobnicate"]])
def test_help_and_mistyped_commands_open_nothing_heavy(arguments: list[str]) -> None:
    code = f"import sys; from atoll.cli.app import main; main({arguments!r})\n"
    code += f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("line", "status"), [
    ("status 127.0.0.1:9", 4), ("generate nowhere hello", 2), ("merge nowhere --out x", 2), ("evaluate nowhere", 2),
    ("export nowhere --for vllm --out x", 2),
])  # fmt: skip
def test_what_needs_no_model_is_answered_before_torch_opens(line: str, status: int, tmp_path: object) -> None:
    code = f"import sys; from atoll.cli.app import main; print(main({line.split()!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=str(tmp_path))
    assert done.stdout == f"{status} False\n"


def test_a_wrong_config_is_answered_before_torch_opens(tmp_path: object) -> None:
    code = "import sys; from atoll.cli.app import main; print(main(['train', 'absent.toml']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=str(tmp_path))
    assert done.stdout == "2 False\n"


def test_waiting_threads_do_not_spin() -> None:
    code = "import atoll, os; print(os.environ['OMP_WAIT_POLICY'], os.environ['TOKENIZERS_PARALLELISM'])"
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "PASSIVE false\n"
