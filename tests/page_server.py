"""A server for the page's tests: the real files, scripted answers, a record of what was asked."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

UI = Path(__file__).parents[1] / "serve" / "ui"
SECURITY = {"content-security-policy": "default-src 'self'; img-src 'self' data:"}
PREFIX = "/under/a/prefix"


def event(body: Mapping[str, Any] | str) -> bytes:
    """One server-sent event."""
    return f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n".encode()


def delta(text: str, part_type: str = "text") -> bytes:
    """A piece of an answer, as the chat API streams it."""
    content = {"content": text} if part_type == "text" else {"tool": _part(part_type, text)}
    return event({"choices": [{"index": 0, "delta": content, "finish_reason": None}]})


def _part(part_type: str, text: str) -> dict[str, str]:
    return {"type": part_type, "text": text}


def ending(tokens: int = 5, finish: str = "stop") -> bytes:
    """The end of a stream: the reason, the usage, the mark."""
    reason = {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
    usage = {"choices": [], "usage": {"completion_tokens": tokens}}
    return event(reason) + event(usage) + event("[DONE]")


class Hold:
    """Stands between pieces: the stream waits here until the test releases it."""

    def __init__(self) -> None:
        self.released = threading.Event()


class Cut:
    """The connection is lost here."""


@dataclass
class Reply:
    """One answer: pieces and holds. With a status that is no 200, `body` is what is sent."""

    pieces: Sequence[bytes | Hold | Cut] = ()
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    left: threading.Event = field(default_factory=threading.Event)  # the client went away


def says(*texts: str, tokens: int = 5, finish: str = "stop") -> Reply:
    """An answer that comes in these pieces."""
    return Reply([*(delta(text) for text in texts), ending(tokens, finish)])


def fails(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    """An error with a body of OpenAI's form."""
    body = json.dumps({"error": {"message": message, "type": "error", "code": code}}).encode()
    return Reply(status=status, body=body, headers=headers)


@dataclass
class Asked:
    """A request for an answer."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class PageServer:
    """What a test scripts (`replies`, `models`, `key`) and what it reads (`asked`, `url`)."""

    def __init__(self) -> None:
        self.url = ""
        self.reset()

    def reset(self) -> None:
        self.models: list[dict[str, Any]] = [{"id": "tiny-sft", "object": "model", "chat": True}]
        self.key = ""
        self.replies: list[Reply] = []  # taken in order; then an answer of its own
        self.asked: list[Asked] = []

    def app(self) -> Starlette:
        routes: list[BaseRoute] = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._answer, methods=["POST"]),
            Route("/v1/completions", self._answer, methods=["POST"]),
            Route("/", self._page),
            Mount("/", StaticFiles(directory=UI)),
        ]
        return Starlette(routes=[Mount(PREFIX, routes=routes)])

    async def _page(self, request: Request) -> Response:
        return FileResponse(UI / "index.html", headers=SECURITY)

    async def _models(self, request: Request) -> Response:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            message = "Incorrect API key provided."
            return JSONResponse({"error": {"message": message}}, status_code=401)
        return JSONResponse({"object": "list", "data": self.models})

    async def _answer(self, request: Request) -> Response:
        path = request.url.path.removeprefix(PREFIX)
        self.asked.append(Asked(path, dict(request.headers), await request.json()))
        reply = self.replies.pop(0) if self.replies else says("Hello ", "there.")
        if reply.status != 200:
            return Response(reply.body, reply.status, dict(reply.headers), "application/json")
        return StreamingResponse(_stream(reply), media_type="text/event-stream")


async def _stream(reply: Reply) -> AsyncIterator[bytes]:
    try:
        for piece in reply.pieces:
            if isinstance(piece, bytes):
                yield piece
                await asyncio.sleep(0)
                continue
            if isinstance(piece, Cut):
                await asyncio.sleep(0.2)  # what a browser has not yet read is lost, too
                raise ConnectionError("cut by the test")
            while not piece.released.is_set():
                await asyncio.sleep(0.01)
    except asyncio.CancelledError:
        reply.left.set()
        raise


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """Runs an ASGI app on a free port of loopback, in a thread, and gives its URL."""
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        thread.join(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    server.force_exit = True
    thread.join(10)
