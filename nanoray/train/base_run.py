"""The run that fine-tuning and practice go on from, and the name of what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanoray import storage
from nanoray.checkpoint import Checkpoint, find_checkpoint
from nanoray.checkpoint.folder import step_of
from nanoray.config import RlConfig, SftConfig
from nanoray.errors import NanorayError
from nanoray.model.config import GPTConfig
from nanoray.tokenizer import Tokenizer, load_tokenizer
from nanoray.train.record import begun_with


@dataclass(frozen=True)
class Base:
    """The model that a run begins with.

    Attributes:
        folder: of the checkpoint.
        plan: values of a plan that knows the words and the corpus.
        begun: that is the run's own plan, which goes on; else the base run's.
    """

    folder: str
    model: GPTConfig
    tokenizer: Tokenizer
    plan: dict[str, Any]
    begun: bool


def name_after(from_run: str, run: str | None, suffix: str) -> str:
    """The name of a run that goes on from another: as told, or ``<base run>-<suffix>``.

    Raises:
        NanorayError: it is not usable, or the base run's own.
    """
    is_path = "/" in from_run
    base = storage.normalize(from_run) if is_path else storage.run_dir(from_run)
    if step_of(base.rsplit("/", 1)[1]) is not None:
        base = base.rsplit("/", 2)[0]
    name = storage.check_name(run or f"{base.rsplit('/', 1)[1]}-{suffix}", "run")
    if storage.run_dir(name) == base:
        raise NanorayError(f"--run {name} is the base run itself; give the new run another name")
    return name


def find_base(config: SftConfig | RlConfig, run_dir: str, own_key: str) -> Base:
    """The base model; where the run goes on, as it was: it may be trained on since, or be gone.

    Args:
        run_dir: of the new run.
        own_key: a value that the plans of the new run's stage have, and no other stage's.

    Raises:
        NanorayError: there is no such base model, or it cannot be read.
    """
    assert config.from_run
    begun = begun_with(run_dir)
    asked = {"from_run": config.from_run, "from_step": config.from_step}
    if begun and own_key in begun and asked.items() <= begun["config"].items():
        tokenizer = load_tokenizer(tokenizer_dir(run_dir))
        return Base(begun["base"], GPTConfig.from_dict(begun["model"]), tokenizer, begun, True)
    root, step = find_checkpoint(config.from_run, config.from_step)
    with Checkpoint(root, step) as checkpoint:
        meta, folder = checkpoint.meta, checkpoint.folder
    try:
        plan: dict[str, Any] = meta["plan"]
        model = GPTConfig.from_dict(meta["model_config"])
    except KeyError as error:
        raise untold(folder, error) from error
    return Base(folder, model, load_tokenizer(folder), plan, False)


def untold(folder: str, error: KeyError) -> NanorayError:
    """What to raise where a checkpoint's plan lacks a value."""
    return NanorayError(
        f"{folder}/meta.json does not tell how the model was trained (it has no {error}); take "
        f"a checkpoint of jobs.pretrain or jobs.sft"
    )


def tokenizer_dir(run_dir: str) -> str:
    """Where a run keeps its copy of the tokenizer: the base run may delete its checkpoint."""
    return storage.join(run_dir, "tokenizer")
