"""What the documents say is so: the drawing of the house, links, paths, test names, the form of decisions, one meaning a word."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, DOCS = ROOT / "src" / "atoll", ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")), *sorted(DOCS.rglob("*.md"))]
DECISIONS = sorted((DOCS / "decisions").glob("*.md"))
DECISION_LINES = 60
LIBRARIES = {"torch", "flwr", "peft", "transformers", "datasets"}
CONTRACT_WORDS = {"host", "edge", "coordinator", "base", "module", "adapter", "plan", "round", "step", "update", "cut"}
# A folder at the root of some machine, or a user's own; "https://" and "../" are neither.
MACHINE_PATH = re.compile(r"(?<![\w.:/~-])/(?:work|home|root|tmp|usr|opt|mnt|srv|var|Users)\b|[A-Z]:\\")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def layers() -> list[set[str]]:
    """The lines of the import contract, from the top."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (c for c in project["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    return [set(line.split(" | ")) for line in contract["layers"]]


def architecture() -> str:
    return (DOCS / "architecture.md").read_text(encoding="utf-8")


def drawn_lines() -> list[set[str]]:
    """The lines of the drawing that name rooms, from the top; what stands after three spaces explains."""
    drawing = re.findall(r"^```\n(.*?)^```", architecture(), flags=re.MULTILINE | re.DOTALL)[0]
    named = [re.split(r"\s{3,}", line.strip())[0] for line in drawing.splitlines() if line.strip(" |")]
    return [set(line.split(" · ")) for line in named]


def room_rows() -> dict[str, str]:
    """The table of rooms: what each knows nothing of."""
    table = architecture().partition("| room |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", table, flags=re.MULTILINE)
    assert len(dict(rows)) == len(rows), "a room has two rows"
    return dict(rows)


def imports_of(room: str) -> set[str]:
    """First names that a room imports when its files are opened, and rooms of Atoll that it imports at any time."""
    folder = PACKAGE / room
    found: set[str] = set()
    for file in folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{room}.py"]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            own = isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "atoll"
            if isinstance(node, ast.ImportFrom) and own:
                first = (node.module or "").split(".")[1:2]
                found |= set(first or (alias.name for alias in node.names))
            elif isinstance(node, ast.ImportFrom) and node in tree.body:
                found.add((node.module or "").partition(".")[0])
            elif isinstance(node, ast.Import) and node in tree.body:
                found |= {alias.name.partition(".")[0] for alias in node.names}
    return found - {room}


def test_the_drawing_has_the_rooms_of_the_contract_line_by_line() -> None:
    assert drawn_lines() == layers()


def test_the_table_has_every_room_once() -> None:
    assert set(room_rows()) == set().union(*layers())


def test_no_room_knows_what_the_table_says_it_does_not() -> None:
    rooms = set().union(*layers())
    for room, text in room_rows().items():
        named = set(re.findall(r"`(\w+)`", text))
        assert named <= rooms | LIBRARIES, f"{room}: {named - rooms - LIBRARIES}"
        unknown = {"everything else": rooms - {room}, f"everything but {''.join(f'`{name}`' for name in named)}": rooms - {room} - named}
        assert not imports_of(room) & unknown.get(text, named), room


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_is_one_page_of_three_parts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == ["Context", "Decision", "Consequences"]
    assert text.startswith(f"# {page.name[:4]} ")
    assert re.search(r"^20\d\d-\d\d-\d\d, (accepted|replaced by \[?\d{4}).*$", text, flags=re.MULTILINE), "date and state"
    assert text.count("\n") <= DECISION_LINES


def test_decisions_are_numbered_without_gaps() -> None:
    assert [page.name[:4] for page in DECISIONS] == [f"{number:04d}" for number in range(1, len(DECISIONS) + 1)]


def test_the_glossary_defines_every_word_once() -> None:
    text = (DOCS / "glossary.md").read_text(encoding="utf-8")
    words = [word.casefold() for word in re.findall(r"^- \*\*([^*]+)\*\*: ", text, flags=re.MULTILINE)]
    assert len(words) == text.count("\n- "), "an entry has another form"
    assert len(words) == len(set(words)), sorted(word for word in set(words) if words.count(word) > 1)
    assert set(words) >= CONTRACT_WORDS


