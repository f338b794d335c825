"""The one engine for everything that samples: chat, evaluation, reinforcement learning, serving.

    engine = Engine(model, tokenizer)
    completions = engine.generate([prompt], SamplingParams(temperature=0))
    async for delta in engine.stream(prompt, params): ...

Seven files, in reading order: slots (which sequence lies where), weights (folded and packed),
cached (the forward pass over slots), sampling, request (text, stops, tools), scheduler (the step),
engine (the door). No Ray.
"""

from nanoray.engine.cached import CachedModel, KVCache
from nanoray.engine.engine import Engine, EngineClosedError
from nanoray.engine.request import PART_TYPES, Completion, Delta, PromptScore, extend_parts
from nanoray.engine.sampling import SamplingParams

__all__ = [
    "PART_TYPES",
    "CachedModel",
    "Completion",
    "Delta",
    "Engine",
    "EngineClosedError",
    "KVCache",
    "PromptScore",
    "SamplingParams",
    "extend_parts",
]
