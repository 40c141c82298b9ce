"""What each command does once it is parsed: call one function of atoll.commands, show what it returns."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.errors import CommandLineError

_FAILED_CHECK = 1


@dataclass(frozen=True, slots=True)
class Access:
    """The options that say which host, and how to reach it."""

    host: str | None
    ca: Path | None
    cert: Path | None
    key: Path | None
    insecure: bool

    def opened(self) -> Any:
        """As the commands take it; None where no host is named.

        Raises: CommandLineError for options of a connection without a host.
        """
        if self.host is None:
            if self.ca or self.cert or self.key or self.insecure:
                raise CommandLineError(
                    "--ca, --cert, --key and --insecure go with --host", got="no --host", expected="--host HOST:PORT", do="add --host"
                )
            return None
        from atoll.commands.edge import host_access

        return host_access(self.host, self.ca, self.cert, self.key, self.insecure)


@dataclass(frozen=True, slots=True)
class Fleet:
    """The options that say where edges run."""

    engine: str
    """"here" or "flower"."""
    folder: Path | None

    def check(self, access: Access) -> None:
        """Raises: CommandLineError for options that do not go together."""
        if self.folder is not None and self.engine != "flower":
            raise CommandLineError("--fleet goes with --engine flower", got="--fleet alone", expected="--engine flower", do="add it")
        if self.engine == "flower" and access.host is not None:
            raise CommandLineError(
                "the edges of a fleet know their hosts themselves", got="--engine flower and --host", expected="one of them",
                do="name hosts when the fleet's folders are written: atoll fleet init --host HOST:PORT",
            )  # fmt: skip


def init(directory: Path) -> None:
    """Write a folder to start from, and say what to do with it."""
    from atoll.commands.init import init as write_folder

    config = write_folder(directory)
    print(f"wrote {config} and sample data beside it\nnext: atoll train {config}")


def plan(config: Path, *, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what each edge would do."""
    with _results(as_json) as show:
        _check_config(config, overrides)
        from atoll.commands.plan import plan as make_plan

        fleet = make_plan(config, overrides=overrides).to_json()
        if as_json:
            show(fleet)
            return
        from atoll.report.plans import plan_table
        from atoll.report.tables import print_table

        print_table(plan_table(fleet), sys.stdout)


def train(config: Path, *, out: Path | None, overrides: tuple[str, ...], access: Access, fleet: Fleet, as_json: bool) -> None:
    """Run it and show the comparison, the adapter, and what to try next."""
    fleet.check(access)
    _check_config(config, overrides)

    def begin(progress: Any) -> Any:
        if fleet.engine == "flower":
            from atoll.fleet.train import train_on_fleet

            return train_on_fleet(config, fleet.folder, _tell, out=out, overrides=overrides, observers=(progress,))
        from atoll.commands.train import train as run

        return run(config, out=out, overrides=overrides, observers=(progress,), host=access.opened())

    _train(begin, access, as_json)


def resume(run_dir: Path, *, access: Access, fleet: Fleet, as_json: bool) -> None:
    """Go on with it and show the same."""
    fleet.check(access)
    from atoll.runs.layout import RunDirectory

    RunDirectory.open(run_dir)  # Answered at once, before the seconds that torch takes to open.

    def begin(progress: Any) -> Any:
        if fleet.engine == "flower":
            from atoll.fleet.train import resume_on_fleet

            return resume_on_fleet(run_dir, fleet.folder, _tell, (progress,))
        from atoll.commands.resume import resume as run

        return run(run_dir, observers=(progress,), host=access.opened())

    _train(begin, access, as_json)


def edge(config: Path, *, access: Access, options: Mapping[str, Any], as_json: bool) -> None:
    """Train one edge against a host and show the same."""
    _check_config(config, options["overrides"])
    from atoll.commands.edge import edge as run

    def begin(progress: Any) -> Any:
        return run(config, access.opened(), observers=(progress,), **options)

    _train(begin, access, as_json)


def _train(run: Callable[[Any], Any], access: Access, as_json: bool) -> None:
    with _results(as_json) as show:
        from atoll.report.progress import Progress

        with Progress() as progress:
            result = run(progress)
        if as_json:
            show({**result.summary.to_json(), "run_dir": str(result.run_dir), "adapter": str(result.adapter)})
            return
        from atoll.commands.train import example_prompt
        from atoll.report.tables import comparison_table, print_table

        table = comparison_table(result.summary)
        if table is not None:
            print_table(table, sys.stdout)
        print(f"adapter: {result.adapter}")
        if result.figures:
            print(f"figures: {result.figures[0].parent}")
        prompt = example_prompt(result.run_dir)
        if prompt is None:
            print(f"next:    atoll evaluate {shlex.quote(str(result.run_dir))}")
            return
        options = {"--host": access.host, "--ca": access.ca, "--cert": access.cert, "--key": access.key}
        through = "".join(f" {name} {shlex.quote(str(value))}" for name, value in options.items() if value)
        through += " --insecure" if access.insecure else ""
        print(f"next:    atoll generate {shlex.quote(str(result.run_dir))} {shlex.quote(prompt)}{through}")


