"""The files for real clusters: against Ray's and KubeRay's schemas, and against this repository.

Which fields KubeRay knows is listed here from its CRDs (v1.6 to v1.7.1, `ray.io/v1`).
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from pretrain_runs import run_plan, tiny_plan

from nanoray import config

ROOT = Path(__file__).parents[1]
LAUNCHERS = ["aws.yaml", "gcp.yaml"]
ROLES = {"head", "trainer", "data", "rollout"}
MANIFESTS = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))

CLUSTER_FIELDS = set(
    "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec "
    "headServiceAnnotations managedBy rayVersion suspend upgradeStrategy workerGroupSpecs".split()
)
HEAD_FIELDS = set("enableIngress headService labels rayStartParams resources serviceType "
                  "template".split())  # fmt: skip
WORKER_FIELDS = set(
    "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts rayStartParams "
    "replicas resources scaleStrategy suspend template".split()
)
JOB_FIELDS = set(
    "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint "
    "entrypointNumCpus entrypointNumGpus entrypointResources jobId managedBy metadata "
    "rayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig "
    "submitterPodTemplate suspend ttlSecondsAfterFinished".split()
)
SERVICE_FIELDS = set(
    "deploymentUnhealthySecondThreshold excludeHeadPodFromServeSvc rayClusterConfig "
    "rayClusterDeletionDelaySeconds serveConfigV2 serveService serviceUnhealthySecondThreshold "
    "upgradeStrategy".split()
)


def load(*parts: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(ROOT.joinpath(*parts).read_text())
    return found


def documents(kind: str) -> list[dict[str, Any]]:
    read = [d for path in MANIFESTS for d in yaml.safe_load_all(path.read_text())]
    return [document for document in read if document["kind"] == kind]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_files(name: str) -> None:
    launcher = load("cluster", name)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.Draft7Validator(schema).validate(launcher)
    types = launcher["available_node_types"]
    assert set(types) == ROLES
    assert launcher["head_node_type"] == "head"
    for role, node in types.items():
        assert node["labels"] == {"nanoray-role": role}
        assert ("GPU" in node["resources"]) == (role in ("trainer", "rollout"))
        own = {"aws.yaml": "IamInstanceProfile", "gcp.yaml": "serviceAccounts"}[name]
        # The launcher gives nobody but the head an account, of its own where none is named.
        assert own in node["node_config"] or (role, name) == ("head", "gcp.yaml")
    assert types["head"]["resources"] == {"CPU": 0}  # no tasks beside the drivers
    assert not any(launcher[f"{whose}setup_commands"] for whose in ("", "head_", "worker_"))
    assert "spot" in str(types["rollout"]["node_config"]).lower()
    assert not re.search("spot|preemptible", str(types["trainer"]["node_config"]).lower())
    assert launcher["max_workers"] >= sum(node.get("max_workers", 0) for node in types.values())

    options = " ".join(launcher["docker"]["run_options"] + launcher["docker"]["head_run_options"])
    assert "RAY_AUTH_MODE=token" in options
    assert "RAY_USAGE_STATS_ENABLED=0" in options
    assert "RAY_REDIS_ADDRESS=" in options
    assert launcher["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [line for line in launcher[commands] if "ray start" in line]
        assert "--disable-usage-stats" in start
        assert "dashboard-host=0.0.0.0" not in start


def check_cluster(spec: dict[str, Any]) -> None:
    """A RayCluster's spec, wherever it stands."""
    assert set(spec) <= CLUSTER_FIELDS
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"}
    redis = spec["gcsFaultToleranceOptions"]
    assert set(redis) == {"redisAddress", "redisPassword"}
    head = spec["headGroupSpec"]
    assert set(head) <= HEAD_FIELDS
    assert head["rayStartParams"]["num-cpus"] == "0"
    groups = spec["workerGroupSpecs"]
    for group in groups:
        assert set(group) <= WORKER_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", group["groupName"])
    for group in [head, *groups]:
        assert group["labels"]["nanoray-role"] in ROLES
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == head["template"]["spec"]["containers"][0]["image"]
        variables = {item["name"]: item["value"] for item in container["env"]}
        assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
        assert variables["NANORAY_HOME"].startswith("s3://")
        known = {f"NANORAY_{name.upper()}" for cls in config.JobConfig.registry
                 for name in cls.model_fields} | {"NANORAY_HOME"}  # fmt: skip
        assert {name for name in variables if name.startswith("NANORAY_")} <= known
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert limits == requests  # Ray takes the limits for what there is
        assert all(isinstance(amount, str) for amount in limits.values())


