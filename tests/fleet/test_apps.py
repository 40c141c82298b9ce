"""What Flower's own short-lived processes do in a fleet that is run with Flower's commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from atoll.federated.flower import ConfigRecord, Context, Message, RecordDict, assume_identity
from atoll.federated.grid import numbered
from atoll.fleet import join
from atoll.fleet.apps import client
from atoll.fleet.links.frames import PROBLEM, Frame, packed, unpacked


@pytest.mark.parametrize("kind", ["train", "query", "query.capabilities"])
def test_the_app_is_the_edge_whose_folder_its_node_names(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def once(folder: Path, question: bytes) -> bytes:
        frame = Frame.from_bytes(question)
        assert (folder, frame.node, frame.kind, frame.group) == (tmp_path, 7, kind, "3")
        return frame.answered(problem="error once").to_bytes()

    assume_identity(1, 0)
    monkeypatch.setattr(join, "answer_once", once)
    message = numbered(Message(packed(RecordDict()), 7, kind, group_id="3"), "flower-1")
    reply = client(message, Context(1, 7, {"folder": str(tmp_path)}, RecordDict(), {}))
    assert unpacked(reply.content).config_records[PROBLEM] == ConfigRecord({"page": "error once"})
    assert reply.metadata.reply_to_message_id == "flower-1"
