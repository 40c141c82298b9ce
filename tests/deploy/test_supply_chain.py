"""What the image is made of: exact, by hash, and the same versions that are tested."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
_ENTRY = re.compile(
    r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^ ]+)(?: ; .*?)?(?P<hashes>(?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE
)


@pytest.fixture(scope="module")
def lock() -> dict[str, str]:
    """Versions by name. What is no entry with hashes is nothing at all."""
    text = (ROOT / "deploy" / "lock.txt").read_text()
    assert not [line for line in _ENTRY.sub("", text).splitlines() if line and not line.startswith("#")]
    return {found["name"]: found["version"] for found in _ENTRY.finditer(text)}


def test_everything_in_the_image_has_its_hash(lock: dict[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["host"], "setuptools"]:
        needed = Requirement(text)
        assert needed.specifier.contains(lock[needed.name.lower()]), f"{text}: run make lock"
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    for install in re.findall(r"pip install ([^\n]+)", dockerfile):
        assert "--require-hashes" in install or "--no-deps --no-build-isolation ." in install


def test_what_is_installed_is_what_was_tested(lock: dict[str, str]) -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#")
    assert {name: version for name, version in lock.items() if pins.get(name, version) != version} == {}
    # What only CUDA needs, and what only other systems need, is installed nowhere in the tests.
    assert {name for name in lock if name not in pins and not re.match("nvidia-|cuda-|triton|pywin32|win|httpx2-jsfetch", name)} == set()


def test_the_base_image_is_named_by_its_digest() -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    assert re.search(r"^ARG PYTHON=python:3\.11[.\d]*-slim@sha256:[0-9a-f]{64}$", dockerfile, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {"${PYTHON}"}


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FINE, UNTOLD = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}
BAD = {"name": "c", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}


@pytest.mark.parametrize(("out", "status", "says"), [
    (json.dumps({"dependencies": [FINE]}), 0, ["1 of 1 packages audited, 0 known"]),
    (json.dumps({"dependencies": [FINE, UNTOLD, BAD]}), 1, ["c 2: CVE-1, mended in 3", "2 of 3 packages audited, 1 known", "of 1: b"]),
    ("", 0, ["not audited: no such host"]),
])  # fmt: skip
def test_an_audit_fails_for_a_vulnerability_and_says_what_was_not_asked(
    out: str, status: int, says: list[str], audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, out, "a trace\nno such host\n"))
    assert audit.main() == status
    told = capsys.readouterr().out
    assert all(line in told for line in says)
