"""A device's part of a base gives what the whole base gives, holds nothing of the middle, and is known by its digest."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

from atoll.base import head
from atoll.base.blocks import Skip, blocks_path, sizes_of, trace
from atoll.base.headers import INDEX, PART, WEIGHTS, read_headers, read_stored
from atoll.base.load import Base, load_base, load_config, load_tokenizer
from atoll.base.part import load_part, part_digest, part_tensors
from atoll.base.read_shapes import read_shapes
from atoll.base.weights.beside import tokenizer_digest
from atoll.errors import ArchitectureError, BadValueError, BaseFolderError, InputError, TokenizerError, WeightsError
from atoll.remote_blocks import RemoteBlocksPlaceholder, find_placeholder
from atoll.tasks.batches import Batch, pack_batch, pad_batch
from atoll.tasks.tokens import Example

from tests.base.test_shapes import edit_config, rewrite
from tests.conftest import FAMILIES, random_model, save_model_folder
from tests.pieces import write_part

CUTS = [(0, 0), (1, 0), (1, 1)]
PREFIX = {"gpt2": "transformer.", "bloom": "transformer.", "opt": "model.", "llama": "model."}


class FullMiddle(RemoteBlocksPlaceholder):
    """Runs the middle blocks of the whole model, with all that the family gives to the first of them."""

    def __init__(self, sizes: Mapping[str, tuple[int, int]], whole: Base, front: int, back: int, returns_tuple: bool) -> None:
        super().__init__(sizes)
        self.middle: Callable[[], Iterator[nn.Module]] = lambda: middle_of(whole, front, back)
        self.returns_tuple = returns_tuple
        self.seen: list[object] = []
        self.own = nn.Parameter(torch.ones(()))
        self.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, _module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.others, self.named = arguments[1:], named

    def forward(self, h_BTD: Tensor) -> Any:
        self.seen.append(self.layout)
        for block in self.middle():
            out = block(h_BTD, *self.others, **self.named)
            h_BTD = out[0] if isinstance(out, tuple) else out
        return (h_BTD, None) if self.returns_tuple else h_BTD


def middle_of(whole: Base, front: int, back: int) -> Iterator[nn.Module]:
    blocks: Any = whole.model.get_submodule(blocks_path(whole.model))
    return iter(blocks[front : len(blocks) - back])


def part_of(whole: Base, folder: Path | str, front: int, back: int, precision: str = "fp32") -> Base:
    return load_part(
        str(folder), front, back, precision=precision,
        remote_blocks=lambda sizes, returns_tuple: FullMiddle(sizes, whole, front, back, returns_tuple),
    )  # fmt: skip


def save_three_blocks(folder: Path, family: str) -> Path:
    save_model_folder(folder, family)
    random_model(family, 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save_three_blocks(tmp_path_factory.mktemp(family), family)
        return made[family]

    return folder


@pytest.fixture
def llama(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder that a test may change."""
    return Path(shutil.copytree(folders("llama"), tmp_path / "llama"))


