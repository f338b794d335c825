"""In front of Serve's HTTP proxy: what it cannot say itself, in the API's own form; and when each
request arrived.

Serve's proxy refuses in plain text, answers a lost replica with nothing at all, breaks a stream
off when its replica dies, and takes in bodies of any size. Ray loads this in its proxies by
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxy:middlewares. Without torch: it is a process
of its own.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.arrival import stamped
from serve.errors import ApiError
from serve.limits import BodyLimit

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares"}
# Of any deployment: each has its own, lower limits.
_MAX_BODY_BYTES = 16 * 2**20
_BODY_DEADLINE_S = 30.0
_TELLS = {
    404: "there is nothing at this path: see /openapi.json.",
    408: "the request took too long.",
    429: "all slots are taken and the queue is full: ask again in a moment.",
    503: "no replica is ready: ask again in a moment.",
}
_LOST = "the replica that was answering is lost: ask again."


def middlewares() -> list[Middleware]:
    """What Serve puts around its proxy; the last one is the outermost."""
    return [
        Middleware(Arrivals),
        Middleware(BodyLimit, max_bytes=_MAX_BODY_BYTES, timeout_s=_BODY_DEADLINE_S),
        Middleware(ProxyErrors),
    ]


class Arrivals:
    """Notes when a request was there as a whole: a client may be as slow as it likes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(stamped(scope) if scope["type"] == "http" else scope, receive, send)


class ProxyErrors:
    """Has every answer of the proxy end well: as it was, or as an error in OpenAI's form."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, receive, send)
        await self._app(_readable(scope), receive, answer.send)
        await answer.end()


class _Answer:
    """One answer on its way: what of it was sent."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._started = self._is_stream = self._complete = False
        self._replaced = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._start(message)
        elif not self._replaced:
            self._complete = not message.get("more_body", False)
            await self._send(message)

    async def _start(self, message: Message) -> None:
        headers = {key.lower(): value for key, value in message.get("headers", ())}
        content_type = headers.get(b"content-type", b"")
        self._started = True
        if message["status"] in _TELLS and content_type.startswith(b"text/plain"):
            # The proxy's own words: the application speaks JSON.
            status = message["status"]
            kept = {"retry-after": headers.get(b"retry-after", b"1").decode()}
            await self._replace(
                ApiError(status, _TELLS[status], headers=kept if status in (429, 503) else {})
            )
            return
        self._is_stream = content_type.startswith(b"text/event-stream")
        await self._send(message)

    async def end(self) -> None:
        """Nothing more comes; if the client has left, nobody reads what is sent now."""
        lost = ApiError(502, _LOST, code="replica_lost", headers={"retry-after": "1"})
        if not self._started:
            await self._replace(lost)
        elif self._is_stream and not self._complete:
            event = b"data: " + lost.body() + b"\n\n"
            await self._send({"type": "http.response.body", "body": event})

    async def _replace(self, error: ApiError) -> None:
        self._replaced = self._complete = True
        await error.response()(self._scope, self._receive, self._send)


def _readable(scope: Scope) -> Scope:
    """Without headers that are no ASCII, which the proxy decodes and would fail at."""
    headers = [(key, value) for key, value in scope["headers"] if (key + value).isascii()]
    return {**scope, "headers": headers}
