"""Without Serve: what a replica does with a config, and what the deployment is built of."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from engine_models import one_thread  # noqa: F401
from ray.serve import Application, Deployment
from serve_runs import save_run, speaker

import serve.app
from nanoray.config.serve import ChatServiceConfig
from serve.app import AppArgs
from serve.observe import MemoryMeter
from serve.proxy import CALLBACK

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
        replica._observer.meter = meter = MemoryMeter()
        gauges = meter.gauges

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
        assert gauges["nanoray_config_refused", ()] == 1
        weights.write_bytes(whole)
        for _ in range(200):
            await asyncio.sleep(0.05)
            if host.refused is None:
                break
        assert (step(), host.refused) == (20, None)
        await asyncio.sleep(0.2)
        assert gauges["nanoray_config_refused", ()] == 0
        weights.write_bytes(whole[:-7])
        await replica.reconfigure(config(10) | {"num_slots": 0})
        assert host.refused is not None
        await replica.reconfigure(config(10))  # what was asked for last counts
        await asyncio.sleep(0.4)
        assert (step(), host.refused) == (10, None)
        replica._watch.cancel()
        host.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize("is_set", [False, True])
def test_a_proxy_without_our_part_is_warned_of(
    is_set: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name,) = CALLBACK
    monkeypatch.delenv(name, raising=False)
    if is_set:
        monkeypatch.setenv(name, CALLBACK[name])
    logger = logging.getLogger("ray.serve")  # hands nothing on to the root's
    logger.addHandler(caplog.handler)

    async def start() -> None:
        serve.app.Chat()._watch.cancel()

    try:
        asyncio.run(start())
    finally:
        logger.removeHandler(caplog.handler)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [name in warning for warning in warnings] == ([] if is_set else [True])


# ---- the deployment


def built(application: Application) -> Deployment:
    """What Serve is given."""
    deployment: Deployment = application._bound_deployment
    return deployment


def test_the_builder_of_the_command(home: Path) -> None:
    """``serve run serve.app:app run=talk replicas=1:4 …``"""
    save_run("talk", 10, speaker("a"))
    args = AppArgs.model_validate(
        {"run": "talk", "replicas": "1:4", "cpus_per_replica": "2", "num_slots": "8"}
    )
    deployment = built(serve.app.app(args))
    settings = deployment._deployment_config
    scaling = settings.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    assert scaling.target_ongoing_requests == 6
    assert deployment.max_ongoing_requests == 16
    assert deployment.max_queued_requests == 64
    assert deployment.ray_actor_options == {"num_cpus": 2, "num_gpus": 0}
    assert settings.graceful_shutdown_timeout_s == 310
    assert deployment.user_config is not None
    config = ChatServiceConfig.model_validate(deployment.user_config)
    (model,) = config.models
    assert (model.name, model.step) == ("talk", 10), "a later replica would serve a later step"
    assert Path(model.run).name == "talk"
    assert (config.num_slots, config.num_threads) == (8, 2)


def test_the_builder_without_autoscaling_or_a_run() -> None:
    deployment = built(serve.app.app(AppArgs(replicas="3")))
    assert deployment.num_replicas == 3
    assert deployment._deployment_config.autoscaling_config is None
    assert deployment.user_config is None  # the config file has it
    assert deployment.max_ongoing_requests == 24


@pytest.mark.parametrize(("num_models", "most", "target"), [(1, 24, 12), (3, 56, 12)])
def test_each_model_has_slots_of_its_own(num_models: int, most: int, target: int) -> None:
    models = [{"name": f"m{i}", "run": "talk", "step": 10} for i in range(num_models)]
    config = ChatServiceConfig.model_validate({"models": models})
    deployment = built(serve.app.build(AppArgs(replicas="1:2"), config))
    scaling = deployment._deployment_config.autoscaling_config
    assert scaling is not None
    assert deployment.max_ongoing_requests == most
    assert scaling.target_ongoing_requests == target
