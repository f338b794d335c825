"""From flags and a base model to the plan of a supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nanoray import storage
from nanoray.checkpoint import list_steps
from nanoray.config import SftConfig, parse_worker_range
from nanoray.data.conversations import ConversationStream, lengths_file, load_lengths, measure, pack
from nanoray.data.plan import layout
from nanoray.data.words import words_of_run
from nanoray.errors import NanorayError
from nanoray.tasks.catalog import SPELLING, Sources
from nanoray.tasks.mixture import MixtureSource, is_file, parse_mixture
from nanoray.tokenizer import Tokenizer, load_tokenizer
from nanoray.train.base_run import Base, find_base, name_after, tokenizer_dir, untold
from nanoray.train.run_plan import StreamRunPlan

if TYPE_CHECKING:  # a plan is made without torch, which takes seconds to import
    from nanoray.evals.chat_suite import ChatSuite

_INHERITED = (
    "max_seq_len", "device_batch_size", "total_batch_size",
    "embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr",
)  # fmt: skip


@dataclass(frozen=True)
class SftPlan(StreamRunPlan):
    """A `StreamRunPlan` whose stream is a mixture of conversations.

    Attributes:
        base: the folder of the checkpoint that training begins with.
        inherited: its values of `_INHERITED`.
        corpus_dir: what its model was pretrained on.
        sources: the values of a `Sources`.
        validation: mixture that is held out; empty where there is none.
        num_conversations, num_rows: of one pass, as they are packed.
        truncated, left_out: conversations cut, and those with nothing to train on.
        padding: share of the rows.
    """

    stage: ClassVar[str] = "sft"
    FIXED: ClassVar[dict[str, str]] = {
        **StreamRunPlan.FIXED,
        "base": "base model",
        "mixture_fingerprint": "mixture",
    }
    FOLLOWS_FLAGS: ClassVar[frozenset[str]] = frozenset({"mixture_fingerprint", "base"})

    base: str
    inherited: dict[str, Any]
    corpus_dir: str
    sources: dict[str, Any]
    validation: str
    mixture_fingerprint: str
    num_conversations: int
    num_rows: int
    truncated: int
    left_out: int
    padding: float

    @property
    def mixture(self) -> MixtureSource:
        return MixtureSource(self.config["mixture"], "train", Sources(**self.sources))

    @property
    def held_out(self) -> MixtureSource | None:
        if not self.validation:
            return None
        return MixtureSource(self.validation, "test", Sources(**self.sources))

    @property
    def chat_suite(self) -> ChatSuite | None:
        """The evaluation on the way; None where no tasks are wanted."""
        names = [name.strip() for name in self.config["chatcore_tasks"].split(",")]
        if not any(names):
            return None
        from nanoray.evals.chat_suite import ChatSuite

        return ChatSuite(
            task_names=tuple(filter(None, names)),
            sources=Sources(**self.sources),
            max_per_task=self.config["chatcore_max_cat"],
            max_generative=self.config["chatcore_max_sample"],
            max_tokens=self.config["chatcore_max_tokens"],
            seed=self.config["seed"],
        )

    @property
    def _lengths_uri(self) -> str:
        # Named by its content: a start that is refused in the end has changed nothing.
        return storage.join(self.run_dir, f"mixture-{self.mixture_fingerprint}.npy")

    # Of these two the driver knows the values; workers read what it has written.
    @cached_property
    def lengths(self) -> np.ndarray:
        """See `Measured.lengths`."""
        return load_lengths(storage.read_bytes(self._lengths_uri))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The base model's; a copy, as the base run may delete its checkpoint."""
        return load_tokenizer(self.tokenizer_dir)

    def prepare(self) -> None:
        self.tokenizer.save(self.tokenizer_dir)
        storage.write_bytes(self._lengths_uri, lengths_file(self.lengths))

    def stream(self, tokenizer: Tokenizer) -> ConversationStream:
        return ConversationStream(
            conversations=self.mixture,
            lengths=self.lengths,
            layout=self.layout,
            num_steps=self.num_iterations,
            train_on=self.config["train_on"],
            seed=self.config["seed"],
        )

    def unit_bytes(self) -> int:
        return 8 * 2**20

    def inputs(self) -> tuple[str, ...]:
        files = [p.name for p in parse_mixture(self.config["mixture"]) if is_file(p.name)]
        folders = [value for value in self.sources.values() if value]
        # Once there are checkpoints of its own, a run does not read the base's.
        base = () if list_steps(self.checkpoints_dir) else (self.base,)
        return (*base, *files, *folders)

    def describe(self) -> list[str]:
        model, config = self.model_config, self.config
        return [
            f"run        {self.run} in {self.run_dir}",
            f"model      {self.base}: depth {model.n_layer}, width {model.n_embd}, "
            f"{self.num_parameters:,} parameters, {config['recipe']} recipe",
            f"mixture    {config['mixture']}",
            f"data       {self.num_conversations:,} conversations in {self.num_rows:,} rows of "
            f"{self.sequence_len:,} tokens, {100 * self.padding:.1f} % padding; {self.truncated:,} "
            f"truncated, {self.left_out:,} left out (nothing to train on)",
            f"horizon    {self.num_iterations:,} steps of {self.total_batch_size:,} tokens "
            f"({self.num_iterations * self.layout.rows_per_step / self.num_rows:.2f} epochs), loss "
            f"on {'the assistant' if config['train_on'] == 'assistant' else 'all'} tokens",
            f"workers    {config['num_workers']}, micro-batches of "
            f"{self.micro_rows(parse_worker_range(config['num_workers'])[0])} rows",
        ]


