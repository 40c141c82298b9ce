"""docs/protocol.md says what the code does: its tables, its limits, and every byte of its worked step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atoll.wire import frames
from atoll.wire import protocol_pb2 as pb
from atoll.wire.dialogue import TURNS, Dialogue
from atoll.wire.encoding import decode, encode
from atoll.wire.frames import Assembler, Message, Packer
from atoll.wire.handshake import PROTOCOL, REFUSAL_CODES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8")
LONGEST_LINES = 250


def table(first_column: str) -> dict[str, list[str]]:
    """The table with this head, by its first column."""
    rows = PAGE.partition(f"\n| {first_column} |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells, first_column
    return {row[0].strip("`"): row[1:] for row in cells}


def step(mode: str) -> list[tuple[str, str, bytes]]:
    """Sender, message and bytes of each frame of the worked step; what stands after two spaces explains."""
    (block,) = re.findall(rf"^```{mode}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    found: list[tuple[str, str, bytes]] = []
    for line in block.splitlines():
        if match := re.fullmatch(r"(device|host) (\w+)", line):
            found.append((match[1], match[2], b""))
        else:
            sender, name, data = found[-1]
            found[-1] = (sender, name, data + bytes.fromhex(line.partition("  ")[0]))
    return found


def numbers(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def worked_step(mode: str) -> list[tuple[str, Message]]:
    """What the page describes, computed anew."""
    h, down_RI, up_OR, g = numbers([1, 2], [3, 4]), numbers([1, 1]), numbers([0.5], [-0.5]), numbers([1, 0], [0, 1])
    delta = h @ down_RI.T @ up_OR.T
    lends, (down_grad, up_grad) = mode == "lent", gradients()
    said: list[tuple[str, object, list[Tensor]]] = [
        ("device", pb.Forward(rows=1, positions=2, train=True, has_factors=lends), [h, *([down_RI, up_OR] if lends else [])]),
        *([] if lends else [("host", pb.Input(), [h]), ("device", pb.Output(), [delta])]),
        ("host", pb.Hidden(), [h + delta]), ("device", pb.HiddenGradient(want_factor_gradients=lends), [g]),
        *([] if lends else [("host", pb.Gradient(), [g])]), ("host", pb.Finished(), [down_grad, up_grad] if lends else []),
    ]  # fmt: skip
    return [(sender, Message(body, tuple(encode(tensor, "fp32") for tensor in tensors))) for sender, body, tensors in said]


def gradients() -> tuple[Tensor, Tensor]:
    """Of A and B."""
    h, g = numbers([1, 2], [3, 4]), numbers([1, 0], [0, 1])
    down_RI, up_OR = numbers([1, 1]).requires_grad_(), numbers([0.5], [-0.5]).requires_grad_()
    ((h @ down_RI.T @ up_OR.T) * g).sum().backward()
    assert down_RI.grad is not None
    assert up_OR.grad is not None
    return down_RI.grad, up_OR.grad


def opening(mode: str) -> list[tuple[str, Message]]:
    module = pb.Module(name="a", rank=1, scaling=1)
    hello = pb.Hello(protocol=PROTOCOL, modules=[module], wire_mode=mode, codec="fp32", adapter_codec="fp32", max_tokens=2)
    return [("device", Message(hello)), ("host", Message(pb.Welcome(groups=[pb.Group(modules=["a"])])))]


@pytest.mark.parametrize("mode", ["dense", "lent"])
def test_the_worked_step_is_what_the_code_sends(mode: str) -> None:
    packers, dialogue, written = {"device": Packer(), "host": Packer()}, Dialogue("device"), []
    for sender, message in opening(mode) + worked_step(mode):
        (dialogue.sent if sender == "device" else dialogue.received)(message)
        written.append((sender, type(message.body).__name__, b"".join(packers[sender].frames(message))))
    assert step(mode) == written[2:]
    assert dialogue.state == "forward"


@pytest.mark.parametrize("mode", ["dense", "lent"])
def test_the_worked_step_is_what_the_code_reads(mode: str) -> None:
    assemblers = {"device": Assembler(1000), "host": Assembler(1000)}
    for sender, message in opening(mode):
        for frame in Packer().frames(message):
            assemblers[sender].add(frame)
    for (sender, _, data), (_, message) in zip(step(mode), worked_step(mode), strict=True):
        arrived = assemblers[sender].add(data)
        assert arrived is not None
        assert arrived.body == message.body
        assert all(torch.equal(decode(a), decode(b)) for a, b in zip(arrived.tensors, message.tensors, strict=True))


def test_the_gradients_of_the_worked_step_are_right() -> None:
    down_grad, up_grad = (grad.int().tolist() for grad in gradients())
    assert f"dL/dB = g^T u = {up_grad}, dL/dA = (g B)^T x = {down_grad}" in " ".join(PAGE.split())


def test_the_dialogue_table_is_that_of_the_code() -> None:
    assert {state: row[0] for state, row in table("state").items()} == TURNS
    assert list(table("state")) == list(TURNS)
    following = {name for row in table("state").values() for name in re.findall(r"`(\w+)`", row[2])} - {"want_input_gradient"}
    assert following == set(TURNS) - {"hello"}


def test_the_limits_are_those_of_the_code() -> None:
    limits = {name: value for name, (value,) in table("limit").items()}
    assert int(limits["bytes of a header"]) == frames.MAX_HEADER_BYTES
    assert int(limits["tensors of a message"]) == frames.MAX_TENSORS
    assert limits["dimensions of a tensor"] == f"1 to {frames.MAX_DIMENSIONS}"
    assert int(limits["one dimension"]) == frames.MAX_DIMENSION
    assert int(limits["payload of a frame, as sent"]) == frames.CHUNK_BYTES


def test_frame_fields_and_refusal_codes_are_those_of_the_code() -> None:
    proto = (ROOT / "src" / "atoll" / "wire" / "protocol.proto").read_text(encoding="utf-8")
    assert list(table("field")) == [field.name for field in pb.Frame.DESCRIPTOR.fields]
    assert all(f"  {row[0]} {name} = {number};" in proto for number, (name, row) in enumerate(table("field").items(), start=1))
    assert tuple(table("`Refusal.code`")) == REFUSAL_CODES


def test_every_field_of_hello_is_compared_or_said_not_to_be() -> None:
    section = PAGE.partition("| field of Hello |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", section)) >= {field.name for field in pb.Hello.DESCRIPTOR.fields} - {"atoll_version"}


def test_the_page_is_of_this_version() -> None:
    assert PAGE.startswith(f"# The split protocol, version {PROTOCOL}\n")


def test_the_page_is_short() -> None:
    assert PAGE.count("\n") <= LONGEST_LINES
