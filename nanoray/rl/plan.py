"""From flags and a chat model to the plan of a reinforcement learning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from nanoray import storage
from nanoray.checkpoint import Checkpoint, find_checkpoint
from nanoray.config import RlConfig
from nanoray.data.words import words_of_run
from nanoray.errors import NanorayError
from nanoray.evals.chat_suite import ChatSuite
from nanoray.model.config import GPTConfig
from nanoray.rl.algorithms import ALGORITHMS
from nanoray.rl.ledger import LedgerRules
from nanoray.rl.reward_worker import TaskReward
from nanoray.rl.sampler import SamplerSettings, example_index, prompt_ids
from nanoray.tasks.base import Task
from nanoray.tasks.catalog import SPELLING, Sources, load_task
from nanoray.tokenizer import Tokenizer, load_tokenizer
from nanoray.train.run_plan import RunPlan

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

    def prepare(self) -> None:
        # The chat run may delete its checkpoint, and that tokenizer with it.
        load_tokenizer(self.base).save(self.tokenizer_dir)

    def inputs(self) -> tuple[str, ...]:
        return (self.base, *(value for value in self.sources.values() if value))

    def micro_tokens(self) -> int:
        rows = int(self.config["device_batch_size"])
        return rows * min(self.model_config.rotary_len, 2 * int(self.config["max_new_tokens"]))

    def describe(self) -> list[str]:
        model, config = self.model_config, self.config
        questions, samples = config["questions_per_step"], config["num_samples"]
        behind = config["max_staleness"]
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
    root, step = find_checkpoint(config.from_run, config.from_step)
    with Checkpoint(root, step) as checkpoint:
        meta, folder = checkpoint.meta, checkpoint.folder
    base: dict[str, Any] = meta["plan"]
    model = GPTConfig.from_dict(meta["model_config"])
    tokenizer = load_tokenizer(folder)
    run = storage.check_name(config.run or f"{root.rsplit('/', 2)[1]}-rl", "run")
    run_dir = storage.run_dir(run)
    if run_dir == root.rsplit("/", 1)[0]:
        raise NanorayError(f"--run {run} is the chat run itself; give the new run another name")
    words = config.words
    if not words and config.task in SPELLING:
        words = words_of_run(base)
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
    return RlPlan(
        config=resolved | {"data_dir": sources.data_dir, "words": sources.words},
        run=run,
        run_dir=run_dir,
        model=model.to_dict(),
        tokenizer_dir=storage.join(run_dir, "tokenizer"),
        tokenizer_fingerprint=tokenizer.fingerprint,
        num_iterations=steps,
        weight_decay=0.0,
        flops_per_token=model.flops_per_token(),
        num_parameters=model.num_parameters_by_group()["total"],
        base=folder,
        corpus_dir=base["corpus_dir"],
        sources={"data_dir": sources.data_dir, "words": sources.words},
        num_questions=len(task),
    )


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


def sampler_settings(plan: RlPlan, num_threads: int) -> SamplerSettings:
    """What a rollout actor is made from."""
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
        dtype=config["dtype"],
        num_slots=min(_MAX_SLOTS, config["questions_per_call"] * config["num_samples"]),
        reward_deadline_s=config["reward_deadline_s"],
    )
