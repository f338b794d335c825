"""Bodies as large as the limit allows: what is wrong with them is said at once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine_models import one_thread  # noqa: F401
from fastapi import FastAPI
from serve_models import AsgiClient, app_of, small_host

pytestmark = pytest.mark.usefixtures("one_thread")
CHAT, COMPLETIONS, FEBRUARY = "/v1/chat/completions", "/v1/completions", "/chat/completions"
NUM_BYTES = 2 * 2**20 - 1000
SAID = {"role": "user", "content": "hello"}
HELLO = {"messages": [SAID]}
# Far above what an answer takes (under 0.7 s), far below an error for every item (3 to 16 s).
MOST_CPU_S = 2.0


def many(item: Any) -> list[Any]:
    """As many of them as a body holds."""
    return [item] * (NUM_BYTES // (len(json.dumps(item)) + 2))


def fields(value: Any = 1, num_bytes: int = NUM_BYTES) -> dict[str, Any]:
    """As many fields as a body holds."""
    size = len(json.dumps({"k000000": value}))
    return {f"k{number:06d}": value for number in range(num_bytes // size)}


def message(role: str = "user", **rest: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, **rest}]}


# Made one by one: together they take hundreds of megabytes.
BODIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "parts that are none": (CHAT, lambda: message(content=many(1))),
    "empty parts": (CHAT, lambda: message(content=many({}))),
    "parts of no kind": (CHAT, lambda: message("assistant", parts=many({"type": "x"}))),
    "an answer's parts": (CHAT, lambda: message("assistant", content=many(1))),
    "parts without a word": (CHAT, lambda: message(content=many({"type": "text", "text": ""}))),
    "messages that are none": (CHAT, lambda: {"messages": many(1)}),
    "fields": (CHAT, lambda: HELLO | fields()),
    "a message's fields": (CHAT, lambda: message(content="x", **fields())),
    "a part's fields": (CHAT, lambda: message(content=[{"type": "text", "text": "x", **fields()}])),
    "fields of all messages": (CHAT, lambda: {"messages": [SAID | fields(1, 4000)] * 500}),
    "stream options": (CHAT, lambda: HELLO | {"stream": True, "stream_options": fields()}),
    "stops": (CHAT, lambda: HELLO | {"stop": many(1)}),
    "metadata": (CHAT, lambda: HELLO | {"metadata": fields()}),
    "a bias of words": (CHAT, lambda: HELLO | {"logit_bias": fields("x")}),
    "too many biases": (CHAT, lambda: HELLO | {"logit_bias": fields()}),
    "prompts": (COMPLETIONS, lambda: {"prompt": many("a")}),
    "prompts of no kind": (COMPLETIONS, lambda: {"prompt": many({})}),
    "negative ids": (COMPLETIONS, lambda: {"prompt": many(-1)}),
    "ids and a word": (COMPLETIONS, lambda: {"prompt": [*many(1), "a"]}),
    "more ids than the context": (COMPLETIONS, lambda: {"prompt": many(7)}),
    "prompts of ids": (COMPLETIONS, lambda: {"prompt": many([1])}),
    "words in a prompt of ids": (COMPLETIONS, lambda: {"prompt": [many("a")]}),
    "words in all prompts of ids": (COMPLETIONS, lambda: {"prompt": [["a"] * 400] * 1000}),
    "february's messages": (FEBRUARY, lambda: {"messages": many({})}),
    "february's fields": (FEBRUARY, lambda: HELLO | fields()),
}  # fmt: skip


@pytest.fixture(scope="module")
def app() -> Iterator[FastAPI]:
    host = small_host()
    yield app_of(host)
    host.close()


def cpu_s(app: FastAPI, client: AsgiClient) -> float:
    """What an answer takes of this process's time, the event loop's and all."""
    before = time.process_time()
    asyncio.run(asyncio.wait_for(client.run(app), 60))
    return time.process_time() - before


@pytest.mark.parametrize("name", BODIES)
def test_a_large_wrong_body_is_refused_at_once(app: FastAPI, name: str) -> None:
    path, make = BODIES[name]
    body = make()
    assert len(json.dumps(body)) < 2 * 2**20
    client = AsgiClient(path, body)
    assert cpu_s(app, client) < MOST_CPU_S
    assert client.status == 400
    told = json.loads(b"".join(client.bodies))["error"]
    assert told["type"] == "invalid_request_error"
    assert len(told["message"]) <= 500


def test_a_large_right_body_is_answered_at_once(app: FastAPI) -> None:
    prompts = [[7] * 390] * 1000
    body = {"model": "base", "prompt": prompts, "max_tokens": 0}
    client = AsgiClient(COMPLETIONS, body)
    assert cpu_s(app, client) < MOST_CPU_S
    assert client.status == 200
    answer = json.loads(b"".join(client.bodies))
    assert answer["usage"]["prompt_tokens"] == 390_000


def test_the_first_of_many_unknown_fields_is_named(app: FastAPI) -> None:
    client = AsgiClient(CHAT, {"first": 1} | HELLO | fields())
    asyncio.run(client.run(app))
    told = json.loads(b"".join(client.bodies))["error"]
    assert (told["param"], told["code"]) == ("first", "unknown_field")
