"""From the name of a run to a model that can be asked: the way in for all that does not train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nanoray.checkpoint.folder import find_checkpoint
from nanoray.checkpoint.reader import Checkpoint, DamagedCheckpointError
from nanoray.errors import NanorayError
from nanoray.model.config import GPTConfig
from nanoray.model.gpt import GPT
from nanoray.model.precision import pick_compute_dtype, pick_device
from nanoray.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint made ready for inference.

    Attributes:
        model: in eval mode, on its device.
        tokenizer: the one that the model was trained with.
        meta: the checkpoint's ``meta.json`` (stage, step, model_config, …).
        step: of the checkpoint.
        path: the checkpoint's folder or URI.
    """

    model: GPT
    tokenizer: Tokenizer
    meta: dict[str, Any]
    step: int
    path: str


def load_model(
    where: str,
    step: int | None = None,
    *,
    device: torch.device | None = None,
    dtype: str = "auto",
) -> LoadedModel:
    """Load the weights and the tokenizer of a checkpoint; its optimiser state is not read.

    Args:
        where: a run's name (under ``NANORAY_HOME/runs``), or the path or URI of a run's folder
            or of one checkpoint in it. What holds a slash is a path.
        step: which checkpoint of the run (default: the latest).
        device: default: the best that there is.
        dtype: of matmuls and activations: "auto" (bf16 where it is fast), "float32", "bfloat16".

    Raises:
        NanorayError: there is no such run or checkpoint, or it is damaged, holds no tokenizer,
            or its parts do not fit together.
    """
    device = device or pick_device()
    root, found = find_checkpoint(where, step)
    try:
        return _load(root, found, device, dtype)
    except DamagedCheckpointError:
        # A run that trains on deletes its older checkpoints, this one perhaps by now.
        root, newer = find_checkpoint(where, step)
        if newer == found:
            raise
        return _load(root, newer, device, dtype)


def _load(root: str, step: int, device: torch.device, dtype: str) -> LoadedModel:
    with Checkpoint(root, step) as checkpoint:
        meta = checkpoint.meta
        config = _model_config(checkpoint.folder, meta)
        tokenizer = _tokenizer(checkpoint)
        if tokenizer.vocab_size != config.vocab_size:
            raise NanorayError(
                f"checkpoint {checkpoint.folder} holds a tokenizer of {tokenizer.vocab_size:,} "
                f"ids and a model of {config.vocab_size:,}; restore the files it was saved with"
            )
        model = GPT(config, pick_compute_dtype(device, dtype)).place(device)
        try:
            model.load_state_dict(checkpoint.model_state())
        except RuntimeError as error:  # names or shapes; torch's list of them is pages long
            raise NanorayError(
                f"the weights in {checkpoint.folder} are not those of the model that its "
                f"meta.json describes; restore the files it was saved with"
            ) from error
        return LoadedModel(model.eval(), tokenizer, meta, step, checkpoint.folder)


def _model_config(folder: str, meta: dict[str, Any]) -> GPTConfig:
    try:
        return GPTConfig.from_dict(meta["model_config"])
    except (KeyError, TypeError, NanorayError) as error:
        raise NanorayError(
            f"{folder}/meta.json does not describe a model ({error!s}); use the nanoray that "
            f"wrote this checkpoint"
        ) from error


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    names = [n for n in checkpoint.files if n == "tokenizer.json" or n.startswith("ranks-")]
    if not names:
        raise NanorayError(
            f"checkpoint {checkpoint.folder} holds no tokenizer, so its model can neither read "
            f"nor write text; take a checkpoint that nanoray saved"
        )
    return Tokenizer.from_files({n: checkpoint.file(n) for n in names}, checkpoint.folder)
