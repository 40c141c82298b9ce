"""Whether a device and a host fit together: every field of Hello against what the host serves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from atoll.errors import HostLostError, HostRefusedError
from atoll.printable import printable
from atoll.wire import protocol_pb2 as pb

PROTOCOL: Final = 3
"""Version of the protocol that this code speaks."""
REFUSAL_CODES: Final = ("unfit", "busy", "frame", "dialogue", "failed")
"""Refusal.code: Hello does not fit; no room for a session; damaged bytes; a message not allowed; a fault of the host."""
TRANSIENT_CODES: Final = ("busy", "frame")
"""What another try may mend."""
_LIMITS: Final = {
    "sessions": "all of its sessions are in use (sessions)",
    "tenant_sessions": "all sessions that this tenant may have are in use (tenant_sessions)",
    "tenant_tokens": "this tenant has used up its tokens a second (tenant_tokens)",
    "tenant_bytes": "this tenant has moved as many bytes as it may (tenant_bytes)",
}
"""Of a busy host, by field of its refusal."""
_SHOWN: Final = 300
"""Of a value that the other side sent, so much is repeated to it or shown."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a host serves, but for the digest of the base, which takes a while to work out."""

    protocol: int
    atoll_version: str
    tokenizer_digest: str
    num_blocks: int
    """Of the whole base."""
    modules: Mapping[str, tuple[int, int]]
    """d_in and d_out of every module in its blocks, by full name."""
    codecs: Collection[str]
    wire_modes: Collection[str]
    precision: str
    kinds: Collection[str]
    """Of adapters."""
    max_tokens: int
    """Positions (rows * positions) of the largest micro-batch."""
    max_rank: int
    killed: Collection[str]
    """What it does with killed modules."""
    tokenizer: str = ""
    """Which it is, for people; empty: its digest says it."""


@dataclass(frozen=True, slots=True)
class _Misfit:
    field: str
    host_value: str
    device_value: str
    do: str


def check_hello(hello: pb.Hello, facts: HostFacts, base_digest: Callable[[], str]) -> pb.Refusal | None:
    """The first field that does not fit, with both values; None where all fit. Versions of Atoll may differ, of the protocol not.

    The digest of the base comes last, and `base_digest` is asked only where everything else fits: it may read a large part of the base.
    """
    for misfit in _misfits(hello, facts, base_digest):
        return pb.Refusal(
            code="unfit", field=misfit.field, host_value=misfit.host_value, device_value=_shown(misfit.device_value), do=misfit.do,
        )  # fmt: skip
    return None


def reason_of(refusal: pb.Refusal) -> dict[str, object]:
    """For the host's own log: code, field, and in words what was asked and what is. Digests, which tell files apart, are not in it."""
    asked, limit = (("another one", "the host's") if "digest" in refusal.field else (refusal.device_value, refusal.host_value))
    said = [f"{name} {_shown(value)}" for name, value in (("asked:", asked), ("here:", limit)) if value]
    return {"code": refusal.code, "field": refusal.field, "why": "; ".join(said) or refusal.do or refusal.code}


def refusal_error(refusal: pb.Refusal, host: str, *, opened: bool = False) -> HostRefusedError | HostLostError:
    """What the device's user sees of a refusal by the host at this address; HostLostError where another try may mend it.

    `opened`: whether there was a session, which the refusal ended.
    """
    fits_not, field = refusal.code == "unfit", _shown(refusal.field or refusal.code)
    how = "ended the session" if opened else "takes no session now" if refusal.code == "busy" else "refused"
    what = f"the host refused: {field} does not fit" if fits_not else f"the host {how}: {_LIMITS.get(field, field)}"
    leaf = HostLostError if refusal.code in TRANSIENT_CODES else HostRefusedError
    got, expected = map(_short, (refusal.device_value or refusal.code, refusal.host_value))
    do = _shown(refusal.do)
    error = leaf(what, where=host, got=got, expected=expected, do=do)
    if isinstance(error, HostLostError):
        error.retry_seconds = _sane_seconds(refusal.retry_seconds)
    return error


def wait_error(wait: pb.Wait, host: str) -> HostLostError:
    """What the device's user sees where the host holds an exchange back for longer than the device waits."""
    got, expected, do = map(_shown, (wait.device_value, wait.host_value, wait.do))
    held = _LIMITS.get(wait.field, _shown(wait.field))
    error = HostLostError(f"the host holds this device back: {held}", where=host, got=got, expected=expected, do=do)
    error.retry_seconds = _sane_seconds(wait.seconds)
    return error


