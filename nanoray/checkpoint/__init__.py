"""Checkpoints: the only writer and deleter of them.

``checkpoints/step_000500/`` holds ``model.safetensors``, ``optimizer_<n>.safetensors`` (tensors
named ``<parameter>/<state>@<first row>``), ``meta.json``, the tokenizer's files, and, written
last, ``manifest.json``; without it the folder does not count. Every worker writes the optimiser
rows it owns; the index in the manifest finds any rows again for any other number of workers.
Nothing is pickled.

    from nanoray.checkpoint.loading import load_model
    loaded = load_model("demo")        # model, tokenizer, meta: all that inference needs

What finds and reads them is here; `writer` and `loading` apart, as they import torch.
"""

from nanoray.checkpoint.folder import (
    delete,
    delete_incomplete,
    find_checkpoint,
    list_steps,
    step_dir,
)
from nanoray.checkpoint.reader import Checkpoint, DamagedCheckpointError, open_latest

__all__ = [
    "Checkpoint",
    "DamagedCheckpointError",
    "delete",
    "delete_incomplete",
    "find_checkpoint",
    "list_steps",
    "open_latest",
    "step_dir",
]
