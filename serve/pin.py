"""Which checkpoint a model is served from, settled once for all replicas. Without torch."""

from __future__ import annotations

from nanoray.checkpoint import find_checkpoint
from nanoray.config import ModelChoice


def pinned(model: ModelChoice) -> ModelChoice:
    """With the very step that is the last one now: a replica that starts later shall serve it, too.

    Raises:
        NanorayError: there is no such run or checkpoint.
    """
    root, step = find_checkpoint(model.run, model.step)
    return model.model_copy(update={"run": root.removesuffix("/checkpoints"), "step": step})