def test_the_kuberay_cluster() -> None:
    (cluster,) = documents("RayCluster")
    assert cluster["apiVersion"] == "ray.io/v1"
    check_cluster(cluster["spec"])
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    assert set(groups) == ROLES - {"head"}
    assert "spot" in str(groups["rollout"]["template"]["spec"]["nodeSelector"])
    # Redis is there under the name, with the password, that the cluster asks for.
    # The line it is begun with brings up this, and no job.
    text = (ROOT / "cluster" / "kuberay" / "cluster.yaml").read_text()
    (applied,) = re.findall("kubectl apply (.*)", text)
    assert applied == "-f cluster/kuberay/redis.yaml -f cluster/kuberay/cluster.yaml"
    (redis,) = documents("StatefulSet")
    (service,) = documents("Service")
    options = cluster["spec"]["gcsFaultToleranceOptions"]
    port = service["spec"]["ports"][0]["port"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{port}"
    password = redis["spec"]["template"]["spec"]["containers"][0]["env"][0]["valueFrom"]
    assert password == options["redisPassword"]["valueFrom"]
    assert not documents("Secret")  # none lies in the repository


def test_the_kuberay_jobs() -> None:
    found = documents("RayJob")
    assert len(found) == 2
    (cluster,) = documents("RayCluster")
    for job in found:
        assert job["apiVersion"] == "ray.io/v1"
        assert set(job["spec"]) <= JOB_FIELDS
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
        python, flag, module, *flags = shlex.split(job["spec"]["entrypoint"])
        assert (python, flag) == ("python", "-m")
        parse = {"jobs.pretrain": config.PretrainConfig, "jobs.rl": config.RlConfig}[module]
        parse.parse(flags, module)  # every flag is one, and its value is possible


def test_the_kuberay_service() -> None:
    (service,) = documents("RayService")
    assert service["apiVersion"] == "ray.io/v1"
    assert set(service["spec"]) <= SERVICE_FIELDS
    check_cluster(service["spec"]["rayClusterConfig"])
    own = yaml.safe_load(service["spec"]["serveConfigV2"])
    shipped = load("serve", "chat.yaml")
    schema = importlib.import_module("ray.serve.schema")
    schema.ServeDeploySchema(**own)
    (ours,), (theirs,) = own["applications"], shipped["applications"]
    for key in ("import_path", "route_prefix", "name"):
        assert ours[key] == theirs[key]
    (mine,), (other,) = ours["deployments"], theirs["deployments"]
    assert mine["name"] == other["name"]
    assert set(mine["user_config"]) - {"api_keys_file"} <= set(other["user_config"])
    # It listens to all: not without keys, and they are mounted where it looks for them.
    keys = Path(mine["user_config"]["api_keys_file"])
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (mount,) = pod["containers"][0]["volumeMounts"]
        assert Path(mount["mountPath"]) == keys.parent
        assert mount["name"] == pod["volumes"][0]["name"]
        limits = pod["containers"][0]["resources"]["limits"]
        assert int(limits["cpu"]) >= mine["ray_actor_options"]["num_cpus"]
        assert int(limits["nvidia.com/gpu"]) >= mine["ray_actor_options"]["num_gpus"]


def test_the_dockerfile() -> None:
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    lines = [line.split() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    copied = [name for line in lines if line[0] == "COPY" for name in line[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"nanoray", "jobs", "serve", "pyproject.toml", "constraints.txt"} <= set(copied)
    assert not {".", "..", ".git", "tests"} & set(copied)
    (base,) = [line[1] for line in lines if line[0] == "FROM"]
    project = (ROOT / "pyproject.toml").read_text()
    assert base.startswith("python:3.11") and 'python_version = "3.11"' in project  # noqa: PT018
    (install,) = [line for line in lines if line[:3] == ["RUN", "pip", "install"]]
    assert install[install.index("-c") + 1] == "constraints.txt"
    assert "RAY_AUTH_MODE=token" in text
    assert "RAY_USAGE_STATS_ENABLED=0" in text
    assert lines[-1] == ["USER", "ray"]
    # A password would stay in a layer for ever.
    assert not re.search("(?i)(password|secret|token)=(?!token)", text)


def test_what_a_job_takes_along() -> None:
    lines = (ROOT / ".rayignore").read_text().splitlines()
    ignored = {line.strip("/") for line in lines if line and not line.startswith("#")}
    needed = {"nanoray", "jobs", "serve", "pyproject.toml"}
    assert not ignored & needed
    assert {"tests", "bench", "docs", "cluster"} <= ignored


@pytest.fixture(scope="module")
def demo_home(corpus: str, tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with what the demo's jobs begin with: corpus, tokenizer, base and chat model."""
    home = tmp_path_factory.mktemp("demo") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORAY_HOME", str(home))
        shutil.copytree(corpus, home / "data" / "docstrings")
        shutil.copytree(tokenizer_dir, home / "tokenizers" / "docstrings")
        plan = tiny_plan("docstrings", "docstrings", "base", num_iterations=1, max_seq_len=512)
        run_plan(plan)
        for name in ("demo", "demo-sft"):
            shutil.copytree(plan.run_dir, home / "runs" / name)
    return home


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_configuration_is_fine(
    path: Path, demo_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    own = tmp_path / "home"
    shutil.copytree(demo_home, own)
    kind = path.stem.split("_")[1]
    if kind in ("pretrain", "sft"):  # what this job would make shall not be there
        shutil.rmtree(own / "runs" / {"pretrain": "demo", "sft": "demo-sft"}[kind])
    monkeypatch.setenv("NANORAY_HOME", str(own))
    words = {"eval": ["chat"], "tokenizer": ["train"]}.get(kind, [])
    job = importlib.import_module(f"jobs.{kind}")
    assert job.main([*words, "--config", str(path), "--dry-run"]) == 0
    assert "dry run" in capsys.readouterr().out
