"""Where work goes on a cluster whose nodes have roles, and what the preflight says of them."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch
from pretrain_runs import hashes, run_plan, tiny_plan
from ray.cluster_utils import Cluster
from ray.train.v2.api.config import ScalingConfig

from nanoray import fleet
from nanoray.data import stream as data_stream
from nanoray.data.blocks import Cursor
from nanoray.data.stream import training_dataset
from nanoray.errors import NanorayError
from nanoray.lease import Lease
from nanoray.model.precision import reserved_device
from nanoray.rl.groups import Group
from nanoray.rl.ledger import LedgerRules
from nanoray.rl.pool import PoolClient, close_pool, start_pool
from nanoray.rl.terms import PoolSettings
from nanoray.tokenizer import load_tokenizer
from nanoray.train import ray_glue
from nanoray.train.needs import with_gpus
from nanoray.train.policies import PlacedPolicy
from nanoray.train.record import record_config

placement = importlib.import_module("nanoray.fleet.placement")
GIB = 2**30


def node(role: str | None, cpus: float = 2, gpus: float = 0, memory_gib: float = 8) -> Any:
    """A node as `ray.nodes` tells it."""
    resources = {"CPU": cpus, "GPU": gpus, "memory": memory_gib * GIB}
    labels = {"nanoray-role": role} if role else {}
    return {"Resources": resources, "Labels": labels, "Alive": True}


def needs(**changes: Any) -> fleet.Needs:
    values: dict[str, Any] = {
        "num_workers": 2,
        "cpus_per_worker": 1.0,
        "gpus_per_worker": 0.0,
        "other_cpus": 1.0,
        "memory_bytes_per_worker": GIB,
        "object_store_bytes": 2**26,
        "role": "trainer",
        "others_role": "data",
    }
    return fleet.Needs(**(values | changes))


ROLES = [node("head", 0), node("trainer"), node("data"), node("rollout", gpus=0.5)]


@pytest.mark.parametrize(
    ("nodes", "changes"),
    [
        (ROLES, {}),
        ([node(None, 3)], {}),
        ([node(None), node(None, 1)], {}),
        ([node("head", 0), node("trainer", 3)], {}),  # data tasks go anywhere
        ([node("head", 0), node("data", 1), node(None)], {}),  # and so do trainers
        (ROLES, {"role": "rollout", "others_role": "trainer", "gpus_per_worker": 0.25}),
    ],
)
def test_what_fits_its_roles_is_accepted(nodes: list[Any], changes: dict[str, Any]) -> None:
    fleet.check_roles(needs(**changes), nodes)


@pytest.mark.parametrize(
    ("nodes", "changes", "message"),
    [
        (ROLES, {"num_workers": 3}, r"need 3 .*\(nodes with nanoray-role=trainer\) has 2; lower"),
        (ROLES, {"gpus_per_worker": 0.25}, r"0.5 GPUs, .*nanoray-role=trainer\) has 0; lower"),
        (ROLES, {"memory_bytes_per_worker": 5 * GIB}, r"10.0 GiB .*=trainer\) has 8.0 GiB"),
        (ROLES, {"other_cpus": 3}, r"data tasks need 3 CPUs, .*=data have 2; lower .* data nodes"),
        (
            [node("trainer", 1), node("trainer", 1), node("data")],
            {"num_workers": 1, "cpus_per_worker": 2},
            r"the nodes with nanoray-role=trainer have room for 0 of 1",
        ),
        (
            ROLES,
            {"role": "rollout", "others_role": "trainer", "gpus_per_worker": 0.5},
            r"2 workers need 1 GPUs, .*nanoray-role=rollout\) has 0.5",
        ),
    ],
)
def test_a_shortfall_is_named_with_its_role(
    nodes: list[Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(NanorayError, match=message):
        fleet.check_roles(needs(**changes), nodes)


@pytest.mark.parametrize(
    ("nodes", "places"),
    [
        (ROLES, 2),  # not the data node's and the rollout node's
        ([node("head", 0), node("trainer", 1), node("data"), node("rollout")], 1),
        ([node("head", 0), node("data"), node("rollout")], 3),  # no trainers: anywhere
        ([node("head", 0), node("trainer", 2)], 1),  # the packing tasks need a CPU there
        ([node("head", 0), node("trainer", 2), node(None, 1)], 2),
        ([node(None, 2), node(None, 2)], 3),
        ([node(None, 2)], 1),
        ([node("trainer", 1), node("data", 1)], 1),
    ],
)
def test_elastic_training_counts_the_places_of_its_own(
    nodes: list[Any], places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "living_nodes", lambda: nodes)
    scaling = ScalingConfig(num_workers=(1, 8), resources_per_worker={"CPU": 1.0})
    policy = PlacedPolicy(scaling, {"CPU": 1}, "data")
    reserved = {str(number): node["Resources"] for number, node in enumerate(nodes)}
    assert policy._count_possible_workers(reserved) == places
    one_place = {"0": {"CPU": 1.0}}  # another job has the rest
    assert policy._count_possible_workers(one_place) == min(1, places)


@pytest.mark.parametrize(
    ("nodes", "places"),
    [
        ([node(None, 8, gpus=8)], 6),  # two GPUs are the rollout actors'
        ([node("trainer", 8, gpus=8), node("rollout", 2, gpus=2)], 8),
        ([node("trainer", 8, gpus=4), node(None, 2)], 2),
        ([node(None, 8, gpus=1)], 0),
    ],
)
def test_an_elastic_learner_leaves_room_for_rollout_actors(
    nodes: list[Any], places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "living_nodes", lambda: nodes)
    scaling = ScalingConfig(
        num_workers=(1, 8), use_gpu=True, resources_per_worker={"CPU": 1.0, "GPU": 1.0}
    )
    policy = PlacedPolicy(scaling, {"CPU": 2.0, "GPU": 2.0}, "rollout")
    reserved = {str(number): node["Resources"] for number, node in enumerate(nodes)}
    assert policy._count_possible_workers(reserved) == places


def test_elastic_training_has_no_place_where_its_role_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [node("head", 0), node("data"), node("rollout")]
    for module in (fleet, placement):
        monkeypatch.setattr(module, "living_nodes", lambda: nodes)
    selector = {"nanoray-role": "trainer"}
    scaling = ScalingConfig(
        num_workers=(1, 8), resources_per_worker={"CPU": 1.0}, label_selector=selector
    )
    policy = PlacedPolicy(scaling, {"CPU": 1}, "data")
    reserved = {str(number): node["Resources"] for number, node in enumerate(nodes)}
    assert policy._count_possible_workers(reserved) == 0
    nodes.append(node("trainer"))
    assert policy._count_possible_workers(reserved) == 2


def test_the_last_node_of_a_role_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    nodes = [node("head", 0), node("trainer"), node("trainer"), node("rollout")]
    monkeypatch.setattr(placement, "living_nodes", lambda: nodes)
    monkeypatch.setattr(placement.time, "monotonic", lambda: now[0])
    said: list[str] = []
    watch = fleet.RoleWatch({"trainer": 100, "data": 1}, said.append)  # there is no data node

    def look_at(seconds: float, *roles: str) -> None:
        now[0], nodes[:] = seconds, [node(role) for role in roles]
        watch.look()

    look_at(10, "head", "trainer")
    assert not said
    look_at(20, "head", "data")
    assert said == ["no trainer node is left; waiting 100 s at most for one"]
    look_at(21, "trainer")  # it looks every few seconds only
    look_at(90, "rollout")
    assert len(said) == 1
    look_at(110, "trainer")
    assert said[1:] == ["there is a trainer node again"]
    look_at(200, "head")
    watch.progress()
    now[0] = 290
    watch.progress()
    look_at(389, "head")
    with pytest.raises(
        NanorayError, match=r"no trainer node has come within 100 s; .*role=trainer"
    ):
        look_at(395, "head")


def has(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, mps: bool = False) -> None:
    """What torch says of this machine's accelerators."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_only_a_reserved_gpu_is_used(
    monkeypatch: pytest.MonkeyPatch, home: Any, corpus: str, tokenizer_dir: str
) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "any")
    with_gpu, without = (plan.with_config(gpus_per_worker=gpus) for gpus in (0.5, 0.0))
    has(monkeypatch, cuda=True)
    assert reserved_device(on_gpu=True) == torch.device("cuda", 0)
    assert reserved_device(on_gpu=False) == torch.device("cpu")
    assert ray_glue._device(with_gpu, 2) == torch.device("cuda", 0)
    assert ray_glue._device(without, 2) == torch.device("cpu")
    has(monkeypatch, cuda=False, mps=True)
    assert reserved_device(on_gpu=False) == torch.device("mps")
    assert ray_glue._device(without, 1) == torch.device("mps")
    assert ray_glue._device(without, 2) == torch.device("cpu")  # gloo does not know MPS
    has(monkeypatch, cuda=False)
    assert reserved_device(on_gpu=False) == torch.device("cpu")
    with pytest.raises(NanorayError, match="a GPU is reserved"):
        ray_glue._device(with_gpu, 2)


