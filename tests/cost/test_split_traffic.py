"""What an edge exchanges with its host: a part of the pool, killed modules, and the formula against what a real step carries."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from atoll.adapters.attach import attached
from atoll.adapters.fresh import fresh_adapters
from atoll.base.head import loss_sum
from atoll.base.read_shapes import read_shapes
from atoll.config.schema import RunConfig
from atoll.cost.split_traffic import groups, step_bytes, step_round_trips
from atoll.cost.traffic import WireBytes
from atoll.shapes import BaseShapes, ModuleShape
from atoll.split.cut import Cut
from atoll.wire.byte_formulas import WireMode
from atoll.wire.dialogue import Dialogue
from atoll.wire.frames import Message

from tests.conftest import random_model
from tests.pieces import stream
from tests.split.conftest import BLOCKS, device_trainer, served, thread_host

PARTS = (("attn.q_proj", 8, 8, "attention"), ("attn.v_proj", 8, 4, "attention"), ("mlp.fc1", 8, 16, "mlp"))
MODULES = tuple(ModuleShape(f"h.{b}.{name}", i, o, kind, b) for b in range(4) for name, i, o, kind in PARTS)  # type: ignore[arg-type]
BASE = BaseShapes("example", 2000, MODULES, 8, 32, 4, 64, True, 2.0, 2, 8, False)
"""Four blocks; with CUT the host runs the two in the middle."""
CUT = {"front": 1, "back": 1}


def config(cut: dict[str, int] = CUT, **wire: object) -> RunConfig:
    return RunConfig.model_validate({"model": {"cut": cut}, "wire": wire})


def _mode(wire: dict[str, object]) -> tuple[WireMode, dict[str, object]]:
    """The mode, dense where none is asked for, and the rest."""
    return wire.get("mode", "dense"), {key: value for key, value in wire.items() if key != "mode"}  # type: ignore[return-value]


def count(*names: str, killed: tuple[str, ...] = (), num_exchanges: int = 1, **wire: object) -> WireBytes:
    """One step of 10 tokens; rank 2 everywhere. With a back block on the device, all of them are wanted."""
    mode, rest = _mode(wire)
    return step_bytes(
        config(**rest), BASE, dict.fromkeys(names, 2), mode, num_tokens=10, num_label_tokens=4, num_exchanges=num_exchanges,
        killed=dict.fromkeys(killed, 2),
    )  # fmt: skip


def test_a_group_is_its_active_modules_and_vanishes_without_any() -> None:
    assert groups(config(), BASE, {"h.2.attn.v_proj": 3, "h.1.attn.q_proj": 2}) == [[(8, 8, 2)], [(8, 4, 3)]]
    assert groups(config(), BASE, {"h.1.attn.v_proj": 2, "h.1.attn.q_proj": 2}) == [[(8, 8, 2), (8, 4, 2)]]
    assert groups(config(), BASE, {"h.0.attn.q_proj": 2, "h.3.attn.q_proj": 2, "h.1.attn.q_proj": 0}) == []


def test_bytes_of_one_active_module() -> None:
    """Up h, g and the delta of 4; down x, h and the gradient by the delta. The lowest group sends no dx."""
    assert count("h.1.attn.v_proj") == WireBytes(4 * (80 + 80 + 40), 4 * (80 + 80 + 40), 8 * 200)


def test_a_second_group_sends_dx_too() -> None:
    assert count("h.1.attn.v_proj", "h.2.attn.v_proj").up_bytes - count("h.1.attn.v_proj").up_bytes == 4 * (40 + 80)


def test_an_active_front_module_wants_gradients_of_all_below_it() -> None:
    """dx of the lowest group up, and dh down."""
    only, both = count("h.1.attn.v_proj"), count("h.1.attn.v_proj", "h.0.attn.q_proj")
    assert (both.up_bytes - only.up_bytes, both.down_bytes - only.down_bytes) == (320, 320)
    assert count("h.1.attn.v_proj", killed=("h.0.attn.q_proj",)) == only


def test_without_an_active_module_in_host_or_front_no_gradient_travels() -> None:
    assert count("h.3.attn.q_proj") == WireBytes(320, 320, 640)
    assert count("h.0.attn.q_proj") == WireBytes(640, 640, 1280)


def test_killed_modules_of_the_host_travel_once_in_fp32() -> None:
    """q_proj 2 * 16 numbers and v_proj 2 * 12; those of the device's own blocks stay."""
    killed = ("h.1.attn.q_proj", "h.2.attn.v_proj", "h.0.attn.q_proj", "h.3.attn.q_proj")
    for wire in ({}, {"codec": "int8"}, {"mode": "factored", "codec": "bf16"}, {"mode": "lent", "adapters": "bf16"}):
        for num_exchanges in (1, 3):
            plain = count("h.1.attn.v_proj", num_exchanges=num_exchanges, **wire)
            first = count("h.1.attn.v_proj", num_exchanges=num_exchanges, killed=killed, **wire)
            assert first == plain + WireBytes(224, 0, 224)