def example(length: int, start: int) -> Example:
    return Example((np.arange(length) * 5 + start).astype(np.int32) % 96, np.arange(length) >= length // 2)


def batches(family: str = "llama") -> list[Batch]:
    """A padded one and a packed one; BLOOM takes no mask of its own for packed rows."""
    packed = [] if family == "bloom" else [pack_batch([[example(5, 0), example(6, 7)], [example(9, 3)]], 0)]
    return [pad_batch([example(12, 0), example(7, 3)], 0), *packed]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_a_part_with_the_middle_elsewhere_is_the_whole_model(family: str, cut: tuple[int, int], folders: Callable[[str], Path]) -> None:
    folder = folders(family)
    whole = load_base(str(folder))
    part = part_of(whole, folder, *cut)
    for batch in batches(family):
        with torch.no_grad():
            ours, theirs = head.hidden_states(part.model, batch), head.hidden_states(whole.model, batch)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        torch.testing.assert_close(head.token_losses_N(part.model, batch), head.token_losses_N(whole.model, batch), rtol=0, atol=1e-5)
    assert (part.name, part.transposed) == (str(folder), family == "gpt2")
    assert tokenizer_digest(part.tokenizer) == tokenizer_digest(whole.tokenizer)


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_part_holds_the_whole_models_tensors_but_for_the_middle(
    family: str, cut: tuple[int, int], precision: str, folders: Callable[[str], Path]
) -> None:
    folder = folders(family)
    whole = load_base(str(folder), precision=precision)
    part = part_of(whole, folder, *cut, precision=precision)
    path = blocks_path(whole.model)
    middle = tuple(f"{path}.{number}." for number in range(cut[0], 3 - cut[1]))
    own = f"{path}.{cut[0]}.own"
    for kind in ("named_parameters", "named_buffers"):
        expected = {name: tensor for name, tensor in getattr(whole.model, kind)() if not name.startswith(middle)}
        found = {name: tensor for name, tensor in getattr(part.model, kind)() if name != own}
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert (tensor.dtype, tensor.device, tensor.requires_grad) == (expected[name].dtype, expected[name].device, False)
            assert torch.equal(tensor, expected[name])
    assert part.model.get_parameter(own).requires_grad
    assert not any(module.training for module in part.model.modules())


@pytest.mark.parametrize("has_file", [True, False])
def test_a_part_has_the_settings_of_the_whole_model(family: str, has_file: bool, folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders(family), tmp_path / family))
    settings = json.loads((folder / "generation_config.json").read_text()) | {"temperature": 0.3, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    if not has_file:
        (folder / "generation_config.json").unlink()
    whole = load_base(str(folder), precision="bf16")
    part = part_of(whole, folder, 1, 0, precision="bf16")
    assert (part.model.generation_config.temperature == 0.3) == has_file
    for ours, theirs in ((part.model.config, whole.model.config), (part.model.generation_config, whole.model.generation_config)):
        assert ours.to_dict() == theirs.to_dict()
    assert part.model.config._attn_implementation == whole.model.config._attn_implementation
    assert type(part.model) is type(whole.model)
    weights = [(m.get_input_embeddings().weight, m.get_output_embeddings().weight) for m in (part.model, whole.model)]
    assert (weights[0][0] is weights[0][1]) == (weights[1][0] is weights[1][1])


def test_the_stand_in_is_told_the_middle_projections_in_their_order(family: str, folders: Callable[[str], Path]) -> None:
    whole = load_base(str(folders(family)))
    part = part_of(whole, folders(family), 1, 1)
    path = blocks_path(whole.model)
    names = [name for group in trace(whole.model).groups for name in group if name.startswith(f"{path}.1.")]
    stand_in = find_placeholder(part.model)
    assert stand_in is part.model.get_submodule(f"{path}.1")
    assert list(stand_in.sizes.items()) == [(name, sizes_of(whole.model.get_submodule(name))) for name in names]
    assert stand_in.returns_tuple == (family == "bloom")
    wide = part_of(whole, folders(family), 0, 0).model
    assert isinstance(wide.get_submodule(path)[0], FullMiddle)
    assert all(isinstance(wide.get_submodule(path)[number], Skip) for number in (1, 2))


def test_the_stand_in_is_told_the_layout_of_the_batch(llama: Path) -> None:
    part = part_of(load_base(str(llama)), llama, 1, 0)
    stand_in: Any = find_placeholder(part.model)
    for batch in batches():
        head.loss_sum(part.model, batch)
        layout = stand_in.seen.pop()
        assert layout.lengths == batch.lengths
        assert layout.wanted_N is batch.predict_N
        assert layout.position_ids_BT is batch.position_ids_BT
        assert stand_in.layout is None


@pytest.mark.parametrize("cut", [(-1, 0), (0, -1), (3, 0), (2, 1), (0, 7)], ids=str)
def test_a_cut_that_leaves_nothing_to_the_host_is_refused(llama: Path, cut: tuple[int, int]) -> None:
    for attempt in (lambda: part_of(None, llama, *cut), lambda: part_digest(str(llama), *cut)):  # type: ignore[arg-type]
        with pytest.raises(BadValueError, match="cut") as caught:
            attempt()
        assert caught.value.where == "[model] cut"
        assert "3 blocks" in caught.value.expected


def shard(folder: Path) -> None:
    random_model("llama", 3).save_pretrained(folder, max_shard_size="10KB")
    (folder / WEIGHTS).unlink()
    assert len(list(folder.glob("*.safetensors"))) > 3


def change(folder: Path, tensor: str) -> None:
    weights = load_file(folder / WEIGHTS)
    weights[tensor].view(-1)[0] += 1
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def test_the_digest_does_not_depend_on_files_or_prefixes(family: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folders(family)
    digest = part_digest(str(folder), 1, 1)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    random_model(family, 3).save_pretrained(copy, max_shard_size="10KB")
    (copy / WEIGHTS).unlink()
    assert part_digest(str(copy), 1, 1) == digest
    if family in PREFIX:
        bare = Path(shutil.copytree(folder, tmp_path / "bare"))
        rewrite(bare, lambda name: name.removeprefix(PREFIX[family]))
        assert part_tensors(str(bare), 1, 1) != part_tensors(str(folder), 1, 1)
        assert part_digest(str(bare), 1, 1) == digest
        whole = load_base(str(bare))
        ids = torch.arange(12)[None]
        torch.testing.assert_close(part_of(whole, bare, 1, 1).model(ids).logits, whole.model(ids).logits, rtol=0, atol=1e-6)


def test_the_digest_is_of_the_devices_tensors_only(llama: Path) -> None:
    digest = part_digest(str(llama), 1, 1)
    change(llama, "model.layers.1.mlp.up_proj.weight")
    assert part_digest(str(llama), 1, 1) == digest
    seen = {digest}
    for tensor in ("model.layers.0.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight", "lm_head.weight", "model.norm.weight"):
        change(llama, tensor)
        seen.add(part_digest(str(llama), 1, 1))
    assert len(seen) == 5
    assert len({part_digest(str(llama), *cut) for cut in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0))}) == 5


