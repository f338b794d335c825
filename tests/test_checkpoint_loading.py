"""From a run's name to a model: whatever is wrong is told in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanoray import storage
from nanoray.checkpoint import delete, step_dir
from nanoray.checkpoint.loading import load_model
from nanoray.checkpoint.writer import CheckpointWriter, Snapshot
from nanoray.errors import NanorayError
from nanoray.model.config import GPTConfig
from nanoray.model.gpt import GPT
from nanoray.optim.buckets import StateShard
from nanoray.tokenizer import ByteTokenizer, load_tokenizer

CONFIG = GPTConfig(
    sequence_len=16, vocab_size=257, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, recipe="february"
)
CPU = torch.device("cpu")


def random_weights(config: GPTConfig = CONFIG, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of which none is zero, by name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.shape, generator=generator) / 8
        for name, weight in GPT(config).state_dict().items()
    }


def save_model(run_dir: str, step: int, **changes: Any) -> str:
    """A checkpoint as training saves it; ``changes`` replace fields of the snapshot."""
    fields = {
        "optimizer": [],
        "model": random_weights(seed=step),
        "meta": {"stage": "pretrain", "step": step, "model_config": CONFIG.to_dict()},
        "files": ByteTokenizer().to_files(),
    }
    root = storage.join(run_dir, "checkpoints")
    writer = CheckpointWriter(root, rank=0, world_size=1, attempt="a", keep=9, guard=lambda: None)
    writer.save(Snapshot(step=step, **(fields | changes)))
    writer.wait()
    return step_dir(root, step)


@pytest.fixture
def run_dir(home: Path) -> str:
    """A run ``small`` under NANORAY_HOME with checkpoints of steps 10 and 20."""
    folder = storage.run_dir("small")
    for step in (10, 20):
        save_model(folder, step)
    return folder


def test_a_checkpoint_that_goes_while_it_is_loaded(
    run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run trains on: it saves step 30 and deletes step 20, which was the latest just now."""
    read_bytes = storage.read_bytes

    def train_on(uri: str) -> bytes:
        if uri.endswith("step_000020/meta.json"):
            save_model(run_dir, 30)
            delete(storage.join(run_dir, "checkpoints"), 20)
        return read_bytes(uri)

    monkeypatch.setattr(storage, "read_bytes", train_on)
    assert load_model("small", device=CPU).step == 30
    save_model(run_dir, 20)
    delete(storage.join(run_dir, "checkpoints"), 30)
    refused(r"no complete checkpoint of step 20; there are 10, 30", "small", step=20)


def refused(match: str, *args: Any, **options: Any) -> None:
    with pytest.raises(NanorayError, match=match) as error:
        load_model(*args, device=CPU, **options)
    assert "\n" not in str(error.value)


def test_a_run_by_name_folder_and_checkpoint(run_dir: str) -> None:
    idx_BT = torch.arange(24).view(2, 12)
    reference = GPT(CONFIG)
    for where, step, expected in (
        ("small", None, 20),
        ("small", 10, 10),
        (run_dir, None, 20),
        (run_dir + "/", 10, 10),
        (step_dir(run_dir + "/checkpoints", 10), None, 10),
        (step_dir(run_dir + "/checkpoints", 10), 10, 10),
    ):
        loaded = load_model(where, step, device=CPU, dtype="float32")
        assert (loaded.step, loaded.meta["step"]) == (expected, expected)
        assert loaded.path == step_dir(run_dir + "/checkpoints", expected)
        assert not loaded.model.training
        assert loaded.model.config == CONFIG
        assert loaded.tokenizer.decode(loaded.tokenizer.encode("grüße")) == "grüße"
        reference.load_state_dict(random_weights(seed=expected))
        assert torch.equal(loaded.model(idx_BT), reference(idx_BT))


def test_a_run_in_a_bucket() -> None:
    save_model("memory://load-bucket/runs/small", 3)
    assert load_model("memory://load-bucket/runs/small", device=CPU).step == 3


