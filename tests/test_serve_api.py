"""The API's answers: chat and completions, whole and streamed, against the engine itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_models import one_thread  # noqa: F401
from serve_models import BYTES, SPECIAL, AsgiClient, SmallHost, app_of, running, small_host

from nanoray.engine import SamplingParams
from serve.observe import MemoryMeter, Observer
from serve.schemas import ChatCompletionChunk

pytestmark = pytest.mark.usefixtures("one_thread")
HELLO = {"messages": [{"role": "user", "content": "hello"}]}
METER = MemoryMeter()


@pytest.fixture(scope="module")
def host() -> Iterator[SmallHost]:
    host = small_host()
    yield host
    host.close()


@pytest.fixture(scope="module")
def client(host: SmallHost) -> Iterator[httpx.Client]:
    with (
        running(app_of(host, Observer(METER))) as url,
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        yield client


def ask(client: httpx.Client, path: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body if "prompt" in body else {**HELLO, **body})
    assert response.status_code == 200, response.text
    return response.json()


def events(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The data of all events but [DONE], which must be the last."""
    body = {**(body if "prompt" in body else {**HELLO, **body}), "stream": True}
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *frames, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(frame.startswith("data: ") for frame in frames)
    return [json.loads(frame[6:]) for frame in frames]


def error(response: httpx.Response) -> dict[str, Any]:
    assert response.json().keys() == {"error"}, response.text
    told = response.json()["error"]
    assert told.keys() == {"message", "type", "param", "code"}
    return told


# ---- models


def test_models_are_listed_and_found(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [(card["id"], card["chat"]) for card in listed] == [
        ("chat", True),
        ("calculating", True),
        ("base", False),
    ]
    assert client.get("/v1/models/base").json() == listed[2]
    assert error(client.get("/v1/models/nothing"))["code"] == "model_not_found"


def test_a_base_model_does_not_chat(client: httpx.Client) -> None:
    response = client.post("/v1/chat/completions", json={**HELLO, "model": "base"})
    assert response.status_code == 400
    assert error(response)["param"] == "model"
    assert "/v1/completions" in error(response)["message"]


# ---- chat


@pytest.mark.parametrize("temperature", [0, 1.3])
def test_chat_says_what_the_engine_says(
    client: httpx.Client, host: SmallHost, temperature: float
) -> None:
    prompt = BYTES.render_for_completion({"messages": HELLO["messages"]})
    params = SamplingParams(temperature=temperature, seed=5, n=3, max_tokens=20, stop=("q",))
    wanted = host.model("chat").engine.generate([prompt], params)
    fields = {"temperature": temperature, "seed": 5, "n": 3, "max_tokens": 20, "stop": "q"}
    answer = ask(client, **fields)
    chunks = events(client, "/v1/chat/completions", **fields)
    for index, completion in enumerate(wanted):
        choice = answer["choices"][index]
        assert "".join(part["text"] for part in choice["message"]["parts"]) == completion.text
        assert choice["finish_reason"] == completion.finish_reason
        streamed = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        pieces = [c["delta"].get("content", "") for c in streamed]
        assert "".join(pieces) == choice["message"]["content"]
        tools = [c["delta"]["tool"]["text"] for c in streamed if "tool" in c["delta"]]
        assert len("".join(tools)) + len("".join(pieces)) == len(completion.text)
        assert [c["finish_reason"] for c in streamed][-1] == completion.finish_reason
        roles = [c["delta"].get("role") for c in streamed]
        assert roles == ["assistant"] + [None] * (len(streamed) - 1)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    assert usage["completion_tokens"] == sum(len(c.tokens) for c in wanted)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)


def test_the_calculators_calls_are_parts_and_not_content(client: httpx.Client) -> None:
    message = ask(client, model="calculating", temperature=0)["choices"][0]["message"]
    assert message["content"] == "=yz"
    assert [(part["type"], part["text"]) for part in message["parts"]] == [
        ("text", "="),
        ("python", "6*7"),
        ("python_output", "42"),
        ("text", "yz"),
    ]
    chunks = events(client, "/v1/chat/completions", model="calculating", temperature=0)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    tools: dict[str, str] = {}
    for delta in deltas:
        if "tool" in delta:
            kind = delta["tool"]["type"]
            tools[kind] = tools.get(kind, "") + delta["tool"]["text"]
    assert tools == {"python": "6*7", "python_output": "42"}
    assert "".join(delta.get("content", "") for delta in deltas) == "=yz"


