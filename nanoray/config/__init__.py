"""Typed configuration of the jobs: flags, environment, YAML, and the recipe's presets.

A value is taken from the first of: a flag (``--total-batch-size``), an environment variable
(``NANORAY_TOTAL_BATCH_SIZE``), the YAML file given by ``--config``, the default. Unknown keys
are errors in all of them. A field whose default is ``None`` follows from the dial or from the
recipe.

Every job's configuration is imported here, so that whichever job runs knows the variables of all.
"""

from nanoray.config.base import (
    JobConfig,
    UsageError,
    check_environment,
    parse_worker_range,
    run_job,
)
from nanoray.config.chat import ChatConfig
from nanoray.config.data import BuildConfig, DownloadConfig, InspectConfig, RepackageConfig
from nanoray.config.eval import (
    BpbConfig,
    ChatEvalConfig,
    CoreConfig,
    EvalConfig,
    InferConfig,
    SampleConfig,
)
from nanoray.config.pretrain import RECIPES, PretrainConfig
from nanoray.config.rl import RlConfig, RlScaleConfig, RlStatusConfig
from nanoray.config.serve import ChatServiceConfig, ModelChoice, ServeConfig
from nanoray.config.sft import SFT_RECIPES, SftConfig
from nanoray.config.status import StatusConfig
from nanoray.config.tokenizer import TokenizerConfig
from nanoray.config.train import TrainConfig

__all__ = [
    "RECIPES",
    "SFT_RECIPES",
    "BpbConfig",
    "BuildConfig",
    "ChatConfig",
    "ChatEvalConfig",
    "ChatServiceConfig",
    "CoreConfig",
    "DownloadConfig",
    "EvalConfig",
    "InferConfig",
    "InspectConfig",
    "JobConfig",
    "ModelChoice",
    "PretrainConfig",
    "RepackageConfig",
    "RlConfig",
    "RlScaleConfig",
    "RlStatusConfig",
    "SampleConfig",
    "ServeConfig",
    "SftConfig",
    "StatusConfig",
    "TokenizerConfig",
    "TrainConfig",
    "UsageError",
    "check_environment",
    "parse_worker_range",
    "run_job",
]