def trips(*names: str, killed: tuple[str, ...] = (), num_exchanges: int = 1, **wire: object) -> int:
    mode, rest = _mode(wire)
    active, gone = (dict.fromkeys(some, 2) for some in (names, killed))
    return step_round_trips(config(**rest), BASE, active, mode, num_exchanges=num_exchanges, killed=gone)


def test_an_exchange_waits_twice_for_each_group_with_an_active_module_and_once_more() -> None:
    assert trips("h.1.attn.q_proj") == trips("h.1.attn.q_proj", "h.1.attn.v_proj", "h.3.mlp.fc1") == 3
    assert trips("h.1.attn.q_proj", "h.1.mlp.fc1", "h.2.attn.v_proj", num_exchanges=3) == 3 * 7
    assert trips("h.0.attn.q_proj", num_exchanges=2) == 2 * 2, "gradients go on to the front"
    assert trips("h.0.attn.q_proj", "h.1.attn.q_proj") == 4


def test_an_exchange_without_a_backward_pass_waits_once() -> None:
    assert trips("h.3.attn.q_proj") == 1
    assert trips("h.3.attn.q_proj", num_exchanges=3) == 3


def test_handing_over_opens_one_session_whatever_the_exchanges() -> None:
    """Killed modules of the device's own blocks are sent to nobody."""
    assert trips("h.1.attn.q_proj", killed=("h.2.attn.q_proj", "h.1.mlp.fc1"), num_exchanges=3) == 3 * 3 + 1
    assert trips("h.3.attn.q_proj", killed=("h.2.attn.q_proj",)) == 2
    assert trips("h.1.attn.q_proj", killed=("h.0.attn.q_proj", "h.3.mlp.fc1")) == 3


def test_with_lent_adapters_an_exchange_waits_twice_whatever_is_active() -> None:
    assert trips("h.1.attn.q_proj", mode="lent") == trips("h.1.attn.q_proj", "h.1.mlp.fc1", "h.2.attn.v_proj", mode="lent") == 2
    assert trips("h.0.attn.q_proj", "h.1.attn.q_proj", num_exchanges=3, mode="lent") == 6
    assert trips("h.3.attn.q_proj", mode="lent") == 1
    assert trips("h.1.attn.q_proj", killed=("h.2.attn.q_proj",), mode="lent") == 3


def test_lent_factors_travel_once_a_step_and_their_gradients_too() -> None:
    """h and g up, h down, 4 bytes a number; 2 * (8 + 8) numbers of q_proj each way, in 2 bytes."""
    one, four = (count("h.1.attn.q_proj", num_exchanges=number, mode="lent", adapters="bf16") for number in (1, 4))
    assert one == four
    plain = count("h.1.attn.q_proj", mode="lent", adapters="fp32")
    assert (plain.up_bytes - one.up_bytes, plain.down_bytes - one.down_bytes) == (64, 64)


ACTIVE = {
    "all": [""], "a part of two groups": ["1.self_attn.k_proj", "1.mlp.up_proj"], "last of the host": ["1.mlp.down_proj"],
    "front and host": ["0.mlp.down_proj", "1.self_attn.q_proj"], "front only": ["0."], "back only": ["2."],
}  # fmt: skip


@pytest.mark.parametrize(("mode", "codec"), [
    ("dense", "fp32"), ("dense", "int8"), ("factored", "fp32"), ("factored", "bf16"), ("lent", "fp32"), ("lent", "int8"),
])  # fmt: skip
@pytest.mark.parametrize("active", ACTIVE)
@pytest.mark.parametrize("cut", [Cut(1, 1), Cut(1, 0)])
def test_the_formula_is_what_a_step_carries(
    active: str, mode: str, codec: str, cut: Cut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model("llama", BLOCKS).save_pretrained(tmp_path)
    shapes = read_shapes(str(tmp_path))
    ranks = {m.name: 2 for m in shapes.modules if any(f".layers.{part}" in m.name or not part for part in ACTIVE[active])}
    sizes = {module.name: (module.d_in, module.d_out) for module in shapes.modules}
    trainer, client = device_trainer("llama", cut, thread_host(served(random_model("llama", BLOCKS))), mode=mode, codec=codec)
    carried: Counter[str] = Counter()

    def counting(method: str) -> None:
        real = getattr(Dialogue, method)

        def counted(self: Dialogue, message: Message) -> None:
            carried[method] += sum(tensor.num_bytes for tensor in message.tensors) if self.role == "device" else 0
            real(self, message)

        monkeypatch.setattr(Dialogue, method, counted)

    counting("sent")
    counting("received")
    batch = stream().batch(0)
    with attached(trainer.base.model, fresh_adapters("lora", sizes, ranks, 1.0, 0)):
        loss_sum(trainer.base.model, batch).backward()
    client.end()
    foretold = step_bytes(
        config({"front": cut.front, "back": cut.back}, codec=codec), shapes, ranks, mode,
        num_tokens=sum(batch.lengths), num_label_tokens=batch.num_label_tokens,
    )  # fmt: skip
    assert (foretold.up_bytes, foretold.down_bytes) == (carried["sent"], carried["received"])
