"""torch.compile, by regions: each block, the embedding's and the stream's ends, the loss chunk."""

from __future__ import annotations

from typing import Literal

import torch
import torch._dynamo

from nanoray.errors import NanorayError
from nanoray.model.gpt import GPT, Block, Parts
from nanoray.model.loss import head_step

CompileMode = Literal["off", "default", "max-autotune"]
# Blocks differ by window and value embedding (at most 4 kinds), inputs by MAX_COMPILED_INPUTS;
# dynamo counts all of them against one function.
_RECOMPILE_LIMIT = 32


def compile_model(model: GPT, mode: str = "default") -> GPT:
    """Compile the model's training path in place and return the model.

    mode: "off" (plain Python), "default", or "max-autotune" (inductor's, without CUDA graphs).
    Nothing is compiled before the first forward pass with targets. Parameter names stay as
    they are. Raises NanorayError for another mode.
    """
    if mode not in ("off", "default", "max-autotune"):
        raise NanorayError(f"compile mode must be off, default or max-autotune, not {mode!r}.")
    if mode == "off":
        model.use_parts(Parts())
        return model
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT
    )
    inductor_mode = "max-autotune-no-cudagraphs" if mode == "max-autotune" else "default"

    def compiled(function):  # type: ignore[no-untyped-def]
        return torch.compile(function, dynamic=False, mode=inductor_mode)

    model.use_parts(
        Parts(
            embed=compiled(GPT.embed),
            block=compiled(Block.forward),
            finish=compiled(GPT.finish),
            head_step=compiled(head_step),
        )
    )
    return model
