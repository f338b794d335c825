"""Clients that leave: their slots are free at once, whatever they were doing."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from engine_models import one_thread, tiny  # noqa: F401
from serve_models import AsgiClient, SmallHost, app_of, served

from serve.observe import MemoryMeter, Observer

pytestmark = pytest.mark.usefixtures("one_thread")
ENDLESS = {
    "messages": [{"role": "user", "content": "hello"}],
    "logit_bias": {"120": 100},  # "x" and nothing else, to the end of the context
}


@pytest.fixture
def host() -> Iterator[SmallHost]:
    host = SmallHost(served("chat", tiny(), max_len=600))
    yield host
    host.close()


async def until_free(host: SmallHost, within_s: float = 2.0) -> None:
    deadline = time.monotonic() + within_s
    while host.busy_slots():
        assert time.monotonic() < deadline, "slots are still busy"
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/v1/chat/completions", {"stream": True}),
        ("/v1/chat/completions", {"stream": True, "n": 3}),
        ("/v1/chat/completions", {}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 500, "stream": True}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 500}),
    ],
)
def test_leaving_frees_the_slots(host: SmallHost, path: str, change: dict[str, Any]) -> None:
    body = {**ENDLESS, **change}
    if "prompt" in body:
        del body["messages"]
    meter = MemoryMeter()
    app = app_of(host, Observer(meter))

    async def leave() -> None:
        client = AsgiClient(path, body, 0.05, wait=bool(body.get("stream")))
        start = time.monotonic()
        await asyncio.wait_for(client.run(app), 10)
        assert time.monotonic() - start < 1
        assert bool(client.bodies) == bool(body.get("stream"))
        await until_free(host)

    asyncio.run(leave())
    failures = [key for key in meter.counters if key[0] == "nanoray_request_failure"]
    assert failures == [("nanoray_request_failure", (("model", "chat"), ("status", "499")))]


def test_a_server_that_cancels_frees_them_too(host: SmallHost) -> None:
    app = app_of(host)

    async def leave() -> None:
        for stream in (True, False):
            client = AsgiClient(
                "/v1/chat/completions", {**ENDLESS, "stream": stream}, 100, wait=False
            )
            task = asyncio.create_task(client.run(app))
            while not host.busy_slots():
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until_free(host)

    asyncio.run(leave())


def test_500_random_disconnects_leave_no_slot_busy(host: SmallHost) -> None:
    rng = random.Random(0)
    meter = MemoryMeter()
    app = app_of(host, Observer(meter), coalesce_s=0.003)
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {**ENDLESS, "max_tokens": 16}),
        ("/v1/chat/completions", {**ENDLESS, "max_tokens": 16, "stream": True}),
        ("/v1/chat/completions", {**ENDLESS, "max_tokens": 6, "stream": True, "n": 2}),
        ("/v1/completions", {"prompt": "words", "max_tokens": 16, "stream": True}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 0, "echo": True, "logprobs": 1}),
        ("/chat/completions", {"messages": ENDLESS["messages"], "max_tokens": 16}),
    ]

    async def storm() -> None:
        limit = asyncio.Semaphore(12)

        async def one() -> None:
            async with limit:
                path, body = rng.choice(bodies)
                client = AsgiClient(path, body, rng.choice([0, 0.002, 0.02]), rng.random() < 0.5)
                await client.run(app)

        await asyncio.wait_for(asyncio.gather(*(one() for _ in range(500))), 60)
        await until_free(host)

    asyncio.run(storm())
    stats = host.stats()["models"]["chat"]
    assert stats["waiting"] == stats["running"] == 0
    ended = sum(value for key, value in meter.counters.items() if "request_" in key[0])
    assert ended == 500  # each of them is recorded, once
