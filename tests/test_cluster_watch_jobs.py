"""The dashboards beside real jobs: the whole pipeline on a local cluster, watched by a real
Prometheus. Every panel shows something of it.
"""

from __future__ import annotations

import contextlib
import importlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import requests
from serve_cluster import free_port, wait_for
from test_cluster_watch import MADE, ROOT, configured, connected, queries, started

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not shutil.which("prometheus"), reason="no Prometheus (apt-get install prometheus)"
    ),
]

# Evaluations and saves midway: what a worker tells in its last second is gone with it, before
# Prometheus has looked.
OFTEN: dict[str, dict[str, Any]] = {
    "pretrain": {"eval-every": 20},
    "sft": {
        "eval-every": 10, "validation": "arithmetic", "chatcore-every": 10,
        "chatcore-tasks": "arithmetic", "chatcore-max-sample": 2, "chatcore-max-tokens": 4,
    },
    "rl": {"eval-every": 2},
}  # fmt: skip
STEPS = {"pretrain": 200, "sft": 60, "rl": 12}


class Watcher(threading.Thread):
    """Asks all that the panels ask, again and again; what has had no answer yet is in `silent`."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self._url = f"http://{address}/api/v1/query"
        self._over = threading.Event()
        self.silent = {query for made in MADE.values() for query in queries(made)}

    def run(self) -> None:
        while not self._over.wait(2):
            for query in sorted(self.silent):
                with contextlib.suppress(requests.RequestException, KeyError):
                    if requests.get(self._url, {"query": filled(query)}, timeout=10).json()["data"][
                        "result"
                    ]:
                        self.silent.discard(query)

    def close(self) -> None:
        self._over.set()
        self.join()


def filled(query: str) -> str:
    """Of all runs and models, over Grafana's shortest time."""
    for variable in ("run", "model"):
        query = query.replace(f"${variable}", ".*")
    return query.replace("$__rate_interval", "20s")


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "cluster"))
    module = importlib.import_module("chaos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORAY_HOME", "")  # what the pipeline sets is put back
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        yield module


def test_every_panel_shows_something_of_real_jobs(
    chaos: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground = chaos.Ground(Path(tempfile.mkdtemp(prefix="nr-watch-")))
    address = f"127.0.0.1:{free_port()}"
    ask: Any = chaos.ask

    def ask_and_err(url: str, question: Any, stream: bool) -> Any:
        """As the pipeline's client, and one that the server has to refuse; at leisure."""
        httpx.post(f"{url}/v1/chat/completions", json={"messages": []}, timeout=60)
        time.sleep(3)  # a rate needs two looks at a counter
        return ask(url, question, stream)

    monkeypatch.setattr(chaos, "ask", ask_and_err)
    stages = importlib.import_module("chaos_stages")
    for stage, flags in OFTEN.items():
        monkeypatch.setitem(stages._FLAGS, stage, stages._FLAGS[stage] | flags)
        monkeypatch.setitem(stages.STEPS, stage, STEPS[stage])
    try:
        chaos.prepare(ground)
        head = ground.cluster.nodes[0].name
        with started(
            "prometheus", f"--config.file={configured(tmp_path, ground.folder / 'c' / head)}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}", f"--web.listen-address={address}",
            log=tmp_path / "prometheus.log",
        ):  # fmt: skip
            wait_for(lambda: connected(address), 60, "Prometheus")
            watcher = Watcher(address)
            watcher.start()
            try:
                chaos.run_pipeline(ground, "watched", chaos.STAGES, {}, {})
            finally:
                watcher.close()
    finally:
        chaos.end_cluster(ground)
        shutil.rmtree(ground.folder)
    assert not watcher.silent, sorted(watcher.silent)
