"""What the shell is told when somebody presses Tab: by the protocol, and in a bash of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import shellingham
import typer

from atoll.cli.app import app
from atoll.registry.methods import METHODS

from tests.cli.test_help import COMMANDS

GROUP = typer.main.get_command(app)
BASH = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@pytest.fixture
def completed(atoll: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """How `atoll LINE` could go on, where its last word is not at its end; nothing else is printed."""

    def complete(line: str) -> list[str]:
        monkeypatch.setenv("_ATOLL_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", f"atoll {line}")
        monkeypatch.setenv("COMP_CWORD", str(len(f"atoll {line}".split(" ")) - 1))
        outcome = atoll()
        assert (outcome.status, outcome.err) == (0, "")
        return outcome.out.split()

    return complete


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", COMMANDS), ("tr", ("train",)), ("fleet ", ("init", "join", "add", "renew", "remove")),
        ("frobnicate", ()), ("frobnicate ", COMMANDS),
        ("host --me", ("--merge", "--metrics", "--metrics-tenants")),
        ("fleet init --", ("--out", "--address", "--host", "--quiet", "--verbose", "--help")), ("train --engine ", ("here", "flower")),
        ("resume runs/x --engine f", ("flower",)), ("train --method ", tuple(METHODS)), ("plan run.toml --method flo", ("flora",)),
        ("host --quantize ", ("16", "8", "4")), ("host --precision b", ("bf16",)), ("train ", ()), ("merge runs/x --out ", ()),
    ],
)  # fmt: skip
def test_a_line_goes_on_with(line: str, words: tuple[str, ...], completed: Callable[[str], list[str]]) -> None:
    assert completed(line) == list(words)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "fleet"])
def test_shells_that_explain_options_explain_them_as_the_help_does(
    command: str, atoll: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """typer has rich read the explanations, which would swallow what it takes for markup."""
    monkeypatch.setenv("_ATOLL_COMPLETE", "complete_fish")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"atoll {command} --")
    outcome = atoll()
    assert (outcome.status, outcome.err) == (0, "")
    assert isinstance(GROUP, click.Group)
    found = GROUP.commands[command]
    context = click.Context(found, help_option_names=["-h", "--help"])
    options = [option for option in found.get_params(context) if isinstance(option, click.Option)]
    assert outcome.out.splitlines() == [f"{option.opts[-1]}\t{option.help}" for option in options]


def test_completion_opens_nothing_heavy() -> None:
    code = "import sys; from atoll.cli.app import main; main()\n"
    code += "assert not {'torch', 'transformers', 'flwr', 'datasets'} & set(sys.modules)"
    environment = {**os.environ, "_ATOLL_COMPLETE": "complete_bash", "COMP_WORDS": "atoll train --method dl", "COMP_CWORD": "3"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "dlora\n", "")


@BASH
def test_bash_completes_after_reading_what_is_shown(tmp_path: Path) -> None:
    program = tmp_path / "atoll"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m atoll "$@"\n')
    program.chmod(0o755)
    script = 'eval "$(atoll --show-completion)"\nCOMP_WORDS=(atoll train --eng); COMP_CWORD=2\n'
    script += '$(complete -p atoll | sed "s/.* -F \\([^ ]*\\) .*/\\1/") atoll --eng train; echo "${COMPREPLY[@]}"\n'
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout, done.stderr) == ("--engine\n", "")


@BASH
def test_completion_is_installed_for_bash(tmp_path: Path) -> None:
    script = f'"{sys.executable}" -m atoll --install-completion; exit $?'
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, env={**os.environ, "HOME": str(tmp_path)}
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    (installed,) = (tmp_path / ".bash_completions").iterdir()
    assert str(installed) in (tmp_path / ".bashrc").read_text()
    assert "_ATOLL_COMPLETE=complete_bash" in installed.read_text()


@pytest.mark.parametrize("option", ["--install-completion", "--show-completion"])
def test_a_shell_that_nobody_knows_is_a_page_and_exit_2(option: str, atoll: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_found() -> None:
        raise shellingham.ShellDetectionFailure

    monkeypatch.setattr(shellingham, "detect_shell", nothing_found)
    outcome = atoll(option)
    assert outcome.status == 2
    assert "error C107: " in outcome.err
    assert f"atoll {option}" in outcome.err
    assert "bash, zsh, fish or PowerShell" in outcome.err
