"""``python -m jobs.sft``: fine-tune a base model on conversations; the same run name goes on."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.progress import CountProgress
from jobs.training import carry_out
from nanoray.config import SftConfig, run_job
from nanoray.train.sft_plan import make_sft_plan


def main(argv: Sequence[str]) -> int:
    config = SftConfig.parse(argv, "python -m jobs.sft")
    with CountProgress("reading the mixture: {:,} conversations, {:,} tokens") as progress:
        plan = make_sft_plan(config, progress)
    return carry_out(plan, config)


if __name__ == "__main__":
    run_job(main)
