"""What the API refuses, in whose words, and what it never tells."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from engine_models import one_thread  # noqa: F401
from serve_models import SPECIAL, SmallHost, app_of, running, small_host

pytestmark = pytest.mark.usefixtures("one_thread")
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
KEYS = ("first-key", "sécond-key")
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def host() -> Iterator[SmallHost]:
    host = small_host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def url(host: SmallHost) -> Iterator[str]:
    with running(app_of(host, max_body_bytes=300_000, body_timeout_s=0.5)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error, which must be in OpenAI's form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    told = response.json()["error"]
    assert told.keys() == {"message", "type", "param", "code"}
    assert told["message"]
    return told


# ---- bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"messages": "\xc3"}',
        b'{"model": "\xed\xa0\x80"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"1" * 10_000,
        b'{"\\ud800": 1}',
    ],
    ids=range(12),
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/chat/completions"])
def test_what_is_no_json_object(client: httpx.Client, path: str, body: bytes) -> None:
    refused(client.post(path, content=body, headers=JSON))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"wrong": 1}}, "stream_options.wrong"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"frequency_penalty": 0.1}, "frequency_penalty"),
        ({"presence_penalty": -0.1}, "presence_penalty"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"functions": []}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"store": True}, "store"),
        ({"audio": {}}, "audio"),
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
        ({"messages": [{"role": "developer", "content": "x", "name": "y"}]}, "messages[0].name"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [*HELLO["messages"], {"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": HELLO["messages"] * 2}, "messages"),
        ({"messages": HELLO["messages"] * 501}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 8001}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages"),
    ],
)
def test_wrong_fields_are_named(client: httpx.Client, change: dict[str, Any], param: str) -> None:
    body = json.dumps({**HELLO, **change})
    told = refused(client.post("/v1/chat/completions", content=body, headers=JSON))
    assert str(told["param"]).startswith(param)
    assert param.split("[")[0].split(".")[-1] in told["message"] or "message" in told["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 128, "prompt": ["a"] * 9}, "n"),
        ({"messages": []}, "messages"),
    ],
)
def test_wrong_fields_of_completions(
    client: httpx.Client, change: dict[str, Any], param: str
) -> None:
    response = client.post("/v1/completions", json={"model": "base", "prompt": "a", **change})
    assert refused(response)["param"] == param


def test_fields_that_ask_for_nothing_are_taken(client: httpx.Client) -> None:
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "store": False,
        "user": "somebody",
        "metadata": {"a": "b"},
        "logit_bias": {},
        "stop": None,
        "seed": None,
        "max_tokens": 2,
    }
    assert client.post("/v1/chat/completions", json={**HELLO, **neutral}).status_code == 200


def test_a_prompt_longer_than_the_context(client: httpx.Client) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 500}]}
    for path, body in (
        ("/v1/chat/completions", long),
        ("/v1/chat/completions", {**long, "stream": True}),
        ("/v1/completions", {"prompt": "x" * 500}),
        ("/chat/completions", long),
    ):
        told = refused(client.post(path, json=body))
        assert told["code"] == "context_length_exceeded"
        assert "400" in told["message"]


@pytest.mark.parametrize("in_parts", [False, True])
def test_an_answer_may_be_longer_than_a_message(client: httpx.Client, in_parts: bool) -> None:
    """A client sends back what the model wrote. Only the context and the whole have a limit."""
    text = "x" * 8_001
    content = [{"type": "text", "text": text}] if in_parts else text
    answered = [*HELLO["messages"], {"role": "assistant", "content": content}]
    body = {"messages": [*answered, *HELLO["messages"]]}
    told = refused(client.post("/v1/chat/completions", json=body))
    assert told["code"] == "context_length_exceeded"
    assert "the prompt has 8,0" in told["message"]
    body = {"messages": [*answered * 4, *HELLO["messages"]]}
    told = refused(client.post("/v1/chat/completions", json=body))
    assert (told["param"], told["code"]) == ("messages", "context_length_exceeded")
    assert "leave out some messages" in told["message"]
    body = {"messages": [*answered, {"role": "user", "content": text}]}
    told = refused(client.post("/v1/chat/completions", json=body))
    assert told["param"] == "messages[2].content"
    if not in_parts:  # February's own route has February's limit, for all messages
        body = {"messages": [*answered, *HELLO["messages"]]}
        told = refused(client.post("/chat/completions", json=body))
        assert told["param"] == "messages[1].content"


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    refused(client.get("/v1/nothing"), 404)
    refused(client.post("/v1/nothing"), 404)
    response = client.get("/v1/chat/completions")
    refused(response, 405)
    assert response.headers["allow"] == "POST"
    refused(client.put("/v1/models"), 405)


@pytest.mark.parametrize("chunked", [False, True])
def test_giant_bodies(client: httpx.Client, chunked: bool) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 10_000

    content = chunks() if chunked else b"x" * 400_000
    response = client.post("/v1/completions", content=content, headers=JSON)
    refused(response, 413)


def test_a_length_announced_is_refused_before_anything_is_read(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 99999999999999999999999\r\n\r\n"
        )
        answer = connection.recv(1000)
    assert answer.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))


def test_a_body_that_drips_is_given_up(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 1000\r\n\r\n{"
        )
        start = time.monotonic()
        answer = b""
        connection.settimeout(0.1)
        while not answer and time.monotonic() - start < 5:
            try:
                connection.sendall(b" ")
                answer = connection.recv(1000)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408")
    assert 0.4 < time.monotonic() - start < 2


# ---- deadlines


def test_an_answer_that_takes_too_long(host: SmallHost) -> None:
    app = app_of(host, request_timeout_s=0.2, coalesce_s=0.0)
    # Without a stop token: it would go on for all of the context.
    fields = {**HELLO, "n": 8, "logit_bias": {"120": 100}}
    with running(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        told = refused(client.post("/v1/chat/completions", json=fields), 504)
        assert (told["type"], told["code"]) == ("server_error", "timeout")
        response = client.post("/v1/chat/completions", json={**fields, "stream": True})
        assert response.status_code == 200
        *frames, last, rest = response.text.split("\n\n")
        assert rest == ""
        assert all("choices" in json.loads(frame[6:]) for frame in frames)
        assert json.loads(last[6:])["error"]["code"] == "timeout"
    assert host.busy_slots() == 0


def test_a_closed_engine_asks_to_try_again() -> None:
    host = small_host()
    with running(app_of(host)) as url, httpx.Client(base_url=url, timeout=30) as client:
        host.close()
        response = client.post("/v1/chat/completions", json=HELLO)
        told = refused(response, 503)
        assert told["type"] == "server_error"
        assert response.headers["retry-after"] == "1"


# ---- keys


@pytest.fixture(scope="module")
def locked(host: SmallHost) -> Iterator[httpx.Client]:
    with (
        running(app_of(host, api_keys=KEYS, body_timeout_s=5)) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        yield client


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(locked: httpx.Client, key: str) -> None:
    for scheme in ("Bearer", "bearer"):
        headers = {"authorization": f"{scheme} {key}".encode()}
        response = locked.post(
            "/v1/chat/completions", json={**HELLO, "max_tokens": 1}, headers=headers
        )
        assert response.status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "Bearer",
        "Bearer first-ke",
        "Bearer first-keyx",
        "Basic first-key",
        "first-key",
    ],
)
def test_wrong_keys_open_nothing(locked: httpx.Client, value: str | None) -> None:
    headers = {} if value is None else {"authorization": value}
    documented = locked.get("/openapi.json").json()["paths"]
    for path, methods in documented.items():
        for method in methods:
            response = locked.request(method, path, headers=headers, json={"wrong": 1})
            if path == "/health":
                assert response.status_code == 200
            else:
                told = refused(response, 401)
                assert (told["type"], told["code"]) == ("authentication_error", "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
    refused(locked.get("/no/such/path", headers=headers), 401)
    refused(locked.post("/health", headers=headers), 401)


def test_no_other_origin_is_let_in(client: httpx.Client) -> None:
    headers = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    response = client.options("/v1/chat/completions", headers=headers)
    assert response.status_code == 405
    response = client.get("/v1/models", headers=headers)
    assert not [name for name in response.headers if name.startswith("access-control")]


# ---- secrets


def test_no_log_has_a_word_of_what_was_asked_or_a_key(
    locked: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    canary = "canary7391"
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    bodies: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": canary}], "max_tokens": 2},
        {"messages": [{"role": "user", "content": canary}], "max_tokens": 2, "stream": True},
        {"messages": [{"role": "user", "content": canary * 900}]},
        {"messages": [{"role": canary, "content": "x"}]},
        {"messages": canary},
        {**HELLO, canary: 1},
        {**HELLO, "model": canary},
        {**HELLO, "temperature": canary},
    ]
    paths = ("/v1/chat/completions", "/v1/completions", "/chat/completions")
    for path in paths:
        for body in bodies:
            prompt = {"prompt": canary, "max_tokens": 1} if path == "/v1/completions" else {}
            locked.post(path, json={**body, **prompt}, headers=headers)
    locked.post("/v1/chat/completions", content=canary, headers={**headers, **JSON})
    locked.post("/v1/completions", json={"prompt": canary}, headers=headers)
    server = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore"))]
    assert any(record.name == "nanoray.access" for record in server)
    told = "\n".join(logging.Formatter().format(record) for record in server)
    assert canary not in told
    assert KEYS[0] not in told
    assert KEYS[0] not in repr(app_of.__globals__["HttpSettings"](api_keys=KEYS))


# ---- many sequences


def test_a_batch_may_wait_but_not_behind_another(client: httpx.Client, host: SmallHost) -> None:
    """4 slots: 16 sequences may wait, more where nothing else does."""
    batch = {"model": "base", "prompt": ["a"] * 30, "max_tokens": 300, "temperature": 1}
    batch["logit_bias"] = {str(token): -100 for token in SPECIAL.values()}
    engine = host.model("base").engine
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/completions", json=batch)
        deadline = time.monotonic() + 20
        while not engine.stats()["waiting"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        told = refused(client.post("/v1/completions", json=batch), 429)
        assert told["type"] == "rate_limit_error"
        assert "ask again" in told["message"]
        assert len(first.result(60).json()["choices"]) == 30
    assert client.post("/v1/completions", json=batch | {"max_tokens": 1}).status_code == 200
