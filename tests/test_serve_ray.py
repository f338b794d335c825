"""The chat under real Serve: swapped, broken, overrun and robbed of a replica while it answers."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve_cluster import CANARY, KEY, ROOT, Cluster, free_port, wait_for
from serve_runs import save_run, speaker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for all tests here, with two replicas that serve run `talk`, step 10: "abab…"."""
    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORAY_HOME", str(folder / "home"))
        for step, letter in ((10, "a"), (20, "c")):
            save_run("talk", step, speaker(letter))
        weights = Path(save_run("talk", 30, speaker("e"))) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-7])
        cluster = Cluster(folder)
        try:
            cluster.deploy_by_command(cluster.config(models=[model(10)]))
            wait_for(cluster.is_running, 200, "the service")
            yield cluster
        finally:
            cluster.stop()
            shutil.rmtree(cluster.temp, ignore_errors=True)


def model(step: int) -> dict[str, Any]:
    return {"name": "talk", "run": "talk", "step": step}


def question(max_tokens: int, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{CANARY} how are you?"}]
    return {"messages": messages, "temperature": 0, "max_tokens": max_tokens} | changes


def client(cluster: Cluster) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=300)
    return httpx.AsyncClient(base_url=cluster.url, headers=HEADERS, limits=limits, timeout=60)


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


async def stream(http: httpx.AsyncClient, max_tokens: int, started: asyncio.Event) -> Any:
    """An answer's text, its finish reason, and the error that ended it."""
    text, reason, error = "", None, None
    body = question(max_tokens, stream=True)
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        async for event in events(response):
            started.set()
            if error := event.get("error"):
                break
            choice = event["choices"][0]
            text += choice["delta"].get("content") or ""
            reason = choice["finish_reason"] or reason
    return text, reason, error


async def start_streams(http: httpx.AsyncClient, number: int, max_tokens: int) -> list[Any]:
    """Streams whose first token is there."""
    started = [asyncio.Event() for _ in range(number)]
    tasks = [asyncio.ensure_future(stream(http, max_tokens, event)) for event in started]
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in started)), 30)
    return tasks


async def answer(http: httpx.AsyncClient, max_tokens: int = 4) -> str:
    response = await http.post("/v1/chat/completions", json=question(max_tokens))
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


async def all_answer(http: httpx.AsyncClient, text: str, seconds: float = 30) -> None:
    """Wait until both replicas give an answer: it comes ten times in a row."""
    deadline = time.monotonic() + seconds
    in_a_row = 0
    while in_a_row < 10:
        assert time.monotonic() < deadline, f"{text} is not what they say"
        in_a_row = in_a_row + 1 if await answer(http) == text else 0


def test_new_weights_cut_no_stream(cluster: Cluster) -> None:
    pids = cluster.replicas()
    assert len(pids) == 2

    async def swap() -> None:
        async with client(cluster) as http:
            await all_answer(http, "abab")
            streams = await start_streams(http, 8, 2500)
            await asyncio.to_thread(cluster.deploy, cluster.config(models=[model(20)]))
            await all_answer(http, "cdcd")
            assert not all(task.done() for task in streams), "the swap was not under load"
            for text, reason, error in await asyncio.gather(*streams):
                assert (len(text), reason, error) == (2500, "length", None)
                cut = text.index("c")
                assert set(text[:cut]) == set("ab")
                assert set(text[cut:]) == set("cd")

    asyncio.run(swap())
    assert cluster.replicas() == pids, "replicas were replaced"


def test_a_broken_checkpoint_leaves_the_old_version_serving(cluster: Cluster) -> None:
    pids = cluster.replicas()
    cluster.deploy(cluster.config(models=[model(20)]))
    wait_for(cluster.is_running, 30, "the good config")

    def refusal() -> Any:
        return httpx.get(f"{cluster.url}/stats", headers=HEADERS, timeout=30).json()["refused"]

    async def ask() -> None:
        async with client(cluster) as http:
            await all_answer(http, "cdcd")

    for broken in ({"models": [model(30)]}, {"models": [model(20)], "num_slot": 3}):
        cluster.deploy(cluster.config(**broken))
        message = wait_for(refusal, 30, "the refusal")
        assert "model.safetensors is damaged" in message or "num_slot: Extra inputs" in message
        asyncio.run(ask())
        assert cluster.replicas() == pids
        cluster.deploy(cluster.config(models=[model(20)]))
        wait_for(lambda: not any(refusal() for _ in range(10)), 30, "the good config again")


