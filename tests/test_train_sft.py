"""Supervised fine-tuning without Ray: the loss, where it begins, exact after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gloo import run_gloo
from pretrain_runs import blocks_of, first_gradients, hashes, losses, noisy, run_plan, weights
from sft_runs import make_base, sft_plan, write_conversations

from nanoray.checkpoint import Checkpoint, list_steps
from nanoray.checkpoint.loading import load_model
from nanoray.data.blocks import Cursor, local_blocks, step_rows
from nanoray.metrics import read_records
from nanoray.tokenizer import load_tokenizer
from nanoray.train.record import record_config
from nanoray.train.sft_plan import SftPlan
from nanoray.train.stages import make_worker
from nanoray.train.watch import LossWatch
from nanoray.train.worker import Hooks
from nanoray.train.world import World


@pytest.fixture(scope="module")
def base(corpus: str, tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small base run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORAY_HOME", str(tmp_path_factory.mktemp("base")))
        return make_base(corpus, tokenizer_dir, "base")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_conversations(tmp_path_factory.mktemp("chats") / "chats.jsonl", 300, (1, 12))


def records_of(plan: SftPlan) -> list[dict[str, Any]]:
    return read_records(str(Path(plan.run_dir, "metrics.jsonl")))


def naive_gradients(plan: SftPlan) -> dict[str, np.ndarray]:
    """One forward over all rows of the first step, and torch's own cross entropy."""
    loaded = load_model(plan.base, dtype="float32")
    noisy(loaded.model)
    stream = plan.stream(loaded.tokenizer)
    rows = next(step_rows(local_blocks(stream, loaded.tokenizer, Cursor()), stream, 0, 1))
    ids = torch.from_numpy(rows.ids.astype(np.int64))
    logits = loaded.model(ids[:, :-1])
    targets = ids[:, 1:].clone()
    assert rows.trained is not None
    targets[torch.from_numpy(rows.trained[:, 1:]) == 0] = -100
    assert 0 < (targets == -100).sum() < targets.numel()
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    loss.backward()
    grads = {
        name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
        for name, p in loaded.model.named_parameters()
    }
    return grads | {"loss": loss.detach().numpy()}


