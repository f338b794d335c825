"""The models of a replica: loaded, swapped under streams, refused when broken; their health."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import one_thread, tiny  # noqa: F401
from pydantic import ValidationError
from serve_runs import TOKENIZER, save_run, speaker

from nanoray.config import UsageError
from nanoray.config.serve import ChatServiceConfig, ServeConfig, parse_models
from nanoray.engine import CachedModel, Delta, SamplingParams
from nanoray.errors import NanorayError
from serve.errors import UnknownModelError
from serve.host import Host
from serve.observe import MemoryMeter, Observer

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = TOKENIZER.render_for_completion({"messages": [{"role": "user", "content": "hi"}]})


@pytest.fixture
def host(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr("serve.host._IDLE_S", 0.5)
    host = Host(drain_s=20)
    yield host
    host.close()


def config(*models: dict[str, Any], **changes: Any) -> ChatServiceConfig:
    values = {"num_slots": 4, "max_len": 600, "dtype": "float32"} | changes
    return ChatServiceConfig.model_validate({"models": models, **values})


def chat(run: str = "talk", **changes: Any) -> dict[str, Any]:
    return {"name": "chat", "run": run} | changes


def say(host: Host, name: str | None = None, max_tokens: int = 4) -> str:
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return host.model(name).engine.generate([PROMPT], params)[0].text


async def collect(host: Host, max_tokens: int, started: asyncio.Event) -> list[Delta]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    deltas = []
    async for delta in host.model("chat").engine.stream(PROMPT, params):
        deltas.append(delta)
        started.set()
    return deltas


def engine_threads() -> set[threading.Thread]:
    """Those that run; other tests' may end at any time, so none may be counted on."""
    return {thread for thread in threading.enumerate() if thread.name == "engine"}


# ---- models side by side


def test_models_side_by_side(host: Host) -> None:
    save_run("talk", 10, speaker("a"))
    save_run("talk", 20, speaker("c"))
    save_run("base", 5, speaker("e"), stage="pretrain")
    host.reconfigure(
        config(
            {"name": "new", "run": "talk"},
            {"name": "old", "run": "talk", "step": 10},
            {"name": "base", "run": "base"},
        )
    )
    assert [(m.name, m.step, m.chat) for m in host.models()] == [
        ("new", 20, True),
        ("old", 10, True),
        ("base", 5, False),
    ]
    assert [say(host, name) for name in ("new", "old", "base", None)] == [
        "cdcd",
        "abab",
        "efef",
        "cdcd",
    ]
    with pytest.raises(UnknownModelError, match="no model 'gpt-4' here; the models are new, old"):
        host.model("gpt-4")
    stats = host.stats()
    assert stats["models"]["new"]["generated_tokens"] == 8
    assert stats["draining"] == 0
    json.dumps(stats)


def test_no_model_yet(host: Host) -> None:
    with pytest.raises(UnknownModelError, match="none yet"):
        host.model(None)
    with pytest.raises(NanorayError, match="no model is loaded"):
        asyncio.run(host.health())


# ---- swaps


def test_new_weights_reach_streams_between_two_tokens(host: Host) -> None:
    save_run("talk", 10, speaker("a"))
    save_run("talk", 20, speaker("c"))
    host.reconfigure(config(chat(step=10)))
    engine = host.model("chat").engine

    async def swap_under_streams() -> list[list[Delta]]:
        started = [asyncio.Event() for _ in range(3)]
        streams = [asyncio.ensure_future(collect(host, 500, event)) for event in started]
        await asyncio.gather(*(event.wait() for event in started))
        await asyncio.to_thread(host.reconfigure, config(chat(step=20)))
        return await asyncio.gather(*streams)

    for deltas in asyncio.run(swap_under_streams()):
        text = "".join(delta.text for delta in deltas)
        assert deltas[-1].finish_reason == "length"
        assert len(text) == 500
        cut = text.index("c")
        assert cut > 0
        assert set(text[:cut]) == set("ab")
        assert set(text[cut:]) == set("cd"), "old weights after the new ones"
    assert host.model("chat").engine is engine
    assert host.model("chat").step == 20
    assert say(host) == "cdcd"
    assert engine.stats()["version"] == 1


