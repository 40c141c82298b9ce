"""Frames and packed records come back bit for bit; what Atoll did not write is refused."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import ProtocolError
from atoll.federated.flower import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from atoll.federated.payload import to_array, to_tensor
from atoll.fleet.links.frames import Frame, packed, page_of, unpacked

FLOATS, WHOLE, TEXT = st.floats(allow_nan=False), st.integers(-(2**63), 2**63 - 1), st.text(max_size=8)
METRICS = st.one_of(FLOATS, WHOLE, st.lists(FLOATS, max_size=3), st.lists(WHOLE, max_size=3))
CONFIGS = st.one_of(FLOATS, WHOLE, TEXT, st.booleans(), st.lists(TEXT, max_size=3), st.lists(st.booleans(), max_size=3))
TENSORS = st.builds(
    lambda shape, kind: (torch.arange(math.prod(shape)) * 0.37 - 1).to(kind).view(shape),
    st.lists(st.integers(0, 3), min_size=1, max_size=3), st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
RAW = st.builds(lambda data: Array("uint8", (len(data),), "any", data), st.binary(max_size=20))
RECORDS = st.one_of(
    st.dictionaries(TEXT, METRICS, max_size=3).map(MetricRecord),
    st.dictionaries(TEXT, CONFIGS, max_size=3).map(ConfigRecord),
    st.dictionaries(TEXT, st.one_of(TENSORS.map(to_array), RAW), max_size=3).map(ArrayRecord),
)
CONTENTS = st.dictionaries(TEXT, RECORDS, max_size=4).map(RecordDict)
FRAMES = st.builds(
    Frame, st.integers(0, 2**40), st.integers(0, 2**64 - 1), TEXT, TEXT, CONTENTS, st.one_of(st.none(), TEXT), st.booleans(),
    st.one_of(st.none(), st.integers(0, 2**40)),
)  # fmt: skip


def bits(value: object) -> object:
    """With types, and the sign of zero."""
    if isinstance(value, list):
        return [bits(one) for one in value]
    return (type(value), struct.pack("<d", value) if isinstance(value, float) else value)


def values(content: RecordDict) -> list[object]:
    found: list[object] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            found.append((name, [(key, one.dtype, tuple(one.shape), one.stype, one.data) for key, one in record.items()]))
        else:
            found.append((name, type(record), [(key, bits(value)) for key, value in record.items()]))
    return found


@settings(deadline=None, max_examples=80)
@given(FRAMES)
def test_a_frame_comes_back(frame: Frame) -> None:
    again = Frame.from_bytes(frame.to_bytes())
    assert values(again.content) == values(frame.content)
    for key in ("number", "node", "kind", "group", "problem", "is_lost", "most_bytes"):
        assert getattr(again, key) == getattr(frame, key)


@settings(deadline=None, max_examples=80)
@given(CONTENTS)
def test_what_is_packed_is_one_array_and_comes_back(content: RecordDict) -> None:
    record = packed(content)
    assert len(record) == 1
    assert sum(len(arrays) for arrays in record.array_records.values()) == 1
    assert values(unpacked(record)) == values(content)


def test_no_number_is_not_lost() -> None:
    content = RecordDict({"metrics": MetricRecord({"nan": math.nan, "inf": -math.inf})})
    again = unpacked(packed(content)).metric_records["metrics"]
    assert math.isnan(again["nan"])  # type: ignore[arg-type]
    assert again["inf"] == -math.inf


def test_weights_keep_every_bit() -> None:
    tensors = [torch.tensor([0x7F80, 1, -1], dtype=torch.int16).view(torch.bfloat16), torch.randn(2, 3), torch.empty(0, 4)]
    content = RecordDict({"a": ArrayRecord({str(number): to_array(tensor) for number, tensor in enumerate(tensors)})})
    for number, tensor in enumerate(tensors):
        again = to_tensor(unpacked(packed(content)).array_records["a"][str(number)])
        assert (again.shape, again.dtype) == (tensor.shape, tensor.dtype)
        assert to_array(again).data == to_array(tensor).data


def test_an_answer_has_the_number_of_its_question_and_none_of_its_content() -> None:
    question = Frame(7, 3, "train", "2", RecordDict({"a": ConfigRecord({"b": 1})}))
    for answer in (question.answered(), question.answered(problem="full"), question.answered(problem="away", is_lost=True)):
        assert (answer.number, answer.node, answer.kind, answer.group, dict(answer.content)) == (7, 3, "train", "2", {})
    assert (question.answered(problem="away", is_lost=True).problem, question.answered().problem) == ("away", None)
    assert question.answered(problem="away", is_lost=True).is_lost
    assert not question.answered(problem="full").is_lost


DEEP, LONG = b"[" * 100_000, b'{"a": {"arrays": {"x": ["float32", [1], "raw", %d]}}}\n'
DAMAGED = (
    DEEP, b'{"a": ' * 100_000, b'{"a": {"config": {"b": ' + DEEP + b"\n", b"9" * 5000,
    LONG % 2**63, LONG % 10**400, LONG % 2**62, LONG % -1,
    b'{"a": {"arrays": {"x": ["float32", [1], "raw", true]}}}\n1234', b'{"a": {"arrays": {"x": ["float32", ["a"], "raw", 0]}}}\n',
    b"", b"[]\n", b"\xff\xfe\n", b'{"a": 5}\n', b'{"a": {}}\n', b'{"a": {"config": {"b": null}}}\n', b'{"a": {"arrays": {"b": 1}}}\n',
)  # fmt: skip
ARRAYS = ArrayRecord({"x": Array("uint8", (1,), "x", b"x")})


@pytest.mark.parametrize("record", [
    RecordDict(), RecordDict({"adapter": ArrayRecord({})}), RecordDict({"atoll.records": ConfigRecord({"a": 1})}),
    RecordDict({"atoll.records": ARRAYS}),
    *(RecordDict({"atoll.records": ArrayRecord({"atoll.records": Array("uint8", (len(data),), "x", data)})}) for data in DAMAGED),
])  # fmt: skip
def test_what_atoll_did_not_write_is_refused(record: RecordDict) -> None:
    with pytest.raises(ProtocolError, match="did not write"):
        unpacked(record)


def test_what_is_too_long_is_not_read() -> None:
    content = RecordDict({"a": ArrayRecord({"x": Array("uint8", (1000,), "x", bytes(1000))})})
    record = packed(content)
    size = len(record.array_records["atoll.records"]["atoll.records"].data)
    assert values(unpacked(record, size)) == values(content)
    with pytest.raises(ProtocolError, match="longer than it may be") as caught:
        unpacked(record, size - 1)
    assert (caught.value.got, caught.value.expected) == (f"{size} bytes", f"at most {size - 1}")


def test_what_lies_beside_the_records_is_refused() -> None:
    array = packed(RecordDict()).array_records["atoll.records"]["atoll.records"]
    for record in (
        RecordDict({"atoll.records": ArrayRecord({"atoll.records": array, "junk": array})}),
        RecordDict({"atoll.records": ArrayRecord({"atoll.records": array}), "junk": ArrayRecord({"x": array})}),
    ):
        with pytest.raises(ProtocolError, match="did not write"):
            unpacked(record)


PAGE = "error A403: other sizes\n  where     edge north\n            and more"


@pytest.mark.parametrize(("text", "page"), [
    (PAGE, PAGE),
    ("away\nerror X999: forged\r\nround 9: done", "away\n  error X999: forged\n  round 9: done"), ("", ""),
    ("\x1b[2J\x07\x9b1A", "\\x1b[2J\\x07\\x9b1A"), ("a\u2028b\x0bc", "a\n  b\n  c"),
])  # fmt: skip
def test_a_page_of_an_edge_cannot_look_like_anything_else(text: str, page: str) -> None:
    assert page_of(text) == page


@settings(deadline=None)
@given(st.text())
def test_pages_of_edges_are_bounded(text: str) -> None:
    page = page_of(text * 3000)
    assert len(page) < 50_000
    assert all(line.isprintable() for line in page.split("\n"))
    assert all(line.startswith("  ") for line in page.split("\n")[1:])


@pytest.mark.parametrize("data", [
    b"", b"\n", b"{}\n{}\n", b"[]\n{}\n", b"5\n{}\n", b"\xff\n{}\n", DEEP, b'{"number": ' + DEEP + b"\n{}\n",
])  # fmt: skip
def test_bytes_that_are_no_frame_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="did not write"):
        Frame.from_bytes(data)
