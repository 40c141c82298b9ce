"""The two ends of a base are the base's own, in every family."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from atoll.attacks.labels import labels_of, sent_gradient
from atoll.attacks.views import Front, Tail

IDS_BT = torch.tensor([[1, 7, 12, 40, 5], [1, 9, 30, 2, 8]])


def test_tokens_to_the_cut_are_the_hidden_states_of_the_whole(family_model: PreTrainedModel) -> None:
    with torch.no_grad():
        states = family_model(input_ids=IDS_BT, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(Front.at_cut(family_model, 1)(IDS_BT), states[1], rtol=1e-4, atol=1e-5)
    rows = [IDS_BT[0], IDS_BT[1, :3]]
    apart = Front.at_cut(family_model, 1).rows(rows)
    torch.testing.assert_close(apart[1], states[1][1, :3], rtol=1e-4, atol=1e-5)


def test_from_the_last_block_on_logits_are_those_of_the_whole(family_model: PreTrainedModel) -> None:
    with torch.no_grad():
        whole = family_model(input_ids=IDS_BT, use_cache=False).logits
        h_ND = Front.at_end(family_model)(IDS_BT).flatten(0, 1)
        tail = Tail(family_model)
        torch.testing.assert_close(tail.head.logits(tail(h_ND)), whole.flatten(0, 1).float(), rtol=1e-3, atol=1e-4)


def test_labels_are_read_off_their_gradients(family_model: PreTrainedModel) -> None:
    h_ND, target_N = Front.at_end(family_model)(IDS_BT).flatten(0, 1), torch.arange(10) * 7 + 3
    seen_ND = sent_gradient(Tail(family_model), h_ND, target_N)
    assert (labels_of(Tail(family_model), h_ND, seen_ND)[:, 0] == target_N).all()
