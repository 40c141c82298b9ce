"""Options that more than one command has, each declared once; `parsing.expand_options` gives a command those of a dataclass.

Arguments are described in the commands' docstrings: typer 0.20 loses their help under click 8.5.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from atoll.cli.loudness import tell
from atoll.cli.names import method_names
from atoll.errors import CommandLineError

MODEL = typer.Option("--model", metavar="M", help='"tiny", a folder, or a Hugging Face id.')
NewRun = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run directory; default runs/NAME-0001, -0002, ...")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow another address than loopback without TLS.")]
CaKey = Annotated[Path | None, typer.Option("--ca-key", metavar="FILE", help="ca.key, where it is kept apart.")]
Moved = Annotated[str | None, typer.Option("--model", metavar="M", help="Where the base is now, if it was moved.")]
OtherBase = Annotated[bool, typer.Option("--other-base", help="Take a base with other weights than the run was trained on.")]
Trust = Annotated[bool, typer.Option("--trust", help="Import code that the run names beside Atoll's.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Put one value on top of the file; may be repeated.")
]


Method = Annotated[
    str | None,
    typer.Option("--method", metavar="NAME", help="Do as a published method does; --set still counts.", autocompletion=method_names),
]


@dataclass(frozen=True, slots=True)
class RunFile:
    """The file that says what to do."""

    config: Annotated[Path, typer.Argument(metavar="RUN.toml", hidden=True)]

    def check(self, overrides: tuple[str, ...] = ()) -> None:
        """Answer a wrong file at once; the command reads it again after the seconds that torch takes to open.

        Raises: InputError leaves.
        """
        from atoll.config.load import load

        load(self.config, overrides)


@dataclass(frozen=True, slots=True)
class RunFileOrRun(RunFile):
    """The same, or the folder of a run that is to be done again."""

    config: Annotated[Path, typer.Argument(metavar="RUN.toml|RUN_DIR", hidden=True)]
    trust: Trust = False

    def check(self, overrides: tuple[str, ...] = ()) -> None:
        """As of a file; the folder of a run is answered when it is read.

        Raises: InputError leaves.
        """
        if not (self.config / "config.json").is_file():
            RunFile.check(self, overrides)


@dataclass(frozen=True, slots=True)
class ReadRun:
    """A run that is read, or none: options of every command that reads one."""

    run_dir: Annotated[Path | None, typer.Argument(metavar="[RUN_DIR]", hidden=True)] = None
    trust: Trust = False


@dataclass(frozen=True, slots=True)
class Run(ReadRun):
    """The same where there must be one."""

    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", hidden=True)]

    def check(self) -> None:
        """Answer at once where there is no finished run, before the seconds that torch takes to open.

        Raises: RunFolderError.
        """
        from atoll.runs.layout import RunDirectory

        RunDirectory.open(self.run_dir).check_finished()


@dataclass(frozen=True, slots=True)
class Overrides:
    """What counts in place of what the file says."""

    method: Method = None
    sets: Sets = None

    def given(self) -> tuple[str, ...]:
        """As the commands take them; the later of two wins."""
        return (*([f"method={self.method}"] if self.method is not None else ()), *(self.sets or ()))


@dataclass(frozen=True, slots=True)
class Access:
    """Which host, and how to reach it."""

    host: Annotated[str | None, typer.Option("--host", metavar="HOST:PORT", help="A host that keeps most of the base (atoll host).")] = None
    ca: Annotated[Path | None, typer.Option("--ca", metavar="FILE", help="The CA of the host's certificate: turns TLS on.")] = None
    cert: Annotated[Path | None, typer.Option("--cert", metavar="FILE", help="This machine's certificate, if the host wants one.")] = None
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE", help="The key of --cert.")] = None
    insecure: Insecure = False

    def opened(self) -> Any:
        """As the commands take it; None where no host is named.

        Raises: CommandLineError for options of a connection without a host.
        """
        if self.host is None:
            if self.given():
                raise CommandLineError(
                    "--ca, --cert, --key and --insecure go with --host", got="no --host", expected="--host HOST:PORT", do="add --host"
                )
            return None
        from atoll.commands.hosts.status import host_access

        return host_access(self.host, self.ca, self.cert, self.key, self.insecure, tell)

    def given(self) -> tuple[str, ...]:
        """The options that were typed, with their values, as they would be typed again."""
        valued = (("--host", self.host), ("--ca", self.ca), ("--cert", self.cert), ("--key", self.key))
        typed = (word for name, value in valued if value for word in (name, str(value)))
        return (*typed, *(("--insecure",) if self.insecure else ()))


@dataclass(frozen=True, slots=True)
class Engine:
    """Where edges run."""

    engine: Annotated[Literal["here", "flower"], typer.Option("--engine", help="Edges run here, or over Flower.")] = "here"
    fleet: Annotated[Path | None, typer.Option("--fleet", metavar="DIR", help="With flower: the coordinator's folder.")] = None

    def check(self, access: Access) -> None:
        """Raises: CommandLineError for options that do not go together."""
        if self.fleet is not None and self.engine != "flower":
            raise CommandLineError("--fleet goes with --engine flower", got="--fleet alone", expected="--engine flower", do="add it")
        if self.engine == "flower" and access.host is not None:
            raise CommandLineError(
                "the edges of a fleet know their hosts themselves", got="--engine flower and --host", expected="one of them",
                do="name hosts when the fleet's folders are written: atoll fleet init --host HOST:PORT",
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Output:
    """For people, or for programs."""

    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document, and nothing else.")] = False

    @contextlib.contextmanager
    def results(self) -> Iterator[Callable[[object], None]]:
        """Keep standard output for the one document: whatever a library prints meanwhile goes to standard error."""
        stdout = sys.stdout

        def show(value: object) -> None:
            from atoll.runs.files import finite

            # JSON's own escapes are readable in every encoding.
            is_utf = (stdout.encoding or "utf-8").lower().startswith("utf")
            print(json.dumps(finite(value), indent=2, ensure_ascii=not is_utf, allow_nan=False), file=stdout)

        with contextlib.redirect_stdout(sys.stderr) if self.as_json else contextlib.nullcontext():
            yield show
