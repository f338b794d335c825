"""From the name of a run to a model that can be asked: the way in for all that does not train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nanoray import storage
from nanoray.checkpoint.folder import list_steps, step_of
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


def find_checkpoint(where: str, step: int | None) -> tuple[str, int]:
    """The ``checkpoints`` folder and the step that are meant by a run's name or a path.

    Raises:
        NanorayError: there is no such run, or no such checkpoint in it; says what there is.
    """
    is_path = "/" in where
    base = storage.normalize(where) if is_path else storage.run_dir(where)
    parent, name = base.rsplit("/", 1)
    own_step = step_of(name)
    if own_step is not None:
        if step not in (None, own_step):
            raise NanorayError(
                f"{base} is the checkpoint of step {own_step}, not of step {step}; leave the "
                f"step out, or give the run's folder"
            )
        if not storage.exists(base):
            raise NanorayError(f"there is no checkpoint {base}; {_told(parent)}")
        return parent, own_step
    if not storage.exists(base):
        runs = [] if is_path else storage.list_names(parent)
        known = f"the runs there are {', '.join(runs)}" if runs else "give a run's name or folder"
        raise NanorayError(
            f"there is no {f'folder {base}' if is_path else f'run {where} in {parent}'}; {known}"
        )
    root = storage.join(base, "checkpoints")
    steps = list_steps(root)
    if not steps:
        raise NanorayError(
            f"{base} has no complete checkpoint yet; train on until the first is saved "
            f"(--save-every), or take another run"
        )
    if step is not None and step not in steps:
        raise NanorayError(f"{base} has no complete checkpoint of step {step}; {_told(root)}")
    return root, steps[-1] if step is None else step


def _told(root: str) -> str:
    steps = list_steps(root)
    return f"there are {', '.join(map(str, steps))}" if steps else f"there are none in {root}"


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
