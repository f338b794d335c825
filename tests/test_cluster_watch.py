"""Dashboards, Prometheus' configuration and alert rules: what they ask for is really exported.

Which metrics there are is found out by tiny runs of every stage, not listed here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests
import yaml
from pretrain_runs import run_plan, tiny_plan
from rl_pools import World, run
from rl_runs import LocalRollouts, rl_plan, run_alone
from serve_cluster import free_port, wait_for
from sft_runs import sft_plan, write_conversations

from nanoray import fleet
from nanoray.fleet import board
from nanoray.metrics import Record, read_records
from nanoray.rl.journal import Journal
from nanoray.rl.ledger import Ledger
from nanoray.rl.plan import ledger_rules
from nanoray.rl.pool import pool_numbers
from nanoray.rl.supervisor import Supervisor
from nanoray.rl.terms import PoolSettings, Taken
from serve.observe import METRICS

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
ALERTS = CLUSTER / "alerts.yml"
STAGES = "pretrain", "sft", "rl"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboards", CLUSTER / "dashboards.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["dashboards"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


dashboards = load_script()
MADE = {name: dashboards.make(dashboard) for name, dashboard in dashboards.DASHBOARDS.items()}


def graphs(made: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in made["panels"] if panel["type"] != "row"]


def queries(made: Mapping[str, Any]) -> list[str]:
    return [target["expr"] for panel in graphs(made) for target in panel["targets"]]


def alert_queries() -> list[str]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


class PooledRollouts(LocalRollouts):
    """With the figures that the pool of a cluster adds."""

    def take(self, step: int, stop_reason: Callable[[], str] = lambda: "") -> Taken:
        return Taken(super().take(step).groups, Journal().figures((), self._ledger))


@pytest.fixture(scope="module")
def records(
    corpus: str, tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Record]]:
    """What a tiny run of every stage logs, by stage; and the pool's numbers."""
    folder = tmp_path_factory.mktemp("watch")
    before = os.environ["NANORAY_HOME"]
    os.environ["NANORAY_HOME"] = str(folder / "home")
    often = {"eval_every": 1, "save_every": 1, "log_every": 1}
    try:
        base = tiny_plan(
            corpus, tokenizer_dir, "base", num_iterations=3, max_seq_len=128, eval_tokens=512,
            **often,
        )  # fmt: skip
        chats = write_conversations(folder / "chats.jsonl", 60, (3, 9))
        run_plan(base)
        sft = sft_plan(
            base.run_dir, chats, "sft", num_iterations=3, validation=chats, eval_tokens=256,
            chatcore_tasks="arithmetic", chatcore_max_sample=2, chatcore_max_tokens=4, **often,
        )  # fmt: skip
        run_plan(sft)
        rl = rl_plan(base.run_dir, "rl", **often)
        run_alone(rl, rollouts=PooledRollouts(rl))
    finally:
        os.environ["NANORAY_HOME"] = before
    plans = zip(STAGES, (base, sft, rl))
    found: dict[str, list[Record]] = {
        stage: [*read_records(f"{plan.run_dir}/metrics.jsonl")] for stage, plan in plans
    }
    supervisor = Supervisor(lambda _: None, ledger_rules(rl), PoolSettings(2, 4))  # type: ignore[arg-type,return-value]
    supervisor._ledger = Ledger(ledger_rules(rl))
    return {**found, "rollouts": [pool_numbers(supervisor.status())]}


def gauges_kept(patch: pytest.MonkeyPatch) -> dict[str, float]:
    """Puts a stand-in in the place of Ray's gauges; their values by name, as they are set."""
    values: dict[str, float] = {}

    class KeptGauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name), "Ray would discard it"
            self._name = name

        def set_default_tags(self, _tags: dict[str, str]) -> None: ...

        def set(self, value: float) -> None:
            values[self._name] = value

    patch.setattr(board, "Gauge", KeptGauge)
    return values


