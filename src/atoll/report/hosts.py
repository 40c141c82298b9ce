"""What a host says of itself, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atoll.report.tables import Listing, plain_table
from atoll.units import format_bytes, format_seconds


def status_table(status: Mapping[str, Any]) -> Listing:
    """One row for each session; what the host is below."""
    rows = [
        (
            session["session"], session["tenant"] or "-", format_seconds(session["seconds"]),
            str(session["tokens"]), str(session["positions"]), format_seconds(session["compute_seconds"]),
            format_bytes(int(session["received_bytes"])), format_bytes(int(session["sent_bytes"])),
        )
        for session in status["open"]
    ]  # fmt: skip
    notes = {
        "base": f"{status['num_blocks']} blocks at {status['bits']} bits, {status['precision']}",
        "load": f"{status['sessions']} of {status['max_sessions']} sessions, {float(status['tokens_per_second']):.1f} tokens/s",
        "memory": format_bytes(int(status["resident_bytes"])),
        "up": format_seconds(status["uptime_seconds"]),
    }
    return plain_table("host", ("session", "tenant", "since", "tokens", "positions", "compute", "received", "sent"), rows, notes)
