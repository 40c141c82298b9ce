"""What of SuperLink is open to edges, and how much of it one of them may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

READY: Final = "the fleet's front is open"
"""What its process says once it listens."""
_WORDS, _OBJECT = 1 << 20, 8 << 20
PATHS: Final[Mapping[str, int]] = {
    "/v1/fleet/activate-node": _WORDS, "/v1/fleet/deactivate-node": _WORDS, "/v1/fleet/send-node-heartbeat": _WORDS,
    "/v1/fleet/pull-messages": _WORDS, "/v1/fleet/push-messages": _WORDS, "/v1/fleet/pull-object": _WORDS,
    "/v1/fleet/push-object": _OBJECT, "/v1/fleet/confirm-message-received": _WORDS,
}  # fmt: skip
"""The largest request to each, in bytes. Flower cuts arrays into objects of 5 MiB. Of the Fleet API, register-node and unregister-node are
not open, as keys are registered by the coordinator, nor get-run and get-fab, as no edge runs an app."""
HEADERS: Final = ("content-type", "accept", "flwr-public-key", "flwr-timestamp", "flwr-signature")
"""What of a request's head is passed on."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the front."""

    handshakes: int = 256
    """Connections that have shown no certificate yet; with one more, the oldest of them is closed."""
    handshake_seconds: float = 10.0
    head_seconds: float = 10.0
    """From the first byte of a request, or of a new connection, to the end of its head."""
    idle_seconds: float = 75.0
    """Between two requests, and between two pieces of a body."""
    request_seconds: float = 900.0
    """For a whole request and its answer: 5 MiB at 50 kbit/s."""
    head_bytes: int = 16 << 10
    edge_connections: int = 16
    """Of one name."""
    edge_requests: int = 4
    """At once, of one name."""
