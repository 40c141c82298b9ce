"""Where a base's positions end, transformers itself says so: one token more fails."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel

from atoll.config.schema import Data, RunConfig
from atoll.errors import BadValueError
from atoll.jobs.inputs import KEPT_FREE, POSITIONS_END, check_positions

POSITIONS = 20
TINY = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16, "pad_token_id": 1,
    "max_position_embeddings": POSITIONS, "n_positions": POSITIONS, "max_seq_len": POSITIONS, "n_ctx": POSITIONS, "rotary_dim": 4,
    "embedding_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "dff": 16, "n_embd": 16, "n_layer": 1, "n_head": 4, "d_model": 16,
    "n_heads": 2, "n_layers": 1, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]], "dim": 16, "hidden_dim": 16,
    "relative_attention": False, "position_biased_input": True,
}  # fmt: skip


def runs(model_type: str, length: int) -> bool:
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **TINY)).eval()
    try:
        with torch.no_grad():
            model(input_ids=torch.full((1, length), 5))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("model_type", sorted(POSITIONS_END))
def test_a_family_has_so_many_positions_and_no_more(model_type: str) -> None:
    room = POSITIONS - KEPT_FREE.get(model_type, 0)
    assert runs(model_type, room)
    assert not runs(model_type, room + 1)
    check_positions(RunConfig(data=Data(max_length=room)), model_type, POSITIONS)
    with pytest.raises(BadValueError) as caught:
        check_positions(RunConfig(data=Data(max_length=room + 1)), model_type, POSITIONS)
    assert f"max_length = {room} " in caught.value.do


def test_rotary_positions_do_not_end() -> None:
    assert runs("llama", POSITIONS + 9)
    check_positions(RunConfig(), "llama", POSITIONS)
