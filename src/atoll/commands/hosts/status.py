"""atoll status: what a host serves and how busy it is. Opens without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from atoll.split.certificates import DeviceTls, HostAccess, open_channel
from atoll.split.transport import fetch_status

STATUS_SECONDS = 10.0


def host_access(
    address: str, ca: Path | None, cert: Path | None, key: Path | None, insecure: bool, tell: Callable[[str], None]
) -> HostAccess:  # fmt: skip
    """How to reach a host, from what a command line says; `tell` shows a line to the user."""
    return HostAccess(address, DeviceTls(ca, cert, key), insecure, tell)


def status(host: HostAccess) -> dict[str, object]:
    """What a running host serves and how busy it is, with the names of protocol.proto; seconds, bytes and tokens as numbers.

    Raises: TransportError, HostLostError.
    """
    from google.protobuf.json_format import MessageToDict

    with open_channel(host.address, host.tls, insecure=host.insecure) as channel:
        reply = fetch_status(channel, STATUS_SECONDS)
    told = MessageToDict(reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return _with_numbers(told, reply)


def _with_numbers(told: dict[str, object], message: Message) -> dict[str, object]:
    """The same, with numbers of 64 bits as numbers: JSON of protobuf has them as text, for programs that only know floats."""
    for field in message.DESCRIPTOR.fields:
        value = told.get(field.name)
        if field.message_type is not None and isinstance(value, list):
            parts = zip(value, getattr(message, field.name), strict=True)
            told[field.name] = [_with_numbers(one, part) for one, part in parts]
        elif field.cpp_type in (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64):
            told[field.name] = [int(one) for one in value] if isinstance(value, list) else int(str(value))
    return told
