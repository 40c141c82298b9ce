"""From hidden states to the loss, at label positions only and in chunks of the vocabulary's logits.

Shape suffixes: B rows, T positions, D width, N label tokens, C a chunk of them, V vocabulary.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atoll.errors import ArchitectureError
from atoll.remote_blocks import Layout, find_placeholder

CHUNK_BYTES = 32 * 2**20
"""Largest block of logits held at once: large enough for full matmul speed, small beside any base."""


class TokenBatch(Protocol):
    """What the loss needs of a batch (tasks.batches.Batch is one)."""

    @property
    def input_ids_BT(self) -> Tensor:
        """Right-padded token ids."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens of each row."""

    @property
    def predict_N(self) -> Tensor:
        """Flat positions (of B*T) whose next token carries loss."""

    @property
    def target_N(self) -> Tensor:
        """These next tokens."""

    @property
    def position_ids_BT(self) -> Tensor | None:
        """Positions within each packed document; none: 0, 1, 2, ..."""

    @property
    def attention_B1TT(self) -> Tensor | None:
        """Which positions see which, for packed rows; none: plain causal."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The output projection and what the model does to its logits: logits = cap * tanh(factor * (W h + b) / cap)."""

    weight_VD: Tensor
    bias_V: Tensor | None
    factor: float
    cap: float | None

    def logits(self, h_CD: Tensor) -> Tensor:
        """Logits in fp32.

        Shapes: (C, V).
        """
        z_CV = nn.functional.linear(h_CD, self.weight_VD, self.bias_V).float()
        if self.factor != 1.0:
            z_CV.mul_(self.factor)
        return z_CV if self.cap is None else z_CV.div_(self.cap).tanh_().mul_(self.cap)


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model.

    Raises: ArchitectureError where the model has none.
    """
    module = model.get_output_embeddings()
    if module is None or not hasattr(module, "weight"):
        raise ArchitectureError(
            "the model has no output projection",
            got=type(model).__name__, expected="a causal language model (AutoModelForCausalLM)", do="choose a generative model",
        )  # fmt: skip
    config = model.config.get_text_config()
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(module.weight, getattr(module, "bias", None), factor, getattr(config, "final_logit_softcapping", None))


def hidden_states(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Final hidden states (after the last norm), without the head; those at `predict_N` alone where blocks run in another process.

    Shapes: (B, T, D).
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids_BT, "use_cache": False}
    if batch.attention_B1TT is not None:
        inputs["attention_mask"] = batch.attention_B1TT
    if batch.position_ids_BT is not None and "position_ids" in inspect.signature(model.base_model.forward).parameters:
        inputs["position_ids"] = batch.position_ids_BT
    remote_blocks = find_placeholder(model)
    layout = Layout(lengths=batch.lengths, wanted_N=batch.predict_N, position_ids_BT=batch.position_ids_BT)
    with nullcontext() if remote_blocks is None else remote_blocks.expect(layout):
        return model.base_model(**inputs).last_hidden_state


def loss_sum(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Sum of the cross-entropy over all label tokens of a batch, in nats; differentiable in the adapters."""
    h_ND = hidden_states(model, batch).flatten(0, 1)[batch.predict_N]
    total: Tensor = _ChunkedCrossEntropy.apply(h_ND, batch.target_N, head_of(model))
    return total


@torch.no_grad()
def token_losses_N(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Cross-entropy of every label token, in nats, without gradient.

    Shapes: (N,), fp32.
    """
    h_ND, head = hidden_states(model, batch).flatten(0, 1)[batch.predict_N], head_of(model)
    chunks = zip(_chunks(h_ND, head), _chunks(batch.target_N, head), strict=True)
    return torch.cat([nn.functional.cross_entropy(head.logits(h), target, reduction="none") for h, target in chunks])


class Objective(Protocol):
    """From a batch to the loss: what a base is trained for."""

    def loss_sum(self, model: PreTrainedModel, batch: TokenBatch) -> Tensor:
        """Sum of the losses over all labels of a batch, in nats; differentiable in what is trained."""

    def frozen_head(self, model: PreTrainedModel) -> Tensor:
        """The weight of the output projection where it is frozen; empty where it is not."""


@dataclass(frozen=True, slots=True)
class NextToken:
    """Predict the tokens that carry loss, each from those before it."""

    def loss_sum(self, model: PreTrainedModel, batch: TokenBatch) -> Tensor:
        """Sum of the cross-entropy over all label tokens."""
        return loss_sum(model, batch)

    def frozen_head(self, model: PreTrainedModel) -> Tensor:
        """The output projection's weight."""
        return head_of(model).weight_VD


def check_head(model: PreTrainedModel) -> None:
    """Compare this file's logits with the model's own on a few tokens.

    Raises: ArchitectureError where they differ, rather than train on the wrong loss.
    """
    ids_BT = torch.arange(4, device=model.device).remainder(model.config.get_text_config().vocab_size)[None]
    with torch.no_grad():
        own = head_of(model).logits(model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state[0])
        theirs = model(input_ids=ids_BT, use_cache=False).logits[0].float()
    if own.shape != theirs.shape or not torch.allclose(own, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()) + 1e-6):
        raise ArchitectureError(
            f"{type(model).__name__} does something to its logits that Atoll does not know",
            got="different logits from the same hidden states", expected="a plain, scaled or soft-capped output projection",
            do="use another model family, and report this one",
        )  # fmt: skip


def _chunks(tensor: Tensor, head: Head) -> tuple[Tensor, ...]:
    return tensor.split(max(16, CHUNK_BYTES // (4 * head.weight_VD.shape[0])))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; the gradient by the hidden states is made in the forward pass, while a chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, target_N: Tensor, head: Head) -> Tensor:
        grad_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        total, start = torch.zeros((), dtype=torch.float32, device=h_ND.device), 0
        for h_CD, target_C in zip(_chunks(h_ND, head), _chunks(target_N, head), strict=True):
            stop = start + len(target_C)
            total += _chunk_loss(h_CD, target_C, head, None if grad_ND is None else grad_ND[start:stop])
            start = stop
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grads[0].to(grad_ND.dtype), None, None


def _chunk_loss(h_CD: Tensor, target_C: Tensor, head: Head, grad_CD: Tensor | None) -> Tensor:
    """The chunk's loss; its gradient by the hidden states is written to `grad_CD`.

    All in place: one block of C x V numbers is what this loss holds (two where logits are capped).
    """
    z_CV = head.logits(h_CD)
    slope_CV = None if head.cap is None or grad_CD is None else 1 - (z_CV / head.cap) ** 2
    z_CV -= z_CV.amax(dim=1, keepdim=True)
    picked_C = z_CV.gather(1, target_C[:, None])[:, 0]
    norm_C1 = z_CV.exp_().sum(dim=1, keepdim=True)
    if grad_CD is not None:
        p_CV = z_CV.div_(norm_C1)
        p_CV[torch.arange(len(target_C)), target_C] -= 1
        if slope_CV is not None:
            p_CV *= slope_CV
        if head.factor != 1.0:
            p_CV *= head.factor
        torch.mm(p_CV.to(h_CD.dtype), head.weight_VD, out=grad_CD)
    return norm_C1.log().sum() - picked_C.sum()
