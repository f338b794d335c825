"""Answers that are sent while they are made, and clients that leave in the meantime."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.errors import ApiError, as_api_error

T = TypeVar("T")
COMPONENTS = "#/components/schemas/"  # where an OpenAPI document has its models
DONE = b"data: [DONE]\n\n"
_logger = logging.getLogger(__name__)


def event(data: bytes | str) -> bytes:
    """A server-sent event; data: one line, such as JSON."""
    return b"data: " + (data.encode() if isinstance(data, str) else data) + b"\n\n"


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client leaves.

    `receive` is ASGI's, the request's body read. Raises ClientDisconnect.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events as they come; the generator is closed however it ends.

    An error before the first event is an ordinary error response, a later one an event with the
    same body.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(None, headers=headers)
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            with contextlib.suppress(ClientDisconnect):
                await unless_disconnected(receive, self._send_all(scope, receive, send))

    async def _send_all(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await anext(self._events)
        except Exception as error:
            await _told(error).response()(scope, receive, send)
            return
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            while True:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                body = await anext(self._events)
        except StopAsyncIteration:
            body = b""
        except OSError:  # how newer servers say that the client has gone
            raise ClientDisconnect from None
        except Exception as error:
            body = event(_told(error).body())
        await send({"type": "http.response.body", "body": body, "more_body": False})


def _told(error: Exception) -> ApiError:
    told = as_api_error(error)
    if told.code == "internal_error":
        _logger.error("a stream failed", exc_info=error)
    return told


def streamed(*events: dict[str, Any], done: str | None = None) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: a 200 that is a stream.

    events: schemas of the JSON in `data`; an error may be among them. done: what else comes last.
    """
    json_data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [*events, {"$ref": f"{COMPONENTS}ErrorBody"}]},
    }
    data = {"anyOf": [{"const": done}, json_data]} if done else json_data
    event_schema = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    content = {"text/event-stream": {"itemSchema": event_schema}}
    return {200: {"description": "The answer.", "content": content}}
