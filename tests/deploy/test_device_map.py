"""A host whose base is spread by a device map computes what a host with the base in one place computes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from atoll.base.load import DeviceMap, load_base
from atoll.commands.edge import edge
from atoll.commands.host import HostSettings, host
from atoll.errors import BadValueError, CommandLineError
from atoll.jobs.split import HostAccess
from atoll.split.host.blocks.middle import shared_view

from tests.conftest import save_model_folder
from tests.run_files import write_run

KILLS = ("select.policy=early-kill", "select.observe_steps=1", "select.keep=0.5")
"""The host evaluates the killed modules."""
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
HALF_ON_DISK = dict.fromkeys(PARTS, "cpu") | {"model.layers.1": "disk", "lm_head": "disk"}
BLOCKS_ON_DISK = HALF_ON_DISK | {"model.layers.0": "disk", "model.norm": "disk"}
MAPS: Mapping[str, DeviceMap] = {"half of the blocks on disk": HALF_ON_DISK, "all blocks on disk": BLOCKS_ON_DISK, "auto": "auto"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run.toml, a base and rows of unequal length."""
    save_model_folder(tmp_path / "base", "llama")
    rows = [{"prompt": f"w{n} w{n + 1}" + " w7" * (n % 3), "completion": f" w{n + 2} w3"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_run(tmp_path, {"run": {"rounds": 1}, "wire": {"mode": "factored"}}, {})
    return tmp_path


@contextmanager
def serving(folder: Path, device_map: DeviceMap | None) -> Iterator[HostAccess]:
    """`atoll host`, in a thread."""
    given = device_map
    if isinstance(device_map, Mapping):
        given = str(folder / "map.json")
        Path(given).write_text(json.dumps(device_map))
    lines, ready, stop = list[str](), threading.Event(), threading.Event()

    def on_ready(line: str) -> None:
        lines.append(line)
        ready.set()

    settings = HostSettings(str(folder / "base"), "127.0.0.1:0", max_tokens=4096, device_map=given)  # type: ignore[arg-type]
    thread = threading.Thread(target=host, args=(settings, on_ready, stop))
    thread.start()
    try:
        assert ready.wait(60)
        yield HostAccess("127.0.0.1:" + lines[0].split("127.0.0.1:")[1].split()[0])
    finally:
        stop.set()
        thread.join(60)


def trained(folder: Path, device_map: DeviceMap | None, out: str, overrides: tuple[str, ...]) -> bytes:
    """The adapter of one edge, trained against such a host."""
    with serving(folder, device_map) as access:
        result = edge(folder / "run.toml", access, out=folder / out, overrides=overrides)
    return (result.adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("overrides", [(), ("wire.mode=dense", "model.cut.front=1")], ids=["factored", "dense, a block in front"])
@pytest.mark.parametrize("name", list(MAPS))
def test_a_device_map_changes_no_bit(folder: Path, name: str, overrides: tuple[str, ...]) -> None:
    wanted, got = (trained(folder, where, out, overrides) for where, out in ((None, "plain"), (MAPS[name], "spread")))
    assert got == wanted


@pytest.mark.parametrize("name", list(MAPS))
def test_killed_modules_are_evaluated_wherever_their_weights_are(folder: Path, name: str) -> None:
    """Beside a weight that is brought in for each pass base and adapter are two products and a sum, elsewhere one fused one."""
    wanted, got = (load(trained(folder, where, out, KILLS)) for where, out in ((None, "plain"), (MAPS[name], "spread")))
    assert wanted.keys() == got.keys()
    assert max(float((wanted[key] - got[key]).abs().max()) for key in wanted) < 1e-6


def test_a_view_of_a_spread_base_runs_its_own_modules(folder: Path) -> None:
    """What a session puts in the place of a module is what runs: the map's hooks belong to the view, not to the base."""
    base = load_base(str(folder / "base"), device_map=HALF_ON_DISK)
    ids = torch.arange(4)[None]
    before = base.model(input_ids=ids).logits
    view = shared_view(shared_view(base.model))
    assert torch.equal(view(input_ids=ids).logits, before)
    for block in range(2):
        view.get_submodule(f"model.layers.{block}").mlp.down_proj = torch.nn.Linear(48, 32)
    assert not torch.equal(view(input_ids=ids).logits, before)
    assert torch.equal(base.model(input_ids=ids).logits, before)


def test_what_is_on_disk_holds_no_memory_between_passes(folder: Path) -> None:
    base = load_base(str(folder / "base"), device_map=HALF_ON_DISK)
    base.model(input_ids=torch.arange(4)[None])
    away = {name for name, weight in base.model.named_parameters() if weight.is_meta}
    assert away == {name for name, _ in base.model.named_parameters() if name.startswith(("model.layers.1.", "lm_head."))}


@pytest.mark.parametrize(
    "device_map",
    [
        HALF_ON_DISK | {"model.layers.0": 7}, HALF_ON_DISK | {"model.layers.0": "nowhere"}, {"model.layers.0": "cpu"}, {"": "disk"},
        HALF_ON_DISK | {"model.embed_tokens": "disk"},
    ],
    ids=["an accelerator that is not there", "no device", "modules without a place", "all on disk", "embedding on disk"],
)  # fmt: skip
def test_a_map_that_does_not_fit_is_refused(folder: Path, device_map: Mapping[str, int | str]) -> None:
    with pytest.raises(BadValueError, match="device map"):
        load_base(str(folder / "base"), device_map=device_map)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"model": true}', '{"model": 1.5}'])
def test_a_file_that_is_no_map_is_refused(folder: Path, text: str | None) -> None:
    if text is not None:
        (folder / "map.json").write_text(text)
    with pytest.raises(BadValueError, match="cannot be read"):
        host(HostSettings("tiny", "127.0.0.1:0", device_map=str(folder / "map.json")), print, threading.Event())


def test_merging_needs_the_base_in_one_place() -> None:
    with pytest.raises(CommandLineError, match="--merge"):
        host(HostSettings("tiny", "127.0.0.1:0", merges=True, device_map="auto"), print, threading.Event())
