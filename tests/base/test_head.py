"""The loss at label positions, in chunks, against the library's own loss over all logits."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from atoll.adapters.layers import AdaptedLinear, LowRankPair
from atoll.base import head
from atoll.errors import ArchitectureError

from tests.conftest import random_model
from tests.families import FAMILIES, build


@dataclass(frozen=True)
class Rows:
    """Two right-padded rows with labels on the later positions."""

    input_ids_BT: Tensor
    predict_N: Tensor
    target_N: Tensor
    labels_BT: Tensor
    lengths: tuple[int, ...] = (12, 12)
    position_ids_BT: Tensor | None = None
    attention_B1TT: Tensor | None = None


def rows() -> Rows:
    ids = torch.arange(24).view(2, 12) * 5 % 96
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 8:] = -100
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1).flatten()
    predict = (shifted != -100).nonzero()[:, 0]
    return Rows(ids, predict, shifted[predict], labels)


def test_loss_is_the_librarys_loss(family_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)  # the smallest chunks: 16 tokens, so that the 15 or more labels need two
    batch = rows()
    ours = head.loss_sum(family_model, batch)
    theirs = family_model(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss * len(batch.target_N)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.token_losses_N(family_model, batch).sum(), ours, rtol=1e-5, atol=1e-5)


def test_gradient_is_the_librarys_gradient(family_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    batch, grads = rows(), []
    norm = [p for name, p in family_model.named_parameters() if "norm" in name or "ln_" in name][-1].requires_grad_()
    theirs = family_model(input_ids=batch.input_ids_BT, labels=batch.labels_BT).loss * len(batch.target_N)
    for loss in (head.loss_sum(family_model, batch), theirs):
        norm.grad = None
        loss.backward()
        assert norm.grad is not None
        grads.append(norm.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ranks", [(), (3,), (2, 4)])
@pytest.mark.parametrize(("factor", "cap"), [(1.0, 5.0), (0.3, None), (0.7, 3.0)])
def test_scaled_and_capped_logits_with_pairs_beside_them(factor: float, cap: float | None, ranks: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    h = torch.randn(40, 8, generator=g, requires_grad=True)
    weight, bias, target = torch.randn(30, 8, generator=g) * 3, torch.randn(30, generator=g), torch.randint(30, (40,), generator=g)
    leaves = [nn.Parameter(torch.randn(shape, generator=g)) for rank in ranks for shape in ((rank, 8), (30, rank))]
    pairs = tuple(
        AdaptedLinear(nn.Linear(8, 30), LowRankPair("lora", *leaves[2 * n : 2 * n + 2], 0.5 + n, 0.0)) for n in range(len(ranks))
    )  # fmt: skip
    given = head.Head(weight, bias, factor, cap, pairs)
    ours = head._ChunkedCrossEntropy.apply(*given.with_low(h), target, given)
    grads_ours = torch.autograd.grad(ours, [h, *leaves])
    z = h @ weight.T + bias
    for number, (down, up) in enumerate(zip(leaves[::2], leaves[1::2], strict=True)):
        z = z + (0.5 + number) * h @ down.T @ up.T
    z = z * factor if cap is None else cap * torch.tanh(z * factor / cap)
    plain = nn.functional.cross_entropy(z, target, reduction="sum")
    torch.testing.assert_close(ours, plain)
    for grad_ours, grad_plain in zip(grads_ours, torch.autograd.grad(plain, [h, *leaves]), strict=True):
        torch.testing.assert_close(grad_ours, grad_plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(given.logits(h), z, rtol=1e-4, atol=1e-4)


def test_every_family_passes_the_check(family_model: PreTrainedModel) -> None:
    head.check_head(family_model)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_models_own_to_the_last_digits(family: str) -> None:
    """Where logits have a bound it is made narrow: that of the checkpoints is so wide that its absence hardly shows."""
    model = build(family).eval()
    config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0.5)
    ids_BT = torch.arange(3, 9)[None]
    with torch.no_grad():
        own = head.head_of(model).logits(head.body_of(model)(input_ids=ids_BT, use_cache=False).last_hidden_state[0])
        theirs = model(input_ids=ids_BT, use_cache=False).logits[0].float()
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


def test_a_head_we_do_not_know_is_refused() -> None:
    model = random_model("llama")
    model.lm_head.register_forward_hook(lambda _m, _a, out: out * 1.5)
    with pytest.raises(ArchitectureError, match="does something to its logits"):
        head.check_head(model)
