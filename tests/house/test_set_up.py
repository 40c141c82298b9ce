"""The files that set a machine up say what they must."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_direct_dependency_is_pinned_exactly() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    direct = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    names = {re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-") for requirement in direct}
    assert names <= set(pins())
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pins().values()), "no local versions, no ranges"


def test_every_library_that_is_imported_is_asked_for() -> None:
    """And not merely there because another one needs it; names of modules that are not their library's stand here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    of_parts = ("gguf", "tensorboard", "mlflow", "wandb", "trackio")
    direct = [*project["dependencies"], *(name for extra in of_parts for name in project["optional-dependencies"][extra])]
    asked = {re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in direct}
    asked |= {"grpc", "google", "yaml", "pydantic_core", "huggingface_hub", "prometheus_client", "rouge_score", "mlflow"}
    found: dict[str, str] = {}
    for file in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        only_types = {
            inner for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }  # fmt: skip
        for node in ast.walk(tree):
            if node not in only_types:
                found |= {name.partition(".")[0]: str(file) for name in imported(node)}
    assert {name: file for name, file in found.items() if name not in {*asked, *sys.stdlib_module_names, "atoll"}} == {}


def imported(node: ast.AST) -> list[str]:
    """Modules that a statement imports from outside its own package."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module else []


def test_continuous_integration_is_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text(encoding="utf-8").rstrip().endswith("make test")
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_no_registry_is_named() -> None:
    for name in ("Makefile", ".ci/run", "constraints.txt", "pyproject.toml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"://|--index-url|--find-links", text), name


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
