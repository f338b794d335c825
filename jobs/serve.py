"""``python -m jobs.serve``: the chat over HTTP, with a page, until Ctrl-C."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from nanoray.config import ChatServiceConfig, ModelChoice, ServeConfig, parse_worker_range, run_job
from nanoray.errors import NanorayError


def main(argv: Sequence[str]) -> int:
    config = ServeConfig.parse(argv, "python -m jobs.serve")
    from serve.pin import pinned

    models = tuple(pinned(model) for model in config.models())
    if config.export_tokenizer is not None:
        return export_tokenizer(models, config.export_tokenizer)
    from serve.keys import read_api_keys

    open_to_all = not read_api_keys(config.api_keys_file)
    if not os.environ.get("RAY_ADDRESS"):  # else it is a port of the cluster's nodes
        _check_port(config.host, config.port)
    for model in models:
        print(f"model {model.name}: {model.run}, step {model.step}")
    if config.dry_run:
        from nanoray.checkpoint.loading import load_model

        for model in models:
            load_model(model.run, model.step, dtype=config.dtype)
        print(f"dry run: all is fine; it would listen on {_address(config)}")
        return 0
    if open_to_all and not _is_loopback(config.host):
        print(
            f"warning: whoever reaches {config.host}:{config.port} may ask: give --api-keys-file",
            file=sys.stderr,
        )
    return serve(config, models)


def serve(config: ServeConfig, models: tuple[ModelChoice, ...]) -> int:
    """Start Ray and Serve, say so when the models answer, drain at the first Ctrl-C."""
    from serve.proxy import CALLBACK

    os.environ |= CALLBACK  # before Ray starts: its processes inherit it
    import ray

    from nanoray import fleet

    if fleet.on_cluster() and os.environ.get("NANORAY_API_KEYS"):
        raise NanorayError(
            "NANORAY_API_KEYS of this process does not reach the cluster of RAY_ADDRESS; give "
            "--api-keys-file with a file that every node sees"
        )
    stop = threading.Event()
    fleet.connect(dashboard=config.dashboard)
    try:
        _check_others(config)
        needs = [_needs(config, models)]
        room = fleet.when_there_is_room(lambda: (None, needs), config.wait_for_nodes)
        with room as (_settled, give_turn_back):
            serve_is_ours = not _check_others(config)  # again: it may have taken long
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, lambda *_: _stop(stop))
            try:
                _deploy(config, models)
                give_turn_back()
                print(f"ready: {_address(config)}  (Ctrl-C stops)", flush=True)
                stop.wait()
                print("finishing the answers under way (Ctrl-C again: not)", flush=True)
            finally:
                _end(config, serve_is_ours)
    finally:
        ray.shutdown()
    return 0


def _check_others(config: ServeConfig) -> bool:
    """What the cluster serves already is not ours to change or to end. Whether Serve runs there.

    Raises:
        NanorayError: our application is among it, or Serve listens on another address.
    """
    from ray import serve as ray_serve
    from ray.serve.context import _get_global_client  # there is no public way (2.60)

    from serve.app import NAME

    if NAME in ray_serve.status().applications:
        raise NanorayError(
            f"this cluster serves an application {NAME} already; change it with `serve deploy`, or "
            f"end it with `serve shutdown`"
        )
    client = _get_global_client(raise_if_no_controller_running=False)
    if client and (client.http_config.host, client.http_config.port) != (config.host, config.port):
        host, port = client.http_config.host, client.http_config.port
        raise NanorayError(
            f"Serve runs on this cluster already and listens on {host}:{port}; give --host {host} "
            f"--port {port}, or end it with `serve shutdown`"
        )
    return client is not None


def _end(config: ServeConfig, serve_is_ours: bool) -> None:
    """End our application once it has answered, and the Serve that we started if it serves nothing
    else. Must not hide why it ends.
    """
    from ray import serve as ray_serve

    from serve.app import NAME, PROXY_PATIENCE_S

    with contextlib.suppress(ray_serve.exceptions.RayServeException):  # Serve did not start
        # shutdown() alone ends the proxy at once, and cuts every stream. Serve itself ends replicas
        # that take longer than an answer may.
        ray_serve.delete(NAME, _blocking=False)
        deadline = time.monotonic() + config.request_timeout_s + 2 * PROXY_PATIENCE_S
        while NAME in ray_serve.status().applications and time.monotonic() < deadline:
            time.sleep(0.2)
    if serve_is_ours and not ray_serve.status().applications:
        ray_serve.shutdown()


def _stop(stop: threading.Event) -> None:
    """The first signal drains, the second one does not."""
    if stop.is_set():
        raise KeyboardInterrupt
    stop.set()


def _deploy(config: ServeConfig, models: tuple[ModelChoice, ...]) -> None:
    from ray import serve as ray_serve

    from serve.app import NAME, PROXY_PATIENCE_S, AppArgs, build

    service = ChatServiceConfig(
        models=models,
        num_slots=config.num_slots,
        max_len=config.max_len,
        dtype=config.dtype,
        num_threads=config.cpus_per_replica,
        request_timeout_s=config.request_timeout_s,
        api_keys_file=_absolute(config.api_keys_file),
    )
    args = AppArgs(
        replicas=config.replicas,
        cpus_per_replica=config.cpus_per_replica,
        gpus_per_replica=config.gpus_per_replica,
        num_slots=config.num_slots,
        max_queue=config.max_queue,
    )
    http = {
        "host": config.host,
        "port": config.port,
        "request_timeout_s": config.request_timeout_s + PROXY_PATIENCE_S,
    }
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(http_options=http)
    try:
        ray_serve.run(build(args, service), name=NAME, route_prefix=config.root_path)
    except RuntimeError as error:
        raise NanorayError(f"the service did not start: {_why(error)}") from error


def _why(error: Exception) -> str:
    """The replicas' own words, where Serve kept them."""
    from ray import serve as ray_serve

    from serve.app import NAME

    application = ray_serve.status().applications.get(NAME)
    deployments = application.deployments.values() if application else ()
    told = [deployment.message for deployment in deployments if deployment.message]
    lines = [line.strip() for line in "\n".join(told or [str(error)]).splitlines() if line.strip()]
    reasons = [line for line in lines if "NanorayError: " in line]
    return reasons[-1].split("NanorayError: ", 1)[1] if reasons else " ".join(lines[-3:])


