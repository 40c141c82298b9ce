"""GGUF files that the gguf package's writer makes of tiny models: converted they are those models, and what would be lost is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import atoll
from atoll.base.load import load_base
from atoll.base.quantize import Bits
from atoll.base.read_shapes import read_shapes
from atoll.cli.app import main
from atoll.commands.models.convert import convert
from atoll.embedded import tiny_path
from atoll.errors import AtollError

from tests.run_files import write_rows, write_run

gguf = pytest.importorskip("gguf", reason="needs the gguf package: pip install 'atoll[gguf]'")

TEXTS = (
    "", "a", " a", "The capital of France is Paris.", "a  2", "x\n   17,5 and 2024\n\n", "it's 3rd; don't", "\t\tif (x == 10) {",
    "naïve café — 北京 42", "<|endoftext|> and <|endoftext|>9", "   ", "a\r\nb 1 2  3   4",
)  # fmt: skip
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
CUTS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "qwen2": [pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")],
}


def byte_level(cut: str) -> Tokenizer:
    """A tokenizer that was trained with this cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*CUTS[cut], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut != "qwen2")]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, *(path.read_text(encoding="utf-8") for path in [Path(__file__)])], trainer)
    return tokenizer


def model_of(architecture: str, rows: int, **more: Any) -> Any:
    torch.manual_seed(0)
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (LlamaConfig, LlamaForCausalLM, {}), "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 128}),
    }  # fmt: skip
    config, model, own = kinds[architecture]
    made = model(config(**SIZES | own | more | {"vocab_size": rows})).eval()
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return made


class File:
    """A GGUF file to be, of a model and a tokenizer; what a test changes in it comes before `write`."""

    def __init__(self, architecture: str = "llama", cut: str = "smollm", tokenizer: Tokenizer | None = None, **more: Any) -> None:
        self.tokenizer = tokenizer or byte_level(cut)
        self.model = model_of(architecture, self.tokenizer.get_vocab_size(), **more)
        config, head = self.model.config, getattr(self.model.config, "head_dim", None) or 16
        self.fields: dict[str, Any] = {
            "general.name": "tiny", "general.type": "model",
            **{f"{architecture}.{key}": value for key, value in {
                "context_length": 128, "block_count": config.num_hidden_layers, "embedding_length": 64, "feed_forward_length": 96,
                "attention.head_count": 4, "attention.head_count_kv": config.num_key_value_heads, "rope.dimension_count": head,
                "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": float(config.rope_parameters["rope_theta"]),
            }.items()},
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": cut, **vocabulary(self.tokenizer),
            "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.add_bos_token": False,
        }  # fmt: skip
        self.architecture = architecture
        names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], 2)
        self.tensors: dict[str, np.ndarray] = {}
        for name, weight in self.model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            values = weight.numpy()
            if architecture == "llama" and (heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])):
                values = values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
            self.tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values

    def write(self, path: Path, kind: str = "F32") -> Path:
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.fields.items():
            add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
            add[type(value)](key, value)
        for name, values in self.tensors.items():
            stored = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
            writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    kinds = [3 if token == "<|endoftext|>" else 1 for token in tokens]
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges, "tokenizer.ggml.token_type": kinds}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_converted_model_has_the_logits_of_the_one_that_was_written(architecture: str, tied: bool, tmp_path: Path) -> None:
    one = File(architecture, tie_word_embeddings=tied)
    convert(one.write(tmp_path / "m.gguf"), out=tmp_path / "m")
    ids = torch.arange(40)[None] % one.tokenizer.get_vocab_size()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert found.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, one.model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("cut", CUTS)
def test_a_converted_tokenizer_cuts_as_the_one_that_was_trained(cut: str, tmp_path: Path) -> None:
    one = File(cut=cut)
    convert(one.write(tmp_path / "m.gguf"), out=tmp_path / "m")
    found = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert [found(text).input_ids for text in TEXTS] == [one.tokenizer.encode(text).ids for text in TEXTS]
    assert found.eos_token == "<|endoftext|>"


