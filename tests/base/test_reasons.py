"""A model or tokenizer that does not open is a page with the true reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from atoll.base.load import load_base, load_tokenizer
from atoll.base.read_shapes import read_shapes
from atoll.base.skeleton import reasons
from atoll.errors import AtollError

from tests.families import save


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def only(folder: Path, name: str) -> None:
    """A tokenizer that is in this file alone."""
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(b"\x0e\x00")


CODE = {"AutoConfig": "configuration_new.NewConfig", "AutoModelForCausalLM": "modeling_new.NewForCausalLM"}
TOKENIZER_CODE = {"AutoTokenizer": ["tokenization_new.NewTokenizer", None]}
MODELS: dict[str, tuple[Callable[[Path], None], str, str, str]] = {
    "code of its own": (lambda f: edit(f / "config.json", model_type="new", auto_map=CODE), "B302", "not run here", "conversion"),
    "a newer type": (lambda f: edit(f / "config.json", model_type="new"), "B302", "this version of transformers", "upgrade"),
    "sizes that do not fit": (lambda f: edit(f / "config.json", num_attention_heads=5, hidden_size=7), "B30", "", ""),
    "an encoder and a decoder": (lambda f: edit(f / "config.json", model_type="t5", is_encoder_decoder=True), "B302", "causal", ""),
}  # fmt: skip
TOKENIZERS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "sentencepiece's file": (lambda f: only(f, "tokenizer.model"), "takes a library more", "atoll[tokenizers]"),
    "tiktoken's file": (lambda f: only(f, "qwen.tiktoken"), "takes a library more", "atoll[tokenizers]"),
    "code of its own": (
        lambda f: (
            only(f, "new.vocab"), edit(f / "tokenizer_config.json", tokenizer_class="NewTokenizer", auto_map=TOKENIZER_CODE),
        )[1], "not run here", "conversion",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_does_not_open(tmp_path: Path, case: str) -> None:
    damage, code, what, do = MODELS[case]
    save("stablelm", tmp_path)
    damage(tmp_path)
    for look in (read_shapes, load_base):
        with pytest.raises(AtollError) as caught:
            look(str(tmp_path))
        assert caught.value.code.startswith(code)
        assert what in caught.value.what
        assert do in caught.value.do


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_does_not_open(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasons, "find_spec", lambda name: None)
    damage, what, do = TOKENIZERS[case]
    save("llama", tmp_path)
    damage(tmp_path)
    with pytest.raises(AtollError) as caught:
        load_tokenizer(str(tmp_path))
    assert what in caught.value.what
    assert do in caught.value.do
