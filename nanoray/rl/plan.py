"""From flags and a chat model to the plan of a reinforcement learning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from nanoray import storage
from nanoray.checkpoint import Checkpoint, DamagedCheckpointError, list_steps
from nanoray.config import RlConfig
from nanoray.data.words import words_of_run
from nanoray.errors import NanorayError
from nanoray.rl.algorithms import ALGORITHMS
from nanoray.rl.ledger import LedgerRules
from nanoray.rl.prompts import example_index, prompt_ids
from nanoray.rl.reward_worker import TaskReward
from nanoray.tasks.base import Task
from nanoray.tasks.catalog import SPELLING, Sources, load_task
from nanoray.tokenizer import Tokenizer, load_tokenizer
from nanoray.train.base_run import find_base, name_after, tokenizer_dir
from nanoray.train.run_plan import RunPlan

if TYPE_CHECKING:  # a plan is made without torch, which takes seconds to import
    from nanoray.evals.chat_suite import ChatSuite
    from nanoray.rl.sampler import SamplerSettings

_REWARD_WORKERS = 2  # processes of each rollout actor
_MAX_SLOTS = 64  # more rows make a decoding step longer, not better
_MAX_CHECKED = 20_000  # prompts that are measured before a start: a second or two


@dataclass(frozen=True)
class RlPlan(RunPlan):
    """A `RunPlan` whose steps are answers that the model itself has sampled.

    Attributes:
        base: the folder of the checkpoint that training begins with.
        corpus_dir: what its model was pretrained on.
        sources: the values of a `Sources`.
        num_questions: problems of an epoch.
    """

    stage: ClassVar[str] = "rl"
    FIXED: ClassVar[dict[str, str]] = {
        **RunPlan.FIXED,
        "base": "chat model",
        "num_questions": "number of problems",
    }
    FOLLOWS_FLAGS: ClassVar[frozenset[str]] = frozenset({"base", "num_questions"})

    base: str
    corpus_dir: str
    sources: dict[str, Any]
    num_questions: int

    @cached_property
    def task(self) -> Task:
        """The problems that are practised."""
        return load_task(self.config["task"], "train", Sources(**self.sources))

    @property
    def eval_suite(self) -> ChatSuite:
        """Held-out problems, sampled as in training: pass@k."""
        from nanoray.evals.chat_suite import ChatSuite

        config = self.config
        return ChatSuite(
            task_names=(config["task"],),
            sources=Sources(**self.sources),
            max_per_task=config["eval_examples"],
            num_samples=config["eval_samples"],
            max_tokens=config["max_new_tokens"],
            temperature=config["temperature"],
            top_k=config["top_k"],
            seed=config["seed"],
        )

    # The driver knows its value; workers read what it has written.
    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The chat model's; a copy, as the chat run may delete its checkpoint."""
        return load_tokenizer(self.tokenizer_dir)

    @property
    def reference_dir(self) -> str:
        """Where a checkpoint with the weights that ``--kl-coef`` compares with is kept."""
        return storage.join(self.run_dir, "reference")

    def prepare(self) -> None:
        self.tokenizer.save(self.tokenizer_dir)
        if self.config["kl_coef"] and not list_steps(self.reference_dir):
            self._keep_reference()

    def _keep_reference(self) -> None:
        """Copy the chat model's weights: the run needs them to its end.

        Raises:
            NanorayError: they cannot be read, or not be written.
        """
        from nanoray.checkpoint.writer import CheckpointWriter, Snapshot

        try:
            with Checkpoint.at(self.base) as base:
                weights = Snapshot(base.step, optimizer=(), model=base.model_state())
        except DamagedCheckpointError as error:
            raise NanorayError(
                f"--kl-coef compares with the chat model {self.base}, which is gone or damaged; "
                f"restore it, or take another --run"
            ) from error
        writer = CheckpointWriter(
            self.reference_dir,
            rank=0,
            world_size=1,
            attempt="reference",
            keep=1,
            guard=lambda: None,  # the driver holds the lease
        )
        writer.save(weights)
        writer.wait()

    def inputs(self) -> tuple[str, ...]:
        # Once there are checkpoints of its own, a run does not read the chat model's.
        base = () if list_steps(self.checkpoints_dir) else (self.base,)
        return (*base, *(value for value in self.sources.values() if value))

    def micro_tokens(self) -> int:
        rows = int(self.config["device_batch_size"])
        return rows * min(self.model_config.rotary_len, 2 * int(self.config["max_new_tokens"]))

    def describe(self) -> list[str]:
        model, config = self.model_config, self.config
        questions, samples = config["questions_per_step"], config["num_samples"]
        behind = config["max_staleness"]
        penalty = f"KL to the chat model x {config['kl_coef']:g}, its copy in {self.reference_dir}"
        return [
            f"run        {self.run} in {self.run_dir}",
            f"model      {self.base}: depth {model.n_layer}, width {model.n_embd}, "
            f"{self.num_parameters:,} parameters",
            f"problems   {self.num_questions:,} of {config['task']}",
            f"horizon    {self.num_iterations:,} steps of {questions} problems x {samples} answers "
            f"of at most {config['max_new_tokens']} tokens, {config['algorithm']}",
            f"sampling   {config['rollout_actors']} actors, temperature {config['temperature']:g}, "
            f"top-k {config['top_k']}, "
            + (f"at most {behind} steps behind" if behind else "in step with the learner"),
            *([f"reference  {penalty}"] if config["kl_coef"] else []),
            f"workers    {config['num_workers']}, micro-batches of {config['device_batch_size']} "
            f"answers",
        ]


