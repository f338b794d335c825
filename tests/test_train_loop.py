"""The training loop without Ray: exact at any number of workers, exact after a stop."""

from __future__ import annotations

import json
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo import run_gloo
from pretrain_runs import blocks_of, first_gradients, hashes, losses, run_plan, tiny_plan, weights

from nanoray import storage
from nanoray.checkpoint import list_steps
from nanoray.data.writer import write_shard
from nanoray.errors import NanorayError
from nanoray.lease import LeaseLostError
from nanoray.metrics import read_records
from nanoray.train.pretrain import PretrainWorker
from nanoray.train.record import check_resume, record_config
from nanoray.train.resume import StartLostError, choose_start
from nanoray.train.step import micro_batches
from nanoray.train.watch import LossWatch, Progress, TrainingHealthError, describe_rows
from nanoray.train.worker import Hooks
from nanoray.train.world import World

GOLDEN = Path(__file__).parent / "golden" / "pretrain_losses.json"


@pytest.mark.slow
def test_gradients_do_not_depend_on_workers_or_micro_batches(
    home: Path, corpus: str, tokenizer_dir: str
) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "gradients", device_batch_size=16)
    alone = first_gradients(0, 1, plan)
    small = tiny_plan(corpus, tokenizer_dir, "gradients", device_batch_size=3)
    variants = [first_gradients(0, 1, small)]
    variants += [run_gloo(first_gradients, size, small)[0] for size in (2, 3, 4)]
    for grads in variants:
        for name, grad in alone.items():
            np.testing.assert_allclose(grads[name], grad, atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.slow
def test_losses_and_batches_do_not_depend_on_the_number_of_workers(
    home: Path, corpus: str, tokenizer_dir: str
) -> None:
    plans = {n: tiny_plan(corpus, tokenizer_dir, f"workers{n}") for n in (1, 2, 3, 4)}
    summaries = {n: run_plan(plan, n) for n, plan in plans.items()}
    for n in (2, 3, 4):
        assert hashes(plans[n]) == hashes(plans[1])
        ours, alone = losses(plans[n]), losses(plans[1])
        assert len(ours) == 20
        np.testing.assert_allclose(list(ours.values()), list(alone.values()), atol=1e-4, rtol=0)
        assert summaries[n]["val_bpb"] == pytest.approx(summaries[1]["val_bpb"], abs=1e-4)


def test_the_same_command_twice_gives_the_same_bits(
    home: Path, corpus: str, tokenizer_dir: str
) -> None:
    plans = [tiny_plan(corpus, tokenizer_dir, run) for run in ("one", "two")]
    for plan in plans:
        run_plan(plan)
    assert losses(plans[0]) == losses(plans[1])
    assert weights(plans[0], 20) == weights(plans[1], 20)


def test_a_stopped_run_goes_on_bitwise_equal(home: Path, corpus: str, tokenizer_dir: str) -> None:
    whole = tiny_plan(corpus, tokenizer_dir, "whole", num_iterations=45)
    run_plan(whole)
    parts = tiny_plan(corpus, tokenizer_dir, "parts", num_iterations=45)
    # Stops inside the first slab of 32 steps, at its end, and in the second.
    for stop, done in ((9, 9), (23, 32), (6, 38)):
        summary = run_plan(parts, stop_step=stop)
        assert (summary["status"], summary["step"]) == ("stopped", done)
        assert list_steps(parts.checkpoints_dir)[-1] == done
    assert run_plan(parts)["status"] == "finished"
    assert losses(parts) == losses(whole)
    assert hashes(parts) == hashes(whole)
    assert weights(parts, 45) == weights(whole, 45)


@pytest.mark.slow
def test_save_at_two_workers_resume_at_one_and_back(
    home: Path, corpus: str, tokenizer_dir: str
) -> None:
    still = tiny_plan(corpus, tokenizer_dir, "still", num_iterations=30)
    run_plan(still, 2)
    moving = tiny_plan(corpus, tokenizer_dir, "moving", num_iterations=30)
    run_plan(moving, 2, stop_step=10)
    run_plan(moving, 1, stop_step=10)
    assert run_plan(moving, 2)["status"] == "finished"
    assert hashes(moving) == hashes(still)
    np.testing.assert_allclose(
        list(losses(moving).values()), list(losses(still).values()), atol=1e-4, rtol=0
    )


def test_warming_up_leaves_no_gradient(home: Path, corpus: str, tokenizer_dir: str) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "warm")
    worker = PretrainWorker(plan, World(0, 1, torch.device("cpu")), Hooks(), 0, blocks_of())
    try:
        worker.step.warm_up(plan.model_config.sequence_len)
        grads = [p.grad for p in worker.model.parameters() if p.grad is not None]
        assert grads
        assert not any(grad.any() for grad in grads)
    finally:
        worker.close()