def pieces() -> Tokenizer:
    """A tokenizer as Llama 2's: a space before the text, pieces, and bytes for what is in no piece."""
    space = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = space, pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    trained.train_from_iterator([text for text in TEXTS if text.isascii()] * 3, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(trained.get_vocab(), merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = space
    return tokenizer


def test_a_converted_tokenizer_of_pieces_is_the_one_that_was_trained(tmp_path: Path) -> None:
    one = File(tokenizer=pieces())
    tokens = one.fields["tokenizer.ggml.tokens"]
    one.fields |= {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": [-float(n) for n in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    del one.fields["tokenizer.ggml.merges"]
    convert(one.write(tmp_path / "m.gguf"), out=tmp_path / "m")
    found = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert [found(text).input_ids for text in TEXTS] == [[1, *one.tokenizer.encode(text).ids] for text in TEXTS]
    assert [found.decode(found(text).input_ids[1:]) for text in TEXTS] == list(TEXTS)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_become_what_the_package_dequantizes_them_to_in_bf16(kind: str, tmp_path: Path) -> None:
    one = File()
    found = convert(one.write(tmp_path / "m.gguf", kind), out=tmp_path / "m")
    assert found.kinds[0] == kind
    stored = gguf.GGMLQuantizationType[kind]
    for name in ("token_embd.weight", "blk.1.ffn_down.weight"):
        wanted = torch.from_numpy(gguf.dequantize(gguf.quantize(one.tensors[name], stored), stored))
        ours = {"token_embd.weight": "model.embed_tokens.weight", "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight"}[name]
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()[ours], wanted.bfloat16())


def test_half_precision_stays_what_it_is(tmp_path: Path) -> None:
    convert(File().write(tmp_path / "m.gguf", "F16"), out=tmp_path / "m")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.float16


Change = Callable[[File], object]
LOST: dict[str, tuple[Change, str, str]] = {
    "a scaling of positions": (lambda f: f.fields.update({"llama.rope.scaling.type": "yarn"}), "B302", "rope.scaling.type = yarn"),
    "its factor": (lambda f: f.fields.update({"llama.rope.scaling.factor": 4.0}), "B302", "rope.scaling.factor = 4.0"),
    "factors of frequencies": (lambda f: f.tensors.update({"rope_freqs.weight": np.ones(8, np.float32)}), "B304", "rope_freqs.weight [8]"),
    "a bias": (lambda f: f.tensors.update({"blk.0.attn_q.bias": np.ones(64, np.float32)}), "B304", "blk.0.attn_q.bias [64]"),
    "a missing tensor": (lambda f: f.tensors.pop("blk.0.attn_q.weight"), "B304", "blk.0.attn_q.weight missing"),
    "another shape": (lambda f: f.tensors.update({"blk.0.attn_q.weight": np.ones((32, 64), np.float32)}), "B304", "[32, 64]"),
    "no key heads": (lambda f: f.fields.pop("llama.attention.head_count_kv"), "B302", "head_count_kv = nothing"),
    "another width of a head": (lambda f: f.fields.update({"llama.attention.key_length": 8}), "B302", "key_length = 8"),
    "half of a head turned": (lambda f: f.fields.update({"llama.rope.dimension_count": 8}), "B304", "expected  "),
    "experts": (lambda f: f.fields.update({"llama.expert_count": 8}), "B302", "llama.expert_count = 8"),
    "a block more": (lambda f: f.fields.update({"llama.block_count": 10**6}), "B304", "2 blocks where the header speaks of 1000000"),
    "another family": (lambda f: setattr(f, "architecture", "gemma2"), "B302", "'gemma2'"),
    "an adapter": (lambda f: f.fields.update({"general.type": "adapter"}), "B302", "'adapter'"),
    "a part": (lambda f: f.fields.update({"split.count": 3}), "B304", "split.count = 3"),
    "another cut": (lambda f: f.fields.update({"tokenizer.ggml.pre": "llama-bpe"}), "B303", "'llama-bpe'"),
    "no cut": (lambda f: f.fields.pop("tokenizer.ggml.pre"), "B303", "None"),
    "words": (lambda f: f.fields.update({"tokenizer.ggml.model": "bert"}), "B303", "'bert'"),
    "a first token": (lambda f: f.fields.update({"tokenizer.ggml.add_bos_token": True}), "B303", "begins"),
    "a merge of what is no token": (lambda f: f.fields["tokenizer.ggml.merges"].append("Ġzq xj"), "B304", "out of vocabulary"),
    "NaN": (lambda f: f.tensors["output_norm.weight"].fill(np.nan), "B304", "NaN"),
}  # fmt: skip


@pytest.mark.parametrize("what", LOST)
def test_what_would_be_lost_is_refused(what: str, tmp_path: Path) -> None:
    change, code, got = LOST[what]
    one = File()
    change(one)
    with pytest.raises(AtollError) as caught:
        convert(one.write(tmp_path / "m.gguf"), out=tmp_path / "m")
    assert caught.value.code == code
    assert got in caught.value.page()
    assert not (tmp_path / "m").exists()


def test_a_tokenizer_can_be_given_if_it_has_the_vocabulary(tmp_path: Path) -> None:
    one = File()
    one.fields["tokenizer.ggml.pre"] = "a rule of its own"
    path = one.write(tmp_path / "m.gguf")
    PreTrainedTokenizerFast(tokenizer_object=one.tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path / "own")
    convert(path, out=tmp_path / "m", tokenizer=str(tmp_path / "own"))
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("a  2").input_ids == one.tokenizer.encode("a  2").ids
    with pytest.raises(AtollError, match="has not the vocabulary"):
        convert(path, out=tmp_path / "other", tokenizer=str(tiny_path()))


def test_broken_files_are_refused_with_one_page(tmp_path: Path) -> None:
    whole = File().write(tmp_path / "m.gguf").read_bytes()
    generator = np.random.default_rng(0)
    ends = [0, 3, 8, 23, 24, 60, len(whole) // 3, len(whole) - 1]
    broken = [whole[:end] for end in ends]
    for place in generator.integers(0, 3000, 24):
        broken.append(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    for number, content in enumerate(broken):
        (tmp_path / "broken.gguf").write_bytes(content)
        out = tmp_path / f"out{number}"
        try:
            convert(tmp_path / "broken.gguf", out=out)
        except AtollError:
            assert not out.exists()
        else:
            assert number >= len(ends), "a file that is cut off"


def test_a_run_on_a_converted_file_is_evaluated_and_merged_and_loads_in_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # The adapter names its base as run.toml does, from where that is.
    one = File(tie_word_embeddings=True)
    convert(one.write(tmp_path / "m.gguf", "Q8_0"), out=tmp_path / "m")
    assert len(read_shapes(str(tmp_path / "m")).modules) == 14
    choices: tuple[Bits | None, ...] = (None, 16, 8, 4)
    for bits in choices:
        assert load_base(str(tmp_path / "m"), bits=bits).model.config.model_type == "llama"
    write_rows(tmp_path / "rows.jsonl")
    run = atoll.train(write_run(tmp_path, {"model": {"base": "m"}, "train": {"learning_rate": 1e-3}}))
    assert atoll.evaluate(run_dir=run.run_dir)
    atoll.merge(run.run_dir, out=tmp_path / "merged")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
        torch.testing.assert_close(merged, atoll.load(run.run_dir)(ids).logits, rtol=0.05, atol=0.05)
        peft = AutoPeftModelForCausalLM.from_pretrained(str(run.run_dir / "adapter"), dtype=torch.float32)
        torch.testing.assert_close(peft(ids).logits, atoll.load(run.run_dir)(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = File().write(tmp_path / "m.gguf", "Q4_1"), tmp_path / "m"
    assert main(["convert", str(tmp_path), "--out", str(out), "--dtype", "fp16"]) == 0
    numbers = AutoModelForCausalLM.from_pretrained(out).num_parameters()
    assert capsys.readouterr().out == f"wrote {out}: {numbers:,} numbers in float16, from Q4_1, F32\n"
    assert main(["convert", str(path), "--out", str(out)]) == 2
    assert "R502" in capsys.readouterr().err
