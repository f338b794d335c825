"""A replica by itself, without Serve: what it does with a config."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from engine_models import one_thread  # noqa: F401
from serve_runs import save_run, speaker

import serve.app

pytestmark = pytest.mark.usefixtures("one_thread")


def config(step: int) -> dict[str, Any]:
    models = [{"name": "talk", "run": "talk", "step": step}]
    return {"models": models, "num_slots": 2, "max_len": 200, "dtype": "float32"}


def test_a_config_that_was_refused_is_tried_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run("talk", 10, speaker("a"))
    weights = Path(save_run("talk", 20, speaker("c"))) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-7])
    monkeypatch.setattr(serve.app, "_RETRY_EVERY_S", 0.1)
    monkeypatch.setattr(serve.app, "_GAUGES_EVERY_S", 0.05)

    async def scenario() -> None:
        replica = serve.app.Chat()
        host = replica._host

        def step() -> int:
            (served,) = host.models()
            return served.step

        await replica.reconfigure(config(10))
        await replica.reconfigure(config(20))  # no error: Serve would stop it
        assert step() == 10
        assert host.refused is not None
        assert "damaged" in host.refused
        await asyncio.sleep(0.4)
        assert step() == 10
        weights.write_bytes(whole)
        for _ in range(200):
            await asyncio.sleep(0.05)
            if host.refused is None:
                break
        assert (step(), host.refused) == (20, None)
        weights.write_bytes(whole[:-7])
        await replica.reconfigure(config(10) | {"num_slots": 0})
        assert host.refused is not None
        await replica.reconfigure(config(10))  # what was asked for last counts
        await asyncio.sleep(0.4)
        assert (step(), host.refused) == (10, None)
        replica._watch.cancel()
        host.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
