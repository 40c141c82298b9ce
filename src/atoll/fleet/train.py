"""atoll train --engine flower: the same run, with edges on machines of their own, or in processes of their own on this one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from uuid import uuid4

from atoll.commands.resume import resume_by
from atoll.commands.train import RunResult, train_job
from atoll.config.load import LoadedConfig, load
from atoll.config.schema import RunConfig
from atoll.errors import ConflictError
from atoll.federated.flower import Grid
from atoll.fleet.files import CoordinatorFolder, HostFolder
from atoll.fleet.init import init, may_split
from atoll.fleet.links.carrier import carry
from atoll.fleet.links.relay import FleetGrid, Relay
from atoll.fleet.processes import Child, free_port, until_ready
from atoll.fleet.superlink import SuperLink
from atoll.jobs.backends.backend import BackendFactory
from atoll.jobs.backends.fleet import FleetBackend, Members, ask_capabilities, named, prepared_for_fleet, tell_finished
from atoll.jobs.inputs import base_source
from atoll.jobs.job import Job, Participant
from atoll.jobs.results.config import check_begun_with, given_config
from atoll.report.progress import Progress
from atoll.runs.events import Event, EventLog, Phase
from atoll.runs.layout import RunDirectory
from atoll.runs.tracker import check_trackers
from atoll.scratch import scratch_folder

_LOCAL_EDGES_SECONDS, _HOST_SECONDS = 180.0, 180.0
_FINISHED_SECONDS = 5.0
"""An idle edge looks every three."""
_ALONE_SECONDS = 120.0
"""Edges without a long-lived process load their base before every answer: asked again sooner, they would do it twice."""


@dataclass(frozen=True, slots=True, eq=False)
class Fleet:
    """Where messages to edges go, and the edges that there are."""

    relay: Relay
    nodes: Mapping[int, str]
    join_seconds: float
    """How long edges may take until they tell their capabilities."""
    gone: Collection[str] = ()
    """Edges that were removed while this fleet ran."""
    outlives_runs: bool = False
    config: list[RunConfig] = field(default_factory=list)
    """Of the run that was prepared last, with all its edges."""

    def prepared(self, loaded: LoadedConfig, run_id: str, before: Path | None = None) -> Job:
        """The coordinator's side of a run with the edges that answer; `before`: of the run in this folder, which goes on.

        Raises: as `atoll.jobs.backends.fleet.prepared_for_fleet`.
        """
        self.config[:] = [loaded.config]
        asked = {edge.name for edge in loaded.config.edge}
        nodes = {node: edge for node, edge in self.nodes.items() if edge in asked}
        said, silent = ask_capabilities(FleetGrid(self.relay, nodes), nodes, self.join_seconds)
        return prepared_for_fleet(loaded, said, silent, run_id, _asked_before(before))

    def tell_finished(self) -> None:
        """Tell the edges of the run that was prepared last that it is complete; those that end with it need not know."""
        if self.outlives_runs:
            asked = {edge.name for edge in self.config[0].edge}
            nodes = {node: edge for node, edge in self.nodes.items() if edge in asked and edge not in self.gone}
            tell_finished(FleetGrid(self.relay, nodes, 0), nodes, self.config[0].run.rounds, _FINISHED_SECONDS)

    @property
    def make_backend(self) -> BackendFactory:
        """Makes the backends of a run."""

        def backend(job: Job, edges: Sequence[Participant], phase: Phase, log: EventLog) -> FleetBackend:
            names = {edge.name for edge in edges}
            nodes = {node: edge for node, edge in self.nodes.items() if edge in names}
            least = min(job.config.federated.min_edges, len(edges))
            if phase != "federated" or not self.config:
                return FleetBackend(job, FleetGrid(self.relay, nodes, least), nodes)
            asked = {edge.name for edge in self.config[0].edge}
            every = {node: edge for node, edge in self.nodes.items() if edge in asked}
            absent = {node: edge for node, edge in every.items() if edge not in names}
            grid = FleetGrid(self.relay, every, least)
            return FleetBackend(job, grid, nodes, Members(self.config[0], grid, absent, self.gone), log)

        return backend


def _asked_before(run: Path | None) -> str:
    """What a run's edges were asked for, with all that there were when it began."""
    return "" if run is None else str(RunDirectory(run).read_config().get("asked_for", ""))


def train_on_fleet(
    config_path: Path, fleet: Path | None, tell: Callable[[str], None], *, out: Path | None = None, overrides: Sequence[str] = (),
    observers: Sequence[Callable[[Event], None]] = (), trust: bool = False,
) -> RunResult:  # fmt: skip
    """Train as run.toml, or the folder of a run, says over Flower.

    `fleet`: the coordinator's folder; None: SuperLink, hosts and edges start here, on loopback.

    Raises: as `atoll.train`; ConflictError for a run's folder without `fleet`; FleetFolderError; HostLostError where something does not
    start.
    """
    given = given_config(config_path, overrides, trust=trust)
    if given.again is not None and given.noted is not None:
        check_begun_with(given.again, given.noted, has_host=False, on_fleet=True)
        if fleet is None:
            raise ConflictError(
                "edges that start here read run.toml, which may have changed since", where=str(config_path),
                got="--engine flower without --fleet", expected="run.toml, or the coordinator's folder of a fleet",
                do=f"atoll train {given.loaded.path} --engine flower, or add --fleet DIR",
            )  # fmt: skip
    with _result_kept(tell) as kept, opened(given.loaded, fleet, overrides, tell) as found:
        kept.append(train_job(found.prepared(given.loaded, uuid4().hex), out, observers, found.make_backend, given))
        found.tell_finished()
    return kept[0]


