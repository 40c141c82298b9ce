"""atoll export: what servers read means what the run trained, and what they would leave out is refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import atoll
from atoll.adapters.attach import merge_into
from atoll.adapters.peft_files import save_adapter
from atoll.adapters.state import AdapterState, ModuleAdapter
from atoll.cli.app import main
from atoll.commands.models.convert import convert
from atoll.commands.models.export import export
from atoll.errors import AdapterFitError, AtollError, ConflictError, OutputError, UnavailableError
from atoll.jobs.exports.one_rank import of_one_rank
from atoll.jobs.exports.vllm import FAMILIES_WITH_ADAPTERS, MAX_RANKS, check_vllm, max_rank

from tests.conftest import FAMILIES, random_model, save_model_folder, write_job

SERVERS = ("transformers", "vllm", "llama.cpp", "ollama")
IDS = torch.arange(24).view(2, 12) * 3 % 96
OWNERS: dict[str, dict[str, object]] = {"secret-clinic": {"rank": 2}, "hidden-hospital": {"rank": 4}}
ONE: dict[str, dict[str, object]] = {"run": {"rounds": 1}, "train": {"local_steps": 2}}


def unequal(model: Any, targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "down_proj")) -> AdapterState:
    """An adapter whose modules have ranks and scalings of their own."""
    g, modules = torch.Generator().manual_seed(0), {}
    for number, (name, module) in enumerate(model.named_modules()):
        if name.rpartition(".")[2] in targets:
            rank = (2, 3, 5)[number % 3]
            down, up = torch.randn(rank, module.in_features, generator=g), torch.randn(module.out_features, rank, generator=g)
            modules[name] = ModuleAdapter(down * 0.2, up * 0.2, (2.0, 0.7, 1.5)[number % 3])
    return AdapterState("lora", modules)


def by_vllm(folder: Path, model: Any) -> Any:
    """The model as vLLM would serve it: r and lora_alpha of the file are all it knows of ranks and scalings.

    Source: vllm/lora/peft_helper.py (scaling = lora_alpha / r), vllm/lora/lora_weights.py (lora_b times scaling, once),
    vllm/lora/layers (lora_a and lora_b copied into buffers of max_lora_rank, and multiplied).
    """
    config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    scaling, most = config["lora_alpha"] / config["r"], next(rank for rank in MAX_RANKS if rank >= config["r"])
    assert config["bias"] == "none"
    assert not config["modules_to_save"]
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")] * scaling
        buffer_a, buffer_b = torch.zeros(most, a.shape[1]), torch.zeros(b.shape[0], most)
        buffer_a[: config["r"]] = a
        buffer_b[:, : config["r"]] = b
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        model.get_submodule(name).weight.data += buffer_b @ buffer_a
    return model


@contextmanager
def refused(kind: type[AtollError], words: str) -> Iterator[None]:
    """Whatever is within is refused, with a page that has these words."""
    with pytest.raises(kind) as caught:
        yield
    assert re.search(words, caught.value.page()), caught.value.page()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose adapter has unequal ranks and scalings, and of its base."""
    folder = tmp_path_factory.mktemp("trained")
    atoll.train(write_job(folder, ONE, OWNERS), out=folder / "run")
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    state = unequal(AutoModelForCausalLM.from_pretrained(folder / "base"))
    save_adapter(state, folder / "run" / "adapter", base_name="./base")
    return folder


