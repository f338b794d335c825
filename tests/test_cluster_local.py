"""The local cluster: nodes with roles, the token, `ray job submit`, and nothing left behind."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from local_cluster import REPOSITORY, LocalCluster, local_cluster, wait_for
from pretrain_runs import tiny_flags
from rl_runs import make_guesser, rl_flags

from nanoray.checkpoint import Checkpoint, list_steps


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster("--rollout", "0") as made:
        yield made


@pytest.mark.slow
def test_nodes_have_roles_and_a_token_keeps_strangers_out(cluster: LocalCluster) -> None:
    state = cluster.state
    assert [node["role"] for node in state["nodes"]] == ["head", "trainer", "data"]
    listed = cluster.run("status").stdout
    assert listed.count(" alive ") == 3
    assert listed.count(" 0 GPUs, ") == 3
    for node in state["nodes"]:  # or Ray would find a workstation's GPU on every node
        assert "--num-gpus=0" in cluster.process(node["name"]).cmdline()
    token = cluster.dir / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(cluster.dir.stat().st_mode) == 0o700

    for path in ("/api/jobs/", "/nodes?view=summary", "/api/v0/nodes", "/api/serve/applications/"):
        assert requests.get(state["dashboard"] + path, timeout=30).status_code == 401, path
        wrong = {"Authorization": f"Bearer {'0' * 64}"}
        answer = requests.get(state["dashboard"] + path, headers=wrong, timeout=30)
        assert answer.status_code in (401, 403), path
    secret = token.read_text()
    logs = [path for path in cluster.dir.rglob("*") if path.is_file() and path != token]
    assert logs
    assert not [path for path in logs if secret.encode() in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_submitted_run_is_stopped_and_goes_on(
    cluster: LocalCluster, corpus: str, tokenizer_dir: str
) -> None:
    # Long enough to be stopped on the way, short enough to end by itself.
    flags = tiny_flags(corpus, tokenizer_dir, "tiny", num_iterations=300, num_workers=2)
    cluster.submit("first", flags)
    wait_for(lambda: len(cluster.trained("tiny")) >= 20)
    assert "was stopped" in cluster.ray("job", "stop", "first")
    assert "run tiny stopped" in cluster.get("/api/jobs/first/logs")["logs"]

    root = str(cluster.home / "runs" / "tiny" / "checkpoints")
    (step,) = list_steps(root)
    assert 20 <= step < 300
    with Checkpoint(root, step) as checkpoint:
        assert checkpoint.meta["step"] == step
    assert not cluster.actors()

    cluster.submit("second", flags)
    cluster.succeeds("second")
    assert list_steps(root)[-1] == 300
    assert cluster.trained("tiny") == list(range(1, 301))  # none twice, none left out

    # What went to the cluster is the code, and nothing else.
    packages = list(cluster.dir.glob("head-1/session_2*/runtime_resources/working_dir_files/*/"))
    assert packages
    junk = {"tests", "bench", "cluster", "docs", ".git", ".venv", ".ci"}
    for package in packages:
        assert (package / "nanoray").is_dir()
        assert not junk & set(os.listdir(package))


@pytest.mark.slow
def test_a_lost_node_is_seen_and_replaced(cluster: LocalCluster) -> None:
    cluster.run("kill", "data")
    wait_for(lambda: len(cluster.nodes()) == 2)
    assert re.search(r"data-1 .* dead ", cluster.run("status").stdout)
    assert cluster.run("add", "data").stdout.count(" alive ") == 3
    refused = cluster.run("kill", "data-1", check=False)
    assert refused.returncode == 1
    assert refused.stderr == "error: no node data-1 is alive; `status` lists them\n"
    refused = cluster.run("up", check=False)
    assert refused.returncode == 1
    assert "a cluster is up" in refused.stderr


@pytest.mark.soak
def test_a_submitted_practice_is_stopped_and_goes_on(
    home: Path, corpus: str, tokenizer_dir: str, tmp_path: Path
) -> None:
    """Neither the pool nor a rollout actor is left behind, and no problem is trained twice."""
    steps = 40
    guesser = make_guesser(corpus, tokenizer_dir, tmp_path)
    flags = rl_flags(**guesser, run="mine", num_iterations=steps, rollout_actors="2")
    with local_cluster() as own:
        own.submit("first", flags, "rl")
        wait_for(lambda: len(own.trained("mine")) >= 3)
        assert {"_PoolActor", "_RolloutActor"} <= own.actors()
        assert "was stopped" in own.ray("job", "stop", "first")
        assert "run mine stopped" in own.get("/api/jobs/first/logs")["logs"]
        root = str(own.home / "runs" / "mine" / "checkpoints")
        (step,) = list_steps(root)
        assert 3 <= step < steps
        wait_for(lambda: not own.actors(), 30)
        own.submit("second", flags, "rl")
        own.succeeds("second")
        assert own.trained("mine") == list(range(1, steps + 1))
        with Checkpoint(root, steps) as checkpoint:
            ledger = checkpoint.meta["ledger"]
        assert (ledger["next_number"], ledger["open"]) == (4 * steps, [])
        assert ledger["counts"]["trained"] == 4 * steps


@pytest.mark.slow
def test_trainer_and_rollout_nodes_offer_the_gpus_that_are_asked_for() -> None:
    with local_cluster("--gpus", "2", "--data", "0", "--rollout", "0") as own:
        own.run("add", "rollout")  # as `up` would have
        gpus = {name: node["resources_total"].get("GPU", 0) for name, node in own.nodes().items()}
        assert gpus == {"head-1": 0, "trainer-1": 2, "rollout-1": 2}
        assert own.run("status").stdout.count(" 2 GPUs, ") == 2


@pytest.mark.slow
def test_down_ends_what_was_started_and_nothing_else(cluster: LocalCluster) -> None:
    cluster.run("kill", "head")
    refused = cluster.run("add", "head", check=False)
    assert refused.returncode == 1
    assert "this cluster has no Redis" in refused.stderr
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        state = cluster.state
        # A node's pid that has come to mean another process since.
        state["nodes"].append({"name": "x-1", "role": "data", "pid": bystander.pid, "started": 1.0})
        (cluster.dir / "cluster.json").write_text(json.dumps(state))
        cluster.run("down")
        assert bystander.poll() is None
    finally:
        bystander.send_signal(signal.SIGKILL)
        bystander.wait()
    assert not cluster.dir.exists()
    left = [p for p in psutil.process_iter(["cmdline"]) if str(cluster.dir) in str(p.info)]
    assert not left
    assert "no cluster is up" in cluster.run("status").stdout
    cluster.run("down")  # once more, and nothing happens


def test_another_user_s_folder_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "cluster"))
    local = importlib.import_module("local")
    folder = Path(tempfile.mkdtemp(prefix="nr-"))
    try:
        (folder / "cluster.json").write_text("{}")
        monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
        with pytest.raises(local.ClusterError, match="is another user's; take another --dir"):
            local.LocalCluster(folder)
    finally:
        shutil.rmtree(folder)


def test_a_folder_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 40)
    command = [sys.executable, "cluster/local.py", "--dir", str(folder), "status"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "take a shorter one" in done.stderr
    assert "Traceback" not in done.stderr