def test_golden_losses(home: Path, corpus: str, tokenizer_dir: str) -> None:
    """A change of the numbers must be meant: delete the file to write it anew."""
    plan = tiny_plan(corpus, tokenizer_dir, "golden")
    summary = run_plan(plan)
    found = {"losses": list(losses(plan).values()), "val_bpb": summary["val_bpb"]}
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        pytest.fail(f"wrote {GOLDEN}: look at it, and commit it")
    golden = json.loads(GOLDEN.read_text())
    # Another processor rounds otherwise, and Muon amplifies rounding.
    np.testing.assert_allclose(found["losses"], golden["losses"], atol=2e-3)
    assert found["val_bpb"] == pytest.approx(golden["val_bpb"], abs=5e-3)
    assert found["losses"][-1] < found["losses"][0] - 0.3, "it learns"


def test_what_a_run_leaves(home: Path, corpus: str, tokenizer_dir: str) -> None:
    plan = tiny_plan(
        corpus, tokenizer_dir, "files", eval_every=8, sample_every=10, save_every=4, log_every=3
    )
    run_plan(plan)
    run_dir = Path(plan.run_dir)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in records if "loss" in r]
    assert steps == [1, *range(3, 21, 3), 20], "the last one, too"
    assert [r["step"] for r in records if "val_bpb" in r] == [8, 16, 20]
    stable = {"step", "loss", "lr_multiplier", "tokens", "tokens_per_s", "mfu", "step_s",
              "data_wait_s", "epoch", "batch_hash"}  # fmt: skip
    assert all(stable <= set(r) for r in records if "loss" in r)
    summary = json.loads((run_dir / "summary.json").read_text())
    keys = {"run", "stage", "status", "params", "tokens", "flops", "train_s", "tokens_per_s",
            "mfu", "peak_memory_bytes", "val_bpb", "min_val_bpb", "metrics"}  # fmt: skip
    assert keys <= set(summary)
    assert (summary["stage"], summary["status"]) == ("pretrain", "finished")
    assert summary["tokens"] == 20 * 512
    assert list_steps(plan.checkpoints_dir) == [16, 20], "the latest two"
    samples = (run_dir / "samples.md").read_text()
    assert samples.count("## Step") == 2
    assert "The capital of France is" in samples


def test_more_rows_than_a_micro_batch_are_filled_up() -> None:
    ids = np.arange(5 * 4).reshape(5, 4).astype(np.uint16)
    batches = micro_batches(ids, 2, torch.device("cpu"))
    assert [tuple(x.shape) for x, _y in batches] == [(2, 3)] * 3
    assert batches[2][1].tolist() == [[17, 18, 19], [-1, -1, -1]]
    assert batches[0][0].tolist() == [[0, 1, 2], [4, 5, 6]]
    assert micro_batches(ids[:0], 2, torch.device("cpu")) == []