def test_a_second_turn_finds_its_prefix(cluster: Cluster) -> None:
    async def converse(http: httpx.AsyncClient, session: int) -> tuple[int, int]:
        said = f"{CANARY} {session} " * 12
        messages: list[dict[str, Any]] = [{"role": "user", "content": said}]
        for _ in range(2):
            response = await http.post(
                "/v1/chat/completions",
                json=question(8, messages=messages),
                headers={"x-session-id": f"session-{session}"},
            )
            found = response.json()
            message = found["choices"][0]["message"]
            messages += [{"role": "assistant", "content": message["content"]}]
            messages += [{"role": "user", "content": "go on"}]
            if len(messages) == 3:
                first = found["usage"]["prompt_tokens"]
        return first, found["usage"]["prompt_tokens_details"]["cached_tokens"]

    async def sessions() -> None:
        async with client(cluster) as http:
            for session in range(8):
                first, cached = await converse(http, session)
                assert cached >= first, f"session {session} went to another replica"

    asyncio.run(sessions())


def test_too_many_are_refused_at_once(cluster: Cluster) -> None:
    async def ask(http: httpx.AsyncClient) -> tuple[float, httpx.Response]:
        start = time.perf_counter()
        response = await http.post("/v1/chat/completions", json=question(150))
        return time.perf_counter() - start, response

    async def overrun() -> None:
        async with client(cluster) as http:
            await all_answer(http, "cdcd")
            answers = await asyncio.gather(*(ask(http) for _ in range(150)))
            refused = [(s, r) for s, r in answers if r.status_code != 200]
            accepted = [(s, r) for s, r in answers if r.status_code == 200]
            assert len(accepted) >= 30
            assert refused
            for _, response in refused:
                assert response.status_code == 429
                assert response.headers["retry-after"] == "2"
                assert response.json()["error"]["type"] == "rate_limit_error"
            typical = [statistics.median(s for s, _ in some) for some in (refused, accepted)]
            assert typical[0] < typical[1], "who is refused waits as long as who is answered"
            for _, response in accepted:
                text = response.json()["choices"][0]["message"]["content"]
                assert text == "cd" * 75
            await all_answer(http, "cdcd")

    asyncio.run(overrun())


def test_a_lost_replica(cluster: Cluster) -> None:
    pids = cluster.replicas()

    async def lose() -> None:
        async with client(cluster) as http:
            await all_answer(http, "cdcd")
            streams = await start_streams(http, 8, 1500)
            os.kill(pids[0], signal.SIGKILL)
            results = await asyncio.gather(*streams)
            lost = [result for result in results if result[2]]
            assert 0 < len(lost) < len(results), "the kill hit all or nobody"
            for text, reason, error in results:
                assert text == ("cd" * 750)[: len(text)]
                if error:
                    assert error["code"] == "replica_lost"
                else:
                    assert (len(text), reason) == (1500, "length")
            await all_answer(http, "cdcd")

    asyncio.run(lose())
    wait_for(lambda: len(cluster.replicas()) == 2, 60, "another replica")
    assert pids[1] in cluster.replicas()
    wait_for(cluster.is_running, 60, "the service")


def test_errors_of_the_proxy_have_the_apis_form(cluster: Cluster) -> None:
    huge = b"{" + b" " * (17 * 2**20)
    response = httpx.post(f"{cluster.url}/v1/completions", content=huge, headers=HEADERS)
    assert response.status_code == 413
    assert "error" in response.json()
    response = httpx.post(
        f"{cluster.url}/v1/chat/completions",
        json=question(2),
        headers={**HEADERS, "x-session-id": "caf\u00e9".encode("latin-1")},  # type: ignore[dict-item]
    )
    assert response.status_code == 200
    assert httpx.get(f"{cluster.url}/v1/models").status_code == 401


