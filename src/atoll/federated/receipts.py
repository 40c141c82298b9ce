"""What ties an answer to a question: the coordinator asks with a number for this run, round, phase and edge, and the edge repeats it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atoll.errors import UpdateRefusedError
from atoll.federated.figures import shown
from atoll.federated.flower import ConfigRecord, RecordDict

_ASK, _RECEIPT = "ask", "receipt"


@dataclass(frozen=True, slots=True)
class Ask:
    """One question to one edge."""

    run: str
    round: int
    phase: str
    edge: str

    @property
    def nonce(self) -> str:
        """The same whenever the same question is asked, so that runs can be repeated; another for every other one."""
        return hashlib.sha256(json.dumps([self.run, self.round, self.phase, self.edge]).encode()).hexdigest()

    def put(self, message: RecordDict) -> None:
        """Write the question into a message, under "ask"."""
        message[_ASK] = self._record()

    def check(self, reply: RecordDict, base_digest: str | None) -> None:
        """See that a reply answers this question, from the base with this digest; None: any base.

        Raises: UpdateRefusedError, which names what differs.
        """
        where, receipt = f"edge {self.edge}", reply.config_records.get(_RECEIPT)
        if receipt is None:
            raise UpdateRefusedError(
                "an update without a receipt", where=where, got=shown(list(reply)) if reply else "an empty answer",
                expected="the question repeated", do="run the same version of Atoll everywhere",
            )  # fmt: skip
        for key, expected in {**self._record(), "edge": self.edge}.items():
            if receipt.get(key) != expected:
                raise UpdateRefusedError(
                    "an answer to another question", where=where, got=f"{key} {shown(receipt.get(key))}", expected=f"{key} {expected!r}",
                    do="let every edge take part in one run at a time; an old answer that is sent again does not count",
                )  # fmt: skip
        if base_digest is not None and receipt.get("base", "") != base_digest:
            raise UpdateRefusedError(
                "an update for another base: wrong hash", where=where, got=f"base {shown(receipt.get('base'))}",
                expected=f"base {base_digest!r}", do="give every edge the same files of the base model",
            )  # fmt: skip

    def _record(self) -> ConfigRecord:
        # Run and phase are in the nonce: a message is no longer for a longer name.
        return ConfigRecord({"round": self.round, "nonce": self.nonce})


def put_receipt(reply: RecordDict, message: RecordDict, edge: str, base_digest: str) -> None:
    """Repeat a message's question in the reply, with who answers and from which base.

    Raises: UpdateRefusedError where nothing was asked.
    """
    if _ASK not in message.config_records:
        raise UpdateRefusedError(
            "a message asks for training without a question", where=f"edge {edge}", got=", ".join(message), expected='"ask"',
            do="run the same version of Atoll everywhere",
        )  # fmt: skip
    reply[_RECEIPT] = _filled({**message.config_records[_ASK], "edge": edge, "base": base_digest})


def _filled(values: Mapping[str, Any]) -> ConfigRecord:
    # Flower cannot count the bytes of an empty text.
    return ConfigRecord({key: value for key, value in values.items() if value != ""})