@pytest.mark.parametrize(
    ("built_with", "mps", "cause"),
    [
        (None, False, r"sees none: this torch is built without CUDA; install a build that has it"),
        (None, True, r"sees none: this torch is built without CUDA"),
        ("13.0", False, r"driver is probably older than torch's CUDA 13\.0, .*`nvidia-smi`"),
    ],
)
def test_a_reserved_gpu_that_torch_does_not_see_is_an_error(
    built_with: str | None, mps: bool, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, cuda=False, mps=mps)
    monkeypatch.setattr(torch.version, "cuda", built_with)
    with pytest.raises(NanorayError, match=cause):
        reserved_device(on_gpu=True)


class RoleCluster:
    """A Ray cluster in this process whose nodes have roles; this process is its driver."""

    def __init__(self) -> None:
        self.cluster = Cluster()
        self.role_of: dict[str, str] = {}
        # Logical GPUs: they are handed out as real ones are, and nothing computes on them.
        for role, cpus, gpus in (
            ("head", 0, 0), ("trainer", 2, 1), ("data", 2, 0), ("rollout", 2, 1),
        ):  # fmt: skip
            self.cluster.add_node(
                num_cpus=cpus, num_gpus=gpus, labels={"nanoray-role": role},
                object_store_memory=100 * 2**20,
            )  # fmt: skip
        os.environ["RAY_ADDRESS"] = self.cluster.address
        try:
            fleet.connect(namespace=None)
            self.role_of = {n["NodeID"]: n["Labels"]["nanoray-role"] for n in ray.nodes()}
        finally:
            del os.environ["RAY_ADDRESS"]

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def roles() -> Iterator[RoleCluster]:
    ray.shutdown()  # the session of other test files
    made = RoleCluster()
    yield made
    made.close()
    fleet.connect()  # for those that come after