def test_a_request_begins_when_the_proxy_has_all_of_it(cluster: Cluster) -> None:
    """A client that sends slowly is no latency of ours, and its own word of it is not believed."""

    def dripping() -> Iterator[bytes]:
        body = json.dumps(question(2)).encode()
        yield body[:20]
        time.sleep(1.5)
        yield body[20:]

    headers = {**HEADERS, "content-type": "application/json"}
    headers["x-nanoray-arrival"] = str(time.time() - 300)  # a client's own is not believed
    response = httpx.post(
        f"{cluster.url}/v1/chat/completions", content=dripping(), headers=headers, timeout=30
    )
    answer_id = response.json()["id"]

    def line() -> Any:
        """Of the replicas' access logs."""
        for path in cluster.logs():
            if path.name.startswith("replica_chat_Chat"):
                for text in path.read_text().splitlines():
                    if answer_id in text:
                        return json.loads(text[text.index("{") :])

    times = wait_for(line, 20, "the request's line in the log")
    for name in ("request_queue_time", "time_to_first_token", "e2e_request_latency"):
        assert 0 <= times[f"{name}_s"] < 1.4


@pytest.mark.soak
def test_replicas_follow_the_load(cluster: Cluster) -> None:
    config = cluster.config(models=[model(20)])
    deployment = config["applications"][0]["deployments"][0]
    del deployment["num_replicas"]
    deployment["autoscaling_config"] = {
        **{"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2},
        **{"upscale_delay_s": 1, "downscale_delay_s": 5},
    }
    cluster.deploy(config)
    wait_for(lambda: len(cluster.replicas()) == 1, 90, "one replica")

    async def load() -> None:
        async with client(cluster) as http:
            while len(cluster.replicas()) < 2:
                streams = await start_streams(http, 6, 1500)
                for text, reason, error in await asyncio.gather(*streams):
                    assert (text, reason, error) == ("cd" * 750, "length", None)

    asyncio.run(asyncio.wait_for(load(), 120))
    wait_for(lambda: len(cluster.replicas()) == 1, 120, "one replica")
    cluster.deploy(cluster.config(models=[model(20)]))
    wait_for(lambda: len(cluster.replicas()) == 2, 90, "two replicas")
    wait_for(cluster.is_running, 60, "the service")


def test_the_job_leaves_alone_what_others_serve(cluster: Cluster) -> None:
    port = cluster.url.rsplit(":", 1)[1]
    refused = cluster.job("--run", "talk", "--step", "20", "--port", port)
    assert refused.returncode == 1
    assert "serves an application chat already" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert httpx.get(f"{cluster.url}/v1/models", headers=HEADERS).status_code == 200


def test_no_word_and_no_key_is_in_any_log(cluster: Cluster) -> None:
    """Last: all that the tests above have sent."""
    assert "talk" in cluster.status()
    assert KEY not in cluster.status()
    names = []
    for path in cluster.logs():
        data = path.read_bytes()
        names.append(path.name)
        for secret in (CANARY, KEY, "cdcdcdcd"):
            assert secret.encode() not in data, f"{secret} is in {path}"
        assert b"was not set before `ray start`" not in data  # serve_cluster.py sets it
    access = [name for name in names if name.startswith("replica_chat_Chat")]
    assert access, "the replicas' logs were not among them"


def test_the_job_serves_and_drains(tmp_path: Path, home: Path) -> None:
    save_run("talk", 10, speaker("a"))
    port = free_port()
    flags = f"--run talk --port {port} --max-len 4000 --dtype float32 --root-path /chat"
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(
            [sys.executable, "-m", "jobs.serve", *flags.split()],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        said = (tmp_path / "log").read_text
        wait_for(lambda: "ready: " in said() or job.poll() is not None, 200, "the service")
        url = f"http://127.0.0.1:{port}/chat"
        assert f"ready: {url}/" in said()
        assert "/chat" in httpx.get(f"{url}/v1/models").url.path
        assert httpx.get(f"{url}/").status_code == 200

        async def drain() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=60) as http:
                (task,) = await start_streams(http, 1, 1500)
                job.send_signal(signal.SIGINT)
                text, reason, error = await task
                assert (text, reason, error) == ("ab" * 750, "length", None)

        asyncio.run(drain())
        assert job.wait(40) == 0, said()
        assert "Traceback" not in said()
    finally:
        job.kill()
