"""How functions become commands, and how commands become groups: what typer and click leave open."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from functools import partial
from typing import Any, TypeVar, get_type_hints

import click
import typer
import typer.core

from atoll.cli import loudness
from atoll.cli.names import part_names
from atoll.errors import CommandLineError

# Of the contract, and of later versions: named here so that the answer to typing one is exact.
_LATER = ("report", "watch")
_HYPHEN = "\u2011"
"""One that does not end a line, until the page is done."""
Action = Callable[..., int | None]
"""What a command does. It returns the exit status, if that is not 0."""
_Function = TypeVar("_Function", bound=Action)


def command(group: typer.Typer, *, several: tuple[str, ...] = ()) -> Callable[[_Function], _Function]:
    """Put the function below into `group`, as a command of its name; its docstring is the help.

    `several` are options that take all words up to the next option, as if the option stood before each.
    """

    def add(function: _Function) -> _Function:
        group.command(cls=type(_Command.__name__, (_Command,), {"several": several}))(expand_options(function))
        return function

    return add


def command_with_commands(function: Action, kind: type[typer.core.TyperGroup] | None = None) -> typer.Typer:
    """A group named for `function`, which runs, with options of its own, where none of the group's commands is named."""
    group = typer.Typer(
        cls=kind or Commands, name=function.__name__, rich_markup_mode=None,
        context_settings={"max_content_width": 110, "help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    group.callback(invoke_without_command=True)(expand_options(function))
    return group


def expand_options(function: Action) -> type[Any]:
    """`function` as typer takes it: a class with a field for each option, made by parsing a command line, called to run the function.

    A parameter whose type is a dataclass stands for the options that its fields are. The dataclasses are made with the class, so that
    what they refuse is refused before anything runs. The function runs after parsing, as click has its own answers to some exceptions.
    """
    hints = get_type_hints(function, include_extras=True)
    shared: dict[str, type[Any]] = {}
    options: list[tuple[str, Any, Any]] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if is_dataclass(hints[name]):
            shared[name], of_fields = hints[name], get_type_hints(hints[name], include_extras=True)
            options += [(one.name, of_fields[one.name], field(default=one.default)) for one in fields(shared[name])]
        else:
            options.append((name, hints[name], field(default=MISSING if parameter.default is parameter.empty else parameter.default)))

    def prepare(typed: Any) -> None:
        own = dict(vars(typed))
        made = {name: kind(*(own.pop(one.name) for one in fields(kind))) for name, kind in shared.items()}
        typed._action = partial(function, **own, **made)

    namespace = {"__doc__": function.__doc__, "__post_init__": prepare, "__call__": lambda typed: typed._action()}
    return make_dataclass(function.__name__, options, kw_only=True, namespace=namespace)


class _Formatter(click.HelpFormatter):
    """Breaks lines between words alone, and names of parts and options have hyphens in them."""

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", _HYPHEN))

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl([(first, second.replace("-", _HYPHEN)) for first, second in rows], col_max, col_spacing)


class _Context(click.Context):
    formatter_class = _Formatter


class _PlainHelp(click.Command):
    """Help in plain text: typer 0.20 escapes brackets for rich even when rich does not print them."""

    context_class = _Context

    def get_help(self, ctx: click.Context) -> str:
        return super().get_help(ctx).replace("\\[", "[").replace(_HYPHEN, "-")

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own options, those that every command has, and --help; a group without any has help alone."""
        own, all_of_click = self.params, super().get_params(ctx)
        is_group = isinstance(self, click.Group)
        return [*own, *(() if is_group and not own else loudness.options()), *all_of_click[len(own) :]]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The names that options take, of what ships and of what is installed."""
        if named := list(part_names({name for option in self.params for name in option.opts})):
            with formatter.section("Names"):
                formatter.write_dl([(where, ", ".join(names)) for where, names in named])
        super().format_epilog(ctx, formatter)


class _Command(_PlainHelp, typer.core.TyperCommand):
    """One command."""

    several: tuple[str, ...] = ()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._repeated(args)))

    def _repeated(self, args: list[str]) -> Iterator[str]:
        option, has_value = None, False
        for word in args:
            if word.startswith("-"):
                name, equals, _ = word.partition("=")
                option, has_value = name if name in self.several else None, bool(equals)
            elif option is not None:
                if has_value:
                    yield option
                has_value = True
            yield word


class Commands(_PlainHelp, typer.core.TyperGroup):
    """A group whose own options count where no command is named; with our own answer to a name that it does not have."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the group's own options, or leave them where a command comes first: what they require is then not required."""
        if self.callback is not None and args and args[0] in self.commands:
            ctx.command = Commands(name=self.name, commands=dict(self.commands))
            return ctx.command.parse_args(ctx, args)
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name.

        Raises: CommandLineError naming the commands there are; the same for options of the group before a command.
        """
        if ctx.resilient_parsing:  # The shell asks how a line could go on; nobody reads an answer.
            return super().resolve_command(ctx, args)
        if args[0] not in self.commands:
            raise _no_such_command(ctx.command_path, args[0], list(self.commands))
        if ctx.params:
            path = f"{ctx.command_path} {args[0]}"
            raise CommandLineError(
                f"options of `{ctx.command_path}` do not go with `{path}`", where=path, got=f"options before {args[0]!r}",
                expected=f"{path} and its own options", do=f"`{path} --help` says which it has",
            )  # fmt: skip
        return super().resolve_command(ctx, args)


def _no_such_command(program: str, name: str, known: list[str]) -> CommandLineError:
    likely = difflib.get_close_matches(name, known, n=1)
    what = f"`atoll {name}` is not in this version" if name in _LATER else f"there is no command {name!r}"
    do = f"did you mean `{program} {likely[0]}`?" if likely else f"`{program} --help` says what each of them does"
    return CommandLineError(what, where=program, got=name, expected=f"one of {', '.join(known)}", do=do)