def test_the_log_is_dated_in_order() -> None:
    """By topic, the oldest entry first; the table at the top has every topic with its number of entries and of negative ones."""
    contents, *topics = re.split(r"^## ", (DOCS / "log.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    there = []
    for topic in topics:
        titles = re.findall(r"^### (.*)$", topic, flags=re.MULTILINE)
        dates = [title.partition(": ")[0] for title in titles]
        assert titles
        assert all(re.fullmatch(r"20\d\d-\d\d-\d\d", date) for date in dates), titles
        assert dates == sorted(dates), titles
        there.append((topic.partition("\n")[0], str(len(titles)), str(sum("negative" in title for title in titles))))
    assert re.findall(r"^\| \[(.*?)\]\(#[\w-]+\) \| (\d+) \| (\d+) \|", contents, flags=re.MULTILINE) == there


def anchors(page: Path) -> set[str]:
    """Places that a link can lead to, as GitHub names headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)", (DOCS / "README.md").read_text(encoding="utf-8")))
    assert linked == {page.name for page in DOCS.glob("*.md")} - {"README.md"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert not [path for path, _, _ in links if path and not (page.parent / path).exists()]
    assert not [f"{path}#{place}" for path, _, place in links if place and place not in anchors(page.parent / path if path else page)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    """Paths in `code`, from the root, the package or the page; files of run directories and model folders stand without a folder."""
    named = re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|toml|txt))`", page.read_text(encoding="utf-8"))
    assert not [path for path in named if not any((folder / path).is_file() for folder in (ROOT, PACKAGE, page.parent))]


def shown_lines(page: Path) -> list[str]:
    """Command lines of atoll in fenced blocks, whole; "..." and placeholders of a usage are none."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    joined = "".join(blocks).replace("\\\n", " ")
    return re.findall(r"^(?:\$ )?(?:\.venv/bin/)?atoll ([^.].*)$", joined, flags=re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if shown_lines(page)], ids=name_of)
def test_command_lines_that_are_shown_are_taken(page: Path) -> None:
    from atoll.cli.app import app

    for line in shown_lines(page):
        action = typer.main.get_command(app).main(args=shlex.split(line, comments=True), prog_name="atoll", standalone_mode=False)
        assert callable(action), line  # What would be done; it is not done.


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tests_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")))
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
    there = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, flags=re.MULTILINE)}
    assert not named - there


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_names_a_place_on_somebodys_machine(page: Path) -> None:
    assert not MACHINE_PATH.findall(page.read_text(encoding="utf-8"))


def test_the_changelog_has_the_version_of_the_package() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_sizes_have_one_notation() -> None:
    """kB, MB and GB as the program writes them; KiB, MiB and GiB where a limit is a power of two."""
    wrong = re.compile(r"\d ?(?:KB|Kb|kb|mb|gb|kib|mib|gib|[kKMG]bytes?)\b")
    assert not [(name_of(page), match[0]) for page in PAGES for match in wrong.finditer(page.read_text(encoding="utf-8"))]


def test_the_fleets_pages_are_of_the_flower_that_is_installed() -> None:
    (pinned,) = re.findall(r"^flwr==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = {version for page in PAGES for version in re.findall(r"Flower(?:'s)? (\d+\.\d+)", page.read_text(encoding="utf-8"))}
    assert named == {pinned}


def test_what_a_number_counts_is_one_or_many() -> None:
    """Lines for people say "1 step": such numbers go through `counted`, or stand where there cannot be one."""
    nouns = "steps|rounds|edges|rows|updates|runs|seeds|classes|tokens|certificates|epochs"
    plain = re.compile(r"\{(?:len\([^{}]*\)|[^{}]*num_\w+)\} (?:" + nouns + r")\b")
    exempt = {"wire", "split", "testing"}  # Of messages, whose sizes and shapes are as they are.
    found = [
        f"{file.relative_to(PACKAGE)}: {match[0]}" for file in sorted(PACKAGE.rglob("*.py")) for match in plain.finditer(file.read_text())
        if file.relative_to(PACKAGE).parts[0] not in exempt
    ]  # fmt: skip
    assert not found