def test_the_compute_dtype_is_what_was_asked_for(run_dir: str) -> None:
    assert load_model(run_dir, device=CPU, dtype="bfloat16").model.compute_dtype == torch.bfloat16
    refused("dtype must be", run_dir, dtype="float8")


def test_weights_saved_in_bf16_by_a_gpu(home: Path) -> None:
    weights = random_weights()
    halves = {k: v.bfloat16() if "embeds" in k or "wte" in k else v for k, v in weights.items()}
    folder = save_model(storage.run_dir("gpu"), 1, model=halves)
    model = load_model(folder, device=CPU, dtype="float32").model
    assert torch.equal(model.wte.weight, weights["transformer.wte.weight"].bfloat16().float())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_tokenizer_of_two_files(home: Path, tokenizer_dir: str) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    config = GPTConfig(**CONFIG.to_dict() | {"vocab_size": tokenizer.vocab_size})
    save_model(
        storage.run_dir("bpe"),
        1,
        model=random_weights(config),
        meta={"model_config": config.to_dict()},
        files=tokenizer.to_files(),
    )
    assert load_model("bpe", device=CPU).tokenizer.fingerprint == tokenizer.fingerprint


def test_what_is_not_there(run_dir: str) -> None:
    root = run_dir + "/checkpoints"
    refused("there is no run other in .*/runs; the runs there are small$", "other")
    refused("there is no folder .*/nowhere", run_dir + "/nowhere")
    refused("is not a usable name", "..")
    refused("no complete checkpoint of step 15; there are 10, 20$", "small", 15)
    refused("no checkpoint .*step_000030; there are 10, 20$", root + "/step_000030")
    refused("is the checkpoint of step 10, not of step 20", root + "/step_000010", 20)
    fresh = storage.run_dir("fresh") + "/checkpoints/step_000001"
    storage.write_bytes(fresh + "/meta.json", b"{}")
    refused("/fresh has no complete checkpoint yet", "fresh")
    refused("step_000001 is not a complete checkpoint", fresh)


def test_parts_that_are_missing_or_do_not_fit(home: Path) -> None:
    def saved(name: str, **changes: Any) -> str:
        save_model(storage.run_dir(name), 1, **changes)
        return name

    refused("holds no tokenizer", saved("mute", files={}))
    refused(
        "cannot load the tokenizer from .*torn.*: tokenizer.json",
        saved("torn", files={"tokenizer.json": b"{}"}),
    )
    refused("does not describe a model", saved("a", meta={"step": 1}))
    refused("does not describe a model", saved("b", meta={"model_config": 5}))
    refused(
        r"does not describe a model \(unknown key.* depth",
        saved("c", meta={"model_config": CONFIG.to_dict() | {"depth": 3}}),
    )
    larger = {"model_config": CONFIG.to_dict() | {"vocab_size": 300}}
    refused("a tokenizer of 257 ids and a model of 300", saved("d", meta=larger))
    deeper = {"model_config": CONFIG.to_dict() | {"n_layer": 3}}
    refused("are not those of the model that its meta.json describes", saved("e", meta=deeper))


@pytest.mark.parametrize("name", ["model.safetensors", "meta.json", "tokenizer.json"])
def test_a_damaged_file_is_named(run_dir: str, name: str) -> None:
    path = Path(run_dir, "checkpoints", "step_000020", name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(f"{name} is damaged", "small")
    assert load_model("small", 10, device=CPU).step == 10


def test_optimizer_state_is_not_read(home: Path) -> None:
    shard = StateShard("w", "exp_avg", 0, 4, 4, torch.ones(4, 2))
    folder = save_model(storage.run_dir("small"), 1, optimizer=[shard])
    Path(folder, "optimizer_00000.safetensors").unlink()
    assert load_model("small", device=CPU).step == 1
