"""What run.toml names and the machines of a fleet must have beside it; and the README in each folder, which says so to whoever gets it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from atoll.config.document import read_document
from atoll.config.fleet import with_fleet
from atoll.config.load import LoadedConfig, resolve_path
from atoll.config.named_parts import plugin_parts
from atoll.fleet.files import EdgeFile, FleetFile
from atoll.jobs.inputs import base_source
from atoll.registry.plugins import files_of
from atoll.tasks.readers.sources import local_path

README = "README.md"
TRAIN = "atoll train run.toml --engine flower --fleet ."
JOIN = "atoll fleet join ."
_THREATS, _CODE, _COLUMNS = "docs/threat-model.md of Atoll", "       ", 110


@dataclass(frozen=True, slots=True)
class NeededInput:
    """What run.toml names and a machine must have."""

    what: str
    value: str
    """As run.toml has it; a path is relative to run.toml."""
    path: Path | None
    """None: a Hugging Face id, as nothing of this name lies beside run.toml."""


def named_by_coordinator(loaded: LoadedConfig) -> list[NeededInput]:
    """What the coordinator's machine must have: the base, held-out rows, and what the plan and the adapter start from."""
    config = loaded.config
    given = {"start adapter": config.adapter.start, "importance": config.plan.importance_file}
    files = [NeededInput(what, value, loaded.resolve(value)) for what, value in given.items() if value is not None]
    source = config.data.eval if config.data.validation_share is None else config.data.train
    rows = [_rows(loaded, "held-out rows", source)] if source not in (None, "demo") else []
    return [*_of_config(loaded), *_base(loaded), *files, *rows]


def named_by_edge(loaded: LoadedConfig, name: str) -> list[NeededInput]:
    """What an edge's machine must have: the base, and its own rows, or all rows of which it trains on a share."""
    edge = next(edge for edge in loaded.config.edge if edge.name == name)
    what, source = ("rows", edge.data) if edge.data is not None else ("all edges' rows", loaded.config.data.train)
    rows = [_rows(loaded, what, source)] if source != "demo" else []
    rows += [_rows(loaded, "its own held-out rows", edge.eval)] if edge.eval is not None else []
    return [*_of_config(loaded), *_base(loaded), *rows]


def _of_config(loaded: LoadedConfig) -> list[NeededInput]:
    """What reading run.toml opens, on every machine: the fleet file, the profiles of all edges, and parts that are not built in."""
    document = read_document(loaded.path)
    run = document.table.get("run")
    fleet = run.get("fleet") if isinstance(run, Mapping) else None
    edges = with_fleet(document)[0].table.get("edge")
    profiles = [edge.get("profile") for edge in edges] if isinstance(edges, list) else []
    values = [*([("fleet file", fleet)] if fleet else []), *(("profile", profile) for profile in dict.fromkeys(profiles) if profile)]
    files = [NeededInput(what, value, resolve_path(loaded.path, value)) for what, value in values]
    return files + [_part(part.name, loaded.path.parent) for part in plugin_parts(loaded.config)]


def _part(name: str, folder: Path) -> NeededInput:
    """Its file, or the folder of its package; where neither is there, the file."""
    module, package = files_of(name, folder)
    path = package.parent if package.is_file() and not module.is_file() else module
    return NeededInput(f"part {name} (a program: copy it if you trust who wrote it)", str(path.relative_to(folder)), path)


def _base(loaded: LoadedConfig) -> list[NeededInput]:
    name = loaded.config.model.base
    source = base_source(loaded)
    if name == "tiny":
        return []
    is_path = source != name or Path(source).is_dir() or Path(source).is_absolute()
    return [NeededInput("base", name, Path(source) if is_path else None)]


def _rows(loaded: LoadedConfig, what: str, source: str) -> NeededInput:
    return NeededInput(what, source, local_path(source, loaded.path.parent))


def needed(named: Sequence[NeededInput]) -> list[str]:
    """What a machine must have, a line for each."""
    if not named:
        return ["It needs nothing else."]
    files = [f"- {one.what}: `{one.value}`" for one in named if one.path is not None]
    fetched = [f"- {one.what}: `{one.value}`, from the Hugging Face hub" for one in named if one.path is None]
    return ["It needs, in this folder or where run.toml says:", "", *files, *fetched]


