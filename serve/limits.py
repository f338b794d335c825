"""What a request must pass before anybody reads it: the key, the size and the pace of its body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError


class ApiKeys:
    """Lets those pass who have one of the keys, and anybody to the open pages.

    Args:
        keys: the secrets; with none everybody passes.
        open_paths: what GET and HEAD reach without a key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: Collection[str]) -> None:
        self._app, self._open_paths = app, frozenset(open_paths)
        # As hashes they are of one length, so that a comparison tells nothing by its time.
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        scheme, _, given = header(scope, b"authorization").partition(b" ")
        digest = hashlib.sha256(given.strip()).digest()
        # All of them are compared, whichever fits.
        fits = [hmac.compare_digest(digest, key) for key in self._keys]
        if scheme.lower() == b"bearer" and any(fits):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "this server wants an API key: send the header 'Authorization: Bearer KEY'."
            if not given
            else "the API key is not one of this server's.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return scope["method"] in ("GET", "HEAD") and route_path(scope) in self._open_paths


class BodyLimit:
    """Reads the whole body before the app runs: at most `max_bytes`, within `timeout_s`."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        length = header(scope, b"content-length")
        if length.isdigit() and int(length[:20]) > self._max_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        num_bytes = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    num_bytes += len(chunks[-1])
                    if num_bytes > self._max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not come within {self._timeout_s:g} s: send it faster.",
                code="request_timeout",
                headers={"connection": "close"},
            ) from None

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body has more than {self._max_bytes:,} bytes: send less.",
            headers={"connection": "close"},
        )


def header(scope: Scope, name: bytes) -> bytes:
    """A header's value; empty without it."""
    return next((value for key, value in scope["headers"] if key == name), b"")


def route_path(scope: Scope) -> str:
    """The path below the prefix that the application stands at, itself with or without a slash."""
    path: str = scope["path"].removeprefix(scope.get("root_path", ""))
    return path or "/"
