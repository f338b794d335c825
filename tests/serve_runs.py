"""Runs for the chat service's tests: models of which every answer is known."""

from __future__ import annotations

from dataclasses import replace

import torch
from engine_models import scripted

from nanoray import storage
from nanoray.checkpoint import step_dir
from nanoray.checkpoint.writer import CheckpointWriter, Snapshot
from nanoray.model.gpt import GPT
from nanoray.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
PARTNER = {"a": "b", "c": "d", "e": "f"}


def speaker(letter: str) -> GPT:
    """A model that greedily says "abab…" (or "cdcd…", "efef…") for ever, whatever was before.

    So each token of an answer tells whose weights it is from.
    """
    first, second = TOKENIZER.encode(letter + PARTNER[letter])
    start = TOKENIZER.special_id("<|assistant_start|>")
    model = scripted([start, first, second, first])
    others = [t for t in TOKENIZER.encode("abcdef") if t not in (first, second)]
    with torch.no_grad():
        for token in [*others, TOKENIZER.bos_id]:
            model.lm_head.weight[first] += model.wte.weight[token] / 4
    # With room for long answers; the weights do not depend on it.
    long = GPT(replace(model.config, sequence_len=512))
    long.load_state_dict(model.state_dict())
    return long.eval()


def save_run(run: str, step: int, model: GPT, stage: str = "sft") -> str:
    """A checkpoint of a run under NANORAY_HOME, as training saves it; its folder."""
    root = storage.join(storage.run_dir(run), "checkpoints")
    writer = CheckpointWriter(root, rank=0, world_size=1, attempt="a", keep=99, guard=lambda: None)
    meta = {"stage": stage, "step": step, "model_config": model.config.to_dict()}
    files = TOKENIZER.to_files()
    writer.save(Snapshot(step, [], model=model.state_dict(), meta=meta, files=files))
    writer.wait()
    return step_dir(root, step)
