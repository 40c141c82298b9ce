"""The two Flower apps of a fleet whose SuperLink and SuperNodes somebody runs with Flower's own commands. `atoll` itself starts neither.

The ServerApp is the coordinator. The ClientApp is the edge whose folder its node names, for this one message.
"""

from __future__ import annotations

from pathlib import Path

from atoll.federated.flower import ClientApp, Context, Grid, Message, ServerApp
from atoll.fleet.links.node import answered

server = ServerApp()
client = ClientApp()


@server.main()
def coordinate(grid: Grid, context: Context) -> None:
    """Train, or go on with a run, as the app's settings say."""
    from atoll.fleet.train import train_in_app  # Loads torch.

    settings = context.run_config
    train_in_app(grid, Path(str(settings["config"])), Path(str(settings["out"])), resumes=bool(settings["resume"]))


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
    def once(question: bytes) -> bytes:
        from atoll.fleet.join import answer_once  # Loads torch and the base, for every message.

        return answer_once(Path(str(context.node_config["folder"])), question)

    return answered(message, once)
