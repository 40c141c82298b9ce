"""Every key for people to read: run.toml of `atoll init`, and docs/configuration.md (python -m atoll.config.reference)."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap

from atoll.config.checks.availability import AVAILABLE, is_reserved
from atoll.config.keys import OPTIONS, Key, as_toml, keys, section_class, section_names
from atoll.registry.kinds import KINDS
from atoll.registry.parts import find, names

_INTRO = """# Configuration

Written by `python -m atoll.config.reference`; a test compares it with the schema.

Every key of `run.toml` has a default. Unknown keys are refused. Paths are relative to the folder of the file. One key can be set
for one run with `atoll train run.toml --set section.key=value`, and one edge's with `--set edge.NAME.key=value`.

`run.fleet` names a file that holds `[[edge]]` sections and nothing else; paths in it are relative to its own folder. `edge.profile` names
what `atoll doctor --profile FILE` wrote on a machine: `memory` (of an accelerator with `process_memory`), `flops`, `bandwidth` and
`latency` hold where the edge does not declare them. A run directory keeps what came of both, not their names.

Where a key takes the name of a *part*, it takes `"module:object"`, too: see [Parts](#parts), which also says what `[options."NAME"]` is.

*Reserved* keys belong to the file format, but this version takes them only at the values named; others are refused with C105.
"""

_PARTS = """
These are the parts that keys name, by kind. In place of a built-in name stands `"module:object"`, a class in a Python file beside run.toml
or in an installed package; or the name of an installed entry point. A part that takes settings has them in `[options."NAME"]`, by the name
that it is given in run.toml. [Extending Atoll](extending.md) says how one is written and checked, and who loads it when.
"""


def commented_toml(values: Mapping[str, object]) -> str:
    """A run.toml that sets `values` ("data.train" -> value) and shows every other key with its default, commented out."""
    lines = ["# What this run does. Every key has a default; a line that begins with # shows it. docs/configuration.md has them all."]
    for section in (one for one in section_names() if one != OPTIONS):
        lines += ["", f"# {_first_line(section)}"]
        lines.append(
            "# [[edge]]                      # once for each edge; without it there is one local edge"
            if section == "edge"
            else f"[{section}]"
        )
        for key in keys().values():
            if key.section == section:
                lines += _entry(key, values)
    return "\n".join(lines) + "\n"


def short_toml(values: Mapping[str, object], notes: Mapping[str, str]) -> str:
    """A run.toml of these values ("data.train" -> value) alone, some with a note behind them."""
    lines = []
    for section in section_names():
        own = {path: value for path, value in values.items() if path.partition(".")[0] == section}
        lines += ["", f"[{section}]"] if own else []
        for path, value in own.items():
            line = f"{path.partition('.')[2]} = {as_toml(value)}"
            lines.append(f"{line:<26} # {notes[path]}" if path in notes else line)
    return "\n".join(lines) + "\n"


def markdown() -> str:
    """docs/configuration.md."""
    lines = [_INTRO.rstrip()]
    for section in (one for one in section_names() if one != OPTIONS):
        lines += ["", f"## {'[[edge]]' if section == 'edge' else f'[{section}]'}", "", _first_line(section), ""]
        lines += ["| key | takes | default | |", "|---|---|---|---|"]
        lines += [_row(key) for key in keys().values() if key.path.partition(".")[0] == section]
    return "\n".join([*lines, *_parts()]) + "\n"


def _parts() -> list[str]:
    """What can be named, and by whom, from the registry."""
    lines = ["", "## Parts", "", _PARTS.strip()]
    for kind in KINDS.values():
        lines += ["", f"### {kind.key}: {kind.name}", "", f"Entry points: `{kind.group}`. Protocol: `{kind.protocol}`.", ""]
        built_in = [find(kind.name, name) for name in names(kind.name)]
        lines += ["| built in | |", "|---|---|", *(f"| `{part.name}` | {_cell(part.summary)} |" for part in built_in)] if built_in else []
        lines += [] if built_in else ["None is built in."]
    return lines


def _entry(key: Key, values: Mapping[str, object]) -> list[str]:
    words = key.description + (" (reserved)" if is_reserved(key.path) and key.path not in AVAILABLE else "")
    comment = [f"# {line}" for line in wrap(words, 110)]
    if key.path in values:
        return [*comment, f"{key.name} = {as_toml(values[key.path])}"]
    shown = as_toml(key.default) if key.default is not None else f"...   ({key.expected})"
    return [*comment, f"#{key.name} = {shown}"]


def _row(key: Key) -> str:
    name = key.path.partition(".")[2]
    default = f"`{as_toml(key.default)}`" if key.default is not None else "required" if key.required else "not set"
    return f"| `{name}` | {_cell(key.expected)} | {_cell(default)} | {_cell(key.description)}{_reserved(key)} |"


def _reserved(key: Key) -> str:
    if key.path in AVAILABLE:
        return f" *Reserved: here {' or '.join(f'`{as_toml(value)}`' for value in AVAILABLE[key.path])}.*"
    return " *Reserved: here the default.*" if is_reserved(key.path) else ""


def _first_line(section: str) -> str:
    text = (section_class(section).__doc__ or "").strip()
    words = text.partition("] ")[2].lstrip("] ")
    return words[:1].upper() + words[1:]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
