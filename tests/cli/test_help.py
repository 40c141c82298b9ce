"""Help answers at once: it opens no library that takes long."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from atoll import __version__

COMMANDS = ("init", "plan", "train", "resume", "host", "host certify", "edge", "status", "evaluate", "generate", "merge", "doctor", "fleet")
HEAVY = ("torch", "transformers", "peft", "datasets", "flwr", "pydantic", "numpy", "pyarrow", "huggingface_hub")


def test_help_names_the_commands_there_are(atoll: Callable[..., object]) -> None:
    outcome = atoll("--help")
    assert outcome.status == 0
    listed = outcome.out.partition("Commands:")[2].split("\n")
    assert tuple(line.strip().partition("  ")[0] for line in listed if line.strip()) == COMMANDS
    assert atoll().out == outcome.out
    assert "..." not in outcome.out.partition("Options:")[2], "a sentence is cut"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_help(command: str, atoll: Callable[..., object]) -> None:
    outcome = atoll(*command.split(), "--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith(f"Usage: atoll {command}")
    assert "\\" not in outcome.out


def test_the_version(atoll: Callable[..., object]) -> None:
    assert atoll("--version").out == f"atoll {__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["frobnicate"]])
def test_help_and_mistyped_commands_open_nothing_heavy(arguments: list[str]) -> None:
    code = f"import sys; from atoll.cli.app import main; main({arguments!r})\n"
    code += f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_wrong_config_is_answered_before_torch_opens(tmp_path: object) -> None:
    code = "import sys; from atoll.cli.app import main; print(main(['train', 'absent.toml']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=str(tmp_path))
    assert done.stdout == "2 False\n"


def test_waiting_threads_do_not_spin() -> None:
    code = "import atoll, os; print(os.environ['OMP_WAIT_POLICY'], os.environ['TOKENIZERS_PARALLELISM'])"
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "PASSIVE false\n"