def make_sft_plan(
    config: SftConfig, progress: Callable[[int, int], None] = lambda _conversations, _tokens: None
) -> SftPlan:
    """Resolve and validate everything that can be known before the first worker starts.

    Every conversation is rendered once, so that an epoch has a known number of steps.

    Args:
        progress: told of conversations and tokens read so far.

    Raises:
        NanorayError: no such base model, data that is not there or breaks the form, a batch
            that does not divide.
    """
    assert config.from_run
    run = name_after(config.from_run, config.run, "sft")
    base = find_base(config, storage.run_dir(run), "inherited")
    model, tokenizer, inherited = base.model, base.tokenizer, _inherited(base)
    resolved = config.model_dump(mode="json") | {"run": run, "recipe": model.recipe}
    for name in _INHERITED:
        if resolved[name] is None:
            resolved[name] = inherited[name]
    for name in ("mixture", "train_on", "init_lr_frac", "warmdown_ratio"):
        resolved[name] = config.recipe_value(name, model.recipe)
    T, batch_tokens = resolved["max_seq_len"], resolved["total_batch_size"]
    if batch_tokens % T:
        raise NanorayError(
            f"--total-batch-size {batch_tokens} is not divisible by --max-seq-len {T}: a step is "
            f"made of whole rows"
        )
    if model.rotary_len < T:
        raise NanorayError(
            f"--max-seq-len {T} is beyond what the base model can read ({model.rotary_len}); "
            f"lower it"
        )
    resolved["mixture"] = ", ".join(map(str, parse_mixture(resolved["mixture"])))
    validation = _validation(config, resolved["mixture"])
    names = {part.name for text in (resolved["mixture"], validation) if text
             for part in parse_mixture(text)}  # fmt: skip
    names |= {name.strip() for name in config.chatcore_tasks.split(",")}
    words = config.words
    if not words and names & SPELLING:
        words = words_of_run(base.plan)
    sources = Sources(config.data_dir, words)

    mixture = MixtureSource(resolved["mixture"], "train", sources)
    measured = measure(mixture, len(mixture.load()), tokenizer, T, resolved["train_on"], progress)
    rows = pack(measured.lengths, T + 1)
    rows_per_step = layout(batch_tokens // T, T).rows_per_step
    plan = SftPlan(
        config=resolved | {"data_dir": sources.data_dir, "words": sources.words},
        run=run,
        run_dir=storage.run_dir(run),
        model=model.to_dict(),
        tokenizer_dir=tokenizer_dir(storage.run_dir(run)),
        tokenizer_fingerprint=tokenizer.fingerprint,
        num_iterations=config.num_iterations or -(-len(rows) // rows_per_step),
        total_batch_size=batch_tokens,
        weight_decay=0.0,
        flops_per_token=model.flops_per_token(),
        num_parameters=model.num_parameters_by_group()["total"],
        base=base.folder,
        inherited=inherited,
        corpus_dir=base.plan["corpus_dir"],
        sources={"data_dir": sources.data_dir, "words": sources.words},
        validation=validation,
        mixture_fingerprint=measured.fingerprint,
        num_conversations=int((measured.lengths > 0).sum()),
        num_rows=len(rows),
        truncated=measured.truncated,
        left_out=measured.left_out,
        padding=1 - int(measured.lengths.sum()) / (len(rows) * (T + 1)),
    )
    # So that these properties need not read what is not there yet.
    plan.__dict__.update(lengths=measured.lengths, tokenizer=tokenizer)
    if held_out := plan.held_out:  # what is wrong with it must not come out in mid-training
        count = len(held_out.load())
        measure(
            held_out, count, tokenizer, T, plan.config["train_on"], num_tokens=config.eval_tokens
        )
    if plan.chat_suite:
        plan.chat_suite.items()
    return plan


def _inherited(base: Base) -> dict[str, Any]:
    """What holds where no flag says otherwise: the base run's values.

    Raises:
        NanorayError: its checkpoint does not tell them.
    """
    if base.begun:
        found: dict[str, Any] = base.plan["inherited"]
        return found
    try:
        inherited = {name: base.plan["config"][name] for name in _INHERITED}
        inherited["total_batch_size"] = base.plan["total_batch_size"]  # the law's, without a flag
    except KeyError as error:
        raise untold(base.folder, error) from error
    return inherited


def _validation(config: SftConfig, mixture: str) -> str:
    """What is held out: as told, or the other split of the mixture's tasks, each once."""
    if config.validation is not None:
        return ", ".join(map(str, parse_mixture(config.validation))) if config.validation else ""
    names = dict.fromkeys(part.name for part in parse_mixture(mixture) if not is_file(part.name))
    return ", ".join(names)