@pytest.mark.slow
def test_the_preflight_of_a_cluster_answers_by_role(roles: RoleCluster) -> None:
    fleet.preflight(needs())
    with pytest.raises(NanorayError, match="nanoray-role=trainer"):
        fleet.preflight(needs(num_workers=4))


@pytest.mark.slow
def test_data_tasks_run_on_data_nodes(
    roles: RoleCluster, home: Any, corpus: str, tokenizer_dir: str, tmp_path: Any
) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "placed")
    stream = plan.stream(load_tokenizer(tokenizer_dir))
    pack_unit = data_stream.unit_block

    def told(*args: Any) -> Any:
        (tmp_path / ray.get_runtime_context().get_node_id()).touch()
        return pack_unit(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_stream, "unit_block", told)  # travels with the task
        dataset = training_dataset(
            stream, Cursor(), tokenizer_dir, label_selector=fleet.label_selector("data")
        )
        assert dataset.take(40)
    packed_on = {path.name for path in tmp_path.iterdir()} & set(roles.role_of)
    assert {roles.role_of[place] for place in packed_on} == {"data"}


@pytest.mark.slow
def test_learners_train_on_trainer_nodes(
    roles: RoleCluster, home: Any, corpus: str, tokenizer_dir: str
) -> None:
    calm = tiny_plan(corpus, tokenizer_dir, "calm")
    run_plan(calm)
    plan = tiny_plan(corpus, tokenizer_dir, "placed", num_workers="1:4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_glue, "_train_loop", _telling_its_node(ray_glue._train_loop))
        lease = Lease(plan.run_dir)
        try:
            record_config(plan)
            records: list[dict[str, Any]] = []
            summary = ray_glue.fit(with_gpus(plan, {}), lease, records.append)
        finally:
            lease.release()
    assert summary["status"] == "finished"
    # Four were allowed and six CPUs there: two on the trainer node is all that may be.
    seen = [record["node"] for record in records if "node" in record]
    assert [roles.role_of[place] for place in seen] == ["trainer", "trainer"]
    assert hashes(plan) == hashes(calm)


def _telling_its_node(loop: Callable[..., None]) -> Callable[..., None]:
    def train(config: dict[str, Any]) -> None:
        config["board"].post.remote({"node": ray.get_runtime_context().get_node_id()})
        loop(config)

    return train


@pytest.mark.slow
def test_a_learner_without_the_gpu_it_reserved_ends_the_run_with_a_sentence(
    roles: RoleCluster, home: Any, corpus: str, tokenizer_dir: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch has a GPU here")
    plan = tiny_plan(corpus, tokenizer_dir, "blind").with_config(gpus_per_worker=1.0)
    lease = Lease(plan.run_dir)
    try:
        record_config(plan)
        with pytest.raises(NanorayError, match=r"^a GPU is reserved for a process on .* sees none"):
            ray_glue.fit(plan, lease, lambda _record: None)
    finally:
        lease.release()


@pytest.mark.slow
def test_rollouts_share_the_gpu_of_rollout_nodes(roles: RoleCluster, tmp_path: Any) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()

    def open_sampler() -> Any:
        class Sampler:
            def load_weights(self, buffer: Any, version: int) -> None: ...

            def sample(self, numbers: list[int]) -> list[Any]:
                here = ray.get_runtime_context()
                gpus = ",".join(here.get_accelerator_ids()["GPU"])
                told = f"{here.get_node_id()} {gpus} {os.environ['CUDA_VISIBLE_DEVICES']}"
                prompt = np.array([0], dtype=np.int32)
                (seen / here.get_actor_id()).touch()
                while len(list(seen.iterdir())) < 2:  # both are there at the same time
                    time.sleep(0.05)
                return [_group(number, prompt, told) for number in numbers]

        return Sampler()

    def _group(number: int, prompt: Any, text: str) -> Group:
        from nanoray.rl.groups import Sample

        one = Sample(
            tokens=np.zeros(1, np.int32),
            mask=np.ones(1, np.uint8),
            logprobs=np.zeros(1, np.float32),
            versions=np.zeros(1, np.int32),
            finish_reason="stop",
            text=text,
            reward=float(number % 2),
        )
        return Group(number, prompt, (one,))

    rules = LedgerRules(num_steps=1, questions_per_step=4, bundle_size=1)
    settings, run_dir = PoolSettings(2, 2), str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    pool = start_pool(open_sampler, rules, settings, run_dir=run_dir, num_cpus=0.5, num_gpus=0.25)
    try:
        client = PoolClient(pool, "a")
        client.begin(0, None)
        client.publish(0, np.zeros(8, np.uint8))
        groups = client.take(0).groups
    finally:
        close_pool(pool)
    for node_id, gpu, visible in (group.samples[0].text.split() for group in groups):
        assert (roles.role_of[node_id], gpu, visible) == ("rollout", "0", "0")