def test_the_digest_tells_types_apart(llama: Path) -> None:
    digest = part_digest(str(llama), 1, 0)
    weights = load_file(llama / WEIGHTS)
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"].view(torch.int32)}, llama / WEIGHTS, {"format": "pt"})
    assert part_digest(str(llama), 1, 0) != digest  # the same bytes, read as something else


def test_a_head_stored_beside_the_embedding_that_it_is_changes_nothing(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("gpt2"), tmp_path / "gpt2"))
    digest, names = part_digest(str(folder), 1, 0), part_tensors(str(folder), 1, 0)
    weights = load_file(folder / WEIGHTS)
    assert "lm_head.weight" not in weights
    embedding = weights["transformer.wte.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, folder / WEIGHTS, {"format": "pt"})
    assert (part_digest(str(folder), 1, 0), part_tensors(str(folder), 1, 0)) == (digest, names)
    only_head = {name: tensor for name, tensor in weights.items() if name != "transformer.wte.weight"} | {"lm_head.weight": embedding}
    save_file(only_head, folder / WEIGHTS, {"format": "pt"})
    assert part_digest(str(folder), 1, 0) == digest
    assert "lm_head.weight" in part_tensors(str(folder), 1, 0)
    whole = load_base(str(folder))
    ids = torch.arange(12)[None]
    torch.testing.assert_close(part_of(whole, folder, 1, 0).model(ids).logits, whole.model(ids).logits, rtol=0, atol=1e-6)


def test_a_head_that_is_not_the_embedding_is_kept_where_config_does_not_tie_them(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("gpt2"), tmp_path / "gpt2"))
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"] + 1}, folder / WEIGHTS, {"format": "pt"})
    base = load_base(str(folders("gpt2")))
    for load in (lambda: load_base(str(folder)), lambda: part_of(base, folder, 1, 0)):
        with pytest.raises(WeightsError, match="contradicts"):
            load()
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    whole = load_base(str(folder))
    part = part_of(whole, folder, 1, 0)
    assert torch.equal(part.model.get_output_embeddings().weight, whole.model.get_output_embeddings().weight)
    assert not torch.equal(part.model.get_output_embeddings().weight, part.model.get_input_embeddings().weight)