def host(settings: Mapping[str, Any]) -> None:
    """Serve until stopped."""
    from atoll.commands.host import HostSettings
    from atoll.commands.host import host as serve

    serve(HostSettings(**settings), lambda line: print(line, flush=True))


def certify(tenant: str, *, folder: Path, ca_key: Path | None) -> None:
    """Write a tenant's certificate, and say what to do with it."""
    from atoll.commands.host import certify as write_certificate

    print(write_certificate(tenant, folder, ca_key=ca_key).to_text())


def status(access: Access, *, as_json: bool) -> None:
    """Show what a host serves."""
    with _results(as_json) as show:
        from atoll.commands.host import status as ask
        from atoll.report.hosts import status_table
        from atoll.report.tables import print_table

        value = ask(access.opened())
        if as_json:
            show(value)
        else:
            print_table(status_table(value), sys.stdout)


def evaluate(what: Mapping[str, Any], *, access: Access, as_json: bool) -> None:
    """Show the scores of a run, or of a model with or without an adapter."""
    with _results(as_json) as show:
        from atoll.commands.evaluate import evaluate as measure
        from atoll.report.progress import Progress

        with Progress() as progress:
            scores = measure(**what, observers=(progress,), host=access.opened())
        if as_json:
            show(scores)
            return
        from atoll.report.tables import print_table, scores_table

        print_table(scores_table(_score_rows(scores), "held-out rows"), sys.stdout)


def generate(run_dir: Path, prompt: str, *, max_new_tokens: int, access: Access) -> None:
    """Show what the trained model answers."""
    with _results(as_json=False):
        from atoll.commands.generate import generate as answer

        print(answer(run_dir, prompt, max_new_tokens=max_new_tokens, host=access.opened()))


def merge(run_dir: Path, *, out: Path) -> None:
    """Write the merged model and say where."""
    from atoll.commands.merge import merge as write_model

    print(f"wrote {write_model(run_dir, out=out)}")


def fleet_init(config: Path, *, out: Path, address: str, hosts: tuple[str, ...]) -> None:
    """Write a fleet's folders, and say what to do with them."""
    _check_config(config, ())
    from atoll.fleet.init import init as write_folders

    print(write_folders(config, out, address, hosts).to_text())


def fleet_add(folder: Path, name: str, *, config: Path | None, host: str | None, ca_key: Path | None) -> None:
    """Write an edge's folder, and say what goes where."""
    from atoll.fleet.members import add

    print(add(folder, name, config=config, host=host, ca_key=ca_key).to_text())


def fleet_renew(folder: Path, name: str | None, *, ca_key: Path | None) -> None:
    """Write new certificates, and say what goes where."""
    from atoll.fleet.members import renew

    print(renew(folder, name, ca_key=ca_key).to_text())


def fleet_remove(folder: Path, name: str, *, ca_key: Path | None) -> None:
    """Revoke an edge's certificates, and say what goes where."""
    from atoll.fleet.members import remove

    print(remove(folder, name, ca_key=ca_key).to_text())


def fleet_join(folder: Path, *, config: Path | None, overrides: tuple[str, ...]) -> None:
    """Take part until stopped, also in the middle of a round: it is trained again from the state before."""
    from atoll.fleet.join import join

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        join(folder, _tell, config=config, overrides=overrides, stop=threading.Event())


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def doctor(fleet: Path | None, *, as_json: bool) -> int:
    """Show what this machine, or a fleet's folder, has; the status tells whether something would fail."""
    with _results(as_json) as show:
        if fleet is None:
            from atoll.commands.doctor import doctor as examine

            report = examine()
        else:
            from atoll.fleet.check import check_fleet

            report = check_fleet(fleet)
        if as_json:
            show(report.to_json())
        else:
            print(report.to_text())
    return 0 if report.is_well else _FAILED_CHECK


def profile(path: Path, *, base: str, access: Access, as_json: bool) -> None:
    """Show what was measured of this machine, and where it was written."""
    with _results(as_json) as show:
        from atoll.commands.doctor import profile as measure

        report = measure(path, base=base, host=access.opened())
        if as_json:
            show(report.to_json())
        else:
            print(report.to_text())


def _check_config(config: Path, overrides: tuple[str, ...]) -> None:
    """Answer a wrong config at once; the command reads it again after the seconds that torch takes to open."""
    from atoll.config.load import load

    load(config, overrides)


@contextlib.contextmanager
def _results(as_json: bool) -> Iterator[Callable[[object], None]]:
    """Keep standard output for the one document: whatever a library prints meanwhile goes to standard error."""
    stdout = sys.stdout

    def show(value: object) -> None:
        from atoll.runs.files import finite

        print(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False), file=stdout)

    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield show


def _score_rows(scores: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float | None]]]:
    """One row for each named set of scores; scores without a name are one row."""
    named: list[tuple[str, Any]] = [(name, value) for name, value in scores.items() if isinstance(value, Mapping)]
    return named or [("model", scores)]
