"""The head is lost: what it knew is in Redis, the nodes wait for it, and no run is harmed."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from local_cluster import REPOSITORY, LocalCluster, local_cluster, wait_for
from pretrain_runs import hashes, losses, run_plan, tiny_flags, tiny_plan

from nanoray.checkpoint import Checkpoint, list_steps

sys.path.insert(0, str(REPOSITORY / "cluster"))  # where its scripts find each other
head_store = importlib.import_module("head_store")

STEPS, SAVE_EVERY, KILL_AT = 200, 10, 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    if not shutil.which("redis-server"):
        pytest.skip("no redis-server (Debian: apt-get install redis-server)")
    with local_cluster("--redis", "--data", "0", "--rollout", "0") as made:
        yield made


def family(process: psutil.Process) -> set[psutil.Process]:
    return {process, *process.children(recursive=True)}


def raylet_of(cluster: LocalCluster, node: str) -> psutil.Process:
    (raylet,) = [p for p in cluster.process(node).children() if p.name() == "raylet"]
    return raylet


def bring_back_the_head(cluster: LocalCluster) -> None:
    """Ray gives a node 30 s to start, which on a busy machine may be too few."""
    wait_for(lambda: cluster.run("add", "head", check=False).returncode == 0)
    assert re.search(r"head-\d+ .* alive ", cluster.run("status").stdout)


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_a_run_goes_on_after_the_head_is_lost(
    cluster: LocalCluster, corpus: str, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANORAY_HOME", str(cluster.home))
    shape = {"num_iterations": STEPS, "save_every": SAVE_EVERY}
    calm = tiny_plan(corpus, tokenizer_dir, "calm", **shape)
    run_plan(calm)
    plan = tiny_plan(corpus, tokenizer_dir, "tiny", **shape)
    flags = tiny_flags(corpus, tokenizer_dir, "tiny", **shape)

    raylet, before = raylet_of(cluster, "trainer-1"), cluster.nodes()
    cluster.submit("first", flags)
    wait_for(lambda: len(cluster.trained("tiny")) >= KILL_AT)
    (worker,) = [p for p in raylet.children() if "RayTrainWorker" in " ".join(p.cmdline())]
    cluster.run("kill", "head")
    seen = cluster.trained("tiny")[-1]
    assert seen < STEPS, "the head was lost too late"
    assert re.search(r"head-1 .* dead ", cluster.run("status").stdout)

    bring_back_the_head(cluster)
    assert list_steps(plan.checkpoints_dir)[-1] > seen - 2 * SAVE_EVERY
    cluster.submit("second", flags)
    cluster.succeeds("second")
    assert cluster.job("first") == "FAILED"  # still known, and what became of it

    # None left out, none twice, nothing else than without the loss.
    assert cluster.trained("tiny") == list(range(1, STEPS + 1))
    assert hashes(plan) == hashes(calm)
    assert losses(plan) == losses(calm)
    whole = list_steps(plan.checkpoints_dir)
    assert whole[-1] == STEPS
    for step in whole:
        with Checkpoint(plan.checkpoints_dir, step) as checkpoint:
            assert checkpoint.meta["step"] == step

    # The other node has only waited; what the first job had on it has ended.
    assert not worker.is_running()
    assert raylet_of(cluster, "trainer-1") == raylet
    assert cluster.nodes()["trainer-1"]["node_id"] == before["trainer-1"]["node_id"]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_control_service_and_redis_are_killed(cluster: LocalCluster) -> None:
    """Ray ends the rest of a head that loses its control service; Redis has lost nothing."""
    raylet, before = raylet_of(cluster, "trainer-1"), cluster.nodes()
    (head,) = [name for name in before if name.startswith("head")]
    known = {job["submission_id"] for job in cluster.get("/api/jobs/")}
    everything = family(cluster.process(head))
    (service,) = [p for p in everything if p.name() == "gcs_server"]
    service.kill()
    cluster.process("redis").kill()
    wait_for(lambda: not any(p.is_running() for p in everything))

    bring_back_the_head(cluster)
    after = cluster.nodes()
    assert len(after) == len(before)
    assert after["trainer-1"]["node_id"] == before["trainer-1"]["node_id"]
    assert raylet_of(cluster, "trainer-1") == raylet
    assert {job["submission_id"] for job in cluster.get("/api/jobs/")} == known
    refused = cluster.run("add", "head", check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: the head is alive")


@pytest.mark.slow
def test_redis_answers_its_head_only(cluster: LocalCluster, tmp_path: Path) -> None:
    folder = cluster.dir / "redis"
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    address = (cluster.state["address"].split(":")[0], cluster.state["redis_port"])

    def client(*chain: Path) -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=certificate)
        made.check_hostname = False
        if chain:
            made.load_cert_chain(*chain)
        return made

    def ask(context: ssl.SSLContext | None) -> bytes:
        try:
            plain = socket.create_connection(address, timeout=30)
            with context.wrap_socket(plain) if context else plain as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(100)
        except OSError:
            return b""

    assert ask(client(certificate, key)) == b"+PONG\r\n"
    assert b"PONG" not in ask(None)
    assert b"PONG" not in ask(client())
    head_store.prepare(tmp_path / "redis", "127.0.0.1", 1)  # of the same name, not the same
    other = tmp_path / "redis" / "certificate.pem", tmp_path / "redis" / "key.pem"
    assert b"PONG" not in ask(client(*other))


@pytest.mark.slow
def test_no_secret_is_told(cluster: LocalCluster) -> None:
    token, key = cluster.dir / "token", cluster.dir / "redis" / "key.pem"
    for path in (token, key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    secrets = [token.read_bytes(), *key.read_bytes().split(b"\n")[1:-2]]
    assert len(secrets) > 20
    files = [path for path in cluster.dir.rglob("*") if path.is_file()]
    told = [
        path
        for path in files
        if path not in (token, key) and any(secret in path.read_bytes() for secret in secrets)
    ]
    assert not told
    assert any(path.name.startswith("gcs_server") for path in files)
    assert any("appendonly" in path.name for path in files)
    commands = [
        " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])
    ]
    assert not [command for command in commands if secrets[0].decode() in command]


def test_without_redis_server_there_is_one_sentence(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="nrc-"))
    try:
        done = subprocess.run(
            [sys.executable, "cluster/local.py", "--dir", str(folder / "c"), "up", "--redis"],
            cwd=REPOSITORY, env=os.environ | {"PATH": str(tmp_path)}, capture_output=True,
            text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.startswith("error: --redis needs the program redis-server, which is not")
        assert done.stderr.count("\n") == 1
        assert not (folder / "c").exists()
    finally:
        folder.rmdir()
