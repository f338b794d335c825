"""An engine that fails at a request is the server's fault, whatever the request asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from engine_models import one_thread, tiny  # noqa: F401
from serve_models import SmallHost, app_of, running, served

from serve.observe import MemoryMeter, Observer

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = {"prompt": "once upon a time", "model": "sick"}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "generated": ("/v1/completions", PROMPT),
    "scored": ("/v1/completions", {**PROMPT, "echo": True, "logprobs": 1, "max_tokens": 0}),
    "scored and generated": ("/v1/completions", {**PROMPT, "echo": True, "logprobs": 1}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
}


@pytest.fixture(params=["not finite", "failing"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHost]:
    model = tiny()
    if request.param == "not finite":
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
    host = SmallHost(served("sick", model))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the device is lost")

    if request.param == "failing":
        monkeypatch.setattr(host.model("sick").engine._scheduler, "_forward", fail)
    yield host
    host.close()


@pytest.mark.parametrize("name", REQUESTS)
def test_an_engine_that_fails_is_the_servers_fault(host: SmallHost, name: str) -> None:
    meter = MemoryMeter()
    path, body = REQUESTS[name]
    with running(app_of(host, Observer(meter))) as url:
        for stream in (False, True):
            response = httpx.post(url + path, json=body | {"stream": stream}, timeout=30)
            assert response.status_code == 500, response.text
            told = response.json()["error"]
            assert (told["type"], told["code"]) == ("server_error", "model_error")
            assert "not finite" in told["message"] or "device is lost" in told["message"]
    failures = {key: n for key, n in meter.counters.items() if key[0] == "nanoray_request_failure"}
    labels = (("model", "sick"), ("status", "500"))
    assert failures == {("nanoray_request_failure", labels): 2}
