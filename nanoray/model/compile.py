"""torch.compile, by regions: each block, the embedding's and the stream's ends, the loss chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanoray.errors import NanorayError
from nanoray.model.gpt import EAGER, GPT, Block, Parts
from nanoray.model.heap import keep_freed_memory
from nanoray.model.loss import head_step, token_losses

COMPILE_MODES = ("off", "default", "max-autotune")
# Blocks differ by window and value embedding (at most 4 kinds), inputs by MAX_COMPILED_INPUTS;
# dynamo counts all of them against one function.
_RECOMPILE_LIMIT = 32


def compile_model(model: GPT, mode: str = "default") -> GPT:
    """Compile the model's training path in place and return the model.

    mode: "off" (plain Python), "default", or "max-autotune" (inductor's, without CUDA graphs).
    Nothing is compiled before the first forward pass with targets. Parameter names stay as
    they are. On a CPU the process's allocator is also told to keep freed memory, in any mode.
    Raises NanorayError for another mode.

    One whole graph is 2 % faster at depth 4 on 2 CPU cores, but its build grows with the depth
    (52 kernels for these regions at any depth, 64 for the whole of d4), and it hands over all
    gradients at its end, when there is nothing left to overlap communication with.
    """
    if mode not in COMPILE_MODES:
        raise NanorayError(f"compile mode must be {', '.join(COMPILE_MODES)}, not {mode!r}.")
    if model.cos.device.type == "cpu":
        keep_freed_memory()
    if mode == "off":
        model.use_parts(EAGER)
        return model
    # Here, because they take 3 s to import, which drivers and eager workers do without.
    import torch._dynamo
    import torch._functorch.config

    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _RECOMPILE_LIMIT)
    # Without this the blocks, whose attention has a backward of its own, are traced again at every
    # start, although all that it calls is here: a third of a warm start.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    inductor_mode = "max-autotune-no-cudagraphs" if mode == "max-autotune" else "default"

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, mode=inductor_mode)

    parts = Parts(
        embed=compiled(GPT.embed),
        block=compiled(Block.forward),
        finish=compiled(GPT.finish),
        head_step=compiled(head_step),
        token_losses=compiled(token_losses),
    )
    model.use_parts(parts)
    return model
