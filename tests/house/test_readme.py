"""What the README says is so: its length, its tree, its commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
LONGEST_WORDS = 700


@pytest.fixture(scope="module")
def text() -> str:
    assert README.is_file(), "README.md is missing"
    return README.read_text(encoding="utf-8")


def fenced(text: str) -> list[str]:
    """The contents of all fenced blocks."""
    return re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> set[str]:
    """First words of the atoll command line, as the application knows them."""
    from atoll.cli.app import app

    group = typer.main.get_command(app)
    return set(group.commands)  # type: ignore[attr-defined]


def shown_commands(text: str, program: str) -> set[str]:
    """Words after the program's name, in fenced lines that begin with it and in `inline code`."""
    lines = [line.strip().removeprefix("$ ") for block in fenced(text) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    return {match[1] for line in lines if (match := re.match(rf"{program}\s+([a-z][a-z-]*)", line))}


def tree_paths(text: str) -> list[str]:
    """Paths of the block that draws the tree: names, indented by two spaces or by box-drawing lines, folders ending in a slash."""
    blocks = [block for block in fenced(text) if re.search(r"^src/", block, flags=re.MULTILINE)]
    paths, folders = [], list[tuple[int, str]]()
    for line in (line for block in blocks for line in block.splitlines() if line.strip()):
        match = re.match(r"([\s│├└─]*)([\w./-]+)", line)
        if match is None:
            continue
        depth, name = len(match[1]), match[2]
        folders = [(own, folder) for own, folder in folders if own < depth]
        path = "".join(folder for _, folder in folders) + name
        paths.append(path)
        if name.endswith("/"):
            folders.append((depth, name))
    return paths


def test_it_is_short(text: str) -> None:
    assert len(text.split()) < LONGEST_WORDS


def test_every_command_it_shows_exists(text: str) -> None:
    shown = shown_commands(text, "atoll")
    assert shown, "the README shows no atoll command"
    assert shown <= commands(text)


def test_every_make_target_it_shows_exists(text: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    shown = shown_commands(text, "make")
    assert {"demo", "test"} <= shown <= targets


def test_every_path_in_its_tree_exists(text: str) -> None:
    paths = tree_paths(text)
    assert paths, "the README draws no tree with src/ in it"
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_its_tree_shows_every_room(text: str) -> None:
    rooms = {f"src/atoll/{folder.parent.name}/" for folder in (ROOT / "src" / "atoll").glob("*/__init__.py")}
    assert not rooms - set(tree_paths(text))


def test_every_link_to_a_file_leads_somewhere(text: str) -> None:
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert not [link for link in links if link and not (ROOT / link).exists()]


def test_the_tree_reader_reads_both_ways_of_drawing() -> None:
    plain = "```\nsrc/\n  atoll/\n    base/     the model\nMakefile\n```\n"
    lines = "```\nsrc/atoll/\n├── base/   the model\n│   └── load.py\n└── config/\n```\n"
    assert tree_paths(plain) == ["src/", "src/atoll/", "src/atoll/base/", "Makefile"]
    assert tree_paths(lines) == ["src/atoll/", "src/atoll/base/", "src/atoll/base/load.py", "src/atoll/config/"]
