"""A base that is no folder here: refused at once where it is nearly one that there is, or where no hub answers."""

from __future__ import annotations

from pathlib import Path

import httpx
import huggingface_hub
import pytest

from atoll.base.load import load_base
from atoll.base.weights.hub import check_hub_name
from atoll.config.load import load
from atoll.errors import BaseFolderError
from atoll.jobs.inputs import base_shapes


class Hub:
    """A hub that cannot be reached, or can, and how often it was asked."""

    def __init__(self, problem: Exception | None) -> None:
        self.problem, self.asked = problem, 0

    def head(self, url: str, timeout: float) -> None:
        self.asked += 1
        if self.problem is not None:
            raise self.problem


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(httpx.ConnectError("Name or service not known"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(httpx, "head", found.head)
    return found


@pytest.mark.parametrize("name", ["tny", "Tiny", "tinny", "tiyn", "TINY"])
def test_nearly_the_name_of_what_ships(name: str, hub: Hub) -> None:
    with pytest.raises(BaseFolderError) as caught:
        load_base(name)
    assert caught.value.do == "did you mean tiny?"
    assert not hub.asked


def test_a_path_into_a_folder_that_is_there(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside run.toml, and nowhere else; or where Atoll was started, where there is none."""
    (tmp_path / "models" / "my-llama").mkdir(parents=True)
    (tmp_path / "run.toml").write_text('[model]\nbase = "models/llama"\n')
    with pytest.raises(BaseFolderError) as caught:
        base_shapes(load(tmp_path / "run.toml"), 0)
    assert caught.value.do == "did you mean models/my-llama?"
    monkeypatch.chdir(tmp_path)
    for name, do in (("models/my-lama", "did you mean models/my-llama?"), ("models/gpt", "mend the path")):
        with pytest.raises(BaseFolderError) as caught:
            load_base(name)
        assert caught.value.do.startswith(do)
    assert not hub.asked


def test_a_hub_that_cannot_be_reached_is_asked_once(hub: Hub) -> None:
    for name in ("org/name", "gpt2"):
        with pytest.raises(BaseFolderError, match="no such base") as caught:
            load_base(name)
        assert "Name or service not known" in caught.value.got
    assert hub.asked == 2


@pytest.mark.parametrize("problem", [None, httpx.ReadTimeout("slow"), httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED]")])
def test_other_names_are_the_librarys_to_find(problem: Exception | None, hub: Hub, tmp_path: Path) -> None:
    hub.problem = problem
    check_hub_name("org/name", tmp_path)
    check_hub_name("tiny", tmp_path)
    check_hub_name("tiny-random/llama", tmp_path)


def test_what_is_in_the_cache_needs_no_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.json"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: str(config) if name == "tny" else None)
    check_hub_name("tny", tmp_path)
    assert not hub.asked
