"""The house rules that can be measured: sizes, names, types, documentation, direction of imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from atoll.registry.kinds import KINDS
from atoll.registry.parts import names

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "atoll"
FILE_LINES, FUNCTION_LINES, ROOM_FILES, RESULT_LINES = 400, 60, 10, 500
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "internal", "misc", "tools"}
OPEN_WITHOUT = ("torch", "transformers", "flwr", "datasets")
LIGHT_ROOMS = ("config", "cost", "runs", "report", "selection", "planner", "cli")
Function = ast.FunctionDef | ast.AsyncFunctionDef

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}


def relative(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def functions() -> Iterator[tuple[Path, Function, bool]]:
    """Every function, and whether it is public: named so, and not inside a private class or another function."""
    for file, tree in TREES.items():
        yield from _functions_in(file, tree, True)


def _functions_in(file: Path, parent: ast.AST, public: bool) -> Iterator[tuple[Path, Function, bool]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Function):
            yield file, node, public and not node.name.startswith("_")
            yield from _functions_in(file, node, False)
        else:
            yield from _functions_in(file, node, public and not (isinstance(node, ast.ClassDef) and node.name.startswith("_")))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, "imports name the whole path, so that their direction can be read"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_files_are_short() -> None:
    long = [relative(file) for file in FILES if file.read_text(encoding="utf-8").count("\n") > FILE_LINES]
    assert not long, f"over {FILE_LINES} lines"


def test_functions_are_short() -> None:
    long = [
        f"{relative(file)}:{node.lineno} {node.name}"
        for file, node, _ in functions()
        if (node.end_lineno or node.lineno) - node.lineno + 1 > FUNCTION_LINES
    ]
    assert not long, f"over {FUNCTION_LINES} lines"


def test_rooms_are_small() -> None:
    rooms = Counter(file.parent for file in FILES if file.name != "__init__.py" and file.parent != PACKAGE)
    assert not {relative(room): count for room, count in rooms.items() if count > ROOM_FILES}


def test_names_say_what_is_inside() -> None:
    parts = {part for file in FILES for part in file.relative_to(PACKAGE).with_suffix("").parts}
    assert not parts & FORBIDDEN_NAMES


def test_no_two_rooms_import_each_other() -> None:
    edges = set()
    for file, tree in TREES.items():
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        edges |= {(room, name.split(".")[1]) for name in imported_modules(tree) if name.startswith("atoll.")}
    assert not {(a, b) for a, b in edges if a < b and (b, a) in edges and "__init__" not in (a, b)}


def test_no_file_imports_itself_in_a_circle() -> None:
    """Also where an import waits for a call."""
    modules = {"atoll." + relative(file).removesuffix(".py").replace("/", ".").removesuffix(".__init__"): file for file in FILES}
    graph = {
        name: {known for one in imported_modules(TREES[file]) for known in (one, one.rpartition(".")[0]) if known in modules} - {name}
        for name, file in modules.items()
    }
    TopologicalSorter(graph).prepare()


def test_public_functions_are_typed_and_documented() -> None:
    bare = []
    for file, node, public in functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        typed = node.returns is not None and all(a.annotation or a.arg in ("self", "cls") for a in arguments)
        if public and not (typed and ast.get_docstring(node)):
            bare.append(f"{relative(file)}:{node.lineno} {node.name}")
    assert not bare


def test_every_file_says_what_it_is() -> None:
    assert not [relative(file) for file, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]


def test_no_open_arguments_and_no_catch_all() -> None:
    bad = [f"{relative(file)}:{node.lineno} **{node.args.kwarg.arg}" for file, node, _ in functions() if node.args.kwarg]
    handlers = [(file, node) for file, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    for file, handler in handlers:
        catches_all = handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException")
        # Allowed where the handler looks at the exception and lets others pass.
        lets_pass = any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(handler))
        # Or where another process waits for an answer, and would hear nothing.
        answers = relative(file) == "fleet/links/resident.py"
        if catches_all and not lets_pass and not answers:
            bad.append(f"{relative(file)}:{handler.lineno} except")
    assert not bad


def test_nothing_is_left_for_later() -> None:
    word = re.compile(r"\b(" + "TO" + "DO|FIX" + r"ME|XX" + r"X)\b")
    assert not [relative(file) for file in FILES if word.search(file.read_text(encoding="utf-8"))]


def test_flower_is_imported_in_two_files() -> None:
    """Its messages in the one, SuperLink and clients of its APIs in the other."""
    importers = {relative(file) for file, tree in TREES.items() if any(name.split(".")[0] == "flwr" for name in imported_modules(tree))}
    assert importers == {"federated/flower.py", "fleet/links/flower.py"}


def test_imports_go_down_only() -> None:
    lint_imports = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([lint_imports, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_light_rooms_open_without_heavy_libraries() -> None:
    """In one fresh interpreter: every module of these rooms, and the library's own front."""
    names = [
        "atoll." + file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for file in FILES
        if file.relative_to(PACKAGE).parts[0] in LIGHT_ROOMS
    ]
    script = (
        "import importlib, sys\n"
        f"for name in {['atoll', *names]!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = sorted(set(sys.modules) & set({OPEN_WITHOUT!r}))\n"
        "    if heavy: sys.exit(f'{name} imports {heavy}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_results_can_be_reviewed() -> None:
    """All of many runs are kept compressed (benchmarks/README.md)."""
    texts = [file for file in (ROOT / "benchmarks" / "results").rglob("*") if file.is_file() and file.suffix not in (".png", ".xz")]
    assert not [file.name for file in texts if file.read_text(encoding="utf-8").count("\n") > RESULT_LINES]


@pytest.mark.parametrize("word", ["/work/", "/home/"])
def test_no_absolute_path_of_a_machine(word: str) -> None:
    files = [file for folder in ("src", "tests", "scripts", "benchmarks", "examples", "docs") for file in (ROOT / folder).rglob("*")]
    text_files = [file for file in files if file.suffix in {".py", ".md", ".toml", ".txt", ".json"} and file != Path(__file__)]
    assert not [str(file.relative_to(ROOT)) for file in text_files if word in file.read_text(encoding="utf-8", errors="replace")]


def test_no_part_is_told_by_its_name() -> None:
    """What Atoll must know of a part is a trait of its class, so that somebody else's can have it, too."""
    # These are values of other keys as well: precisions, "all" of something, suffixes of files; "bleu" is also a score.
    shared = {"all", "fp32", "bf16", "fp16", "csv", "jsonl", "json", "parquet", "arrow", "bleu"}
    named = {name for kind in KINDS for name in names(kind)} - shared
    compared = []
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            compares = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            against = [node.pattern] if isinstance(node, ast.match_case) else compares
            constants = [one.value for part in against for one in ast.walk(part) if isinstance(one, ast.Constant)]
            compared += [f"{relative(file)}: {word}" for word in constants if isinstance(word, str) and word in named]
    assert not compared
