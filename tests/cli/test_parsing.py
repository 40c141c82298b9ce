"""Options out of dataclasses, and a command that is also a group; then what the commands of Atoll make of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click
import pytest
import typer

from atoll.cli.app import app
from atoll.cli.parsing import command, command_with_commands
from atoll.errors import CommandLineError


@dataclass(frozen=True, slots=True)
class Place:
    """Options that two commands have."""

    host: Annotated[str | None, typer.Option("--host", help="A host.")] = None
    ca: Annotated[Path | None, typer.Option("--ca", help="Its CA.")] = None

    def __post_init__(self) -> None:
        if self.ca is not None and self.host is None:
            raise CommandLineError("--ca goes with --host")


@dataclass(frozen=True, slots=True)
class NamedPlace(Place):
    """The same where there must be one."""

    host: Annotated[str, typer.Option("--host", help="The host.")]


ran: list[tuple[object, ...]] = []


def example(context: typer.Context) -> None:
    """The program."""
    ran.append((context.command_path,))


def ask(question: Annotated[str, typer.Argument()], times: int = 1, *, place: Place) -> int:
    """Ask."""
    ran.append((question, times, place))
    return 7


def serve(place: NamedPlace) -> None:
    """Serve, or do one of these."""
    ran.append((place,))


def certify(name: Annotated[str, typer.Argument()], place: Place) -> None:
    """Certify."""
    ran.append((name, place))


PROGRAM, SERVE = command_with_commands(example), command_with_commands(serve)
command(PROGRAM)(ask)
command(SERVE)(certify)
PROGRAM.add_typer(SERVE)


@pytest.fixture
def example_of() -> Callable[..., Any]:
    """Parse a command line of the program; what is returned runs it."""
    ran.clear()
    return lambda *arguments: typer.main.get_command(PROGRAM).main(list(arguments), prog_name="example", standalone_mode=False)


def test_a_command_is_given_its_options_as_a_dataclass(example_of: Callable[..., Any]) -> None:
    typed = example_of("ask", "why", "--ca", "ca.pem", "--host", "big:1")
    assert ran == [], "nothing runs while a line is parsed"
    assert typed() == 7
    assert ran == [("why", 1, Place("big:1", Path("ca.pem")))]


def test_a_dataclass_refuses_before_anything_runs(example_of: Callable[..., Any]) -> None:
    with pytest.raises(CommandLineError, match="--ca goes with --host"):
        example_of("ask", "why", "--ca", "ca.pem")


def test_a_dataclass_may_make_an_option_of_another_required(example_of: Callable[..., Any]) -> None:
    with pytest.raises(click.MissingParameter, match="host"):
        example_of("serve", "--ca", "ca.pem")
    example_of("serve", "--host", "big:1")()
    assert ran == [(NamedPlace("big:1"),)]


def test_a_command_of_a_command_needs_none_of_its_options(example_of: Callable[..., Any]) -> None:
    example_of("serve", "certify", "north", "--host", "big:1")()
    assert ran == [("north", Place("big:1"))]
    ran.clear()
    example_of()()
    assert ran == [("example",)]


def test_options_of_a_command_are_not_lost_on_a_command_of_it(example_of: Callable[..., Any]) -> None:
    with pytest.raises(CommandLineError, match="do not go with `example serve certify`"):
        example_of("serve", "--host", "big:1", "certify", "north")
    with pytest.raises(CommandLineError, match="no command 'leave'"):
        example_of("serve", "--host", "big:1", "leave")


def test_a_command_that_is_a_group_shows_its_options_and_its_commands(
    example_of: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert example_of("serve", "-h") == 0
    shown = capsys.readouterr().out
    assert "--host TEXT    The host.  [required]" in shown
    assert "certify  Certify." in shown
    assert example_of("serve", "certify", "-h") == 0
    assert capsys.readouterr().out.startswith("Usage: example serve certify [OPTIONS] NAME")
    for words, expected in (("example serve ", "certify"), ("example serve certify --", "--host\n--ca\n--quiet\n--verbose\n--help")):
        monkeypatch.setenv("_EXAMPLE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
        with pytest.raises(SystemExit):
            example_of()
        assert capsys.readouterr().out == f"{expected}\n"


def commands(group: click.Command) -> Iterator[click.Command]:
    """All commands of Atoll."""
    yield group
    if isinstance(group, click.Group):
        for inner in group.commands.values():
            yield from commands(inner)


def test_an_option_of_several_commands_is_declared_once() -> None:
    """Unless it means another thing: a host that may be, must be, or is written to folders; what is written; which fleet; which file; one
    value or several.
    """
    found: dict[str, set[tuple[str | None, str | None]]] = {}
    for each in commands(typer.main.get_command(app)):
        for option in (option for option in each.params if isinstance(option, click.Option)):
            found.setdefault(option.opts[0], set()).add((option.metavar, option.help))
    several = {name: len(declared) for name, declared in found.items() if len(declared) > 1}
    assert several == {"--host": 4, "--out": 6, "--fleet": 3, "--config": 2, "--model": 2, "--dtype": 2, "--dir": 2, "--set": 2}
