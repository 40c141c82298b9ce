"""Which requests pass to SuperLink, and how much of each: an application for uvicorn's protocol."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from atoll.fleet.front.admission import Admission, Visitor
from atoll.fleet.front.limits import HEADERS, PATHS, Limits
from atoll.split.host.audit import Audit

log = logging.getLogger("atoll.front")
_POOL = httpx.Limits(max_connections=256, max_keepalive_connections=64, keepalive_expiry=10.0)
_SHOWN = 200
_FORBIDDEN, _NOT_FOUND, _TOO_LARGE, _BUSY = 403, 404, 413, 503


class _BodyTooLarge(Exception):
    """More of a body came than its path allows."""


class Gate:
    """Passes an edge's requests to SuperLink's Unix socket, where they are for one of the paths that are open."""

    def __init__(self, superlink: Path, admission: Admission, limits: Limits, audit: Audit) -> None:
        self._audit = audit
        self._admission, self._limits, self._open = admission, limits, Counter[str]()
        self._superlink = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(superlink), limits=_POOL), base_url="http://superlink",
            timeout=limits.request_seconds,
        )  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        visitor: Visitor = scope["state"]["visitor"]
        self._open[visitor.name] += 1
        try:
            async with asyncio.timeout(self._limits.request_seconds):
                await (await self._answer(visitor, Request(scope, receive)))(scope, receive, send)
        except TimeoutError:
            log.info("%s: too slow with %r, cut off", visitor.name, scope["path"][:_SHOWN])
            scope["state"]["abort"]()
        except ClientDisconnect:
            pass
        finally:
            self._open[visitor.name] -= 1

    async def close(self) -> None:
        """Close the connections to SuperLink."""
        await self._superlink.aclose()

    async def _answer(self, visitor: Visitor, request: Request) -> Response:
        path, why = request.scope["path"], self._admission.refusal(visitor)
        if why is not None:
            return self._refused(visitor, path, _FORBIDDEN, why)
        limit = PATHS.get(path) if request.method == "POST" else None
        if limit is None:
            return self._refused(visitor, path, _NOT_FOUND, "not open to edges")
        if self._open[visitor.name] > self._limits.edge_requests:
            return self._refused(visitor, path, _BUSY, "too many requests at once")
        size = request.headers.get("content-length", "0")
        if not size.isdecimal() or int(size[:20]) > limit:
            return self._refused(visitor, path, _TOO_LARGE, f"a body of {size[:20]} bytes")
        try:
            return await self._passed(path, request, limit)
        except _BodyTooLarge:
            return self._refused(visitor, path, _TOO_LARGE, f"a body of more than {limit} bytes")
        except httpx.TransportError:
            return _refusal(_BUSY, "SuperLink is not there")

    async def _passed(self, path: str, request: Request, limit: int) -> Response:
        headers = {name: request.headers[name] for name in HEADERS if name in request.headers}
        body = b"".join([piece async for piece in self._pieces(request, limit)])
        asked = self._superlink.build_request("POST", path, content=body, headers=headers)
        answer = await self._superlink.send(asked, stream=True)
        kept = {name: answer.headers[name] for name in ("content-type", "content-length") if name in answer.headers}
        return StreamingResponse(_closing(answer), answer.status_code, kept)

    async def _pieces(self, request: Request, limit: int) -> AsyncIterator[bytes]:
        pieces, size = request.stream(), 0
        while True:
            async with asyncio.timeout(self._limits.idle_seconds):
                piece = await anext(pieces, None)
            if piece is None:
                return
            size += len(piece)
            if size > limit:
                raise _BodyTooLarge
            yield piece

    def _refused(self, visitor: Visitor, path: str, status: int, why: str) -> Response:
        self._audit.note("request refused", visitor.name, "", {"path": path[:_SHOWN], "status": status, "why": why})
        log.info("%s: %d for %r: %s", visitor.name or f"certificate {visitor.serial:x}", status, path[:_SHOWN], why)
        return _refusal(status, why)


def _refusal(status: int, why: str) -> Response:
    """Closes the connection: the rest of a body is not read."""
    return PlainTextResponse(f"{why}\n", status, {"connection": "close"})


async def _closing(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()
