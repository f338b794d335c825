"""Peak memory of head and loss, forward and backward: in chunks against all logits at once.

Each form runs in a process of its own; what counts is how far its peak rises above the memory
held before the loss plus that of the two gradients. Prints one JSON line last.

    python bench/loss_memory.py [--tokens 4096] [--dtype float32]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

WIDTH, VOCAB, SOFTCAP = 256, 32768, 15.0
FORMS = ("chunked", "whole")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.form:
        print(json.dumps(measure(args.form, args.tokens, args.dtype)))
        return
    found = {form: in_process(form, args.tokens, args.dtype) for form in FORMS}
    chunked, whole = found["chunked"], found["whole"]
    report = {
        "bench": "loss_memory",
        "tokens": args.tokens,
        "vocab": VOCAB,
        "dtype": args.dtype,
        "chunked_bytes": chunked["logits_bytes"],
        "whole_bytes": whole["logits_bytes"],
        "ratio": round(chunked["logits_bytes"] / whole["logits_bytes"], 4),
        "mean_loss_difference": abs(chunked["mean_loss"] - whole["mean_loss"]),
        "gradient_difference": max(
            abs(a - b) / abs(b) for a, b in zip(chunked["gradient_norms"], whole["gradient_norms"])
        ),
    }
    print(json.dumps(report))


def in_process(form: str, tokens: int, dtype: str) -> dict:
    command = [sys.executable, __file__, "--form", form, "--tokens", str(tokens), "--dtype", dtype]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(form: str, tokens: int, dtype: str) -> dict:
    import torch

    torch.manual_seed(0)
    x_ND = torch.randn(tokens, WIDTH).to(getattr(torch, dtype)).requires_grad_()
    weight_VD = (torch.randn(VOCAB, WIDTH) / WIDTH**0.5).requires_grad_()
    targets_N = torch.randint(0, VOCAB, (tokens,))
    loss_sum = loss_function(form)
    # The libraries' own buffers are paid for once, by a loss too small to matter.
    loss_sum(x_ND[:8], weight_VD, targets_N[:8]).backward()
    x_ND.grad = weight_VD.grad = None
    before_bytes = psutil.Process().memory_info().rss
    loss = loss_sum(x_ND, weight_VD, targets_N)
    loss.backward()
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    grads = [x_ND.grad, weight_VD.grad]
    grad_bytes = sum(grad.numel() * grad.element_size() for grad in grads)
    return {
        "logits_bytes": peak_bytes - before_bytes - grad_bytes,
        "mean_loss": loss.item() / tokens,
        "gradient_norms": [grad.double().norm().item() for grad in grads],
    }


def loss_function(form: str) -> Callable:
    import torch
    import torch.nn.functional as F

    from nanoray.model.loss import chunked_cross_entropy

    def chunked(x_ND, weight_VD, targets_N):
        return chunked_cross_entropy(x_ND, weight_VD, targets_N, VOCAB, SOFTCAP)

    def whole(x_ND, weight_VD, targets_N):
        logits_NV = (x_ND @ weight_VD.to(x_ND.dtype).T).float()
        logits_NV = SOFTCAP * torch.tanh(logits_NV / SOFTCAP)
        return F.cross_entropy(logits_NV, targets_N, reduction="sum")

    return {"chunked": chunked, "whole": whole}[form]


if __name__ == "__main__":
    main()