def resume_on_fleet(
    run_dir: Path, fleet: Path | None, tell: Callable[[str], None], observers: Sequence[Callable[[Event], None]] = (), *,
    trust: bool = False,
) -> RunResult:  # fmt: skip
    """Go on with a run of a fleet; edges go on from what they keep themselves.

    Raises: as `atoll.resume`; ConflictError without `fleet`; FleetFolderError; HostLostError where something does not start.
    """
    if fleet is None:
        raise ConflictError(
            "edges that were started with a run are gone with it, and what they had learned to go on from", where=str(run_dir),
            got="--engine flower without --fleet", expected="the coordinator's folder of a fleet whose edges are still there",
            do="begin a new run; `atoll fleet init` writes a fleet that outlives one",
        )  # fmt: skip
    with _result_kept(tell) as kept, ExitStack() as stack:

        def begin(loaded: LoadedConfig, run_id: str) -> tuple[Job, BackendFactory]:
            found = stack.enter_context(opened(loaded, fleet, (), tell))
            fleets.append(found)
            return found.prepared(loaded, run_id, run_dir), found.make_backend

        fleets = list[Fleet]()
        kept.append(resume_by(run_dir, begin, observers, on_fleet=True, trust=trust))
        for found in fleets:
            found.tell_finished()
    return kept[0]


@contextmanager
def _result_kept(tell: Callable[[str], None]) -> Iterator[list[RunResult]]:
    """A run that is complete is not interrupted by what ends its fleet: what comes then has only processes left to end."""
    kept = list[RunResult]()
    try:
        yield kept
    except KeyboardInterrupt:
        if not kept:
            raise
        tell("the run is complete: nothing was interrupted but the end of the fleet's processes")


def train_in_app(grid: Grid, config: Path, out: Path, *, resumes: bool) -> RunResult:
    """Train, or go on with the run in `out`, inside a Flower app that somebody else's `flwr run` started. An edge is who it says it is.

    Raises: as `atoll.train` and `atoll.resume`; EdgesLostError where too few nodes come.
    """
    relay = Relay(ask_again=_ALONE_SECONDS)
    with Progress() as progress:
        carrier = Thread(target=carry, args=(grid, relay), name="atoll-carrier", daemon=True)
        carrier.start()
        try:

            def begin(loaded: LoadedConfig, run_id: str) -> tuple[Job, BackendFactory]:
                seconds = loaded.config.federated.round_timeout
                until_ready(lambda: len(list(grid.get_node_ids())) >= len(loaded.config.edge), seconds)
                numbers = {node: str(node) for node in grid.get_node_ids()}
                found = Fleet(relay, named(FleetGrid(relay, numbers), numbers, seconds), seconds)
                return found.prepared(loaded, run_id, out if resumes else None), found.make_backend

            if resumes:
                return resume_by(out, begin, [progress], on_fleet=True)
            job, make_backend = begin(load(config), uuid4().hex)
            return train_job(job, out, [progress], make_backend)
        finally:
            relay.close()
            carrier.join()


@contextmanager
def opened(loaded: LoadedConfig, fleet: Path | None, overrides: Sequence[str], tell: Callable[[str], None]) -> Iterator[Fleet]:
    """A fleet, for as long as this context lasts."""
    check_trackers(loaded.config.track.to)  # Before anybody is waited for.
    with ExitStack() as stack:
        if fleet is None:
            folder = Path(stack.enter_context(scratch_folder("atoll-fleet-")))
            path, seconds = folder / "fleet" / "coordinator", _LOCAL_EDGES_SECONDS
            addresses = [f"127.0.0.1:{free_port()}"] if any(may_split(loaded.config, edge) for edge in loaded.config.edge) else []
            init(loaded.path, folder / "fleet", f"127.0.0.1:{free_port()}", [f"host={one}" for one in addresses], overrides=overrides)
            hosts = {HostFolder(folder / "fleet" / "hosts" / "host"): one for one in addresses}
        else:
            path, seconds = fleet, loaded.config.federated.round_timeout
        coordinator = CoordinatorFolder(path)
        link = stack.enter_context(SuperLink(coordinator, tell))
        nodes = link.nodes()
        if fleet is None:
            _start_here(loaded, path.parent, hosts, overrides, stack)
        link.carry()
        tell(f"edges call {coordinator.read().address} (TLS, their certificates and keys); waiting for {', '.join(nodes.values())}")
        yield Fleet(link.relay, nodes, seconds, link.gone, outlives_runs=fleet is not None)


def _start_here(
    loaded: LoadedConfig, fleet: Path, hosts: Mapping[HostFolder, str], overrides: Sequence[str], stack: ExitStack
) -> None:  # fmt: skip
    """A host, if there is one, and all edges, as processes of their own."""
    atoll = [sys.executable, "-m", "atoll"]
    for place, address in hosts.items():
        secured = ["--tls-cert", str(place.cert), "--tls-key", str(place.key), "--client-ca", str(place.ca), "--crl", str(place.revoked)]
        host = Child("the host", [
            *atoll, "host", "--model", base_source(loaded), "--listen", address, "--merge", *secured
        ], place.path / "host.log")  # fmt: skip
        stack.callback(host.stop)
        host.wait_for("serving ", _HOST_SECONDS)
    sets = [text for override in overrides for text in ("--set", override)]
    for edge in loaded.config.edge:
        folder = fleet / "edges" / edge.name
        child = Child(f"edge {edge.name}", [
            *atoll, "fleet", "join", str(folder), "--config", str(loaded.path), *sets
        ], folder / "join.log")  # fmt: skip
        stack.callback(child.stop)