@pytest.fixture(scope="module")
def exported(records: dict[str, list[Record]]) -> set[str]:
    """Every name that Prometheus can see of nanoray."""
    with pytest.MonkeyPatch.context() as patch:
        made = gauges_kept(patch)
        for stage, logged in records.items():
            sink = fleet.gauge_sink(stage, "run")
            for record in logged:
                sink(record)
    gauges = {f"ray_{name}" for name in made}
    suffixes = {"gauge": [""], "counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    served = {f"ray_{name}{end}" for name, m in METRICS.items() for end in suffixes[m.kind]}
    return gauges | served


def metrics_in(query: str) -> set[str]:
    """The metrics a query asks for; ``__name__=~`` with alternatives in brackets is unfolded."""
    names = set(re.findall(r"\bray_[a-z0-9_]+(?![a-z0-9_(])", query))
    for pattern in re.findall(r'__name__=~"([^"]+)"', query):
        names -= set(re.findall(r"ray_[a-z0-9_]+", pattern))
        head, alternatives, tail = re.fullmatch(r"(.*)\((.*)\)(.*)", pattern).groups()  # type: ignore[union-attr]
        names |= {head + one + tail for one in alternatives.split("|")}
    return names


def test_the_files_are_what_the_script_makes() -> None:
    assert dashboards.main([]) == 0, "run `python cluster/dashboards.py --write`"
    assert {path.name for path in dashboards.FOLDER.iterdir()} == {f"{n}.json" for n in MADE}


def test_a_file_that_differs_is_named_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dashboards, "FOLDER", tmp_path)
    (tmp_path / "rl.json").write_text("{}")
    assert dashboards.main([]) == 1
    assert "differs: rl.json" in capsys.readouterr().out
    assert dashboards.main(["--write"]) == 0
    assert dashboards.main([]) == 0
    assert dashboards.main(["--wirte"]) == 2


@pytest.mark.parametrize("name", MADE)
def test_a_dashboard_is_well_formed(name: str) -> None:
    made = MADE[name]
    assert made["schemaVersion"] >= 36, "since then data sources are objects"
    ids = [panel["id"] for panel in made["panels"]]
    assert len(ids) == len(set(ids))
    cells: set[tuple[int, int]] = set()
    for panel in made["panels"]:
        place = panel["gridPos"]
        own = {
            (place["x"] + dx, place["y"] + dy)
            for dx in range(place["w"])
            for dy in range(place["h"])
        }
        assert not own & cells, f"{panel['title']} overlaps another panel"
        assert max(x for x, _ in own) < 24, f"{panel['title']} is beyond Grafana's grid"
        cells |= own
    for panel in graphs(made):
        assert panel["description"].endswith(".")
        ref_ids = [target["refId"] for target in panel["targets"]]
        assert len(ref_ids) == len(set(ref_ids)) <= 26
    titles = [panel["title"] for panel in graphs(made)]
    assert len(titles) == len(set(titles))
    assert len({made["uid"] for made in MADE.values()}) == len(MADE)


def test_every_metric_asked_for_is_exported(exported: set[str]) -> None:
    asked = [query for made in MADE.values() for query in queries(made)] + alert_queries()
    asked += [v["query"] for made in MADE.values() for v in made["templating"]["list"][1:]]
    for query in asked:
        assert metrics_in(query), query
        assert metrics_in(query) <= exported, query


def test_the_sink_counts_what_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    values = gauges_kept(monkeypatch)
    sink = fleet.gauge_sink("rl", "run")
    sink({"step": 1, "loss": float("nan"), "pass@4": float("inf"), "hash": "00ff", "last": True})
    assert values["nanoray_rl_not_finite"] == 2
    assert values.keys() == {
        f"nanoray_rl_{key}" for key in ("step", "loss", "pass_4", "not_finite")
    }
    sink({"step": 2, "loss": 1.5})
    assert values["nanoray_rl_not_finite"] == 0
    assert values["nanoray_rl_loss"] == 1.5


def test_a_healthy_run_logs_only_finite_numbers(records: dict[str, list[Record]]) -> None:
    logged = [record for of_stage in records.values() for record in of_stage]
    assert [record for record in logged if None in record.values()] == []


def test_the_pool_counts_its_actors_and_groups() -> None:
    async def scenario() -> None:
        world = World(low=3)
        assert pool_numbers(world.supervisor.status())["actors_starting"] == 0
        await world.supervisor.begin("a", 0, None)
        started = pool_numbers(world.supervisor.status())
        assert (started["actors_wanted"], started["actors_starting"]) == (3, 3)
        await world.step(0)
        working = pool_numbers(world.supervisor.status())
        assert working["actors_idle"] + working["actors_busy"] == 3
        assert working["actors_starting"] == 0
        await world.supervisor.close()

    run(scenario())


def test_every_serving_metric_is_on_the_dashboard() -> None:
    asked = " ".join(queries(MADE["serving"]))
    assert [name for name in METRICS if f"ray_{name}" not in asked] == []


