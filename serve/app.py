"""The chat on Ray Serve: HTTP, page and engine in one deployment, so that no hop is added.

    python -m jobs.serve --run demo-sft              # on this machine
    serve run serve.app:app run=demo-sft             # on the cluster that `serve` sees
    serve deploy serve/chat.yaml                     # the same, declared in a file

What is served stands in the deployment's `user_config` (a ChatServiceConfig): when only that
changes, `serve deploy` changes it in the replicas that run, and no answer is cut.
"""

# No postponed annotations here: Serve looks at the type of app()'s argument itself.

import asyncio
import logging
import os
import time
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve
from ray.serve import Application, Deployment
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from nanoray.config.base import WorkerRange, parse_worker_range
from nanoray.config.serve import ChatServiceConfig, parse_models
from nanoray.errors import NanorayError
from serve.host import Host
from serve.http import HttpSettings, make_app
from serve.keys import read_api_keys
from serve.observe import Observer
from serve.pin import pinned
from serve.proxy import CALLBACK
from serve.ray_meter import RayMeter

NAME = "chat"
_logger = logging.getLogger("ray.serve")
_HEALTH_DEADLINE_S = 20.0
_GAUGES_EVERY_S = 2.0
# Beside the answers that are written: the page, /health, requests about to be refused.
_SPARE_REQUESTS = 8
# A config that was refused is tried again: a store may have been out of reach for a moment.
_RETRY_EVERY_S = 30.0
# The answer's own deadline comes first, and says more than what Serve's proxy can.
PROXY_PATIENCE_S = 10.0
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Chat:
    """One replica: the models, and the HTTP application in front of them."""

    def __init__(self) -> None:
        for name in CALLBACK.keys() - os.environ.keys():
            _logger.warning(
                f"{name} was not set before `ray start`: what Serve's proxy refuses is told in "
                f"plain text, and a lost replica's stream just stops; see serve/chat.yaml"
            )
        self._host = Host()
        # Below Serve's logger, so that it reaches the session's log files.
        self._observer = Observer(RayMeter(), logging.getLogger("ray.serve.access"))
        self._http: ASGIApp | None = None
        self._config: dict[str, Any] = {}  # the one that was asked for last
        self._changing = asyncio.Lock()
        self._watch = asyncio.get_running_loop().create_task(self._watch_engines())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        # Not the application itself: reconfigure() replaces that.
        return Router(default=self._handle)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._http is not None, "Serve sends requests after reconfigure()"
        await self._http(scope, receive, send)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve what the config says; on return it does.

        Raises if this replica has never served: Serve tells why, and tries again. A replica that
        serves keeps doing so instead, tells it in its log and in /stats (Serve would stop it), and
        tries again now and then.
        """
        self._config = user_config
        try:
            await self._apply(user_config)
        except Exception as error:
            if self._http is None:
                raise
            self._host.refused = _told(error)
            _logger.error(f"the new config is refused, the old one stays: {self._host.refused}")

    async def _apply(self, user_config: dict[str, Any]) -> None:
        async with self._changing:
            if user_config is not self._config:
                return  # another one has come meanwhile
            config = _parse(user_config)
            keys = read_api_keys(config.api_keys_file)
            await asyncio.to_thread(self._host.reconfigure, config)
            self._host.refused = None
            self._serve(config, keys)

    def _serve(self, config: ChatServiceConfig, keys: tuple[str, ...]) -> None:
        settings = HttpSettings(
            api_keys=keys,
            max_body_bytes=config.max_body_bytes,
            request_timeout_s=config.request_timeout_s,
            coalesce_s=config.coalesce_s,
        )
        self._http = make_app(self._host, settings, self._observer)

    async def check_health(self) -> None:
        """Called by Serve: a replica that raises is replaced."""
        await self._host.health(_HEALTH_DEADLINE_S)

    async def _watch_engines(self) -> None:
        next_try_s = time.monotonic() + _RETRY_EVERY_S
        while True:
            self._observer.engines(self._host.stats()["models"])
            self._observer.config(refused=self._host.refused is not None)
            await asyncio.sleep(_GAUGES_EVERY_S)
            if time.monotonic() > next_try_s:
                await self._retry()
                next_try_s = time.monotonic() + _RETRY_EVERY_S

    async def _retry(self) -> None:
        if self._host.refused is None:
            return
        try:
            await self._apply(self._config)
        except Exception as error:
            self._host.refused = _told(error)
        else:
            if self._host.refused is None:  # no other one has come meanwhile
                _logger.info("the config that was refused is taken now")


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, NanorayError) else repr(error)


def _parse(user_config: dict[str, Any]) -> ChatServiceConfig:
    try:
        return ChatServiceConfig.model_validate(user_config)
    except ValidationError as error:
        told = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'user_config'}: {item['msg']}"
            for item in error.errors()
        )
        raise NanorayError(f"the user_config of the chat service is wrong: {told}") from None


_deployment: Deployment = serve.deployment(
    # Requests with the same x-session-id go to the same replica, which has their prefix cached.
    request_router_config={"request_router_class": _ROUTER},
    max_queued_requests=64,
    backpressure_config={"status_code": 429, "retry_after_s": 2},
    health_check_period_s=10,
    health_check_timeout_s=2 * _HEALTH_DEADLINE_S,
    graceful_shutdown_wait_loop_s=0.5,
    graceful_shutdown_timeout_s=300 + PROXY_PATIENCE_S,
    # New code starts beside the old; what does not come up never replaces what serves.
    max_surge_percent=100,
    logging_config={"enable_access_log": False},  # ours tells more
)(serve.ingress()(Chat))


class AppArgs(BaseModel):
    """Arguments of `app`, as in ``serve run serve.app:app run=demo-sft replicas=1:4``.

    A config file may leave them out, and give user_config and the deployment's options itself.
    """

    model_config = ConfigDict(extra="forbid")

    run: str | None = Field(default=None, description="runs, as for --run of jobs.serve")
    replicas: WorkerRange = Field(default="1", description="N, or MIN:MAX to follow the load")
    cpus_per_replica: int = Field(default=1, ge=1)
    gpus_per_replica: float = Field(default=0, ge=0)
    num_slots: int = Field(default=16, ge=1, description="of each model")
    max_queue: int = Field(default=64, ge=1)


def app(args: AppArgs) -> Application:
    """The application for ``serve run`` and for config files."""
    user_config = None
    if args.run is not None:
        user_config = ChatServiceConfig(
            models=tuple(pinned(model) for model in parse_models(args.run)),
            num_slots=args.num_slots,
            num_threads=args.cpus_per_replica,
        )
    return build(args, user_config)


def build(args: AppArgs, config: ChatServiceConfig | None) -> Application:
    """The application with what it serves. Replicas are as many as `args` says."""
    low, high = parse_worker_range(args.replicas)
    num_slots = args.num_slots * (len(config.models) if config else 1)  # each has its own
    options: dict[str, Any] = {
        "ray_actor_options": {
            "num_cpus": args.cpus_per_replica,
            "num_gpus": args.gpus_per_replica,
        },
        "max_ongoing_requests": num_slots + _SPARE_REQUESTS,
        "max_queued_requests": args.max_queue,
    }
    if low < high:
        options["autoscaling_config"] = {
            "min_replicas": low,
            "max_replicas": high,
            # Below the slots of one model, which may have all the load: another replica shall be
            # there before the queue grows.
            "target_ongoing_requests": max(1, args.num_slots * 3 // 4),
        }
    else:
        options["num_replicas"] = low
    if config is not None:
        options["graceful_shutdown_timeout_s"] = config.request_timeout_s + PROXY_PATIENCE_S
        options["user_config"] = config.model_dump(mode="json")
    return _deployment.options(**options).bind()