def edge_readme(loaded: LoadedConfig, edge: EdgeFile) -> str:
    """For whoever has the rows, and this folder alone."""
    lost = f"`atoll fleet remove {edge.name}`, then `atoll fleet add {edge.name}`: there is a new folder"
    to_host = f"- To its host, {edge.host}: activations and gradients of its rows, from which text can be told to some extent ({_THREATS})."
    return _text([
        f"# {edge.name}: the machine with these rows", "", *_for_one(f"the machine that has the rows of {edge.name}"), "",
        *_begin(needed(named_by_edge(loaded, edge.name)), JOIN), "",
        "It calls the coordinator and takes part until Ctrl-C, which the coordinator is told; started again, it takes part again. "
        "When a run is complete it says so, and waits for the next.",
        "", "## What leaves this machine", "",
        f"Nothing calls it. It calls {edge.superlink} over HTTPS, with the certificate in this folder.", "",
        "- To the coordinator: the update of the adapter, its trained numbers as they are; how many rows, examples, steps and tokens; "
        "mean loss; memory, computing and bytes; digests of base and run.toml; Atoll's version; in classification its classes; and, where "
        f"something fails, a page that says what. From an update, words of training rows can be picked out ({_THREATS}).",
        *([to_host] if edge.host is not None else []), "- No row, and no token.", "",
        "`policy.toml` is this machine's own: what is not allowed there is not done, whoever asks. `audit.jsonl` says what was asked, "
        "`events.jsonl` what was done. `state/` holds what training goes on from, `personal/` a copy of its own where run.toml asks for "
        "one.", "", *_keys("client.pem and client.key", lost),
    ])  # fmt: skip


def coordinator_readme(loaded: LoadedConfig, fleet: FleetFile) -> str:
    """For whoever runs the coordinator, and has this folder alone."""
    return _text([
        "# The coordinator", "", *_for_one("the machine where the adapter comes together"), "",
        *_begin(needed(named_by_coordinator(loaded)), TRAIN), "",
        f"Edges call {fleet.address}: the port must be open to them. It waits for the edges, trains, and ends with the run, which lies in "
        "`runs/`. `atoll runs show RUN` says how to go on with one that was stopped.",
        "", "## What leaves this machine", "",
        "Edges are sent the common adapter and what each is to do. Held-out rows stay here. `superlink/` keeps what passes through, "
        "updates too, not encrypted.", "", *_keys("superlink.pem and superlink.key", "the fleet is written anew"),
    ])  # fmt: skip


def host_readme(loaded: LoadedConfig, name: str, edges: Sequence[str], command: str) -> str:
    """For whoever runs a host, and has this folder alone."""
    base = [one for one in named_by_coordinator(loaded) if one.what == "base"]
    return _text([
        f"# {name}: a host", "", *_for_one(f"the machine that keeps most of the base for {', '.join(edges)}"), "",
        *_begin(needed(base), command), "", "It stays for the next run; Ctrl-C ends it.", "", "## What passes this machine", "",
        f"Activations and gradients of its edges' rows, from which text can be told to some extent ({_THREATS}). It keeps none.", "",
        *_keys("host.pem and host.key", "the fleet is written anew"),
    ])  # fmt: skip


def _for_one(who: str) -> list[str]:
    return [f"This folder is for {who}, and for nobody else: private keys are in it. `atoll fleet` wrote it."]


def _begin(needs: Sequence[str], command: str) -> list[str]:
    return [
        f"1. Install Atoll {version('atoll')}, the same on all machines.", f"2. {needs[0]}", *needs[1:], *([""] if needs[1:] else []),
        "3. In this folder, `atoll doctor --fleet .` says what is missing. Then start", "", f"{_CODE}{command}",
    ]  # fmt: skip


def _keys(files: str, lost: str) -> list[str]:
    return [
        "## Keys", "", f"Certificates hold for a year. After `atoll fleet renew`, where ca.key is kept, copy the new {files} here, and "
        f"start anew. Where one is lost, or somebody else may have it, tell whoever keeps ca.key: {lost}.",
    ]  # fmt: skip


def _text(lines: Sequence[str]) -> str:
    broken = [
        [line] if line.startswith(_CODE) else textwrap.wrap(
            line, _COLUMNS, subsequent_indent="  " if line.startswith("- ") else "", break_long_words=False, break_on_hyphens=False
        ) or [""] for line in lines
    ]  # fmt: skip
    return "\n".join(line for part in broken for line in part) + "\n"
