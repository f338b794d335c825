"""The model's shape: validation, what follows from it, and the counts of the recipe."""

from __future__ import annotations

import pytest

from nanoray.errors import NanorayError
from nanoray.model.config import GPTConfig

TINY = {"sequence_len": 64, "vocab_size": 100, "n_layer": 2, "n_head": 2, "n_kv_head": 1}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"window_pattern": "SXL"}, "window_pattern"),
        ({"window_pattern": ""}, "window_pattern"),
        ({"n_embd": 65}, "multiple of n_head"),
        ({"n_head": 3, "n_kv_head": 2, "n_embd": 96}, "multiple of n_kv_head"),
        ({"n_embd": 2 * 33}, "even"),
        ({"n_embd": 16}, "at least 24"),
        ({"n_layer": 0}, "n_layer"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"recipe": "may"}, "july or february"),
    ],
)
def test_impossible_shapes_are_refused(change: dict, names: str) -> None:
    with pytest.raises(NanorayError, match=names):
        GPTConfig(**{**TINY, "n_embd": 64, **change})


def test_dict_and_back() -> None:
    config = GPTConfig(**TINY, n_embd=64, recipe="february")
    assert GPTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(NanorayError, match="num_layers"):
        GPTConfig.from_dict({"num_layers": 3})


def test_windows_follow_the_recipe() -> None:
    july = GPTConfig()
    assert july.window_sizes() == (512, 512, 512, 2048) * 3
    assert GPTConfig(recipe="february").window_sizes()[0] == 1024
    # A quarter of T, rounded up to 128; the last layer is long whatever the pattern says.
    assert GPTConfig(sequence_len=700, n_layer=2, window_pattern="s").window_sizes() == (256, 700)


def test_derived_sizes() -> None:
    config = GPTConfig(**TINY, n_embd=64)
    assert (config.head_dim, config.kv_dim, config.padded_vocab_size) == (32, 32, 128)
    assert config.rotary_len == 640
    five = GPTConfig(n_layer=5)
    assert [five.has_value_embedding(layer) for layer in range(5)] == [True, False] * 2 + [True]
    assert not GPTConfig().has_value_embedding(0)


@pytest.mark.parametrize(("depth", "millions"), [(12, 110.1), (24, 729.8)])
def test_scaling_parameters_of_the_speedrun_models(depth: int, millions: float) -> None:
    heads = depth // 2
    config = GPTConfig(n_layer=depth, n_head=heads, n_kv_head=heads, n_embd=64 * depth)
    assert round(config.num_scaling_parameters() / 1e6, 1) == millions
