"""A cluster whose nodes come when they are needed, as on a cloud: Ray's autoscaler, here with a
provider that starts raylets on this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pretrain_runs import tiny_flags
from serve_cluster import BIN, ROOT, free_port, wait_for

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_ID = "f" * 51 + "00000"  # the name that the provider gives its head: hexadecimal, 28 bytes


def node_type(role: str, cpus: int) -> dict[str, Any]:
    return {
        "resources": {"CPU": cpus},
        "labels": {"nanoray-role": role},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 0 if role == "head" else 1,
    }


def configuration(address: str) -> dict[str, Any]:
    return {
        "cluster_name": "fake",
        "max_workers": 4,
        "idle_timeout_minutes": 10,
        "provider": {
            "type": "external",  # as "fake_multinode" wants a file that Ray's wheel lacks (2.60)
            "module": PROVIDER,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": address,
        },
        "available_node_types": {
            "ray.head.default": node_type("head", 0),  # as the provider calls it
            "trainer": node_type("trainer", 1),
            "data": node_type("data", 2),
        },
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "auth": {},
    }


@pytest.fixture
def environment(home: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Of a job on the cluster, which has a head and no other node yet."""
    file = tmp_path / "cluster.json"
    temp, port = Path("/tmp") / f"nr-{secrets.token_hex(4)}", free_port()
    file.write_text(json.dumps(configuration(f"127.0.0.1:{port}")))
    env = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "PYTHONPATH": str(ROOT),
    }
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=0", f"--port={port}"),
        *(f"--autoscaling-config={file}", f"--temp-dir={temp}", "--include-dashboard=false"),
        *("--node-ip-address=127.0.0.1", "--labels=nanoray-role=head"),
        "--object-store-memory=100000000",
    ]
    with (tmp_path / "head.log").open("wb") as log:
        head = subprocess.Popen(
            command, env=env, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    said = (tmp_path / "head.log").read_text
    try:
        wait_for(lambda: "runtime started" in said() or head.poll() is not None, 120, "the head")
        assert head.poll() is None, said()
        hidden = ("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING")
        kept = {name: value for name, value in env.items() if name not in hidden}
        yield kept | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        parent = psutil.Process(head.pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        head.wait(10)
        shutil.rmtree(temp, ignore_errors=True)


def pretrain(environment: dict[str, str], flags: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.pretrain", *flags],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def test_a_job_has_the_nodes_that_it_needs_added(
    environment: dict[str, str], corpus: str, tokenizer_dir: str
) -> None:
    flags = tiny_flags(corpus, tokenizer_dir, "grown", num_workers=1)
    refused = pretrain(environment, flags)
    assert refused.returncode == 1
    assert "need 2 logical CPUs, but the cluster has 0" in refused.stderr
    done = pretrain(environment, [*flags, "--wait-for-nodes", "200"])
    assert done.returncode == 0, done.stdout + done.stderr
    (waiting,) = [line for line in done.stdout.splitlines() if line.startswith("waiting for room")]
    assert waiting == "waiting for room, 200 s at most: there is no trainer node"