# Runs as a program of its own: as jobs do it, with the sinks that jobs plug in, in actors.
FEEDER = """
import json, math, sys, threading, time
import ray
from nanoray import fleet
from nanoray.fleet import board

records = json.loads(sys.stdin.readline())
fleet.connect(dashboard=True)

@ray.remote(num_cpus=0, max_concurrency=2)
class Feeder:
    def train(self, records):
        sinks = {stage: fleet.gauge_sink(stage, "a-run") for stage in records}
        broken = fleet.gauge_sink("pretrain", "broken")
        while True:
            broken({"step": 3, "loss": math.nan})
            for stage, logged in records.items():
                for record in logged:
                    sinks[stage](record)
            time.sleep(0.5)

    def serve(self):
        from serve.observe import Observer
        from serve.ray_meter import RayMeter
        observer = Observer(RayMeter())
        stats = dict(running=3, waiting=1, busy_tokens=50, cache_capacity_tokens=100,
                     prompt_tokens=0, cached_prompt_tokens=0)
        while True:
            for status in 200, 500:
                request = observer.request("/v1/completions", "a-model")
                request.prompt_tokens(8)
                request.queued(0.01)
                request.tokens(1)
                request.tokens(2)
                request.finish(status, "stop")
            stats["prompt_tokens"] += 8
            stats["cached_prompt_tokens"] += 4
            observer.engines({"a-model": stats})
            observer.config(refused=False)
            time.sleep(0.5)

feeder = Feeder.options(name="feeder").remote()
feeding = [feeder.train.remote(records), feeder.serve.remote()]
threading.Thread(target=lambda: ray.get(feeding), daemon=True).start()
sys.stdin.read()
ray.shutdown()
"""


@contextlib.contextmanager
def started(*command: str, log: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block: asked by the end of its input, then by SIGTERM."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=out, text=True, **options
        )
    assert process.stdin
    try:
        yield process
    finally:
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1 if command[0] == "prometheus" else 30)
        process.terminate()
        process.wait(timeout=30)


def configured(folder: Path, ray_folder: Path) -> Path:
    """The repository's configuration for a Ray with this folder, in a hurry."""
    text = (CLUSTER / "prometheus.yml").read_text()
    file = folder / "prometheus.yml"
    file.write_text(text.replace("/tmp/ray", str(ray_folder)).replace(": 10s", ": 1s"))
    shutil.copy(ALERTS, folder)
    return file


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.skipif(
    not shutil.which("prometheus"), reason="no Prometheus (apt-get install prometheus)"
)
def test_every_panel_shows_data_of_a_real_prometheus(
    records: dict[str, list[Record]], tmp_path: Path
) -> None:
    folder = Path("/tmp") / f"nr-{secrets.token_hex(4)}"  # Ray's sockets want short paths
    hidden = ("RAY_", "NANORAY_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {
        "RAY_TMPDIR": str(folder),
        "RAY_metrics_report_interval_ms": "1000",
        "PYTHONPATH": str(ROOT),
    }
    folder.mkdir()
    address = f"127.0.0.1:{free_port()}"

    def ask(path: str, **params: str) -> Any:
        answer = requests.get(f"http://{address}/api/v1/{path}", params=params, timeout=10)
        assert answer.ok, answer.text
        return answer.json()["data"]

    def numbers(query: str) -> list[float]:
        for variable in ("run", "model"):
            query = query.replace(f"${variable}", "a-.*")
        found = ask("query", query=query.replace("$__rate_interval", "20s"))["result"]
        return [float(series["value"][1]) for series in found]

    def silent() -> list[str]:
        return [q for made in MADE.values() for q in queries(made) if not numbers(q)]

    def firing() -> set[str]:
        alerts = ask("alerts")["alerts"]
        return {a["labels"]["alertname"] for a in alerts if a["state"] == "firing"}

    try:
        with started(
            sys.executable, "-c", FEEDER, env=env, log=tmp_path / "feeder.log"
        ) as feeder, started(
            "prometheus", f"--config.file={configured(tmp_path, folder / 'ray')}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}", f"--web.listen-address={address}",
            log=tmp_path / "prometheus.log",
        ):  # fmt: skip
            assert feeder.stdin
            feeder.stdin.write(json.dumps(records) + "\n")
            feeder.stdin.flush()
            with contextlib.suppress(AssertionError):
                wait_for(lambda: connected(address) and not silent(), 150, "all data")
            assert feeder.poll() is None, (tmp_path / "feeder.log").read_text()
            assert silent() == []
            everything = [n for made in MADE.values() for q in queries(made) for n in numbers(q)]
            assert any(number > 0 for number in everything)
            wait_for(lambda: "NotANumber" in firing(), 20, "the alert of a NaN")
            rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
            assert {rule["health"] for rule in rules} == {"ok"}, rules
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def connected(address: str) -> bool:
    try:
        return requests.get(f"http://{address}/-/ready", timeout=5).ok
    except requests.ConnectionError:
        return False
