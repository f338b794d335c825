"""The routes of nanochat's own server, as its page of February 2026 used them.

Its limits hold, its frames are sent; but its errors are in OpenAI's form, system messages stay
refused, and what the calculator is asked and answers is not shown.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from nanoray.engine import SamplingParams
from nanoray.errors import NanorayError
from serve.chat_api import chat_prompt
from serve.errors import ApiError
from serve.run import Run, Service
from serve.schemas import FebruaryRequest, Health
from serve.sse import EventStream, event, streamed

_TEMPERATURE, _TOP_K, _MAX_TOKENS = 0.8, 50, 512  # nanochat's
_TOKEN = {
    "type": "object",
    "properties": {"token": {"type": "string"}, "gpu": {"const": 0}},
    "required": ["token", "gpu"],
}
_DONE = {"type": "object", "properties": {"done": {"const": True}}, "required": ["done"]}
_STREAMED = streamed(_TOKEN, _DONE)


def february_router(service: Service) -> APIRouter:
    """POST /chat/completions and GET /stats; see /openapi.json."""
    router = APIRouter()

    @router.post("/chat/completions", response_class=Response, responses=_STREAMED)
    async def chat(body: FebruaryRequest, request: Request) -> Response:
        """Answer as events {"token": text, "gpu": 0}, the last one is {"done": true}."""
        models = service.host.models()
        served = next((m for m in models if m.chat), None) or service.host.model(None)
        prompt = chat_prompt(served, [message.model_dump() for message in body.messages])
        temperature = _TEMPERATURE if body.temperature is None else body.temperature
        top_k = _TOP_K if body.top_k is None else body.top_k
        params = SamplingParams(
            temperature=temperature,
            top_k=top_k if temperature else 0,
            max_tokens=body.max_tokens or _MAX_TOKENS,
            seed=secrets.randbits(63),
        )
        return EventStream(_events(Run(service, request, served, [prompt], [params], "chat")))

    @router.get("/stats")
    async def stats() -> dict[str, Any]:
        """What the engines do: nanochat's figures, a worker being a slot, and all of ours."""
        told = service.host.stats()
        engines = told["models"].values()
        total = int(sum(engine["num_slots"] for engine in engines))
        busy = int(sum(engine["busy_slots"] for engine in engines))
        return {
            "total_workers": total,
            "available_workers": total - busy,
            "busy_workers": busy,
            **told,
        }

    return router


def health_router(service: Service) -> APIRouter:
    """GET /health, which needs no key."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Health:
        """Whether every model computes: it is tried."""
        try:
            await service.host.health()
        except NanorayError as error:
            raise ApiError(503, f"{error}.", code="not_healthy") from None
        engines = service.host.stats()["models"].values()
        free = int(sum(engine["num_slots"] - engine["busy_slots"] for engine in engines))
        return Health(num_gpus=len(engines), available_workers=free)

    return router


async def _events(run: Run) -> AsyncGenerator[bytes, None]:
    with run:
        async with aclosing(run.batches(coalesce=True)) as batches:
            async for deltas in batches:
                if text := "".join(delta.text for delta in deltas if delta.tool == "none"):
                    yield event(json.dumps({"token": text, "gpu": 0}, ensure_ascii=False))
        yield event(json.dumps({"done": True}))
