"""Make the embedded base from nothing: text, tokenizer, weights, log. `python scripts/embedded/make_tiny.py [--steps N] [--out DIR]`."""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import dataclasses
import hashlib
import itertools
import platform
import time
from collections.abc import Callable
from pathlib import Path

import corpus
import demo
import pretraining
import tokenizers
import torch
import transformers
from bpe import train_tokenizer
from pretraining import Settings

TINY = Path(__file__).resolve().parents[2] / "src" / "atoll" / "embedded" / "tiny"
LOG_EVERY = 50


def main() -> None:
    """Make everything and write it."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--out", type=Path, default=TINY)
    arguments = parser.parse_args()
    settings = dataclasses.replace(defaults, steps=arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True)
    with (arguments.out / "train.log").open("w", encoding="utf-8") as file:
        make(settings, arguments.out, lambda line: print(line, file=file, flush=True) or print(line, flush=True))


def make(settings: Settings, folder: Path, log: Callable[[str], None]) -> None:
    """Text, tokenizer, training and files, in this order."""
    log(f"settings {dataclasses.asdict(settings)}")
    log(f"versions python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"tokenizers {tokenizers.__version__}, {platform.machine()}")  # fmt: skip
    texts = itertools.islice(pretraining.clean_texts(settings.seed), settings.tokenizer_documents)
    tokenizer = train_tokenizer(texts, settings.vocabulary, settings.context)
    model = pretraining.build_model(settings)
    log(f"parameters {model.num_parameters()}, vocabulary {len(tokenizer)}")
    pretraining.pretrain(model, tokenizer, settings, loss_curve(log))
    log(f"demo words read 0 of {len(demo.PRIVATE)}: every text was looked through before it was used")
    # bf16 is what ships, so it is what is measured; the arithmetic is fp32, as it is when the base is used.
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.to(torch.float32)
    for domain in corpus.DOMAINS:
        log(f"validation {domain} {pretraining.validation_loss(model, tokenizer, settings, domain):.4f}")
    for path in sorted(p for p in folder.iterdir() if p.name != "train.log"):
        log(f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_size} {path.name}")


def loss_curve(log: Callable[[str], None]) -> Callable[[int, float], None]:
    """Log the mean loss of every stretch of steps."""
    losses: list[float] = []
    start = time.perf_counter()

    def report(step: int, loss: float) -> None:
        losses.append(loss)
        if (step + 1) % LOG_EVERY == 0:
            print(f"{time.perf_counter() - start:.0f} s", end=" ")
            log(f"step {step + 1} loss {sum(losses) / len(losses):.4f}")
            losses.clear()

    return report


if __name__ == "__main__":
    main()