def test_an_answer_sent_back_is_found_in_the_cache(client: httpx.Client) -> None:
    question = {"role": "user", "content": "a question that nobody has asked before"}
    first = ask(client, model="calculating", temperature=0, messages=[question])
    answer = first["choices"][0]["message"]
    used = first["usage"]["prompt_tokens"] + first["usage"]["completion_tokens"]
    again = {"role": "user", "content": "and more"}
    for form in (answer, {"role": "assistant", "content": answer["parts"]}):
        second = ask(client, model="calculating", temperature=0, messages=[question, form, again])
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert used - 1 <= cached < second["usage"]["prompt_tokens"]


def test_usage_of_a_stream_comes_last_and_only_if_asked(client: httpx.Client) -> None:
    fields = {"temperature": 0, "max_tokens": 5}
    whole = ask(client, **fields)
    plain = events(client, "/v1/chat/completions", **fields)
    assert not any(chunk.get("usage") for chunk in plain)
    asked = events(client, "/v1/chat/completions", stream_options={"include_usage": True}, **fields)
    assert asked[-1]["choices"] == []
    assert asked[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 5
    assert not any(chunk.get("usage") for chunk in asked[:-1])


def test_logprobs_are_the_models(client: httpx.Client, host: SmallHost) -> None:
    fields = {"model": "calculating", "temperature": 0, "logprobs": True, "top_logprobs": 3}
    answer = ask(client, **fields)["choices"][0]["logprobs"]["content"]
    assert [bytes(token["bytes"]) for token in answer] == [b"=", b"y", b"z"]
    for token in answer:
        assert len(token["top_logprobs"]) == 3
        assert token["top_logprobs"][0]["bytes"] == token["bytes"]
        assert token["top_logprobs"][0]["logprob"] == pytest.approx(token["logprob"], abs=1e-5)
    prompt = BYTES.render_for_completion({"messages": HELLO["messages"]})
    scores = host.model("calculating").engine.score([[*prompt, ord("=")]])[0]
    assert answer[0]["logprob"] == pytest.approx(scores[-1], abs=1e-4)
    chunks = events(client, "/v1/chat/completions", **fields)
    listed = [c["choices"][0]["logprobs"] for c in chunks]
    assert [t["token"] for part in listed if part for t in part["content"]] == ["=", "y", "z"]


def test_logit_bias_forces_and_forbids(client: httpx.Client) -> None:
    forced = ask(client, temperature=1, logit_bias={"120": 100}, max_tokens=4)
    assert forced["choices"][0]["message"]["content"] == "xxxx"
    stopped = ask(client, logit_bias={str(SPECIAL["<|assistant_end|>"]): 100})
    assert stopped["choices"][0]["message"]["content"] == ""
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens"] == 1


def test_a_seed_repeats_and_its_absence_does_not(client: httpx.Client) -> None:
    def texts(**fields: Any) -> list[str]:
        answers = [ask(client, max_tokens=12, **fields) for _ in range(2)]
        return [json.dumps(answer["choices"][0]["message"]) for answer in answers]

    assert len(set(texts(seed=1))) == 1
    assert len(set(texts())) == 2


def test_temperature_zero_takes_filters_along(client: httpx.Client) -> None:
    plain = ask(client, temperature=0, max_tokens=6)
    filtered = ask(client, temperature=0, max_tokens=6, top_p=0.5, top_k=3, min_p=0.1)
    assert plain["choices"] == filtered["choices"]


def test_system_messages_and_parts_of_text(client: httpx.Client) -> None:
    as_parts = [
        {
            "role": "system",
            "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "x"}],
        },
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    as_text = [{"role": "system", "content": "be x"}, {"role": "user", "content": "hello"}]
    in_newer_words = [{"role": "developer", "content": "be x"}, as_text[1]]
    one, *others = (
        ask(client, messages=messages, temperature=0, max_tokens=9)
        for messages in (as_parts, as_text, in_newer_words)
    )
    for other in others:
        assert one["choices"] == other["choices"]
        assert one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
def test_the_first_token_is_sent_at_once_and_later_ones_together(
    host: SmallHost, path: str
) -> None:
    body = {**HELLO, "max_tokens": 200, "stream": True, "logit_bias": {"120": 100}}
    if path == "/chat/completions":
        body = {**HELLO, "max_tokens": 200, "temperature": 0}  # a random answer may end at once
    client = AsgiClient(path, body)
    asyncio.run(client.run(app_of(host, coalesce_s=0.1)))
    first, *rest = (piece.decode() for piece in client.bodies)
    assert first.count("data: ") == 1
    assert rest[-1].endswith("\n\n")
    # On a slow machine a pause has few tokens; but without pauses each would come alone.
    assert 1 <= len(rest) < 100


# ---- completions


def test_completions_of_text_lists_and_ids(client: httpx.Client, host: SmallHost) -> None:
    fields = {"model": "base", "temperature": 0, "max_tokens": 6}
    ids = [BYTES.bos_id, *b"once"]
    wanted = host.model("base").engine.generate([ids], SamplingParams(temperature=0, max_tokens=6))
    for prompt, number in (("once", 1), (["once", "once"], 2), (ids, 1), ([ids, ids], 2)):
        choices = ask(client, "/v1/completions", prompt=prompt, **fields)["choices"]
        assert [choice["index"] for choice in choices] == list(range(number))
        assert {choice["text"] for choice in choices} == {wanted[0].text}
    several = ask(client, "/v1/completions", prompt=["once", "upon"], n=2, **fields)["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2, 3]
    assert several[0]["text"] == several[1]["text"] == wanted[0].text != several[2]["text"]
    chunks = events(client, "/v1/completions", prompt=["once", "upon"], n=2, echo=True, **fields)
    for choice in several:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        prompt = "once" if choice["index"] < 2 else "upon"
        assert "".join(piece["text"] for piece in pieces) == prompt + choice["text"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_echo_scores_the_prompt(client: httpx.Client, host: SmallHost, max_tokens: int) -> None:
    prompts = [[BYTES.bos_id, *"Grüße".encode()], [*b"other words"]]
    engine = host.model("base").engine
    scores = engine.score(prompts)
    fields = {"model": "base", "prompt": prompts, "echo": True, "logprobs": 2, "temperature": 0}
    answer = ask(client, "/v1/completions", max_tokens=max_tokens, **fields)
    for prompt, score, choice in zip(prompts, scores, answer["choices"]):
        listed = choice["logprobs"]
        lengths = {len(column) for column in listed.values()}
        assert lengths == {len(prompt) + max_tokens}
        assert listed["token_logprobs"][0] is None
        assert listed["token_logprobs"][1 : len(prompt)] == pytest.approx(score, abs=1e-5)
        assert listed["top_logprobs"][0] is None
        for token, value, top in list(
            zip(listed["tokens"], listed["token_logprobs"], listed["top_logprobs"])
        )[1:]:
            assert top[token] == value  # exactly: harnesses compare them
            assert len(top) in (2, 3)
            assert max(top.values()) >= value
        assert choice["text"].startswith(BYTES.decode(prompt))
        assert choice["finish_reason"] in ("length", "stop")
    assert answer["usage"]["completion_tokens"] == 2 * max_tokens


def test_text_offsets_point_into_the_text(client: httpx.Client) -> None:
    fields = {"model": "base", "prompt": "Grüße", "echo": True, "logprobs": 0, "max_tokens": 0}
    choice = ask(client, "/v1/completions", **fields)["choices"][0]
    assert choice["text"] == "Grüße"
    assert choice["logprobs"]["tokens"][:2] == ["G", "r"]
    assert choice["logprobs"]["tokens"][2:4] == ["bytes:\\xc3", "bytes:\\xbc"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 2, 3, 3, 4, 5][: len("Grüße".encode())]
    # BOS stands before it unseen, so that the first one has a log-probability, too.
    assert all(value < 0 for value in choice["logprobs"]["token_logprobs"])


def test_what_no_utf8_can_hold_is_replaced(client: httpx.Client) -> None:
    content = b'{"model": "base", "prompt": "a\\ud800b", "echo": true, "max_tokens": 0}'
    headers = {"content-type": "application/json"}
    response = client.post("/v1/completions", content=content, headers=headers)
    assert response.json()["choices"][0]["text"] == "a\ufffdb"


def test_a_tools_output_has_no_logprob(client: httpx.Client) -> None:
    prompt = BYTES.render_for_completion({"messages": HELLO["messages"]})
    fields = {"model": "calculating", "prompt": prompt, "logprobs": 1, "temperature": 0}
    choice = ask(client, "/v1/completions", **fields)["choices"][0]
    assert choice["text"] == "=6*742yz"
    listed = dict(zip(choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]))
    assert listed["2"] is None
    assert listed["y"] < 0
    assert "<|assistant_end|>" in listed


# ---- nanochat's routes


def test_februarys_frames(client: httpx.Client) -> None:
    body = {**HELLO, "temperature": 0, "max_tokens": 9, "top_k": 0}
    response = client.post("/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = [json.loads(frame[6:]) for frame in response.text.split("\n\n")[:-1]]
    assert frames.pop() == {"done": True}
    assert all(frame.keys() == {"token", "gpu"} and frame["gpu"] == 0 for frame in frames)
    wanted = ask(client, temperature=0, max_tokens=9)["choices"][0]["message"]["content"]
    assert "".join(frame["token"] for frame in frames) == wanted


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 2.1},
        {"temperature": -0.1},
        {"top_k": 201},
        {"top_k": -1},
        {"max_tokens": 0},
        {"max_tokens": 4097},
        {"messages": []},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x" * 8001}]},
        {"messages": [{"role": "user", "content": "x"}] * 501},
        {
            "messages": [
                {"role": "user" if i % 2 == 0 else "assistant", "content": "x" * 8000}
                for i in range(5)
            ]
        },
    ],
)
def test_februarys_limits(client: httpx.Client, change: dict[str, Any]) -> None:
    response = client.post("/chat/completions", json={**HELLO, **change})
    assert response.status_code == 400
    field = next(iter(change))
    assert field in str(error(response)["param"])


def test_health_and_stats(client: httpx.Client, host: SmallHost) -> None:
    assert client.get("/health").json()["ready"] is True
    host.sick = "the engine of model chat computed nothing for 5 s; restart this replica"
    response = client.get("/health")
    host.sick = None
    assert response.status_code == 503
    assert "computed nothing" in error(response)["message"]
    stats = client.get("/stats").json()
    assert stats["total_workers"] == 12
    assert stats["busy_workers"] == 0
    assert stats["models"]["chat"]["generated_tokens"] > 0


# ---- the page, records


def test_the_page_is_served_with_its_policy(client: httpx.Client) -> None:
    page = client.get("/")
    if page.status_code == 404:
        pytest.skip("there is no page in serve/ui yet")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for file in Path(__file__).parents[1].glob("serve/ui/*.js"):
        script = client.get(f"/{file.name}")
        assert script.headers["content-type"].startswith("text/javascript")
        assert script.text == file.read_text("utf-8")
    assert client.get("/../http.py").status_code == 404
    assert client.get("/%2e%2e/http.py").status_code == 404


def test_every_request_is_recorded_once(host: SmallHost, client: httpx.Client) -> None:
    METER.counters.clear()
    ask(client, temperature=0, max_tokens=3)
    events(client, "/v1/completions", prompt="a", model="base", max_tokens=3)
    client.post("/v1/chat/completions", json={**HELLO, "model": "gone"})
    client.post("/v1/chat/completions", json={"words of the client": 1})
    client.get("/words of the client")
    counted: dict[tuple[str, ...], float] = {}
    for (name, labels), value in METER.counters.items():
        if name.startswith("nanoray_request"):
            counted[name, *(value for _, value in labels)] = value
    assert counted == {
        ("nanoray_request_success", "length", "chat"): 1,
        ("nanoray_request_success", "length", "base"): 1,
        ("nanoray_request_failure", "", "404"): 2,
        ("nanoray_request_failure", "", "400"): 1,
    }
