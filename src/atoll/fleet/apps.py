"""The two Flower apps of a fleet. Flower starts a new process for every message, so that they hold nothing and load nothing heavy.

The ServerApp hands messages between SuperLink and the coordinator, the ClientApp between SuperNode and the edge's resident process; where
no resident is named, the ClientApp is the edge itself, for this one message.
"""

from __future__ import annotations

from pathlib import Path

from atoll.errors import ProtocolError
from atoll.federated.flower import ClientApp, ConfigRecord, Context, Grid, Message, RecordDict, ServerApp
from atoll.fleet.links.carrier import carry
from atoll.fleet.links.frames import PROBLEM, Frame, packed, unpacked
from atoll.fleet.links.sockets import RELAY, RESIDENT, LocalClient

server = ServerApp()
client = ClientApp()


@server.main()
def relay(grid: Grid, context: Context) -> None:
    """Carry messages until the coordinator has no more; where none is named, be the coordinator."""
    settings = context.run_config
    if not settings["relay"]:
        from atoll.fleet.train import train_in_app  # Loads torch, which a carrier does not need.

        train_in_app(grid, Path(str(settings["config"])), Path(str(settings["out"])), resumes=bool(settings["resume"]))
        return
    with LocalClient(str(settings["relay"]), RELAY) as coordinator:
        carry(grid, coordinator, str(settings["epoch"]).encode())


@client.train()
def train(message: Message, context: Context) -> Message:
    """Have the edge train for a round."""
    return _of_the_edge(message, context)


@client.query()
def query(message: Message, context: Context) -> Message:
    """Have the edge score modules."""
    return _of_the_edge(message, context)


@client.query("capabilities")
def capabilities(message: Message, context: Context) -> Message:
    """Have the edge say what it has."""
    return _of_the_edge(message, context)


def _of_the_edge(message: Message, context: Context) -> Message:
    metadata = message.metadata
    try:
        content = unpacked(message.content)
    except ProtocolError as problem:
        return Message(packed(_told(problem.page())), reply_to=message)
    question = Frame(0, metadata.dst_node_id, metadata.message_type, metadata.group_id, content).to_bytes()
    if "resident" in context.node_config:
        with LocalClient(str(context.node_config["resident"]), RESIDENT) as resident:
            answer = Frame.from_bytes(resident.ask("Answer", question))
    else:
        from atoll.fleet.join import answer_once  # Loads torch and the base, as every message does without a resident.

        answer = Frame.from_bytes(answer_once(Path(str(context.node_config["folder"])), question))
    return Message(packed(answer.content if answer.problem is None else _told(answer.problem)), reply_to=message)


def _told(page: str) -> RecordDict:
    return RecordDict({PROBLEM: ConfigRecord({"page": page})})