def block_of(module: str) -> int | None:
    """Number of the block that a module is in: the first number in its name, "model.layers.3.mlp.experts.0.w1" -> 3."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def _sane_seconds(seconds: float) -> float:
    """A time that the other side names; 0 for what is none."""
    return seconds if seconds > 0 else 0.0  # Nor is NaN.


def _short(text: str) -> str:
    """What the other side wrote; of a digest so much as tells two apart."""
    return f"sha256 {text[:12]}..." if re.fullmatch(r"[0-9a-f]{64}", text) else _shown(text)


def _shown(text: str) -> str:
    """What the other side wrote, on one line, cut off where it is very long."""
    return printable(text[:_SHOWN])


def _misfits(hello: pb.Hello, facts: HostFacts, base_digest: Callable[[], str]) -> Iterator[_Misfit]:
    if hello.protocol != facts.protocol:
        yield _Misfit("protocol", str(facts.protocol), str(hello.protocol), "install the same version of Atoll on both sides")
    if hello.tokenizer_digest != facts.tokenizer_digest:
        host = facts.tokenizer or facts.tokenizer_digest
        yield _Misfit("tokenizer_digest", host, hello.tokenizer_digest, "use the tokenizer of the host's base")
    if hello.precision != facts.precision:
        yield _Misfit("precision", facts.precision, hello.precision, f'set model.precision = "{facts.precision}"')
    if hello.cut_front + hello.cut_back >= facts.num_blocks:
        device = f"{hello.cut_front} front, {hello.cut_back} back"
        yield _Misfit("cut", f"{facts.num_blocks} blocks", device, "lower model.cut, so that the host has at least one block")
    for name, choices, device, key in (
        ("adapter_kind", facts.kinds, hello.adapter_kind, "adapter.kind"),
        ("wire_mode", facts.wire_modes, hello.wire_mode, "wire.mode"),
        ("codec", facts.codecs, hello.codec, "wire.codec"),
        *([("adapter_codec", facts.codecs, hello.adapter_codec, "wire.adapters")] if hello.wire_mode == "lent" else []),
    ):
        if device not in choices:
            yield _Misfit(name, ", ".join(choices), device, f"choose one of the host's for {key}")
    if not 1 <= hello.max_tokens <= facts.max_tokens:
        do = "lower train.batch_size, evaluate.batch_size or data.max_length, or ask who runs the host for more (its --max-tokens)"
        yield _Misfit("max_tokens", f"1 to {facts.max_tokens}", str(hello.max_tokens), do)
    if not 0 <= hello.dropout < 1:
        yield _Misfit("dropout", "0 or more, and less than 1", str(hello.dropout), "use the same version of Atoll")
    yield from _module_misfits(hello, facts)
    digest = base_digest()
    if hello.base_digest != digest:
        yield _Misfit("base_digest", digest, hello.base_digest, "use the base that the host serves, or another host")


def _module_misfits(hello: pb.Hello, facts: HostFacts) -> Iterator[_Misfit]:
    seen: set[str] = set()
    first, last = hello.cut_front, facts.num_blocks - hello.cut_back - 1
    for module in hello.modules:
        block = block_of(module.name)
        if module.name not in facts.modules:
            yield _Misfit("modules", f"{len(facts.modules)} modules, not this one", module.name, "use the base that the host serves")
        elif block is None or not first <= block <= last:
            yield _Misfit("modules", f"blocks {first} to {last}", module.name, "send modules of the middle only")
        elif module.name in seen:
            yield _Misfit("modules", "each module once", f"{module.name} twice", "send each module once")
        elif not 1 <= module.rank <= min(facts.max_rank, max(facts.modules[module.name])):
            # The larger side, as a gate has one output, and may have an adapter of the rank that all have.
            most = min(facts.max_rank, max(facts.modules[module.name]))
            yield _Misfit("rank", f"1 to {most}", f"{module.rank} for {module.name}", "lower adapter.rank")
        elif module.killed not in ("", *facts.killed) or (module.killed == "merge" and hello.adapter_kind != "lora"):
            choices = [how for how in facts.killed if how != "merge" or hello.adapter_kind == "lora"]
            do = 'write killed = "offload" in [select]; a host merges only lora adapters, into a base in full precision, if it has --merge'
            yield _Misfit("killed", " or ".join(choices), f"{module.killed} for {module.name}", do)
        elif (module.killed or hello.wire_mode == "lent") and not (math.isfinite(module.scaling) and module.scaling):
            yield _Misfit("scaling", "a finite number other than 0", f"{module.scaling} for {module.name}", "use the same version of Atoll")
        seen.add(module.name)