def test_the_tokenizers_digest(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folders("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    digest = tokenizer_digest(tokenizer)
    tokenizer(["w1 w2", "w1"], padding=True, truncation=True, max_length=1)
    assert tokenizer_digest(tokenizer) == digest
    tokenizer.add_tokens(["new"])
    assert tokenizer_digest(tokenizer) != digest
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w5"', '"v5"'))
    assert tokenizer_digest(AutoTokenizer.from_pretrained(other)) != digest
    moved = AutoTokenizer.from_pretrained(folder, eos_token="w7")
    assert tokenizer_digest(moved) != digest


@pytest.mark.parametrize("cut", [(1, 0), (1, 1)], ids=str)
def test_a_written_part_is_a_part(family: str, cut: tuple[int, int], folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder, written = folders(family), tmp_path / "written"
    write_part(str(folder), *cut, written)
    whole = load_base(str(folder))
    part = part_of(whole, written, *cut)
    for batch in batches(family):
        torch.testing.assert_close(head.hidden_states(part.model, batch), head.hidden_states(whole.model, batch), rtol=0, atol=1e-6)
    assert part.model.generation_config.to_dict() == whole.model.generation_config.to_dict()
    assert part_digest(str(written), *cut) == part_digest(str(folder), *cut)
    assert tokenizer_digest(part.tokenizer) == tokenizer_digest(whole.tokenizer)
    stored = load_file(written / WEIGHTS)
    assert tuple(sorted(stored)) == part_tensors(str(folder), *cut) == part_tensors(str(written), *cut)
    original = load_file(folder / WEIGHTS)
    assert all(torch.equal(tensor, original[name]) for name, tensor in stored.items())
    assert read_shapes(str(written)) == read_shapes(str(folder))
    assert read_headers(str(written)).tensors == read_headers(str(folder)).tensors
    with pytest.raises(WeightsError, match="part of a base") as caught:
        load_base(str(written))
    assert "host" in caught.value.do


def test_a_part_written_from_a_part_is_the_same(llama: Path, tmp_path: Path) -> None:
    write_part(str(llama), 1, 1, tmp_path / "first")
    write_part(str(tmp_path / "first"), 1, 0, tmp_path / "second")
    write_part(str(llama), 1, 0, tmp_path / "direct")
    assert (tmp_path / "second" / WEIGHTS).read_bytes() == (tmp_path / "direct" / WEIGHTS).read_bytes()
    assert read_shapes(str(tmp_path / "second")) == read_shapes(str(llama))


def test_mixed_types_survive_being_written(llama: Path, tmp_path: Path) -> None:
    weights = {name: tensor.to(torch.bfloat16) if "norm" in name else tensor for name, tensor in load_file(llama / WEIGHTS).items()}
    save_file(weights, llama / WEIGHTS, {"format": "pt"})
    write_part(str(llama), 1, 0, tmp_path / "part")
    stored = load_file(tmp_path / "part" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.float32}
    places = read_stored([tmp_path / "part" / WEIGHTS]).values()
    assert max(one.start for one in places if one.dtype == "F32") < min(one.start for one in places if one.dtype == "BF16")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in stored.items())
    assert part_digest(str(tmp_path / "part"), 1, 0) == part_digest(str(llama), 1, 0)


def test_a_written_part_for_another_cut_is_refused(llama: Path, tmp_path: Path) -> None:
    write_part(str(llama), 1, 0, tmp_path / "part")
    with pytest.raises(WeightsError, match="another cut") as caught:
        part_of(None, tmp_path / "part", 2, 0)  # type: ignore[arg-type]
    assert (caught.value.got, caught.value.expected) == ("front = 1, back = 0", "front = 2, back = 0")
    assert part_digest(str(tmp_path / "part"), 0, 0) == part_digest(str(llama), 0, 0)


def test_only_the_files_of_the_part_are_needed(llama: Path) -> None:
    shard(llama)
    index = json.loads((llama / INDEX).read_text())["weight_map"]
    needed = {index[name] for name in part_tensors(str(llama), 1, 0)}
    for file in set(index.values()) - needed:
        (llama / file).unlink()
    assert part_of(None, llama, 1, 0).model.lm_head.weight.shape == (96, 32)  # type: ignore[arg-type]
    (llama / min(needed)).unlink()
    with pytest.raises(WeightsError, match="cannot be loaded") as caught:
        part_digest(str(llama), 1, 0)
    assert min(needed) in caught.value.got


def lose(tensor: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        del weights[tensor]
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return damage


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def make_whole_numbers(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int8)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def break_part_file(folder: Path) -> None:
    (folder / PART).write_text('{"front": 1}')


BROKEN: dict[str, tuple[Callable[[Path], object], type[InputError], str]] = {
    "front block": (lose("model.layers.0.mlp.up_proj.weight"), WeightsError, "model.layers.0.mlp.up_proj.weight"),
    "head": (lose("lm_head.weight"), WeightsError, "lm_head.weight"),
    "shape": (lambda f: edit_config(f, hidden_size=64, head_dim=16), WeightsError, "another shape"),
    "type": (make_whole_numbers, WeightsError, "int8"),
    "cut short": (cut_short, WeightsError, "bytes"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), BaseFolderError, "no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), BaseFolderError, "a folder holding"),
    "part file": (break_part_file, WeightsError, "KeyError"),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_a_broken_folder_is_one_readable_error(llama: Path, case: str) -> None:
    damage, error, got = BROKEN[case]
    damage(llama)
    with pytest.raises(InputError) as caught:
        part_of(None, llama, 1, 0)  # type: ignore[arg-type]
    assert type(caught.value) is error
    assert got in caught.value.got
    assert all((caught.value.where, caught.value.expected, caught.value.do))


def test_a_head_we_do_not_know_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LlamaForCausalLM.forward

    def scaled(self: LlamaForCausalLM, **inputs: Any) -> Any:
        out = plain(self, **inputs)
        out.logits = out.logits * 1.5
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ArchitectureError, match="does something to its logits"):
        part_of(None, llama, 1, 0)  # type: ignore[arg-type]


def test_a_lost_middle_tensor_does_not_matter(llama: Path) -> None:
    lose("model.layers.1.mlp.up_proj.weight")(llama)
    assert part_of(None, llama, 1, 0).model is not None  # type: ignore[arg-type]


class Hub:
    """A repository on the hub, and the local cache of it."""

    def __init__(self, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repository, self.cache = repository, cache / "0123abc"
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot)
        monkeypatch.setattr("atoll.base.weights.hub._unreached", lambda: None)

    def snapshot(self, repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert repository == "org/name"
        assert revision in (None, self.cache.name)
        self.cache.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            if (self.repository / name).is_file():
                shutil.copyfile(self.repository / name, self.cache / name)
        return str(self.cache)


@pytest.mark.parametrize("sharded", [True, False])
def test_of_a_hub_repository_only_the_needed_files_are_fetched(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    if sharded:
        shard(llama)
    (llama / "README.md").write_text("words")
    hub = Hub(llama, tmp_path / "cache", monkeypatch)
    assert part_digest("org/name", 1, 0) == part_digest(str(llama), 1, 0)
    part = part_of(None, "org/name", 1, 0)  # type: ignore[arg-type]
    assert part.name == "org/name"
    assert torch.equal(part.model.lm_head.weight, load_base(str(llama)).model.lm_head.weight)
    fetched, there = {file.name for file in hub.cache.iterdir()}, {file.name for file in llama.iterdir()}
    assert {"config.json", "tokenizer.json"} < fetched < there
    assert "README.md" not in fetched
    if sharded:
        assert len([name for name in fetched if name.endswith(".safetensors")]) < len(list(llama.glob("*.safetensors")))


def test_a_cache_that_holds_a_part_only_is_not_read_as_the_whole(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(llama)
    hub = Hub(llama, tmp_path / "cache", monkeypatch)
    part_digest("org/name", 1, 0)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repository, name: str(hub.cache / name))
    asked = []

    def metadata(repository: str) -> Any:
        asked.append(repository)
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, name: str(hub.cache / name))
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", metadata)
    with pytest.raises(BaseFolderError, match="neither a folder"):
        read_headers("org/name")
    assert asked == ["org/name"]


def test_an_unreachable_hub_id_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.setattr("atoll.base.weights.hub._unreached", lambda: None)
    with pytest.raises(BaseFolderError, match="neither a folder") as caught:
        part_digest("org/does-not-exist", 1, 0)
    assert "no route" in caught.value.got


def test_tiny_has_a_part() -> None:
    whole = load_base("tiny")
    part = part_of(whole, "tiny", 1, 0)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(part.model(ids).logits, whole.model(ids).logits, rtol=0, atol=1e-5)
    assert part.name == "tiny"


def test_threads_may_make_modules_and_look_at_parts_at_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All four have begun their empty model before any ends it, and between the two another thread makes a module."""
    digest, number_type = part_digest(str(llama), 1, 0), torch.get_default_dtype()
    begun, made = threading.Barrier(4), threading.Barrier(4)
    plain: Callable[..., Any] = LlamaForCausalLM.__init__
    modules: list[nn.Module] = []

    def slow(self: LlamaForCausalLM, *inputs: Any, **named: Any) -> None:
        begun.wait(60)
        assert torch.empty(1).is_meta
        assert torch.get_default_dtype() == number_type
        with ThreadPoolExecutor(1) as other:
            modules.append(other.submit(nn.BatchNorm1d, 3).result(60))
        made.wait(60)
        plain(self, *inputs, **named)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", slow)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: part_digest(str(llama), 1, 0), range(4))) == [digest] * 4
    modules.append(nn.BatchNorm1d(3))
    assert not any(tensor.is_meta for module in modules for tensor in (*module.parameters(), *module.buffers()))
    assert len(modules) == 5


ROTARY: dict[str, dict[str, object]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {"factor": 2.0, "short_factor": [1.5] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("kind", sorted(ROTARY))
def test_rotary_tables_are_computed_as_for_the_whole_model(kind: str, llama: Path) -> None:
    edit_config(llama, rope_parameters={"rope_type": kind, "rope_theta": 5000.0} | ROTARY[kind])
    whole = load_base(str(llama))
    seed = torch.get_rng_state()
    part = part_of(whole, llama, 1, 1)
    assert torch.equal(torch.get_rng_state(), seed)
    expected = dict(whole.model.named_buffers())
    assert expected
    for name, buffer in part.model.named_buffers():
        assert torch.equal(buffer, expected[name])
    assert part.model.model.rotary_emb.attention_scaling == whole.model.model.rotary_emb.attention_scaling


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
(Path({folder!r}) / "ran").touch()
class Settings(LlamaConfig): model_type = "never-heard-of"
class Words(PreTrainedTokenizerFast): pass
class Model(LlamaForCausalLM): config_class = Settings
"""


def bring_code(folder: Path, **changes: object) -> None:
    """A folder that names code of its own for its config and model."""
    (folder / "theirs.py").write_text(CODE.format(folder=str(folder)))
    edit_config(folder, auto_map={"AutoConfig": "theirs.Settings", "AutoModelForCausalLM": "theirs.Model"}, **changes)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked at the terminal, where somebody says yes to everything."""
    questions: list[str] = []

    def yes(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", yes)
    return questions


def test_code_in_the_folder_of_an_unknown_model_is_neither_run_nor_asked_for(llama: Path, asked: list[str]) -> None:
    bring_code(llama, model_type="never-heard-of")
    attempts = (
        lambda: load_config(str(llama)), lambda: load_base(str(llama)), lambda: part_digest(str(llama), 1, 0),
        lambda: part_of(None, llama, 1, 0),  # type: ignore[arg-type]
    )  # fmt: skip
    for attempt in attempts:
        with pytest.raises(ArchitectureError, match="not run here") as caught:
            attempt()
        assert caught.value.where == str(llama)
    assert not asked
    assert not (llama / "ran").exists()


def test_a_tokenizer_of_its_own_code_is_neither_run_nor_asked_for(llama: Path, asked: list[str]) -> None:
    bring_code(llama)
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    own = {"auto_map": {"AutoTokenizer": [None, "theirs.Words"]}, "tokenizer_class": "Words"}
    (llama / "tokenizer_config.json").write_text(json.dumps(settings | own))
    with pytest.raises(TokenizerError, match="not run here"):
        load_tokenizer(str(llama))
    assert not asked
    assert not (llama / "ran").exists()


def test_code_beside_a_known_model_is_left_alone(llama: Path, asked: list[str]) -> None:
    digest = part_digest(str(llama), 1, 0)
    bring_code(llama)
    assert part_digest(str(llama), 1, 0) == digest
    assert type(load_base(str(llama)).model) is LlamaForCausalLM
    assert type(part_of(None, llama, 1, 0).model) is LlamaForCausalLM  # type: ignore[arg-type]
    assert not asked
    assert not (llama / "ran").exists()


def test_every_family_is_tested() -> None:
    assert set(PREFIX) <= set(FAMILIES)


def test_a_part_whose_weights_are_no_numbers_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders("llama"), tmp_path / "llama"))
    weights = load_file(folder / WEIGHTS)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(WeightsError, match="no number"):
        part_of(load_base(str(folders("llama"))), folder, 1, 0)
