"""``python -m jobs.pretrain``: pretrain a model; the same run name goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.training import carry_out
from nanoray.config import PretrainConfig, run_job
from nanoray.train.plan import make_plan


def main(argv: Sequence[str]) -> int:
    config = PretrainConfig.parse(argv, "python -m jobs.pretrain")
    return carry_out(make_plan(config), config)


if __name__ == "__main__":
    run_job(main)
