"""An edge's way to its coordinator: TLS with certificates on both sides, through the proxy that this machine's environment names."""

from __future__ import annotations

import ssl
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx

from atoll.errors import TransportError
from atoll.split.certificates import DeviceTls, is_loopback

CALL_SECONDS = 60.0
"""So long a call may go without a byte."""


def proxy_to(address: str) -> str | None:
    """The proxy through which HOST:PORT is called: of `https_proxy` or `all_proxy`, unless `no_proxy` names the host or it is loopback."""
    proxies = getproxies()
    proxy = proxies.get("https") or proxies.get("all")
    return None if proxy is None or is_loopback(address) or proxy_bypass(address) else proxy


def open_way(address: str, tls: DeviceTls, *, seconds: float = CALL_SECONDS) -> httpx.Client:
    """A client for https://HOST:PORT that shows this certificate and believes this authority alone.

    Raises: TransportError for certificates or a proxy that are of no use.
    """
    try:
        context = ssl.create_default_context(cafile=tls.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        if tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key)
    except (OSError, ValueError) as problem:
        raise TransportError(
            "certificates that cannot be used", where=f"{tls.ca}, {tls.cert}", got=str(problem),
            expected="ca.pem, client.pem and client.key", do="`atoll doctor --fleet .` says which of them is damaged",
        ) from None  # fmt: skip
    proxy = proxy_to(address)
    try:
        return httpx.Client(verify=context, proxy=proxy, trust_env=False, timeout=seconds)
    except (ImportError, ValueError) as problem:
        raise TransportError(
            "a proxy that cannot be used", where="https_proxy", got=f"{_shown(proxy)}: {problem}", expected="http://HOST:PORT",
            do="mend it, or name the coordinator in no_proxy",
        ) from None  # fmt: skip


def said(address: str, problem: Exception) -> str:
    """Why a call did not come through, in words that name the way."""
    proxy = proxy_to(address)
    through = f" through the proxy {_shown(proxy)} (https_proxy)" if proxy else ""
    if isinstance(problem, httpx.HTTPStatusError):
        status = problem.response.status_code
        return f"{address}{through} answers {status}{_MEANING.get(status, '')}"
    if isinstance(problem, httpx.TransportError):
        return f"{address} cannot be reached{through}: {_reason(problem)}"
    return f"{address}{through} answers with something else: {type(problem).__name__}: {problem}"


_NOT_YET = (
    ": the coordinator does not know this edge's key (one that is added while it runs counts from its next start); or it takes the edge to "
    "be there still, and will not in 20 s"
)
_MEANING = {
    401: ": this edge's key is not of its node, or this machine's clock is wrong", 412: _NOT_YET,
    403: ": this edge is of the fleet no more, or its certificate is revoked", 413: ": the message is too large",
    502: ": who stands in front cannot reach SuperLink", 503: ": it is busy, or just starting",
}  # fmt: skip


def _reason(problem: httpx.TransportError) -> str:
    text = str(problem) or type(problem).__name__
    for sign, meaning in _SIGNS.items():
        if sign in text:
            return f"{meaning} ({text})"
    return text


_SIGNS = {
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not of this fleet's authority, or not for this address",
    "disconnected": "it hung up, as it does on a certificate that is revoked, has expired or is of another fleet",
}  # fmt: skip


def _shown(proxy: str | None) -> str:
    """Without the password that may stand in it."""
    parts = urlsplit(proxy or "")
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