def assert_equal_gradients(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Within 1e-6 of the largest entry of all; a parameter's also by its own measure."""
    assert found.keys() == expected.keys()
    largest = max(np.abs(grad).max() for grad in expected.values())
    for name, grad in expected.items():
        difference = np.abs(found[name] - grad).max()
        assert difference < min(1e-6 * largest, 1e-8 + 1e-4 * np.abs(grad).max()), name


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_gradients_are_those_of_the_mean_over_all_targets(
    home: Path, base: str, chats: str, train_on: str
) -> None:
    """Where micro-batches have unequal numbers of targets, a mean of means would differ."""
    plans = [
        sft_plan(base, chats, "gradients", train_on=train_on, device_batch_size=rows)
        for rows in (16, 8, 4)
    ]
    expected = naive_gradients(plans[0])
    for plan in plans:  # 1, 2 and 4 micro-batches
        assert_equal_gradients(first_gradients(0, 1, plan), expected)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_do_not_depend_on_workers(
    home: Path, base: str, chats: str, world_size: int
) -> None:
    plan = sft_plan(base, chats, "gradients", device_batch_size=2)
    found = run_gloo(first_gradients, world_size, plan)
    for grads in found:
        assert_equal_gradients(grads, naive_gradients(plan))


def test_it_begins_with_the_weights_and_moments_of_the_base(
    home: Path, base: str, chats: str
) -> None:
    world = World(0, 1, torch.device("cpu"))
    for keep, run in ((True, "warm"), (False, "cold")):
        worker = make_worker(
            sft_plan(base, chats, run, load_optimizer=keep), world, blocks_of(), Hooks()
        )
        worker.close()
        with Checkpoint(f"{base}/checkpoints", 3) as checkpoint:
            for name, weight in checkpoint.model_state().items():
                assert torch.equal(worker.model.state_dict()[name], weight), name
            for shard in worker.optimizer.state_shards():
                rows = checkpoint.optimizer_rows(
                    shard.param, shard.state, shard.start_row, shard.stop_row
                )
                assert torch.equal(shard.tensor, rows) == keep or not rows.any()
                assert keep or not shard.tensor.any()


def test_the_loss_falls_and_the_run_says_what_it_did(home: Path, base: str, chats: str) -> None:
    plan = sft_plan(
        base, chats, "learns", num_iterations=30, sample_every=20, save_every=25, log_every=1,
        matrix_lr=0.02, unembedding_lr=0.02,
    )  # fmt: skip
    summary = run_plan(plan)
    assert (summary["stage"], summary["status"]) == ("sft", "finished")
    curve = list(losses(plan).values())
    assert len(curve) == 30
    assert np.mean(curve[-5:]) < np.mean(curve[:5]) - 0.5
    assert "val_bpb" not in json.loads(Path(plan.run_dir, "summary.json").read_text())
    assert summary["metrics"]["padding_fraction"] == pytest.approx(plan.padding)
    assert summary["metrics"]["conversations_truncated"] == plan.truncated
    assert summary["metrics"]["conversations_left_out"] == plan.left_out == 0
    assert 0 < plan.padding < 0.2
    assert list_steps(plan.checkpoints_dir) == [25, 30]
    epochs = {record["epoch"] for record in records_of(plan)}
    passes = 30 * plan.layout.rows_per_step / plan.num_rows
    assert epochs == set(range(int(np.ceil(passes))))
    samples = Path(plan.run_dir, "samples.md").read_text()
    assert samples.count("- Who are you? **") == 2
    assert summary["tokens"] == 30 * 1024


def test_an_epoch_is_the_horizon_and_the_schedule_goes_by_it(
    home: Path, base: str, chats: str
) -> None:
    plan = sft_plan(base, chats, "epoch", warmup_ratio=0.25, warmdown_ratio=0.5)
    steps = plan.num_iterations
    assert (steps - 1) * 16 < plan.num_rows <= steps * 16
    assert steps >= 6
    run_plan(plan)
    found = [record["lr_multiplier"] for record in records_of(plan) if "loss" in record]
    up, down = round(0.25 * steps), round(0.5 * steps)
    expected = [min(1.0, (i + 1) / up, (steps - i) / down) for i in range(steps)]
    assert found == pytest.approx(expected)
    tokenizer = load_tokenizer(plan.tokenizer_dir)
    stream = plan.stream(tokenizer)
    rows = step_rows(local_blocks(stream, tokenizer, Cursor()), stream, 0, 1)
    trained_on = [tuple(row) for step in rows for row in step.ids]
    assert len(set(trained_on[: plan.num_rows])) == plan.num_rows, "every row once"


def test_ratios_of_tiny_losses_stop_no_run() -> None:
    watch = LossWatch(spike_factor=3.0)
    assert not any(watch.problem(0.02) for _ in range(30))
    assert not watch.problem(0.3), "15 times the average, and still next to nothing"
    assert "jumped to 0.600" in watch.problem(0.6)


def test_a_stopped_run_goes_on_bitwise_equal(home: Path, base: str, chats: str) -> None:
    changes = {"num_iterations": 40, "log_every": 1}
    whole = sft_plan(base, chats, "whole", **changes)
    run_plan(whole)
    for stop, done in ((3, 3), (30, 33)):
        parts = sft_plan(base, chats, "parts", **changes)
        summary = run_plan(parts, stop_step=stop)
        assert (summary["status"], summary["step"]) == ("stopped", done)
    assert run_plan(parts)["status"] == "finished"
    assert losses(parts) == losses(whole)
    assert hashes(parts) == hashes(whole)
    assert weights(parts, 40) == weights(whole, 40)


@pytest.mark.slow
def test_the_number_of_workers_may_change(home: Path, base: str, chats: str) -> None:
    whole = sft_plan(base, chats, "whole", num_iterations=20)
    run_plan(whole)
    moving = sft_plan(base, chats, "moving", num_iterations=20)
    run_plan(moving, 2, stop_step=7)
    run_plan(moving, 1, stop_step=6)
    assert run_plan(moving, 3)["status"] == "finished"
    assert hashes(moving) == hashes(whole)
    np.testing.assert_allclose(
        list(losses(moving).values()), list(losses(whole).values()), atol=1e-4, rtol=0
    )


def test_the_moments_of_the_base_make_a_difference(home: Path, base: str, chats: str) -> None:
    warm = sft_plan(base, chats, "warm", num_iterations=3)
    cold = sft_plan(base, chats, "cold", num_iterations=3, load_optimizer=False)
    run_plan(warm)
    run_plan(cold)
    assert hashes(warm) == hashes(cold)
    assert losses(warm)[1] == losses(cold)[1], "the same weights"
    assert losses(warm)[2] != losses(cold)[2]


def test_a_task_is_validated_on_its_test_split(home: Path, base: str) -> None:
    plan = sft_plan(base, "arithmetic*0.01", "sums", eval_every=2, num_iterations=5)
    assert plan.validation == "arithmetic*1.0" or plan.validation == "arithmetic"
    summary = run_plan(plan)
    validated = {r["step"]: r["val_bpb"] for r in records_of(plan) if "val_bpb" in r}
    assert list(validated) == [2, 4, 5]
    assert summary["val_bpb"] == validated[5]
    assert summary["min_val_bpb"] == min(validated.values())
    other = sft_plan(base, "arithmetic*0.01", "none", validation="", num_iterations=2)
    assert run_plan(other)["val_bpb"] is None


@pytest.mark.slow
def test_chatcore_is_the_same_with_two_workers(home: Path, base: str) -> None:
    plans = {}
    for workers in (1, 2):
        plan = plans[workers] = sft_plan(
            base, "arithmetic*0.01", f"core{workers}", num_iterations=4, chatcore_every=2,
            chatcore_tasks="arithmetic", chatcore_max_sample=20, chatcore_max_tokens=12,
            validation="arithmetic",
        )  # fmt: skip
        run_plan(plan, workers)
    figures = {n: [r for r in records_of(plan) if "chatcore" in r] for n, plan in plans.items()}
    assert [r["step"] for r in figures[1]] == [2, 4]
    keys = ("step", "chatcore", "chat/arithmetic")
    assert [[r[k] for k in keys] for r in figures[1]] == [[r[k] for k in keys] for r in figures[2]]
    summary = json.loads(Path(plans[2].run_dir, "summary.json").read_text())
    assert summary["metrics"]["chatcore"] == figures[2][-1]["chatcore"]
    bpb = [r["val_bpb"] for n in (1, 2) for r in records_of(plans[n]) if "val_bpb" in r]
    assert bpb[0] == pytest.approx(bpb[1], abs=1e-4)


def test_its_checkpoint_is_a_model_and_a_base(home: Path, base: str, chats: str) -> None:
    first = sft_plan(base, chats, "first", num_iterations=2)
    record_config(first)
    run_plan(first)
    loaded = load_model("first", dtype="float32")
    assert (loaded.meta["stage"], loaded.step) == ("sft", 2)
    assert loaded.meta["plan"]["base"] == f"{base}/checkpoints/step_000003"
    second = sft_plan("first", chats, "second", num_iterations=2, max_seq_len=None,
                      total_batch_size=None, device_batch_size=None)  # fmt: skip
    assert second.base == f"{first.run_dir}/checkpoints/step_000002"
    assert (second.sequence_len, second.total_batch_size) == (64, 1024)
    assert second.config["matrix_lr"] == first.config["matrix_lr"], "not scaled twice"
    assert run_plan(second)["status"] == "finished"
    spelling = sft_plan("first", "simple-spelling*0.001", "spell", num_iterations=1)
    assert str(spelling.config["words"]).endswith("words.txt"), "the pretraining corpus's"


def test_a_run_inherits_from_its_base(home: Path, base: str, chats: str) -> None:
    plan = sft_plan(base, chats, "heir", max_seq_len=None, total_batch_size=None,
                    device_batch_size=None, matrix_lr=0.5)  # fmt: skip
    assert (plan.sequence_len, plan.total_batch_size) == (32, 512)
    assert plan.config["device_batch_size"] == 8
    with Checkpoint(f"{base}/checkpoints", 3) as checkpoint:
        theirs = checkpoint.meta["plan"]["config"]
    for name in ("embedding_lr", "unembedding_lr", "scalar_lr"):
        assert plan.config[name] == theirs[name]
    assert plan.config["matrix_lr"] == 0.5
    assert (plan.config["train_on"], plan.config["init_lr_frac"]) == ("assistant", 0.8)
    worker = make_worker(plan, World(0, 1, torch.device("cpu")), blocks_of(), Hooks())
    worker.close()
    groups = worker._make_groups({n: tuple(p.shape) for n, p in worker.model.named_parameters()})
    assert 0.5 * 0.8 in {g.lr for g in groups if g.kind == "muon"}
    assert all(g.weight_decay == 0 for g in groups if g.kind == "muon")


def test_conversations_longer_than_a_row(home: Path, base: str, tmp_path: Path) -> None:
    chats = Path(write_conversations(tmp_path / "long.jsonl", 40, (1, 300)))
    question = {"role": "user", "content": "why? " * 60}
    answer = {"role": "assistant", "content": "because"}
    with chats.open("a") as file:
        file.write(json.dumps({"messages": [question, answer]}) + "\n")
    plan = sft_plan(base, str(chats), "long", num_iterations=4)
    assert plan.left_out == 1
    assert plan.truncated > 20
    summary = run_plan(plan)
    assert summary["metrics"]["conversations_truncated"] == plan.truncated
    assert summary["metrics"]["conversations_left_out"] == 1
    assert summary["metrics"]["cropped_fraction"] > 0.3
    assert np.isfinite(list(losses(plan).values())).all()


def test_home_and_base_may_be_uris(base: str, chats: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANORAY_HOME", "memory://sft-home")
    here = sft_plan(base, chats, "uri", num_iterations=2)
    assert here.run_dir == "memory://sft-home/runs/uri"
    assert run_plan(here)["status"] == "finished"
    again = sft_plan(here.run_dir, chats, None, num_iterations=1)
    assert again.run == "uri-sft"
    assert again.base == "memory://sft-home/runs/uri/checkpoints/step_000002"
    assert run_plan(again)["status"] == "finished"


def test_a_base_of_february(home: Path, corpus: str, tokenizer_dir: str, chats: str) -> None:
    old = make_base(corpus, tokenizer_dir, "old", recipe="february", num_iterations=2)
    plan = sft_plan(old, chats, "new", num_iterations=10)
    assert plan.config["recipe"] == "february"
    assert (plan.config["train_on"], plan.config["warmdown_ratio"]) == ("all", 0.2)
    assert plan.config["init_lr_frac"] == 1.0
    run_plan(plan)
    multipliers = [r["lr_multiplier"] for r in records_of(plan) if "loss" in r]
    assert multipliers == [1.0] * 9 + [0.5]
