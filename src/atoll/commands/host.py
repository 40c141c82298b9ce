"""atoll host: serve a frozen base to devices, whose data and adapters stay with them."""

from __future__ import annotations

import logging
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from atoll.base.load import Base, DeviceMap, load_base
from atoll.base.quantize import Bits
from atoll.config.schema import PRECISION_BITS
from atoll.errors import BadValueError, CommandLineError
from atoll.heap import share_one_heap
from atoll.jobs.split import serve, start_host
from atoll.parsed import parse_json
from atoll.printable import printable
from atoll.registry.plugins import load_plugin
from atoll.split.authority.revocation import Revoked
from atoll.split.certificates import HostTls, make_certificates, server_credentials
from atoll.split.cut import Cut
from atoll.split.host.audit import Audit
from atoll.split.host.limits.file import read_tenants
from atoll.split.host.limits.rules import BYTES_EXAMPLE, parse_byte_limit
from atoll.split.host.server import Host
from atoll.split.host.tenants import HostLimits
from atoll.threads import suited_threads
from atoll.units import parse_bytes

_BITS: Mapping[int, Bits] = {4: 4, 8: 8}


@dataclass(frozen=True, slots=True)
class HostSettings:
    """What `atoll host` is told."""

    model: str
    listen: str
    quantize: int = 16
    """4 and 8 quantize the base; 16 keeps it as `precision` says."""
    precision: str = "fp32"
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    crl: Path | None = None
    """Certificates by `client_ca` that are believed no more; read again when the file changes."""
    insecure: bool = False
    make_certificates: Path | None = None
    tenants: Sequence[str] = ()
    metrics: str | None = None
    """HOST:PORT for Prometheus."""
    max_sessions: int = 16
    max_tokens: int = 16_384
    idle_seconds: float = 600.0
    merges: bool = False
    """Whether devices may have killed modules merged: a copy of a weight for each of them, in every session."""
    max_tenant_sessions: int | None = None
    """Of devices whose certificates have the same name; without certificates all are one tenant. None: as many as of all together."""
    exchange_seconds: float = 3600.0
    recomputes: bool = False
    """Whether a session with lent adapters keeps no activations while its device computes, and makes the forward pass twice."""
    batches: bool = False
    """Whether lent micro-batches that wait go through the base together; with `recomputes`."""
    silence_seconds: float = 14_400.0
    """How long a session may wait between its exchanges, all told."""
    tenant_tokens_per_second: float | None = None
    """Padding included, of devices whose certificates have the same name; None: as many as come."""
    tenant_bytes: str | None = None
    """SIZE/hour or SIZE/day, both directions together, of such devices."""
    tenant_limits: Path | None = None
    """A TOML file with limits of single tenants."""
    cache: str = "1 GB"
    """SIZE of keys and values that generations go on from, for all sessions together; 0: none are kept."""
    device_map: str | None = None
    """For a base that is larger than one accelerator: "auto", or a JSON file that gives each module its place."""
    max_part: str | None = None
    """FRONT,BACK: blocks that a tenant may fetch, over all its calls. None: what one cut needs, of at most half of the blocks."""
    audit: Path | None = None
    """Who asked for what, as JSON lines that are only ever added to."""
    metrics_tenants: bool = False
    """Whether the metrics name tenants."""
    codecs: Sequence[str] = ()
    """That devices may ask for beside those that ship; "module:object" is looked for in the current folder, then in what is installed."""


def host(settings: HostSettings, on_ready: Callable[[str], None], stop: threading.Event | None = None) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, or until `stop` is set; `on_ready` is told lines for people.

    Raises: TransportError for an address or certificates that are not safe or not usable; PartError for a codec that cannot be loaded; what
    loading the base raises.
    """
    stop = stop or stopped_by_signals()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    allow_open_files()
    if settings.metrics_tenants and settings.metrics is None:
        raise CommandLineError(
            "--metrics-tenants goes with --metrics", where="atoll host", got="--metrics-tenants alone", expected="both", do="add --metrics"
        )
    limits = _limits(settings)
    _check_named(settings)
    for codec in settings.codecs:
        load_plugin("codec", codec, Path())
    tls = _certificates(settings, on_ready)
    # Before the base, which may take minutes to load.
    credentials = server_credentials(settings.listen, tls, insecure=settings.insecure)
    revoked = _revoked(tls)
    audit = Audit(settings.audit)
    share_one_heap()
    base = _base(settings)
    bits = settings.quantize if settings.quantize < 16 else PRECISION_BITS[settings.precision]
    served = serve(base, settings.model, settings.precision, bits, limits, settings.codecs)
    for tenant, own in limits.tenants.items():
        on_ready(f"limits of {printable(tenant)}: {own.to_text()}")
    if limits.tenants:
        on_ready(f"limits of other tenants: {limits.usual.to_text()}")
    with suited_threads(base.model.config.get_text_config().hidden_size):
        running = start_host(served, limits, settings.listen, credentials, audit, revoked)
        _serve(running, settings, bits, tls, on_ready, stop)


def _serve(running: Host, settings: HostSettings, bits: int, tls: HostTls, on_ready: Callable[[str], None], stop: threading.Event) -> None:
    try:
        if settings.metrics is not None:
            from atoll.split.host.metrics import serve_metrics

            on_ready(f"metrics: http://{serve_metrics(running, settings.metrics, tenants=settings.metrics_tenants)}/metrics")
        where = f"{settings.listen.rpartition(':')[0]}:{running.port}"
        secured = "no TLS" if tls.cert is None else "TLS, with device certificates" if tls.client_ca else "TLS"
        on_ready(f"serving {settings.model} at {bits} bits on {where} ({secured}); stop with Ctrl-C")
        stop.wait()
    finally:
        running.stop()


def allow_open_files() -> None:
    """As many as the system lets this process have: a connection is one, and the usual 1,024 are soon used up."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _limits(settings: HostSettings) -> HostLimits:
    try:
        tenant_bytes = None if settings.tenant_bytes is None else parse_byte_limit(settings.tenant_bytes)
    except ValueError:
        raise CommandLineError(
            "--max-tenant-bytes is a size in a period", where="atoll host", got=settings.tenant_bytes or "nothing", expected=BYTES_EXAMPLE,
            do="write SIZE/hour or SIZE/day",
        ) from None  # fmt: skip
    limits = HostLimits(
        settings.max_sessions, settings.max_tokens, settings.idle_seconds, settings.merges, settings.max_tenant_sessions,
        settings.exchange_seconds, settings.recomputes, settings.batches, _max_part(settings.max_part), settings.tenant_tokens_per_second,
        tenant_bytes, settings.silence_seconds, _cache_bytes(settings.cache),
    )  # fmt: skip
    return limits if settings.tenant_limits is None else replace(limits, tenants=read_tenants(settings.tenant_limits, limits.usual))