@pytest.mark.parametrize("change", ["context", "shape"])
def test_another_engine_takes_over_and_the_old_one_drains(host: Host, change: str) -> None:
    save_run("talk", 10, speaker("a"))
    save_run("talk", 20, tiny() if change == "shape" else speaker("c"))
    host.reconfigure(config(chat(step=10)))
    old = host.model("chat").engine
    before = engine_threads()

    async def swap() -> list[Delta]:
        started = asyncio.Event()
        stream = asyncio.ensure_future(collect(host, 500, started))
        await started.wait()
        settings = {"max_len": 300} if change == "context" else {}
        await asyncio.to_thread(host.reconfigure, config(chat(step=20), **settings))
        assert host.stats()["draining"] == 1
        return await stream

    deltas = asyncio.run(swap())
    text = "".join(delta.text for delta in deltas)
    assert text == "ab" * 250
    assert host.model("chat").engine is not old
    say(host)
    wait_for(lambda: len(engine_threads() - before) == 1 and not host.stats()["draining"])
    with pytest.raises(NanorayError, match="closed"):
        old.generate([PROMPT], SamplingParams())


def test_the_number_of_threads_changes_where_the_engine_computes(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run("talk", 10, speaker("a"))
    seen: dict[str, int] = {}
    logits = CachedModel.logits

    def watched(self: CachedModel, hidden: torch.Tensor) -> torch.Tensor:
        seen[threading.current_thread().name] = torch.get_num_threads()
        return logits(self, hidden)

    monkeypatch.setattr(CachedModel, "logits", watched)
    for number in (1, 3, 2):
        host.reconfigure(config(chat(), num_threads=number))
        say(host)
        assert seen.pop("engine") == number
    with pytest.raises(NanorayError, match="step 99"):
        host.reconfigure(config(chat(step=99), num_threads=1))
    say(host)
    assert seen.pop("engine") == torch.get_num_threads() == 2
    assert not seen


def test_what_is_the_same_is_left_alone(host: Host) -> None:
    save_run("talk", 10, speaker("a"))
    save_run("talk", 20, speaker("c"))
    host.reconfigure(config(chat(step=10)))
    engine, created = host.model("chat").engine, host.model("chat").created
    say(host)
    cached = engine.stats()["cached_tokens"]
    host.reconfigure(config(chat(step=10), {"name": "other", "run": "talk"}))
    assert host.model("chat").engine is engine
    assert host.model("chat").created == created
    assert engine.stats()["cached_tokens"] == cached, "its cache was thrown away"
    host.reconfigure(config({"name": "other", "run": "talk"}))
    assert [model.name for model in host.models()] == ["other"]


def test_the_latest_step_moves_only_when_it_is_configured_anew(host: Host) -> None:
    save_run("talk", 10, speaker("a"))
    host.reconfigure(config(chat()))
    save_run("talk", 20, speaker("c"))
    assert (say(host), host.model("chat").step) == ("abab", 10)
    host.reconfigure(config(chat()))
    assert (say(host), host.model("chat").step) == ("cdcd", 20)


def test_a_base_model_becomes_a_chat_model(host: Host) -> None:
    save_run("base", 10, speaker("a"), stage="pretrain")
    save_run("talk", 10, speaker("c"))
    host.reconfigure(config(chat("base")))
    assert not host.model("chat").chat
    host.reconfigure(config(chat("talk")))
    assert host.model("chat").chat


# ---- what is broken


def diverged() -> Any:
    model = speaker("c")
    with torch.no_grad():
        model.wte.weight.fill_(float("nan"))
    return model


@pytest.mark.parametrize("fault", ["missing", "no step", "damaged", "diverged", "half"])
def test_what_cannot_be_served_leaves_everything_as_it_was(host: Host, fault: str) -> None:
    save_run("talk", 10, speaker("a"))
    save_run("good", 10, speaker("e"))
    host.reconfigure(config(chat()))
    before, threads = host.models(), engine_threads()
    new = [chat("broken")]
    if fault == "no step":
        new = [chat(step=99)]
    elif fault == "damaged":
        weights = Path(save_run("broken", 20, speaker("c"))) / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif fault == "diverged":
        save_run("broken", 20, diverged())
    elif fault == "half":  # the first is fine, with new weights; the second is not
        new = [chat("good"), {"name": "second", "run": "broken"}]
    with pytest.raises(NanorayError, match=r"broken|step 99"):
        host.reconfigure(config(*new))
    assert host.models() == before
    assert say(host) == "abab"
    assert engine_threads() <= threads


def test_the_config_is_checked() -> None:
    for wrong in (
        {"models": []},
        {"models": [chat(), chat()]},
        {"models": [chat(name="a b")]},
        {"models": [chat()], "slots": 3},
        {"models": [chat(steps=3)]},
    ):
        with pytest.raises(ValidationError):
            ChatServiceConfig.model_validate(wrong)
    runs = parse_models("demo-sft, demo@400, s3://bucket/x/runs/d12/, /r/e/checkpoints/step_000010")
    assert [(m.name, m.run, m.step) for m in runs] == [
        ("demo-sft", "demo-sft", None),
        ("demo", "demo", 400),
        ("d12", "s3://bucket/x/runs/d12/", None),
        ("e", "/r/e/checkpoints/step_000010", None),
    ]
    parsed = ServeConfig.parse(["--run", "demo", "--step", "3"], "test").models()
    assert [(m.run, m.step) for m in parsed] == [("demo", 3)]
    for flags in ([], ["--run", ","], ["--run=a,b", "--step=1"], ["--run=a", "--port=0"]):
        with pytest.raises(UsageError):
            ServeConfig.parse(flags, "test")


# ---- health


def test_health_runs_the_engine(host: Host) -> None:
    save_run("talk", 10, speaker("a"))
    host.reconfigure(config(chat()))
    for _ in range(3):
        asyncio.run(host.health())
    engine = host.model("chat").engine
    wait_for(lambda: not engine.stats()["busy_slots"])
    assert engine.stats()["generated_tokens"] == 3
    assert engine.stats()["cached_tokens"] == 2, "probes take one slot"


def test_health_notices_an_engine_that_stands_still(host: Host) -> None:
    save_run("talk", 10, speaker("a"))
    host.reconfigure(config(chat()))
    engine = host.model("chat").engine
    engine.start()
    engine.pause()
    start = time.monotonic()
    with pytest.raises(NanorayError, match=r"chat computed nothing for 0\.3 s"):
        asyncio.run(host.health(0.3))
    assert time.monotonic() - start < 2
    engine.resume()
    asyncio.run(host.health())
    wait_for(lambda: not engine.stats()["busy_slots"])
    engine.close()
    with pytest.raises(NanorayError, match="closed"):
        asyncio.run(host.health())


def test_health_under_load_waits_for_nobody(host: Host) -> None:
    save_run("talk", 10, speaker("a"))
    host.reconfigure(config(chat(), num_slots=1))

    async def check() -> None:
        started = asyncio.Event()
        streams = [asyncio.ensure_future(collect(host, 150, started)) for _ in range(4)]
        await started.wait()
        before = time.monotonic()
        await host.health(10)
        assert time.monotonic() - before < 1
        assert not all(stream.done() for stream in streams)
        await asyncio.gather(*streams)

    asyncio.run(check())


# ---- what it tells


def test_engines_are_watched(host: Host) -> None:
    save_run("talk", 10, speaker("a"))
    host.reconfigure(config(chat()))
    meter = MemoryMeter()
    observer = Observer(meter)

    def usage() -> float:
        observer.engines(host.stats()["models"])
        return meter.gauges["nanoray_kv_cache_usage_perc", labels]

    async def usage_while_one_answers() -> float:
        started = asyncio.Event()
        stream = asyncio.ensure_future(collect(host, 300, started))
        await started.wait()
        used = usage()
        await stream
        return used

    labels = (("model", "chat"),)
    say(host)
    observer.engines(host.stats()["models"])
    say(host)
    say(host)
    observer.engines(host.stats()["models"])
    assert meter.counters["nanoray_prefix_cache_queries", labels] == 3 * len(PROMPT)
    assert meter.counters["nanoray_prefix_cache_hits", labels] == 2 * (len(PROMPT) - 1)
    assert meter.gauges["nanoray_num_requests_running", labels] == 0
    wait_for(lambda: not host.model("chat").engine.stats()["busy_slots"])
    assert usage() == 0, "prefixes that are kept are not in use"
    assert len(PROMPT) / 2400 <= asyncio.run(usage_while_one_answers()) <= 600 / 2400
    host.reconfigure(config(chat(), max_len=300))  # another engine counts from zero
    say(host)
    observer.engines(host.stats()["models"])
    assert meter.counters["nanoray_prefix_cache_queries", labels] == 5 * len(PROMPT)


def wait_for(condition: Any, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
