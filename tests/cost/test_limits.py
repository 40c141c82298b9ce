"""What a process may use: control groups of both versions, resource limits, free memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from atoll.cost import limits
from atoll.cost.limits import UsableMemory, usable_memory

GB = 10**9
limits_own_bytes = limits._own_bytes


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 GB free, no limits of this process's own, and nothing that it holds."""
    monkeypatch.setattr(limits, "_own_bytes", lambda: 0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GB))
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def group(folder: Path, version: int, limit: object, usage: int = 0, cached: int = 0) -> None:
    """A control group as the kernel shows it."""
    folder.mkdir(parents=True, exist_ok=True)
    limit_name, usage_name = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / usage_name).write_text(f"{usage}\n")
    prefix = "" if version == 2 else "total_"
    stat = f"anon 7\nfile 9\n{prefix}inactive_file {cached // 2}\n{prefix}active_file {cached - cached // 2}\n"
    (folder / "memory.stat").write_text(stat if version == 2 else "inactive_file 1\nactive_file 1\n" + stat)


def usable(tmp_path: Path, own: str) -> UsableMemory:
    (tmp_path / "own").write_text(own)
    return usable_memory(tmp_path / "groups", tmp_path / "own")


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_leaves_its_limit_less_what_is_used_and_cannot_be_taken_back(version: int, tmp_path: Path) -> None:
    root = tmp_path / "groups" / "memory" if version == 1 else tmp_path / "groups"
    own = "4:cpu,memory:/a/b\n1:cpu:/\n" if version == 1 else "0::/a/b\n"
    group(root / "a" / "b", version, 3 * GB, usage=2 * GB, cached=GB)
    found = usable(tmp_path, own)
    assert (found.cgroup_bytes, found.num_bytes, found.bound_by) == (2 * GB, 2 * GB, "control group")


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_of_the_groups_above_binds(version: int, tmp_path: Path) -> None:
    root = tmp_path / "groups" / "memory" if version == 1 else tmp_path / "groups"
    group(root, version, 9223372036854771712 if version == 1 else "max")
    group(root / "a", version, 4 * GB, usage=3 * GB)
    group(root / "a" / "b", version, 3 * GB)
    group(root / "other", version, 1)
    assert usable(tmp_path, "4:memory:/a/b\n" if version == 1 else "0::/a/b\n").cgroup_bytes == GB


def test_in_a_container_the_groups_name_may_be_the_one_outside(tmp_path: Path) -> None:
    group(tmp_path / "groups" / "memory", 1, 2 * GB)
    assert usable(tmp_path, "4:memory:/docker/0123\n0::/\n").num_bytes == 2 * GB


def test_version_2_beside_version_1_is_mounted_one_level_below(tmp_path: Path) -> None:
    group(tmp_path / "groups" / "unified" / "a", 2, 2 * GB)
    assert usable(tmp_path, "1:cpu:/\n0::/a\n").num_bytes == 2 * GB


def test_a_group_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    group(tmp_path / "groups" / "a", 2, GB, usage=2 * GB)
    assert usable(tmp_path, "0::/a\n").num_bytes == 0


def test_without_groups_and_limits_free_memory_binds(tmp_path: Path) -> None:
    group(tmp_path / "groups" / "a", 2, "max")
    for found in (usable(tmp_path, "0::/a\n"), usable_memory(tmp_path / "none", tmp_path / "none")):
        assert found == UsableMemory(8 * GB, None, None)
        assert (found.num_bytes, found.bound_by) == (8 * GB, "free memory")


def test_the_smaller_resource_limit_binds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = {resource.RLIMIT_AS: 5 * GB, resource.RLIMIT_DATA: 4 * GB}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (own[kind], resource.RLIM_INFINITY))
    found = usable(tmp_path, "")
    assert (found.rlimit_bytes, found.num_bytes, found.bound_by) == (4 * GB, 4 * GB, "resource limit")


def test_what_the_asking_process_holds_is_free_again_when_it_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(limits, "_own_bytes", lambda: GB)
    group(tmp_path / "groups" / "a", 2, 4 * GB, usage=3 * GB)
    assert usable(tmp_path, "0::/a\n") == UsableMemory(9 * GB, 2 * GB, None)
    group(tmp_path / "groups" / "a", 2, 4 * GB, usage=GB // 2)
    assert usable(tmp_path, "0::/a\n").cgroup_bytes == 4 * GB


def test_what_a_process_holds_are_its_own_pages_and_not_its_files() -> None:
    before = limits_own_bytes()
    block = bytearray(os.urandom(1024)) * 2**16  # 64 MiB
    assert 0.9 * len(block) <= limits_own_bytes() - before <= 1.1 * len(block)


def test_a_real_limit_is_seen() -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (400_000_000, resource.RLIM_INFINITY))\n"
    code += "from atoll.cost.limits import usable_memory; print(usable_memory().rlimit_bytes)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 400_000_000