def _check_named(settings: HostSettings) -> None:
    """Whether certificates name the tenants that limits are for; what is wrong in a file of limits was told before."""
    of_tenants = {
        "--max-tenant-sessions": settings.max_tenant_sessions, "--max-tenant-rate": settings.tenant_tokens_per_second,
        "--max-tenant-bytes": settings.tenant_bytes, "--tenant-limits": settings.tenant_limits,
    }  # fmt: skip
    given = [option for option, value in of_tenants.items() if value is not None]
    if given and settings.client_ca is None and not settings.tenants:
        raise CommandLineError(
            f"{given[0]} needs certificates that name the devices", where="atoll host", got="no certificates of devices",
            expected="--client-ca, or --make-certificates with --tenant",
            do="add them, or use --max-sessions" if given == ["--max-tenant-sessions"] else "add them",
        )  # fmt: skip


def _cache_bytes(given: str) -> int:
    try:
        return 0 if given.strip() == "0" else parse_bytes(given)
    except ValueError as problem:
        raise CommandLineError(
            "--cache is a size", where="atoll host", got=str(problem), expected="a size such as '1 GB', or 0 for none",
            do="write how much memory keys and values of all devices together may have",
        ) from None  # fmt: skip


def _max_part(given: str | None) -> Cut | None:
    if given is None:
        return None
    match = re.fullmatch(r"(\d{1,9}),(\d{1,9})", given, flags=re.ASCII)
    if match is None:
        raise CommandLineError(
            "--max-part is two numbers of blocks", where="atoll host", got=given, expected="FRONT,BACK, such as 1,0",
            do="write the cut that devices use, [model] cut of their run.toml",
        )  # fmt: skip
    return Cut(int(match[1]), int(match[2]))


def _base(settings: HostSettings) -> Base:
    if settings.merges and settings.device_map is not None:
        raise CommandLineError(
            "--merge copies weights, which a device map may keep elsewhere", where="atoll host", got="--merge and --device-map",
            expected="one of them", do="leave one away",
        )  # fmt: skip
    where = None if settings.device_map is None else _device_map(settings.device_map)
    return load_base(settings.model, precision=settings.precision, bits=_BITS.get(settings.quantize), device_map=where)


def _device_map(given: str) -> DeviceMap:
    if given == "auto":
        return "auto"
    try:
        value = parse_json(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise _no_device_map(given, str(problem)) from None
    if not isinstance(value, dict) or not value or not all(type(place) in (int, str) for place in value.values()):
        raise _no_device_map(given, "something else")
    return value


def _no_device_map(given: str, got: str) -> BadValueError:
    return BadValueError(
        "the device map cannot be read", where=given, got=got, expected='"auto", or a JSON file such as {"model.embed_tokens": 0, ...}',
        do="mend the file; accelerate.infer_auto_device_map makes one to start from",
    )  # fmt: skip


def _certificates(settings: HostSettings, on_ready: Callable[[str], None]) -> HostTls:
    if settings.make_certificates is None:
        return HostTls(settings.tls_cert, settings.tls_key, settings.client_ca, settings.crl)
    made = make_certificates(settings.make_certificates, [settings.listen.rpartition(":")[0]], settings.tenants)
    on_ready(f"wrote a development CA and certificates to {settings.make_certificates}; a device needs ca.pem and its own pair")
    return made.host if settings.tenants else replace(made.host, client_ca=None, revoked=None)


def _revoked(tls: HostTls) -> Revoked | None:
    if tls.revoked is None:
        return None
    if tls.client_ca is None:
        raise CommandLineError(
            "--crl goes with --client-ca", where="atoll host", got="--crl alone", expected="both", do="add the CA that signed the list"
        )
    revoked = Revoked(tls.revoked, tls.client_ca)
    revoked.check()
    return revoked


def stopped_by_signals() -> threading.Event:
    """What SIGINT, SIGTERM and SIGHUP set from now on, unless whoever started this process had them ignored."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: stop.set())
    return stop
