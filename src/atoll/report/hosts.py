"""What a host says of itself, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atoll.report.tables import Listing, plain_table
from atoll.units import counted, format_bytes, format_seconds, format_wait


def status_table(status: Mapping[str, Any]) -> Listing:
    """One row for each session; what the host is below."""
    kept = [int(session.get("cache_bytes", 0)) for session in status["open"]]
    rows = [
        (
            session["session"], session["tenant"] or "-", format_seconds(session["seconds"]),
            str(session["tokens"]), str(session["positions"]), format_seconds(session["compute_seconds"]),
            format_bytes(int(session["received_bytes"])), format_bytes(int(session["sent_bytes"])),
            *([format_bytes(num_bytes)] if any(kept) else []),
        )
        for session, num_bytes in zip(status["open"], kept, strict=True)
    ]  # fmt: skip
    notes = {
        "base": f"{counted(status['num_blocks'], 'block')} at {status['bits']} bits, {status['precision']}",
        "load": f"{status['sessions']} of {counted(status['max_sessions'], 'session')}, {float(status['tokens_per_second']):.1f} tokens/s",
        "memory": format_bytes(int(status["resident_bytes"])),
        "up": format_seconds(status["uptime_seconds"]),
    }
    if any(kept):
        most = format_bytes(int(status["max_cache_bytes"]))
        notes["kept"] = f"{format_bytes(int(status['cache_bytes']))} of {most} for keys and values of texts that devices generate"
    notes |= {f"limits of {one['tenant'] or 'all'}": text for one in status.get("tenants", ()) if (text := _limits(one))}
    head = ("session", "tenant", "since", "tokens", "positions", "compute", "received", "sent", *(["kept"] if any(kept) else []))
    return plain_table("host", head, rows, notes)


def _limits(tenant: Mapping[str, Any]) -> str:
    """What a tenant has used of what it may; empty where it has no limits."""
    said = []
    if tenant["max_sessions"]:
        said.append(f"{tenant['sessions']} of {counted(tenant['max_sessions'], 'session')}")
    if tenant["max_tokens_per_second"]:
        text = f"{float(tenant['tokens_left']):.0f} of {float(tenant['burst_tokens']):.0f} tokens at once"
        said.append(f"{text}, then {float(tenant['max_tokens_per_second']):g}/s; held back for {format_seconds(tenant['held_seconds'])}")
    if int(tenant["max_bytes"]):
        used, most = format_bytes(int(tenant["bytes"])), format_bytes(int(tenant["max_bytes"]))
        free = f"; all free again in {format_wait(tenant['free_seconds'])}" if tenant["free_seconds"] else ""
        if tenant.get("again_seconds"):
            free = f"; come again in {format_wait(tenant['again_seconds'])}"
        said.append(f"{used} used of {most} in {format_seconds(tenant['period_seconds'])}{free}")
    return "; ".join(said)
