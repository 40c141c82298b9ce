"""Everything Atoll takes from Flower, in one place: its public message API, and two internal names that in-process runs need."""

from __future__ import annotations

import logging

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy

# Internal in Flower 1.41: a Grid has to have a Run, and a Message asks for the identity of who makes it. tests/federated/test_rounds.py
# fails when a new version moves them.
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "Array", "ArrayRecord", "ClientApp", "ConfigRecord", "Context", "Error", "Grid", "Message", "MessageType", "MetricRecord",
    "RecordDict", "Result", "Run", "ServerApp", "Strategy", "assume_identity",
]  # fmt: skip

# Atoll's own events say what happens in a round; Flower's narration would stand between them on the terminal.
logging.getLogger("flwr").setLevel(logging.WARNING)


def assume_identity(run_id: int, node_id: int) -> None:
    """Act as this node of this run from here on: Flower's Message constructor asks the process who is speaking."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, 0
