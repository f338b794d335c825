"""The stock client of OpenAI, with all that it can ask."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from engine_models import one_thread  # noqa: F401
from serve_models import BYTES, app_of, running, small_host

openai = pytest.importorskip("openai", reason="the openai client is an extra of dev")
pytestmark = pytest.mark.usefixtures("one_thread")
HELLO = [{"role": "user", "content": "hello"}]
KEY = "a-key-of-this-test"

# What the client can send: a value that is honoured or asks for nothing, and one that is refused.
CHAT_FIELDS: dict[str, tuple[Any, Any]] = {
    "frequency_penalty": (0, 0.5),
    "logit_bias": ({"120": 100}, {"x": 1}),
    "logprobs": (True, "yes"),
    "max_completion_tokens": (2, 0),
    "max_tokens": (2, 0),
    "metadata": ({"a": "b"}, "text"),
    "n": (2, 0),
    "presence_penalty": (0, -0.5),
    "response_format": ({"type": "text"}, {"type": "json_object"}),
    "seed": (1, "one"),
    "stop": (["z"], [1]),
    "store": (False, True),
    "stream": (False, "yes"),
    "temperature": (0.5, 3),
    "tool_choice": ("none", "required"),
    "tools": ([], [{"type": "function", "function": {"name": "f"}}]),
    "top_p": (0.9, 2),
    "user": ("me", 1),
}
NEVER = {
    "audio", "function_call", "functions", "modalities", "moderation", "parallel_tool_calls",
    "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "reasoning_effort", "safety_identifier", "service_tier", "verbosity", "web_search_options",
}  # fmt: skip


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    host = small_host()
    with running(app_of(host, api_keys=(KEY,))) as url:
        yield url + "/v1"
    host.close()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["chat", "calculating", "base"]
    assert client.models.retrieve("base").owned_by == "nanoray"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_chat_whole_and_streamed_and_asynchronous(client: Any, url: str) -> None:
    fields = {
        "model": "calculating",
        "messages": HELLO,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": {"top_k": 5, "min_p": 0.1},
    }
    whole = client.chat.completions.create(**fields)
    message = whole.choices[0].message
    assert message.content == "=yz"
    assert [part["type"] for part in message.parts] == ["text", "python", "python_output", "text"]
    assert whole.choices[0].logprobs.content[0].top_logprobs[0].token == "="
    assert whole.usage.prompt_tokens_details.cached_tokens >= 0
    chunks = list(
        client.chat.completions.create(
            **fields, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == "=yz"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    # The client's own message goes back as it is.
    again = [*HELLO, message, {"role": "user", "content": "and then?"}]
    assert client.chat.completions.create(**{**fields, "messages": again}).choices

    async def text() -> str:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY) as other:
            stream = await other.chat.completions.create(**fields, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(text()) == "=yz"


def test_its_own_accumulator_takes_the_stream(client: Any) -> None:
    fields = {"model": "calculating", "messages": HELLO, "temperature": 0, "n": 2}
    whole = client.chat.completions.create(**fields)
    with client.chat.completions.stream(**fields) as stream:
        final = stream.get_final_completion()
    assert [c.message.content for c in final.choices] == ["=yz", "=yz"]
    assert [c.finish_reason for c in final.choices] == [c.finish_reason for c in whole.choices]


def test_every_parameter_is_honoured_or_refused_by_name(client: Any) -> None:
    create = client.chat.completions.create
    known = set(inspect.signature(create).parameters)
    known -= {"messages", "model", "stream_options", "top_logprobs"}  # elsewhere in this file
    known -= {"extra_headers", "extra_query", "extra_body", "timeout"}  # of the client itself
    for name in known:
        honoured, refused = CHAT_FIELDS.get(name, (None, "value"))
        if name in CHAT_FIELDS:
            fields = {"max_tokens": 2, name: honoured}
            if name == "max_completion_tokens":
                del fields["max_tokens"]
            assert create(model="chat", messages=HELLO, **fields).choices
        else:
            assert name in NEVER or "not known" in _refusal(create, name, refused)
        assert name in _refusal(create, name, refused)


def _refusal(create: Any, name: str, value: Any) -> str:
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="chat", messages=HELLO, extra_body={name: value})
    assert caught.value.param.startswith(name)
    return str(caught.value.message)


def test_completions(client: Any) -> None:
    fields = {"model": "base", "temperature": 0, "max_tokens": 4}
    ids = [BYTES.bos_id, *b"once"]
    answers = [
        client.completions.create(prompt=prompt, **fields).choices[0].text
        for prompt in ("once", ["once"], ids, [ids])
    ]
    assert len(set(answers)) == 1
    scored = client.completions.create(
        **{**fields, "max_tokens": 0}, prompt=[ids, ids], echo=True, logprobs=1
    )
    assert scored.choices[1].logprobs.token_logprobs[0] is None
    assert len(scored.choices[1].logprobs.tokens) == len(ids)
    stream = client.completions.create(prompt="once", stream=True, **fields)
    assert "".join(chunk.choices[0].text for chunk in stream) == answers[0]


def test_errors_have_the_clients_classes(client: Any, url: str) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="nothing") as caught:
        create(model="nothing", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        create(model="chat", messages=[{"role": "user", "content": "x" * 1000}], stream=True)
    assert caught.value.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=url, api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_an_error_within_a_stream_is_raised() -> None:
    host = small_host()
    with running(app_of(host, request_timeout_s=0.3, coalesce_s=0)) as url:
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        fields = {"model": "chat", "messages": HELLO, "n": 8, "logit_bias": {"120": 100}}
        with pytest.raises(openai.APIError, match="longer than"):
            list(client.chat.completions.create(**fields, stream=True))
        with pytest.raises(openai.InternalServerError, match="longer than"):
            client.chat.completions.create(**fields)
    host.close()
