"""From hidden states to the loss, at label positions only and in chunks of the vocabulary's logits.

Shape suffixes: B rows, T positions, D width, N label tokens, C a chunk of them, V vocabulary.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atoll.base.skeleton.build import body_of
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


@runtime_checkable
class PairBeside(Protocol):
    """A module with a low-rank pair beside it (adapters.layers.AdaptedLinear is one)."""

    base: nn.Module
    up_OR: Tensor

    def low(self, x: Tensor) -> Tensor:
        """What the pair's first matrix makes of the input, scaled: (..., inputs) to (..., rank)."""


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The output projection and what the model does to its logits: logits = cap * tanh(factor * (W h + b) / cap).

    Pairs beside it count as more inputs: W h + up u, with u = low(h).
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    factor: float
    cap: float | None
    pairs: tuple[PairBeside, ...] = ()

    def with_low(self, h_ND: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The hidden states, u and up; None where nothing is beside the head."""
        if not self.pairs:
            return h_ND, None, None
        u_NR = torch.cat([pair.low(h_ND) for pair in self.pairs], dim=-1)
        return h_ND, u_NR, torch.cat([pair.up_OR for pair in self.pairs], dim=1).to(h_ND.dtype)

    def logits(self, h_CD: Tensor) -> Tensor:
        """Logits in fp32.

        Shapes: (C, V).
        """
        return self.logits_of(*self.with_low(h_CD))

    def logits_of(self, h_CD: Tensor, u_CR: Tensor | None, up_VR: Tensor | None) -> Tensor:
        """The same from what `with_low` returns."""
        z_CV = nn.functional.linear(h_CD, self.weight_VD, self.bias_V)
        if u_CR is not None and up_VR is not None:
            z_CV = z_CV.addmm_(u_CR, up_VR.T)
        z_CV = z_CV.float()
        if self.factor != 1.0:
            z_CV.mul_(self.factor)
        return z_CV if self.cap is None else z_CV.div_(self.cap).tanh_().mul_(self.cap)


_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""What configs call a bound of logits, c in c tanh(logits / c): Gemma's kin, RecurrentGemma, xLSTM."""


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
    pairs: list[PairBeside] = []
    while isinstance(module, PairBeside):
        pairs.append(module)
        module = module.base
    if hasattr(module, "change_OI"):
        raise ArchitectureError(
            "the full weight of the output projection cannot be trained", got=type(module).__name__, expected="a LoRA pair beside it",
            do='write kind = "lora" below [adapter], or a rank below the width of the model',
        )  # fmt: skip
    config = model.config.get_text_config()
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = next((value for name in _CAPS if (value := getattr(config, name, None)) is not None), None)
    return Head(module.weight, getattr(module, "bias", None), factor, cap, tuple(pairs))


def hidden_states(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Final hidden states (after the last norm), without the head; those at `predict_N` alone where blocks run in another process.

    Shapes: (B, T, D).
    """
    body = body_of(model)
    inputs: dict[str, Any] = {"input_ids": batch.input_ids_BT, "use_cache": False}
    if batch.attention_B1TT is not None:
        inputs["attention_mask"] = mask_for(batch.attention_B1TT, model.dtype)
    if batch.position_ids_BT is not None and "position_ids" in inspect.signature(body.forward).parameters:
        inputs["position_ids"] = batch.position_ids_BT
    remote_blocks = find_placeholder(model)
    layout = Layout(lengths=batch.lengths, wanted_N=batch.predict_N, position_ids_BT=batch.position_ids_BT)
    with nullcontext() if remote_blocks is None else remote_blocks.expect(layout):
        states: Tensor = body(**inputs).last_hidden_state
        return states


def mask_for(mask_B1TT: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask in the type of the scores that it is added to, as CUDA's kernels want it; what is hidden stays a finite number."""
    return mask_B1TT if mask_B1TT.dtype == dtype else mask_B1TT.clamp(min=torch.finfo(dtype).min).to(dtype)


def loss_sum(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Sum of the cross-entropy over all label tokens of a batch, in nats; differentiable in the adapters."""
    h_ND = hidden_states(model, batch).flatten(0, 1)[batch.predict_N]
    head = head_of(model)
    total: Tensor = _ChunkedCrossEntropy.apply(*head.with_low(h_ND), batch.target_N, head)
    return total


@torch.no_grad()
def token_losses_N(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Cross-entropy of every label token, in nats, without gradient.

    Shapes: (N,), fp32.
    """
    h_ND, head = hidden_states(model, batch).flatten(0, 1)[batch.predict_N], head_of(model)
    chunks = zip(_chunks(h_ND, head), _chunks(batch.target_N, head), strict=True)
    losses = [nn.functional.cross_entropy(head.logits(h), target, reduction="none") for h, target in chunks]
    return torch.cat(losses)


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
    try:
        with torch.no_grad():
            own = head_of(model).logits(body_of(model)(input_ids=ids_BT, use_cache=False).last_hidden_state[0])
            theirs = model(input_ids=ids_BT, use_cache=False).logits[0].float()
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError) as problem:
        raise ArchitectureError(
            f"{type(model).__name__} does not run as it is kept here", got=str(problem).strip().splitlines()[0][:200],
            expected="a forward pass over four tokens",
            do="leave out quantize, cut and placement = \"split\" where they are asked for; else use another model family",
        ) from problem  # fmt: skip
    if own.shape != theirs.shape or not torch.allclose(own, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()) + 1e-6):
        raise ArchitectureError(
            f"{type(model).__name__} does something to its logits that Atoll does not know",
            got="different logits from the same hidden states", expected="a plain, scaled or soft-capped output projection",
            do="use another model family, and report this one",
        )  # fmt: skip


def _chunks(tensor: Tensor, head: Head) -> tuple[Tensor, ...]:
    return tensor.split(max(16, CHUNK_BYTES // (4 * head.weight_VD.shape[0])))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies; the gradients by its inputs are made in the forward pass, while a chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, u_NR: Tensor | None, up_VR: Tensor | None, target_N: Tensor, head: Head) -> Tensor:
        needed: Any = ctx.needs_input_grad[:3]
        inputs = (h_ND, u_NR, up_VR)
        grads = [torch.zeros_like(one) if need and one is not None else None for one, need in zip(inputs, needed, strict=True)]
        total, start = torch.zeros((), dtype=torch.float32, device=h_ND.device), 0
        for h_CD, target_C in zip(_chunks(h_ND, head), _chunks(target_N, head), strict=True):
            part = slice(start, start + len(target_C))
            given = (h_CD, None if u_NR is None else u_NR[part], up_VR)
            total += _chunk_loss(given, target_C, head, (*(None if one is None else one[part] for one in grads[:2]), grads[2]))
            start = part.stop
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if one is None else one * grads[0].to(one.dtype) for one in ctx.saved_tensors), None, None)


Inputs = tuple[Tensor | None, ...]
"""Hidden states, u and up; or their gradients."""


def _chunk_loss(given: tuple[Tensor, Tensor | None, Tensor | None], target_C: Tensor, head: Head, grads: Inputs) -> Tensor:
    """The chunk's loss; its gradients by the hidden states and u are written to `grads`, that by up is added there.

    All in place: one block of C x V numbers is what this loss holds (two where logits are capped).
    """
    z_CV, wants = head.logits_of(*given), any(one is not None for one in grads)
    slope_CV = None if head.cap is None or not wants else 1 - (z_CV / head.cap) ** 2
    z_CV -= z_CV.amax(dim=1, keepdim=True)
    picked_C = z_CV.gather(1, target_C[:, None])[:, 0]
    norm_C1 = z_CV.exp_().sum(dim=1, keepdim=True)
    if wants:
        p_CV = z_CV.div_(norm_C1)
        p_CV[torch.arange(len(target_C), device=target_C.device), target_C] -= 1
        if slope_CV is not None:
            p_CV *= slope_CV
        if head.factor != 1.0:
            p_CV *= head.factor
        _chunk_gradients(p_CV.to(given[0].dtype), given, head, grads)
    return norm_C1.log().sum() - picked_C.sum()


def _chunk_gradients(p_CV: Tensor, given: tuple[Tensor, Tensor | None, Tensor | None], head: Head, grads: Inputs) -> None:
    (_, u_CR, up_VR), (grad_CD, grad_CR, grad_VR) = given, grads
    if grad_CD is not None:
        torch.mm(p_CV, head.weight_VD, out=grad_CD)
    if grad_CR is not None and up_VR is not None:
        torch.mm(p_CV, up_VR, out=grad_CR)
    if grad_VR is not None and u_CR is not None:
        grad_VR.addmm_(p_CV.T, u_CR)
