"""The protocol file: what is generated from it, what it says of every field, and what the room that speaks it may import."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
from pathlib import Path

import pytest

from atoll.wire import protocol_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
ROOM = ROOT / "src" / "atoll" / "wire"
PROTO = (ROOM / "protocol.proto").read_text(encoding="utf-8")
FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "socket", "grpc", "transformers", "peft", "asyncio"}


def test_generated_files_are_those_that_the_protocol_file_gives(tmp_path: Path) -> None:
    """Mend with: python scripts/wire_protocol.py."""
    spec = importlib.util.spec_from_file_location("wire_protocol", ROOT / "scripts" / "wire_protocol.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.generate(tmp_path)
    for name in script.GENERATED:
        assert (tmp_path / name).read_text(encoding="utf-8") == (ROOT / "src" / name).read_text(encoding="utf-8")


def test_every_field_says_who_sets_it_and_what_its_absence_means() -> None:
    lines = [line.strip() for line in PROTO.splitlines()]
    fields = [number for number, line in enumerate(lines) if re.match(r"(?:repeated \w+|[a-z0-9]+) \w+ = \d+;", line)]
    of_oneof = {field.name for field in pb.Message.DESCRIPTOR.oneofs_by_name["body"].fields}
    named = {descriptor.name: descriptor.fields for descriptor in pb.DESCRIPTOR.message_types_by_name.values()}
    assert len(fields) == sum(map(len, named.values())) - len(of_oneof)
    for number in fields:
        comment = lines[number - 1]
        assert comment.startswith("// "), lines[number]
        assert "Set by the " in comment, lines[number]
        assert "Absent: " in comment or "Absent, " in comment, lines[number]


def test_every_message_says_what_it_is() -> None:
    lines = PROTO.splitlines()
    assert not [line for before, line in itertools.pairwise(lines) if line.startswith("message ") and not before.startswith("// ")]


@pytest.mark.parametrize("file", sorted(ROOM.glob("*.py")), ids=lambda file: file.name)
def test_the_room_neither_unpickles_nor_opens_connections(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imports & FORBIDDEN
    loads = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("load", "loads", "eval")]
    assert not loads


def test_the_service_is_the_one_that_was_agreed() -> None:
    service = pb.DESCRIPTOR.services_by_name["Split"]
    assert service.full_name == "atoll.split.v1.Split"
    types = {method.name: (method.input_type.name, method.output_type.name) for method in service.methods}
    assert types == {"Train": ("Frame", "Frame"), "Part": ("PartRequest", "Frame"), "Status": ("StatusRequest", "StatusReply")}
