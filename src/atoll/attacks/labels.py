"""The labels, from the gradient by the hidden states that a device sends back where norm and head are all that it keeps (cut.back = 0).

The host knows the hidden state h, for it made it, and norm and head, for they are the public base's. The gradient of a label's loss is
J^T (W^T p - W_y) / n: all but y is known, so every token is tried.

Shape suffixes: N label positions, D width, V vocabulary, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atoll.attacks.finding import GUESSES
from atoll.attacks.views import Tail

CANDIDATES = 32


def sent_gradient(tail: Tail, h_ND: Tensor, target_N: Tensor) -> Tensor:
    """What a device sends: the gradient of the mean loss over these labels by what left the last block. Shapes: (N, D)."""
    h_ND = h_ND.detach().requires_grad_()
    loss = nn.functional.cross_entropy(_logits(tail, h_ND), target_N)
    (grad_ND,) = torch.autograd.grad(loss, h_ND)
    return grad_ND


def labels_of(tail: Tail, h_ND: Tensor, seen_ND: Tensor) -> Tensor:
    """The likeliest labels, the likeliest first. Shapes: (N, 5)."""
    head, count = tail.head, len(h_ND)
    weight_VD = head.weight_VD.detach().float()
    h_ND = h_ND.detach().requires_grad_()
    out_ND = tail(h_ND)
    with torch.no_grad():
        p_NV = _logits(tail, h_ND).softmax(1)
    # What is left of the gradient when the known part is taken off is -J^T W_y / n.
    (known_ND,) = torch.autograd.grad(out_ND, h_ND, p_NV @ weight_VD, retain_graph=True)
    left_ND = known_ND - count * seen_ND
    # J left, by the derivative of J^T v in v: with it every W_v is compared at once; then the likeliest ones exactly.
    v_ND = torch.zeros_like(out_ND, requires_grad=True)
    (through_ND,) = torch.autograd.grad(out_ND, h_ND, v_ND, create_graph=True)
    (pushed_ND,) = torch.autograd.grad(through_ND, v_ND, left_ND, retain_graph=True)
    pushed_ND = pushed_ND.detach()
    candidates_NK = (pushed_ND @ nn.functional.normalize(weight_VD, dim=1).T).topk(CANDIDATES).indices
    distance_NK = torch.stack(
        [
            (torch.autograd.grad(out_ND, h_ND, weight_VD[candidates_NK[:, k]], retain_graph=True)[0] - left_ND).norm(dim=1)
            for k in range(CANDIDATES)
        ],
        dim=1,
    )
    return candidates_NK.gather(1, distance_NK.argsort(1)[:, :GUESSES])


def _logits(tail: Tail, h_ND: Tensor) -> Tensor:
    out_ND, head = tail(h_ND), tail.head
    z_NV = nn.functional.linear(out_ND, head.weight_VD.float(), None if head.bias_V is None else head.bias_V.float())
    for pair in head.pairs:
        z_NV = z_NV + nn.functional.linear(pair.low(out_ND), pair.up_OR)
    z_NV = z_NV * head.factor
    return z_NV if head.cap is None else head.cap * torch.tanh(z_NV / head.cap)