def peft_logits(base: Path, adapter: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()(ids).logits


def test_vllms_arithmetic_on_what_is_exported_gives_pefts_logits_of_the_run(trained: Path, tmp_path: Path) -> None:
    wanted = peft_logits(trained / "base", trained / "run" / "adapter")
    exported = export(trained / "run", server="vllm", out=tmp_path / "out")
    with torch.no_grad():
        found = by_vllm(tmp_path / "out", AutoModelForCausalLM.from_pretrained(trained / "base"))(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(peft_logits(trained / "base", tmp_path / "out"), wanted, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (5, {}, {})
    assert exported.commands == (
        f"vllm serve {trained / 'base'} --enable-lora --max-lora-rank 8 --lora-modules run={tmp_path / 'out'}",
    )  # fmt: skip


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_family_is_for_vllm_or_refused(family: str) -> None:
    model = random_model(family)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D) and "head" not in name}
    state = AdapterState("lora", {
        name: ModuleAdapter(torch.ones(2, one.weight.shape[1]), torch.ones(one.weight.shape[0], 2), 0.5) for name, one in linear.items()
    })  # fmt: skip
    if family in FAMILIES_WITH_ADAPTERS:
        check_vllm(state, family, (), "adapter")
        return
    with refused(AdapterFitError, rf"got +a {family}\n(.|\n)*--for transformers"):
        check_vllm(state, family, (), "adapter")


def test_what_is_equal_already_keeps_its_bits() -> None:
    state = AdapterState("lora", {name: ModuleAdapter(torch.randn(3, 4), torch.randn(5, 3), 2.0) for name in ("a", "b")})
    assert of_one_rank(state).digest() == state.digest()


@pytest.mark.parametrize("scalings", [(0.0, 0.0), (0.0, 2.0), (-1.0, 3.0)])
def test_one_rank_is_the_same_change(scalings: tuple[float, float]) -> None:
    state = AdapterState("lora", {
        str(n): ModuleAdapter(torch.randn(n + 2, 4), torch.randn(5, n + 2), scaling) for n, scaling in enumerate(scalings)
    })  # fmt: skip
    found = of_one_rank(state)
    assert {(one.rank, one.scaling) for one in found.modules.values()} == {(3, next((s for s in scalings if s), 1.0))}
    for name, pair in state.modules.items():
        torch.testing.assert_close(found.modules[name].delta_OI(), pair.delta_OI(), rtol=1e-6, atol=1e-6)


OUTSIDE = {"model.embed_tokens": (96, 32), "lm_head": (32, 96)}


@pytest.mark.parametrize(("server", "refused"), [("vllm", True), ("llama.cpp", False), ("ollama", False)])
@pytest.mark.parametrize("name", OUTSIDE)
def test_embedding_and_head(name: str, server: Any, refused: bool, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    size = OUTSIDE[name]
    pair = ModuleAdapter(torch.randn(2, size[0]) * 0.1, torch.randn(size[1], 2) * 0.1, 1.0)
    save_adapter(AdapterState("lora", {name: pair}), tmp_path / "run" / "adapter", base_name="./base", embeddings={"model.embed_tokens"})
    if refused:
        with pytest.raises(AdapterFitError) as caught:
            export(tmp_path / "run", server=server, out=tmp_path / "out")
        assert name in caught.value.got
        assert not (tmp_path / "out").exists()
        return
    exported = export(tmp_path / "run", server=server, out=tmp_path / "out")
    assert name in exported.remarks[0]
    assert "convert_hf_to_gguf.py" in exported.commands[0]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
    torch.testing.assert_close(found, peft_logits(trained / "base", tmp_path / "run" / "adapter"), rtol=1e-4, atol=1e-4)


def test_ranks_beyond_vllms(tmp_path: Path) -> None:
    state = AdapterState("lora", {"model.layers.0.self_attn.q_proj": ModuleAdapter(torch.zeros(513, 600), torch.zeros(600, 513), 1.0)})
    with refused(AdapterFitError, "at most 512"):
        check_vllm(state, "llama", (), "adapter")
    assert [max_rank(state.truncate(rank)) for rank in (1, 8, 9, 257)] == [8, 8, 16, 320]


@pytest.mark.parametrize("server", SERVERS)
def test_every_exported_folder_is_opened_by_transformers_or_peft(server: Any, trained: Path, tmp_path: Path) -> None:
    if server in ("llama.cpp", "ollama"):
        pytest.importorskip("gguf", reason="needs the gguf package: pip install 'atoll[gguf]'")
    out = tmp_path / "out"
    atoll.export(trained / "run", server=server, out=out)
    wanted = peft_logits(trained / "base", trained / "run" / "adapter")
    with torch.no_grad():
        is_whole = server == "transformers"
        found = AutoModelForCausalLM.from_pretrained(out)(IDS).logits if is_whole else peft_logits(trained / "base", out)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    if server == "transformers":
        AutoTokenizer.from_pretrained(out)
    if server == "ollama":
        assert (out / "Modelfile").read_text() == 'FROM ./base.gguf\nADAPTER ./adapter.gguf\nTEMPLATE "{{ .Prompt }}"\n'
    check_card(out / "README.md", trained)


def check_card(file: Path, trained: Path) -> None:
    card = ModelCard.load(file)
    assert card.data.license == "apache-2.0"
    text = file.read_text()
    assert "2 owners" in text
    assert "| this model |" in text
    row = json.loads((trained / "rows.jsonl").read_text().splitlines()[0])
    for private in (*OWNERS, str(trained), *(value for value in row.values() if isinstance(value, str) and " " in value)):
        assert private not in text


def test_a_run_has_a_card_beside_its_adapter(trained: Path) -> None:
    card = ModelCard.load(trained / "run" / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert "ranks" in card.text or "rank 4" in card.text
    assert card.data.license is None
    assert "see the base" in card.text


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_base_in_gguf_with_the_adapter_added_is_pefts_model(architecture: str, tmp_path: Path) -> None:
    """The sum is made among tensors as llama.cpp keeps them, and read back by transformers' reader, which undoes their order."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install 'atoll[gguf]'")
    from atoll.jobs.exports.gguf import write_gguf

    from tests.base.test_gguf import File

    base = File(architecture)
    base.model.save_pretrained(tmp_path / "base")
    state = unequal(base.model)
    save_adapter(state, tmp_path / "adapter", base_name="./base")
    write_gguf(of_one_rank(state), base.model.config.to_dict(), tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    wanted = {"general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora"}
    assert fields.items() >= wanted.items()
    tensors = {one.name: one.data for one in reader.tensors}
    assert len(tensors) == 2 * len(state.modules)
    for name in (name for name in tensors if name.endswith(".lora_a")):
        a, b = tensors[name], tensors[name.replace(".lora_a", ".lora_b")]
        # llama.cpp divides the one alpha by each pair's own rank.
        base.tensors[name.removesuffix(".lora_a")] += np.float32(fields["adapter.lora.alpha"] / b.shape[1]) * (b @ a)
    convert(base.write(tmp_path / "sum.gguf"), out=tmp_path / "sum")
    ids = torch.arange(40)[None] % base.tokenizer.get_vocab_size()
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "sum")(ids).logits
    torch.testing.assert_close(found, peft_logits(tmp_path / "base", tmp_path / "adapter", ids), rtol=1e-4, atol=1e-4)


def test_mistral_is_a_llama_there(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install 'atoll[gguf]'")
    from atoll.jobs.exports.gguf import permuted, write_gguf

    model = random_model("mistral")
    state = of_one_rank(unequal(model))
    write_gguf(state, model.config.to_dict(), tmp_path / "a.gguf")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    for module, name, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", None)):
        pair = state.modules[f"model.layers.1.self_attn.{module}"]
        assert torch.equal(tensors[f"blk.1.{name}.weight.lora_a"], pair.down_RI)
        assert torch.equal(tensors[f"blk.1.{name}.weight.lora_b"], pair.up_OR if heads is None else permuted(pair.up_OR, heads))


@pytest.mark.parametrize("server", ["llama.cpp", "ollama"])
def test_a_family_that_llama_cpp_keeps_otherwise_is_merged_for_its_converter(server: Any, trained: Path, tmp_path: Path) -> None:
    toml = write_job(tmp_path, ONE)
    shutil.rmtree(tmp_path / "base")
    save_model_folder(tmp_path / "base", "gpt2")
    run = atoll.train(toml, out=tmp_path / "run").run_dir
    exported = export(run, server=server, out=tmp_path / "out")
    assert "gpt2" in exported.remarks[0]
    assert exported.commands[0].startswith(f"python convert_hf_to_gguf.py {tmp_path / 'out'} --outfile {tmp_path / 'out' / 'model.gguf'}")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
        torch.testing.assert_close(found, atoll.load(run)(IDS).logits, rtol=1e-4, atol=1e-4)
    if server == "ollama":
        assert (tmp_path / "out" / "Modelfile").read_text() == 'FROM ./model.gguf\nTEMPLATE "{{ .Prompt }}"\n'
    with refused(AdapterFitError, "got +a gpt2"):
        export(run, server="vllm", out=tmp_path / "vllm")


@pytest.mark.parametrize("server", SERVERS)
def test_a_bottleneck_is_for_nobody(server: Any, tmp_path: Path) -> None:
    run = atoll.train(write_job(tmp_path, {**ONE, "adapter": {"kind": "bottleneck"}}), out=tmp_path / "run").run_dir
    with refused(AdapterFitError, "bottleneck"):
        export(run, server=server, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_weights_are_merged(tmp_path: Path) -> None:
    sections = {**ONE, "adapter": {"kind": "full", "targets": ["q_proj"]}}
    run = atoll.train(write_job(tmp_path, sections), out=tmp_path / "run").run_dir
    for server in ("transformers", "vllm"):
        export(run, server=server, out=tmp_path / server)
    wanted = peft_logits(tmp_path / "base", run / "adapter")
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "transformers")(IDS).logits
        served = by_vllm(tmp_path / "vllm", AutoModelForCausalLM.from_pretrained(tmp_path / "base"))(IDS).logits
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(served, wanted, rtol=1e-4, atol=1e-4)


def test_a_classifier_is_for_transformers(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"w{n} w{n + 1}", "label": "ab"[n % 2]}) + "\n" for n in range(12))
    toml = write_job(tmp_path, {**ONE, "model": {"base": "base", "task": "classify"}}, {"north": {}})
    toml.write_text(toml.read_text().replace('prompt = ', '# prompt = ').replace("completion = ", "# completion = "))
    (tmp_path / "rows.jsonl").write_text(rows)
    run = atoll.train(toml, out=tmp_path / "run", overrides=["data.text={text}", "data.label=label"]).run_dir
    assert export(run, server="transformers", out=tmp_path / "out").commands == ()
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    for server in ("vllm", "llama.cpp", "ollama"):
        with refused(AdapterFitError, "classif|classes"):
            export(run, server=server, out=tmp_path / server)


def test_what_does_not_go_together(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(ConflictError, "--dtype"):
        export(trained / "run", server="vllm", out=tmp_path / "out", dtype="bf16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(OutputError):
        export(trained / "run", server="vllm", out=tmp_path / "full")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with refused(UnavailableError, r"atoll\[gguf\]"):
        export(trained / "run", server="llama.cpp", out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_the_command_says_what_to_type_next(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(trained / "run"), "--for", "vllm", "--out", str(tmp_path / "my folder")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"wrote {tmp_path / 'my folder'}: an adapter of rank 5 for vLLM"
    assert lines[1].startswith("next:    vllm serve ")
    assert f"'{tmp_path / 'my folder'}'" in lines[1]
    assert main(["export", str(trained / "run"), "--for", "tgi", "--out", str(tmp_path / "x")]) == 2


def test_merge_has_the_card_too(trained: Path, tmp_path: Path) -> None:
    atoll.merge(trained / "run", out=tmp_path / "merged")
    check_card(tmp_path / "merged" / "README.md", trained)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_whom_a_written_model_is_for_is_the_umasks_to_say(umask: int, mode: int, trained: Path, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        atoll.merge(trained / "run", out=tmp_path / "merged")
        atoll.export(trained / "run", server="vllm", out=tmp_path / "adapter")
    finally:
        os.umask(before)
    files = [file for name in ("merged", "adapter") for file in (tmp_path / name).iterdir()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}


def test_a_merged_state_is_the_one_rank_state() -> None:
    model, other = random_model("llama"), random_model("llama")
    state = unequal(model)
    with torch.no_grad():
        merge_into(model, state)
        merge_into(other, of_one_rank(state))
        torch.testing.assert_close(model(IDS).logits, other(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_card_that_says_nonsense_of_its_licence_counts_for_none(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    shutil.copytree(trained / "base", tmp_path / "base")
    for text in ("---\nlicense: [a, b]\n---\n", "---\nlicense: {\n---\n", "no front matter", "---\nlicense: 'x\n\n## evil'\n---\n"):
        (tmp_path / "base" / "README.md").write_text(text)
        try:
            export(tmp_path / "run", server="vllm", out=tmp_path / "out", model=str(tmp_path / "base"))
        except AtollError as problem:
            raise AssertionError(problem.page()) from problem
        assert "see the base" in (tmp_path / "out" / "README.md").read_text()
        shutil.rmtree(tmp_path / "out")


def test_the_cards_own_lines_load_an_adapter_of_the_embedded_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "The ward is closed today."}\n' * 4)
    (tmp_path / "run.toml").write_text('[model]\nbase = "tiny"\n[data]\ntrain = "rows.jsonl"\n[train]\nlocal_steps = 1\n')
    run = atoll.train(tmp_path / "run.toml", out=tmp_path / "run")
    code = (run.adapter / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(run.adapter)
    found: dict[str, object] = {}
    exec(code, found)
    theirs, ours = found["model"].state_dict(), atoll.load(run.run_dir).state_dict()  # type: ignore[attr-defined]
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].equal(ours[name]) for name in ours)
