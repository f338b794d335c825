"""`python -m jobs.chat` with a random model that never stops by itself; prints READY first."""

from __future__ import annotations

import sys

import torch
from engine_models import tiny

import nanoray.checkpoint.loading
from jobs import chat, chat_session  # noqa: F401  (its imports take seconds)
from nanoray.checkpoint.loading import LoadedModel
from nanoray.config import run_job
from nanoray.tokenizer import ByteTokenizer


def endless_model(sequence_len: int = 8192) -> LoadedModel:
    """Its stop tokens (and all above ASCII) have logits of 0, which top-k 5 never reaches."""
    model = tiny(sequence_len=sequence_len)
    with torch.no_grad():
        model.lm_head.weight[128:] = 0
    return LoadedModel(model, ByteTokenizer(), {"stage": "sft"}, 1, "endless")


def rendered(*turns: str, system: str = "") -> list[int]:
    """The tokenizer's own rendering of a whole conversation, for the assistant to go on."""
    messages = [{"role": "system", "content": system}] if system else []
    for i, text in enumerate(turns):
        messages.append({"role": "assistant" if i % 2 else "user", "content": text})
    return ByteTokenizer().render_for_completion({"messages": messages})


if __name__ == "__main__":
    torch.set_num_threads(1)
    nanoray.checkpoint.loading.load_model = lambda *_args, **_kwargs: endless_model()
    print("READY", flush=True)
    run_job(chat.main, ["--run", "endless", "--top-k", "5", "--max-tokens", "8000", *sys.argv[1:]])