def make_rl_plan(config: RlConfig) -> RlPlan:
    """Resolve and validate everything that can be known before the first worker starts.

    Raises:
        NanorayError: no such chat model, no such task or its data is not there, a task that
            cannot be rewarded, a problem longer than the context, a horizon of no step.
    """
    assert config.from_run
    run = name_after(config.from_run, config.run, "rl")
    run_dir = storage.run_dir(run)
    base = find_base(config, run_dir, "num_questions")
    model, tokenizer = base.model, base.tokenizer
    words = config.words
    if not words and config.task in SPELLING:
        words = words_of_run(base.plan)
    sources = Sources(config.data_dir, words)
    task = load_task(config.task, "train", sources)
    if task.kind != "generative":
        raise NanorayError(
            f"{config.task} is not answered in free text, so there is nothing to sample; take a "
            f"task such as gsm8k or arithmetic"
        )
    load_task(config.task, "test", sources)  # what is held out must be there, too
    steps = config.num_iterations or int(config.num_epochs * len(task)) // config.questions_per_step
    if steps < 1:
        raise NanorayError(
            f"{config.num_epochs:g} epochs of {len(task)} problems are not one step of "
            f"{config.questions_per_step}; raise --num-epochs or lower --questions-per-step"
        )
    asked = min(steps * config.questions_per_step, len(task), _MAX_CHECKED)
    order = (example_index(number, len(task), config.seed) for number in range(asked))
    _check_prompts(task, order, tokenizer, model.sequence_len)
    resolved = config.model_dump(mode="json") | {"run": run, "recipe": model.recipe}
    plan = RlPlan(
        config=resolved | {"data_dir": sources.data_dir, "words": sources.words},
        run=run,
        run_dir=run_dir,
        model=model.to_dict(),
        tokenizer_dir=tokenizer_dir(run_dir),
        tokenizer_fingerprint=tokenizer.fingerprint,
        num_iterations=steps,
        weight_decay=0.0,
        flops_per_token=model.flops_per_token(),
        num_parameters=model.num_parameters_by_group()["total"],
        base=base.folder,
        corpus_dir=base.plan["corpus_dir"],
        sources={"data_dir": sources.data_dir, "words": sources.words},
        num_questions=len(task),
    )
    plan.__dict__["tokenizer"] = tokenizer  # so that it need not read what is not there yet
    return plan


def _check_prompts(task: Task, indices: Iterable[int], tokenizer: Tokenizer, max_len: int) -> None:
    """Raises NanorayError: one of the examples' prompts is longer than the context."""
    for index in indices:
        messages = task.example(index)["messages"]
        num_bytes = sum(len(str(message["content"]).encode()) for message in messages)
        marks = 2 * len(messages) + 2
        if num_bytes + marks > max_len:  # a token is a byte or more
            prompt_ids(task, index, tokenizer, max_len)


def ledger_rules(plan: RlPlan) -> LedgerRules:
    """How the pool's ledger deals out this plan's problems."""
    config = plan.config
    questions = config["questions_per_step"]
    filters = ALGORITHMS[config["algorithm"]].filters_degenerate
    return LedgerRules(
        num_steps=plan.num_iterations,
        questions_per_step=questions,
        bundle_size=min(config["questions_per_call"], questions),
        max_staleness=config["max_staleness"],
        refill_budget=round(questions * (config["refill_factor"] - 1)) if filters else None,
    )


def bundle_deadline_s(plan: RlPlan) -> float:
    """What a rollout actor may take for a bundle: to sample it, and to have it judged even where
    every reward takes all of its time.
    """
    config = plan.config
    answers = config["questions_per_call"] * config["num_samples"]
    judged_s = math.ceil(answers / _REWARD_WORKERS) * (config["reward_deadline_s"] + 1)
    return float(config["rollout_deadline_s"] + judged_s)


def sampler_settings(plan: RlPlan, num_threads: int) -> SamplerSettings:
    """What a rollout actor is made from."""
    from nanoray.rl.sampler import SamplerSettings

    config = plan.config
    return SamplerSettings(
        model=plan.model,
        tokenizer_dir=plan.tokenizer_dir,
        problems=TaskReward(config["task"], "train", Sources(**plan.sources)),
        num_samples=config["num_samples"],
        max_new_tokens=config["max_new_tokens"],
        temperature=config["temperature"],
        top_k=config["top_k"],
        seed=config["seed"],
        num_threads=num_threads,
        on_gpu=bool(config["rollout_gpus"]),
        dtype=config["dtype"],
        reward_workers=_REWARD_WORKERS,
        num_slots=min(_MAX_SLOTS, config["questions_per_call"] * config["num_samples"]),
        reward_deadline_s=config["reward_deadline_s"],
    )
