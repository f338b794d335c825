"""The files for real clusters: against Ray's and KubeRay's schemas, and against this repository.

Of KubeRay's CRDs (v1.6 to v1.7.1, `ray.io/v1`) and Kubernetes' own kinds, what the manifests use is
listed here: whatever else stands in one is taken for a slip.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import tomllib
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
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MANIFESTS = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))


def closed(optional: str = "", **fields: Any) -> dict[str, Any]:
    """The JSON schema of an object that has these fields, but for the ``optional`` ones, and no
    others."""
    required = sorted(set(fields) - set(optional.split()))
    return {"type": "object", "properties": fields, "required": required,
            "additionalProperties": False}  # fmt: skip


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


def one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITIES = {
    "type": "object",
    "propertyNames": one_of("cpu", "memory", "nvidia.com/gpu", "storage"),
    "additionalProperties": {"type": "string", "pattern": "^[1-9][0-9]*(m|[KMGT]i)?$"},
}
SECRET = closed(secretKeyRef=closed(name=TEXT, key=TEXT))
CONTAINER = closed(
    "command volumeMounts ports",
    name=TEXT,
    image=TEXT,
    command=listed(TEXT),
    env=listed(closed("value valueFrom", name=TEXT, value=TEXT, valueFrom=SECRET)),
    ports=listed(closed(containerPort=COUNT)),
    volumeMounts=listed(closed("readOnly", name=TEXT, mountPath=TEXT, readOnly={"const": True})),
    resources=closed("requests", limits=QUANTITIES, requests=QUANTITIES),
)
TOLERATION = closed("key", key=TEXT, operator=one_of("Exists"), effect=one_of("NoSchedule"))
RAY_POD = closed(
    "terminationGracePeriodSeconds nodeSelector tolerations volumes",
    serviceAccountName=TEXT,
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=TEXTS,
    tolerations=listed(TOLERATION),
    volumes=listed(closed(name=TEXT, secret=closed(secretName=TEXT))),
    containers=listed(CONTAINER),
)
GROUP = {"rayStartParams": TEXTS, "labels": TEXTS, "template": closed(spec=RAY_POD)}
RAY_CLUSTER = closed(
    rayVersion=TEXT,
    enableInTreeAutoscaling={"const": True},
    # Ray 2.60 runs v2; KubeRay gives pods the restart policy that this needs where it is told.
    autoscalerOptions=closed("idleTimeoutSeconds", version=one_of("v2"), idleTimeoutSeconds=COUNT),
    authOptions=closed(mode=one_of("token")),
    gcsFaultToleranceOptions=closed(redisAddress=TEXT, redisPassword=closed(valueFrom=SECRET)),
    headGroupSpec=closed(**GROUP),
    workerGroupSpecs=listed(
        closed(groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, **GROUP)
    ),
)
APP = closed(app=TEXT)
STATEFUL_SET = closed(
    serviceName=TEXT,
    replicas=COUNT,
    selector=closed(matchLabels=APP),
    template=closed(metadata=closed(labels=APP), spec=closed(containers=listed(CONTAINER))),
    volumeClaimTemplates=listed(
        closed(
            metadata=closed(name=TEXT),
            spec=closed(accessModes=listed(TEXT), resources=closed(requests=QUANTITIES)),
        )
    ),
)
SPECS = {  # by API version and kind
    ("ray.io/v1", "RayCluster"): RAY_CLUSTER,
    ("ray.io/v1", "RayJob"): closed(clusterSelector=TEXTS, entrypoint=TEXT),
    ("ray.io/v1", "RayService"): closed(serveConfigV2=TEXT, rayClusterConfig=RAY_CLUSTER),
    ("apps/v1", "StatefulSet"): STATEFUL_SET,
    ("v1", "Service"): closed(selector=APP, ports=listed(closed(port=COUNT))),
}


def load(*parts: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(ROOT.joinpath(*parts).read_text())
    return found


def documents(kind: str) -> list[dict[str, Any]]:
    read = [d for path in MANIFESTS for d in yaml.safe_load_all(path.read_text())]
    return [document for document in read if document["kind"] == kind]


def check_fields(manifest: str) -> None:
    """Raises a ValidationError where a manifest has a field, or a type, that is not listed here."""
    for document in yaml.safe_load_all(manifest):
        spec = SPECS[document["apiVersion"], document["kind"]]
        whole = closed(apiVersion=TEXT, kind=TEXT, metadata=closed(name=TEXT), spec=spec)
        jsonschema.Draft7Validator(whole).validate(document)


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
        if name == "aws.yaml":
            # Where none is named Ray takes one whose driver is years older than torch's CUDA.
            assert node["node_config"]["ImageId"] == "YOUR-AMI"
        else:
            (disk,) = node["node_config"]["disks"]
            assert disk["initializeParams"]["sourceImage"].endswith("images/YOUR-IMAGE")
    assert types["head"]["resources"] == {"CPU": 0}  # no tasks beside the drivers
    assert not any(launcher[f"{whose}setup_commands"] for whose in ("", "head_", "worker_"))
    assert "spot" in str(types["rollout"]["node_config"]).lower()
    assert not re.search("spot|preemptible", str(types["trainer"]["node_config"]).lower())
    assert launcher["max_workers"] >= sum(node.get("max_workers", 0) for node in types.values())

    text = (ROOT / "cluster" / name).read_text()
    told = " ".join(line.strip().removeprefix("# ") for line in text.splitlines())
    assert "NVIDIA driver >= 580" in told  # CUDA 13's, which torch's wheels bring
    assert "Redis has neither password nor TLS here: keep it in a private subnet" in told
    (extra,) = re.findall(r"pip install -e '\.\[(\w+)\]'", told)  # the launcher's own client
    client = {"aws": "boto3", "gcp": "google-api-python-client"}[launcher["provider"]["type"]]
    assert client in EXTRAS[extra]

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
    assert spec["rayVersion"] == ray.__version__
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    groups = spec["workerGroupSpecs"]
    for group in groups:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", group["groupName"])
    for group in [head, *groups]:
        assert group["labels"]["nanoray-role"] in ROLES
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == "YOUR-ACCOUNT"  # without one nobody reads the bucket
        (container,) = pod["containers"]
        assert container["image"] == head["template"]["spec"]["containers"][0]["image"]
        variables = {item["name"]: item["value"] for item in container["env"]}
        assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
        assert variables["NANORAY_HOME"].startswith("s3://")
        known = {f"NANORAY_{name.upper()}" for cls in config.JobConfig.registry
                 for name in cls.model_fields} | {"NANORAY_HOME"}  # fmt: skip
        assert {name for name in variables if name.startswith("NANORAY_")} <= known
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert limits == requests  # Ray takes the limits for what there is


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_the_fields_of_the_manifests(path: Path) -> None:
    check_fields(path.read_text())


@pytest.mark.parametrize(
    ("file", "right", "slip"),
    [
        ("cluster", "version: v2", "version: v3"),
        ("cluster", "version: v2", "verison: v2"),
        ("cluster", "idleTimeoutSeconds: 300", "idleTimeoutSeconds: 300s"),
        ("cluster", "terminationGracePeriodSeconds", "terminationGracePeriod"),
        ("cluster", "serviceAccountName: YOUR-ACCOUNT", "serviceAcountName: YOUR-ACCOUNT"),
        ("cluster", "nodeSelector", "nodeSelectors"),
        ("cluster", "operator: Exists, effect: NoSchedule", "operator: Exist, effect: NoSchedule"),
        ("cluster", "containers:", "container:"),
        ("cluster", "image:", "imge:"),
        ("cluster", "memory: 800Gi", "memory: 800GiB"),
        ("cluster", 'nvidia.com/gpu: "8"', "nvidia.com/gpu: 8"),
        ("cluster", 'nvidia.com/gpu: "8"', 'nvidia.com/gpus: "8"'),
        ("cluster", 'num-cpus: "0"', "num-cpus: 0"),
        ("cluster", "redisPassword", "redisPasword"),
        ("cluster", "labels: {nanoray-role: head}", "label: {nanoray-role: head}"),
        ("cluster", "  name: nanoray", "  nmae: nanoray"),
        ("chat", "rayClusterConfig", "rayClusterSpec"),
        ("chat", "secretName", "secretname"),
        ("chat", "readOnly: true", "readonly: true"),
        ("pretrain", "clusterSelector", "clusterSelectors"),
        ("pretrain", "  entrypoint", "  deletionStrategy: {onSucess: {}}\n  entrypoint"),
        ("redis", "volumeClaimTemplates", "volumeClaimTemplate"),
        ("redis", "secretKeyRef", "secretRef"),
    ],
)
def test_a_slip_in_a_manifest_is_found(file: str, right: str, slip: str) -> None:
    text = (ROOT / "cluster" / "kuberay" / f"{file}.yaml").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    assert right in lines
    with pytest.raises(jsonschema.ValidationError):
        check_fields(lines.replace(right, slip, 1))


def test_the_kuberay_cluster() -> None:
    (cluster,) = documents("RayCluster")
    check_cluster(cluster["spec"])
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    assert set(groups) == ROLES - {"head"}
    # Bucket and labels are one provider's.
    assert groups["rollout"]["template"]["spec"]["nodeSelector"] == {
        "eks.amazonaws.com/capacityType": "SPOT"
    }
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
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
        python, flag, module, *flags = shlex.split(job["spec"]["entrypoint"])
        assert (python, flag) == ("python", "-m")
        parse = {"jobs.pretrain": config.PretrainConfig, "jobs.rl": config.RlConfig}[module]
        parse.parse(flags, module)  # every flag is one, and its value is possible


def test_the_kuberay_service() -> None:
    (service,) = documents("RayService")
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
    assert install[-1] == "'.[s3,aws,gcp]'"  # every cloud's bucket, and the head starts nodes
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {*EXTRAS["s3"], *EXTRAS["aws"], *EXTRAS["gcp"]} <= pinned
    assert "RAY_AUTH_MODE=token" in text
    assert "RAY_USAGE_STATS_ENABLED=0" in text
    assert lines[-1] == ["USER", "ray"]
    # A password would stay in a layer for ever.
    assert not re.search("(?i)(password|secret|token)=(?!token)", text)


def test_no_printed_line_leaves_usage_statistics_on() -> None:
    starts = re.findall(r"^ {4}.*ray start --head.*$", (ROOT / "README.md").read_text(), re.M)
    assert starts
    assert all("--disable-usage-stats" in line for line in starts)


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
