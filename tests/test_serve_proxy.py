"""What stands in front of Serve's proxy: its own words become the API's, and arrivals are noted."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest
from serve_models import AsgiClient

from serve.arrival import ARRIVAL, seconds_ago, stamped
from serve.limits import BodyLimit
from serve.proxy import CALLBACK, Arrivals, ProxyErrors, middlewares


class Proxy:
    """In the place of Serve's own: an answer of these bodies; None: no answer at all.

    headers: of the requests that came to it.
    """

    def __init__(self, status: int | None, *bodies: bytes, **headers: str) -> None:
        self._status, self._bodies, self._answer_headers = status, bodies, headers
        self.headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers = scope["headers"]
        if self._status is None:
            return
        headers = [
            (name.replace("_", "-").encode(), value.encode())
            for name, value in self._answer_headers.items()
        ]
        start = {"type": "http.response.start", "status": self._status, "headers": headers}
        await send(start)
        for body in self._bodies:
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def ask(proxy: Proxy, **headers: str) -> httpx.Response:
    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(ProxyErrors(Arrivals(proxy)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/chat/completions", json={}, headers=headers)

    return asyncio.run(post())


KINDS = {
    404: ("invalid_request_error", "not_found", "/openapi.json"),
    408: ("invalid_request_error", None, "took too long"),
    429: ("rate_limit_error", "rate_limit_exceeded", "ask again"),
    502: ("server_error", "replica_lost", "ask again"),
    503: ("server_error", None, "no replica is ready"),
}


@pytest.mark.parametrize("status", KINDS)
def test_the_proxys_own_words_become_the_apis(status: int) -> None:
    kind, code, words = KINDS[status]
    proxy = Proxy(
        None if status == 502 else status,
        b"Request dropped due to ",
        b"backpressure (num_queued_requests=64).",
        content_type="text/plain; charset=utf-8",
        retry_after="7",
    )
    response = ask(proxy)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content)
    told = response.json()["error"]
    assert (told["type"], told["code"], told["param"]) == (kind, code, None)
    assert words in told["message"]
    wait = {429: "7", 502: "1", 503: "7"}
    assert response.headers.get("retry-after") == wait.get(status)


@pytest.mark.parametrize("status", [200, 404, 429, 500, 503])
def test_the_applications_words_stay(status: int) -> None:
    body = json.dumps({"error": {"message": "of the application"}}).encode()
    proxy = Proxy(status, body[:9], body[9:], content_type="application/json", x_own="kept")
    response = ask(proxy)
    assert (response.status_code, response.content) == (status, body)
    assert response.headers["x-own"] == "kept"


def test_text_that_is_no_error_stays() -> None:
    response = ask(Proxy(200, b"success", content_type="text/plain"))
    assert (response.status_code, response.text) == (200, "success")


@pytest.mark.parametrize("content_type", ["text/event-stream", "application/json"])
def test_a_stream_that_breaks_off_ends_with_an_event(content_type: str) -> None:
    async def breaks_off(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", content_type.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})

    client = AsgiClient("/v1/chat/completions", {})
    asyncio.run(client.run(ProxyErrors(breaks_off)))
    first, *rest = client.bodies
    assert first == b"data: 1\n\n"
    if content_type == "application/json":  # nothing can be added to that
        assert rest == []
    else:
        (event,) = rest
        assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "replica_lost"


def test_serve_finds_what_stands_in_front() -> None:
    (path,) = CALLBACK.values()
    assert path == f"{middlewares.__module__}:{middlewares.__name__}"
    # From within: a body that drips is no delay of ours, and all that goes wrong is told.
    assert [each.cls for each in middlewares()] == [Arrivals, BodyLimit, ProxyErrors]


# ---- arrivals


def scope(*values: str) -> dict[str, Any]:
    return {"type": "http", "headers": [(ARRIVAL, value.encode()) for value in values]}


def test_the_proxy_notes_the_arrival_and_believes_no_client() -> None:
    proxy = Proxy(200, b"{}", content_type="application/json")
    before = time.time()
    ask(proxy, **{ARRIVAL.decode(): str(before - 100), "x-other": "kept"})
    (stamp,) = (value for name, value in proxy.headers if name == ARRIVAL)
    assert before - 0.001 <= float(stamp) <= time.time()
    assert (b"x-other", b"kept") in proxy.headers
    assert 0 <= seconds_ago({"headers": proxy.headers}) < 10


def test_how_long_ago_a_request_arrived() -> None:
    assert 0 <= seconds_ago(stamped(scope())) < 10
    assert seconds_ago(scope(str(time.time() - 30))) == pytest.approx(30, abs=5)
    for wrong in ("", "soon", "nan", "inf", "-inf", "0", str(time.time() + 60)):
        assert seconds_ago(scope(wrong)) == 0, wrong
    assert seconds_ago(scope(str(time.time() - 601))) == 0
    assert seconds_ago(scope()) == 0
