"""From flags to numbers: the plan of a pretraining run, made before anything starts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from nanoray import laws, storage
from nanoray.config import PretrainConfig, parse_worker_range
from nanoray.data.plan import StreamPlan, plan_stream
from nanoray.data.shards import (
    BadShardError,
    RowGroup,
    corpus_fingerprint,
    list_shards,
    row_groups,
    split_shards,
)
from nanoray.errors import NanorayError
from nanoray.model.config import GPTConfig
from nanoray.tokenizer import Tokenizer, load_tokenizer
from nanoray.train.run_plan import StreamRunPlan


@dataclass(frozen=True)
class PretrainPlan(StreamRunPlan):
    """A `StreamRunPlan` whose stream is a corpus."""

    stage: ClassVar[str] = "pretrain"
    FIXED: ClassVar[dict[str, str]] = {**StreamRunPlan.FIXED, "corpus_fingerprint": "corpus"}
    FOLLOWS_FLAGS: ClassVar[frozenset[str]] = frozenset({"corpus_fingerprint"})

    corpus_dir: str
    corpus_fingerprint: str
    weight_decay_capped: bool
    scaling_parameters: int

    @cached_property
    def skipped_shards(self) -> Counter[str]:
        """What `training_row_groups` left out, by kind."""
        return Counter()

    @cached_property
    def training_row_groups(self) -> list[RowGroup]:
        shards, _validation = split_shards(list_shards(self.corpus_dir))
        return row_groups(shards, self.config["on_bad_shard"], self.skipped_shards)

    def validation_row_groups(self) -> list[RowGroup]:
        """Raises NanorayError: the shard cannot be read; there is no other to go on with."""
        _shards, validation = split_shards(list_shards(self.corpus_dir))
        try:
            return row_groups(validation)
        except BadShardError as error:
            raise NanorayError(
                f"the validation shard {validation[0]} cannot be used ({error.reason}), and it is "
                f"never skipped; delete it and fetch or build it again"
            ) from error

    def stream(self, tokenizer: Tokenizer) -> StreamPlan:
        return plan_stream(
            self.training_row_groups,
            tokenizer,
            layout=self.layout,
            num_steps=self.num_iterations,
            seed=self.config["seed"],
            on_bad=self.config["on_bad_shard"],
        )

    def unit_bytes(self) -> int:
        return max((group.num_bytes for group in self.training_row_groups), default=0)

    def inputs(self) -> tuple[str, ...]:
        return (self.corpus_dir, self.tokenizer_dir)

    def describe(self) -> list[str]:
        model = self.model_config
        tokens = self.num_iterations * self.total_batch_size
        flops = tokens * self.flops_per_token
        lines = [
            f"run        {self.run} in {self.run_dir}",
            f"model      depth {model.n_layer}, width {model.n_embd}, {model.n_head} heads of "
            f"{model.head_dim}, vocabulary {model.vocab_size:,}, {model.recipe} recipe",
            f"parameters {self.num_parameters:,} ({self.scaling_parameters:,} that scale)",
            f"horizon    {self.num_iterations:,} steps of {self.total_batch_size:,} tokens = "
            f"{tokens:,} tokens ({tokens / self.scaling_parameters:.1f} a parameter), "
            f"{flops:.2e} FLOPs",
            f"data       {self.corpus_dir}, tokenizer {self.tokenizer_dir}",
            f"workers    {self.config['num_workers']}, micro-batches of "
            f"{self.micro_rows(parse_worker_range(self.config['num_workers'])[0])} rows",
            f"decay      {self.weight_decay:.4f}",
        ]
        if self.weight_decay_capped:
            lines[-1] += " (the law's value is for depth >= 8; capped to that of depth 8)"
        if self.training_row_groups and self.skipped_shards:  # the first counts the second
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(self.skipped_shards.items()))
            lines.append(f"left out   {kinds.replace('_', ' ')} of the training shards")
        return lines


def model_config(config: PretrainConfig, depth: int, vocab_size: int) -> GPTConfig:
    """The model that the dial gives at a depth."""
    width = laws.model_width(depth, config.aspect_ratio, config.head_dim)
    num_heads = width // config.head_dim
    kv_heads = num_heads
    if config.num_kv_heads:
        own_heads = laws.model_width(config.depth, config.aspect_ratio, config.head_dim)
        group = own_heads // config.head_dim / config.num_kv_heads
        kv_heads = config.num_kv_heads if depth == config.depth else max(1, int(num_heads / group))
        while depth != config.depth and num_heads % kv_heads:
            kv_heads -= 1
    return GPTConfig(
        sequence_len=config.max_seq_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=num_heads,
        n_kv_head=kv_heads,
        n_embd=width,
        window_pattern=config.window_pattern,
        recipe=config.recipe,
    )


def make_plan(config: PretrainConfig) -> PretrainPlan:
    """Resolve and validate everything that can be known before the first worker starts.

    Raises:
        NanorayError: no corpus, one shard only, too little or bad text in it, no tokenizer, a batch
            that does not divide, no horizon of even one step.
    """
    run = storage.check_name(config.run or f"d{config.depth}", "run")
    corpus_dir = storage.data_dir(config.corpus)
    shards = list_shards(corpus_dir)
    corpus_name = corpus_dir.rstrip("/").rsplit("/", 1)[-1]
    tokenizer_dir = storage.tokenizer_dir(config.tokenizer or corpus_name)
    tokenizer = load_tokenizer(tokenizer_dir)
    model = model_config(config, config.depth, tokenizer.vocab_size)
    scaling = laws.scale(
        lambda depth: model_config(config, depth, tokenizer.vocab_size).num_scaling_parameters(),
        config.depth,
        ratio=config.recipe_value("target_param_data_ratio"),
        weight_decay=config.recipe_value("weight_decay"),
        batch_tokens=config.total_batch_size,
        cap=config.weight_decay is None,
    )
    if scaling.batch_tokens % config.max_seq_len:
        raise NanorayError(
            f"the law's batch of {scaling.batch_tokens:,} tokens is not divisible by "
            f"--max-seq-len {config.max_seq_len}; give --total-batch-size"
        )
    num_iterations = _num_iterations(config, scaling, model.flops_per_token())
    resolved = config.model_dump(mode="json")
    for name in ("target_param_data_ratio", "embedding_lr", "unembedding_lr", "matrix_lr",
                 "scalar_lr", "weight_decay", "warmup_steps", "warmdown_ratio",
                 "final_lr_frac"):  # fmt: skip
        resolved[name] = config.recipe_value(name)
    plan = PretrainPlan(
        config=resolved | {"run": run, "tokenizer": tokenizer_dir, "corpus": corpus_dir},
        run=run,
        run_dir=storage.run_dir(run),
        model=model.to_dict(),
        tokenizer_dir=tokenizer_dir,
        tokenizer_fingerprint=tokenizer.fingerprint,
        corpus_dir=corpus_dir,
        corpus_fingerprint=corpus_fingerprint(shards),
        num_iterations=num_iterations,
        total_batch_size=scaling.batch_tokens,
        weight_decay=scaling.weight_decay,
        weight_decay_capped=scaling.weight_decay_capped,
        scaling_parameters=scaling.scaling_parameters,
        flops_per_token=model.flops_per_token(),
        num_parameters=model.num_parameters_by_group()["total"],
    )
    plan.stream(tokenizer)  # a sample is read: better here than minutes later, in a worker
    return plan


def _num_iterations(config: PretrainConfig, scaling: laws.Scaling, flops_per_token: int) -> int:
    if config.num_iterations:
        return config.num_iterations
    if config.target_flops:
        steps = round(config.target_flops / (flops_per_token * scaling.batch_tokens))
    else:
        steps = scaling.horizon_tokens // scaling.batch_tokens
    if steps < 1:
        raise NanorayError(
            f"the horizon is less than one step of {scaling.batch_tokens:,} tokens; raise it or "
            f"lower --total-batch-size"
        )
    return steps