def _needs(config: ServeConfig, models: Sequence[ModelChoice]) -> Any:
    from nanoray import fleet

    return fleet.Needs(
        num_workers=parse_worker_range(config.replicas)[0],
        cpus_per_worker=config.cpus_per_replica,
        gpus_per_worker=config.gpus_per_replica,
        other_cpus=0,
        memory_bytes_per_worker=0,
        object_store_bytes=0,
        paths=tuple(model.run for model in models if model.run.startswith("/")),
        flags="--replicas or --{}-per-replica",
    )


def export_tokenizer(models: Sequence[ModelChoice], folder: str) -> int:
    """Write the first model's tokenizer for those who read Hugging Face's form."""
    from nanoray.checkpoint.loading import load_model
    from nanoray.tokenizer.export import export_hf

    loaded = load_model(models[0].run, models[0].step)
    export_hf(loaded.tokenizer, folder)
    print(f"the tokenizer of {models[0].name}: {folder}")
    return 0


def _check_port(host: str, port: int) -> None:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
    except OSError as error:
        raise NanorayError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}); take another "
            f"--port or --host"
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _address(config: ServeConfig) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{config.port}{config.root_path.rstrip('/')}/"


def _absolute(path: str | None) -> str | None:
    return None if path is None else os.path.abspath(os.path.expanduser(path))


if __name__ == "__main__":
    run_job(main)