def test_a_nan_stops_the_run_and_names_step_and_rows(
    home: Path, corpus: str, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "nan", save_every=5)
    honest = PretrainWorker._loss_sum
    calls = 0

    def broken(self: PretrainWorker, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return honest(self, x, y) * (float("nan") if calls == 14 else 1.0)  # two calls a step

    monkeypatch.setattr(PretrainWorker, "_loss_sum", broken)
    where = r"unit \d+ \(shard_0000\d.parquet.*\) rows \d+-\d+"
    with pytest.raises(TrainingHealthError, match=rf"step 7: the loss is nan.*{where}") as error:
        run_plan(plan)
    assert "--spike-factor" not in str(error.value), "which would not help"
    last = read_records(str(Path(plan.run_dir, "metrics.jsonl")))[-1]
    assert (last["step"], last["loss"]) == (7, None)
    assert f"batch {last['batch_hash']}" in str(error.value)
    assert list_steps(plan.checkpoints_dir) == [5], "no broken weights are saved"
    monkeypatch.undo()
    monkeypatch.setenv("NANORAY_HOME", str(home))
    assert run_plan(plan)["status"] == "finished", "it goes on from before"


def test_a_spike_is_logged_and_passed_by_a_higher_factor(
    home: Path, corpus: str, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "spike", log_every=10, save_every=3)
    monkeypatch.setattr(LossWatch, "__init__", partialmethod(LossWatch.__init__, patience_steps=5))
    honest = PretrainWorker._loss_sum

    def spiky(self: PretrainWorker, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return honest(self, x, y) * (4.0 if self.progress.step == 7 else 1.0)

    monkeypatch.setattr(PretrainWorker, "_loss_sum", spiky)
    with pytest.raises(TrainingHealthError, match=r"step 8: the loss jumped.*higher --spike-fac"):
        run_plan(plan)
    assert list(losses(plan)) == [1, 8], "the failing step is logged, whatever --log-every says"
    record_config(plan)
    higher = tiny_plan(corpus, tokenizer_dir, "spike", save_every=3, spike_factor=9.0)
    assert not check_resume(higher)
    assert run_plan(higher)["status"] == "finished"


def test_rows_are_described_as_ranges() -> None:
    units, rows = np.array([3, 1, 1, 1, 3, 1]), np.array([0, 9, 4, 5, 7, 3])
    described = describe_rows(units, rows, lambda unit, _rows: f"shard {unit}")
    assert described == "unit 1 (shard 1) rows 3-5, 9; unit 3 (shard 3) rows 0, 7"


def test_a_stop_in_the_last_step_finishes_the_run(
    home: Path, corpus: str, tokenizer_dir: str
) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "late", num_iterations=12)
    summary = run_plan(plan, stop_step=12)
    assert (summary["status"], summary["step"]) == ("finished", 12)
    assert summary["val_bpb"] > 0
    assert "## Step 12" in Path(plan.run_dir, "samples.md").read_text()


def test_loss_watch_tells_spikes_from_the_beginning() -> None:
    watch = LossWatch(spike_factor=2.0)
    assert not any(watch.problem(10 - 0.1 * i) for i in range(40))
    assert "jumped to 17.000" in watch.problem(17.0)
    assert watch.problem(float("inf")) == "the loss is inf"
    assert not LossWatch(spike_factor=2.0).problem(1e9), "the first steps may do anything"


def test_progress_estimates_by_the_median() -> None:
    progress = Progress(step=10)
    for step_s in (1.0, 1.0, 30.0):
        progress.add_step_time(step_s)
    assert progress.eta_s(20) == 10.0
    assert Progress.from_dict(progress.to_dict()) == progress


def test_bad_text_is_named_or_skipped_and_counted(
    home: Path, tmp_path: Path, tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conftest import make_texts

    folder = tmp_path / "bad"
    for i in range(3):
        texts = make_texts(300, seed=i)
        if i == 1:
            texts[117] = "   "
        write_shard(str(folder / f"shard_{i:05d}.parquet"), texts, row_group_size=100)
    with pytest.raises(NanorayError, match=r"shard_00001.parquet.*row group 1"):
        tiny_plan(str(folder), tokenizer_dir, "planned")
    monkeypatch.setattr("nanoray.data.plan.SAMPLE_GROUPS", 1)  # and planning does not meet it
    plan = tiny_plan(str(folder), tokenizer_dir, "bad")
    with pytest.raises(NanorayError, match=r"shard_00001.parquet.*row group 1"):
        run_plan(plan)
    skipping = tiny_plan(str(folder), tokenizer_dir, "skip", on_bad_shard="skip")
    summary = run_plan(skipping)
    assert summary["status"] == "finished"
    assert summary["metrics"]["documents_skipped"] == 1


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    home: Path, corpus: str, tokenizer_dir: str
) -> None:
    whole = tiny_plan(corpus, tokenizer_dir, "undamaged", save_every=5)
    run_plan(whole)
    plan = tiny_plan(corpus, tokenizer_dir, "damaged", save_every=5)
    run_plan(plan, stop_step=12)
    model = Path(plan.checkpoints_dir, "step_000012", "model.safetensors")
    model.write_bytes(model.read_bytes()[:-7])
    assert run_plan(plan)["status"] == "finished"
    assert losses(plan) == losses(whole)
    assert storage.exists(storage.join(plan.checkpoints_dir, "step_000020", "manifest.json"))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer_00000.safetensors", "meta.json"])
def test_a_checkpoint_that_breaks_after_it_was_chosen_ends_the_start(
    home: Path, corpus: str, tokenizer_dir: str, name: str
) -> None:
    plan = tiny_plan(corpus, tokenizer_dir, "lost", save_every=5)
    run_plan(plan, stop_step=12)
    start = choose_start(plan, pytest.fail)
    assert start.step == 12
    broken = Path(plan.checkpoints_dir, "step_000012", name)
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    with pytest.raises(StartLostError, match=f"step_000012/{name} is damaged"):
        PretrainWorker(plan, World(0, 1, torch.device("cpu")), Hooks(), start.step, blocks_of())
    warnings: list[str] = []
    assert choose_start(plan, warnings.append).step == 10, "the next start takes the one before"
    assert len(warnings) == 1


def test_a_worker_that_lost_its_run_deletes_nothing(
    home: Path, corpus: str, tokenizer_dir: str
) -> None:
    """What looks half written is what the run's new writer is saving."""
    plan = tiny_plan(corpus, tokenizer_dir, "taken")
    saving = storage.join(plan.checkpoints_dir, "step_000010", "model.safetensors")
    storage.write_text(saving, "half of it")

    def lost() -> None:
        raise LeaseLostError("taken over")

    with pytest.raises(LeaseLostError):
        PretrainWorker(plan, World(0, 1, torch.device("cpu")), Hooks(guard=lost), 0, blocks_of())
    assert storage.exists(saving)


def test_no_worker_looks_for_a_checkpoint_by_itself(
    home: Path, corpus: str, tokenizer_dir: str
) -> None:
    """A later one, which a worker of a lost start may still publish, is not taken."""
    plan = tiny_plan(corpus, tokenizer_dir, "chosen", save_every=5)
    run_plan(plan, stop_step=12)
    world = World(0, 1, torch.device("cpu"))
    for step in (10, 0):
        worker = PretrainWorker(plan, world, Hooks(), step, blocks_of())
        worker.close()
        assert worker.progress.step == step
