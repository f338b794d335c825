"""A host of small models, and an application around it, for the tests of the HTTP API."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from engine_models import scripted, tiny
from fastapi import FastAPI

from nanoray.engine import Engine
from nanoray.errors import NanorayError
from nanoray.model.gpt import GPT
from nanoray.tokenizer import ByteTokenizer, Tokenizer
from nanoray.tools.calculator import calculate
from serve.host import ServedModel, UnknownModelError
from serve.http import HttpSettings, make_app
from serve.observe import Observer

BYTES = ByteTokenizer()
SPECIAL = BYTES.special_tokens
# What "calculating" says to anything: "=", a call of the calculator, and after its output "yz".
CALCULATION = [
    *(SPECIAL["<|assistant_start|>"], *b"=", SPECIAL["<|python_start|>"], *b"6*7"),
    *(SPECIAL["<|python_end|>"], SPECIAL["<|output_end|>"], *b"yz", SPECIAL["<|assistant_end|>"]),
]


class SmallHost:
    """Models as a `Host` has them, without checkpoints."""

    def __init__(self, *models: ServedModel) -> None:
        self._models = {served.name: served for served in models}
        self.sick: str | None = None

    def model(self, name: str | None) -> ServedModel:
        if name is None:
            return self.models()[0]
        if name not in self._models:
            raise UnknownModelError(f"there is no model {name!r} here")
        return self._models[name]

    def models(self) -> list[ServedModel]:
        return list(self._models.values())

    def stats(self) -> dict[str, Any]:
        return {"models": {name: m.engine.stats() for name, m in self._models.items()}}

    async def health(self) -> None:
        if self.sick:
            raise NanorayError(self.sick)

    def busy_slots(self) -> int:
        return int(sum(m.engine.stats()["busy_slots"] for m in self.models()))

    def close(self) -> None:
        for served in self.models():
            served.engine.close()


def served(
    name: str, model: GPT, *, chat: bool = True, tokenizer: Tokenizer = BYTES, **settings: Any
) -> ServedModel:
    """A model with its engine."""
    settings = {"max_len": 400, "num_slots": 4, **settings}
    engine = Engine(model, tokenizer, tool=calculate, **settings)
    return ServedModel(name, engine, tokenizer, chat, "nowhere", 7, 1_700_000_000)


def small_host() -> SmallHost:
    """Three models: "chat" (noise), "calculating" (a script) and "base" (noise)."""
    return SmallHost(
        served("chat", tiny()),
        served("calculating", scripted(CALCULATION)),
        served("base", tiny(seed=3), chat=False),
    )


def app_of(host: SmallHost, observer: Observer | None = None, **settings: Any) -> FastAPI:
    """The application around a host."""
    return make_app(host, HttpSettings(**settings), observer or Observer())  # type: ignore[arg-type]


class AsgiClient:
    """One request by ASGI itself, which leaves `after_s` after the first byte, or after asking.

    status: of the answer; bodies: what the server sent, piece by piece.
    """

    def __init__(
        self, path: str, body: dict[str, Any], after_s: float = 60, wait: bool = True
    ) -> None:
        self._path, self._body = path, json.dumps(body).encode()
        self._after_s, self._wait = after_s, wait
        self._asked = False
        self._answered = asyncio.Event()
        self.status: int | None = None
        self.bodies: list[bytes] = []

    async def run(self, app: Any) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"test")],
            "client": ("test", 1),
            "server": ("test", 80),
            "scheme": "http",
            "root_path": "",
        }
        await app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        if self._wait:
            await self._answered.wait()
        await asyncio.sleep(self._after_s)
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.status = message.get("status", self.status)
        if message["type"] == "http.response.body" and message["body"]:
            self.bodies.append(message["body"])
            self._answered.set()


@contextmanager
def running(app: Any, **options: Any) -> Iterator[str]:
    """A real server in a thread; its URL."""
    config = uvicorn.Config(app, port=0, log_level="info", log_config=None, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
