"""Train the base from nothing on the generated text.

Legend: B windows, T tokens of a window.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import corpus
import torch
from copying_start import draw_copying
from demo import leaks
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides the weights."""

    seed: int = 1
    vocabulary: int = 1280
    context: int = 512
    width: int = 160
    blocks: int = 4
    heads: int = 5
    mlp_width: int = 432
    weight_deviation: float = 0.08
    """About 1 / sqrt(width); with the usual 0.02 a model of this width has not begun to copy when the training ends."""
    tokenizer_documents: int = 20_000
    batch_tokens: int = 2048
    window: int = 256
    """Length of the first windows; the last `long_share` of the steps see the whole context."""
    long_share: float = 0.1
    echo_share: float = 0.2
    """The first steps, which read mostly echoes."""
    steps: int = 1500
    warmup_steps: int = 60
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    validation_documents: int = 64
    threads: int = 2


def build_model(settings: Settings) -> LlamaForCausalLM:
    """A Llama with tied embeddings and weights drawn from the seed."""
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocabulary,
            hidden_size=settings.width,
            intermediate_size=settings.mlp_width,
            num_hidden_layers=settings.blocks,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=settings.context,
            tie_word_embeddings=True,
            initializer_range=settings.weight_deviation,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    draw_copying(model)
    return model


def clean_texts(seed: int, echoes: float = corpus.SHARES[corpus.ECHOES]) -> Iterator[str]:
    """The corpus of a seed without its domains.

    Raises: ValueError where a text has a private word of the demo.
    """
    for _, text in corpus.documents(seed, echoes):
        if leaks(text):
            raise ValueError(f"the base must not read a private word of the demo; change the word there: {text}")
        yield text


def windows(texts: Iterator[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Iterator[list[int]]:
    """Windows of whole documents in a row; each starts with a document, and the last one is cut off."""
    window: list[int] = []
    for text in texts:
        window += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(window) >= length:
            yield window[:length]
            window = []


def batches(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> Iterator[Tensor]:
    """The training text in its order: mostly echoes, then everything, then everything in long windows.

    Shapes: [B, T] each.
    """
    echoes = round(settings.steps * settings.echo_share)
    long = round(settings.steps * settings.long_share)
    stages = (
        (echoes, settings.window, clean_texts(settings.seed, corpus.ECHOES_FIRST)),
        (settings.steps - echoes - long, settings.window, clean_texts(settings.seed + 1)),
        (long, settings.context, clean_texts(settings.seed + 2)),
    )
    for steps, length, texts in stages:
        rows = windows(texts, tokenizer, length)
        for _ in range(steps):
            yield torch.tensor(list(itertools.islice(rows, settings.batch_tokens // length)))


def _rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then linearly down to nothing."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    return (settings.steps - step) / (settings.steps - settings.warmup_steps)


def _optimizer(model: LlamaForCausalLM, settings: Settings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings, report: Callable[[int, float], None]
) -> None:
    """Train in place, in fp32; `report` hears every step and its loss."""
    optimizer = _optimizer(model, settings)
    model.train()
    for step, ids_BT in enumerate(batches(tokenizer, settings)):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(settings, step)
        loss = _loss(model, ids_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report(step, loss.item())


def _loss(model: LlamaForCausalLM, ids_BT: Tensor) -> Tensor:
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings, domain: str) -> float:
    """Nats per token over held-out documents of one domain, each on its own."""
    fresh = (text for name, text in corpus.documents(settings.seed + 1000) if name == domain)
    total, count = 0.0, 0
    model.eval()
    for text in itertools.islice(fresh, settings.validation_documents):
        ids_BT = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        total += _loss(model, ids_BT).item() * (ids_BT.shape[1] - 1)
        count += ids_BT.shape[1] - 1
    return total / count
