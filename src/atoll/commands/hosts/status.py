"""atoll status: what a host serves and how busy it is. Opens without torch."""

from __future__ import annotations

from pathlib import Path

from atoll.split.certificates import DeviceTls, HostAccess, open_channel
from atoll.split.transport import fetch_status

STATUS_SECONDS = 10.0


def host_access(address: str, ca: Path | None, cert: Path | None, key: Path | None, insecure: bool) -> HostAccess:
    """How to reach a host, from what a command line says."""
    return HostAccess(address, DeviceTls(ca, cert, key), insecure)


def status(host: HostAccess) -> dict[str, object]:
    """What a running host serves and how busy it is, with the names of protocol.proto; seconds, bytes and tokens as numbers.

    Raises: TransportError, HostLostError.
    """
    from google.protobuf.json_format import MessageToDict

    with open_channel(host.address, host.tls, insecure=host.insecure) as channel:
        reply = fetch_status(channel, STATUS_SECONDS)
    return MessageToDict(reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
