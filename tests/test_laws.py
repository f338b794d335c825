"""The laws of the dial against recipe.md's formulas, written out once more."""

from __future__ import annotations

import functools
import math

import pytest

from nanoray import laws
from nanoray.config import PretrainConfig
from nanoray.model.config import GPTConfig
from nanoray.optim.groups import build_groups
from nanoray.train.plan import model_config

VOCAB = 32768


@functools.cache
def default_config() -> PretrainConfig:
    return PretrainConfig.parse([], "test")


def parameters(depth: int, vocab_size: int = VOCAB) -> int:
    return model_config(default_config(), depth, vocab_size).num_scaling_parameters()


def expected_parameters(depth: int, vocab_size: int = VOCAB) -> int:
    """Block matrices (12 width^2 and the value gates of every other layer) + head."""
    width = math.ceil(depth * 64 / 128) * 128
    gates = math.ceil(depth / 2) * 12 * (width // 128)
    return depth * 12 * width**2 + gates + math.ceil(vocab_size / 64) * 64 * width


def expected_scaling(depth: int, ratio: float) -> tuple[int, int, float]:
    """D, B, and lambda without the cap."""
    tokens = ratio * expected_parameters(depth)
    tokens_12 = ratio * expected_parameters(12)
    batch = 2 ** round(math.log2(2**19 * (tokens / tokens_12) ** 0.383))
    return int(tokens), batch, 0.28 * math.sqrt(batch / 2**19) * tokens_12 / tokens


def scale(depth: int, ratio: float = 12, vocab_size: int = VOCAB, **options: int) -> laws.Scaling:
    return laws.scale(
        lambda d: parameters(d, vocab_size), depth, ratio=ratio, weight_decay=0.28, **options
    )


@pytest.mark.parametrize("ratio", [8, 10.5, 12])
@pytest.mark.parametrize("depth", range(4, 33))
def test_table(depth: int, ratio: float) -> None:
    tokens, batch, decay = expected_scaling(depth, ratio)
    scaling = scale(depth, ratio)
    assert scaling.scaling_parameters == expected_parameters(depth)
    assert scaling.horizon_tokens == tokens
    assert scaling.batch_tokens == batch
    limit = expected_scaling(8, ratio)[2] if depth < 8 else math.inf
    assert scaling.weight_decay == pytest.approx(min(decay, limit), rel=1e-6)
    assert scaling.weight_decay_capped == (decay > limit)


def test_figures_of_the_reference() -> None:
    assert parameters(12) == pytest.approx(110.1e6, rel=1e-3)
    assert scale(12).batch_tokens == 2**19
    assert scale(12).weight_decay == pytest.approx(0.28)
    assert parameters(24) == pytest.approx(729.8e6, rel=1e-4)
    speedrun = scale(24, ratio=8)
    assert speedrun.batch_tokens == 2**20
    assert speedrun.weight_decay == pytest.approx(0.0597, abs=5e-5)
    assert speedrun.horizon_tokens // speedrun.batch_tokens == 5568


def test_decay_is_capped_below_depth_8() -> None:
    uncapped = {depth: expected_scaling(depth, 12)[2] for depth in (4, 6, 8)}
    assert {d: round(x, 2) for d, x in uncapped.items()} == {4: 1.89, 6: 0.94, 8: 0.52}
    limit = scale(8)
    assert not limit.weight_decay_capped
    for depth in range(1, 8):
        assert scale(depth).weight_decay_capped
        assert scale(depth).weight_decay == limit.weight_decay
    # A small vocabulary has a cap of its own.
    assert scale(4, vocab_size=4096).weight_decay == scale(8, vocab_size=4096).weight_decay > 0.52


def test_a_given_batch_takes_the_law_s_place() -> None:
    assert scale(12, batch_tokens=2**21).batch_tokens == 2**21
    assert scale(12, batch_tokens=2**21).weight_decay == pytest.approx(2 * 0.28)
    # A tiny batch makes the law's decay small: then there is nothing to cap.
    tiny = scale(4, batch_tokens=2**13)
    assert not tiny.weight_decay_capped
    _tokens, law_batch, law_decay = expected_scaling(4, 12)
    assert tiny.weight_decay == pytest.approx(law_decay * math.sqrt(2**13 / law_batch))


@pytest.mark.parametrize("depth", [4, 12, 20, 24, 32])
def test_learning_rates(depth: int) -> None:
    """Width and batch scaling of the learning rates, from the dial down to the groups."""
    scaling = scale(depth)
    width = laws.model_width(depth, 64, 128)
    groups = build_groups(
        {
            "lm_head.weight": (VOCAB, width),
            "transformer.wte.weight": (VOCAB, width),
            "resid_lambdas": (depth,),
            "smear_lambda": (1,),
            "transformer.h.0.mlp.c_fc.weight": (4 * width, width),
            "transformer.h.0.mlp.c_proj.weight": (width, 4 * width),
        },
        "july",
        embedding_lr=0.3,
        unembedding_lr=0.008,
        matrix_lr=0.02,
        scalar_lr=0.5,
        weight_decay=scaling.weight_decay,
        width=width,
        batch_tokens=scaling.batch_tokens,
    )
    lr = {name: group.lr for group in groups for name in group.names}
    by_width = (width / 768) ** -0.5
    by_batch = math.sqrt(expected_scaling(depth, 12)[1] / 2**19)
    assert lr == pytest.approx(
        {
            "lm_head.weight": 0.008 * by_width * by_batch,
            "transformer.wte.weight": 0.3 * by_width * by_batch,
            "resid_lambdas": 0.005 * by_batch,
            "smear_lambda": 0.2,
            "transformer.h.0.mlp.c_fc.weight": 0.02 * by_batch * 2,
            "transformer.h.0.mlp.c_proj.weight": 0.02 * by_batch,
        }
    )


@pytest.mark.parametrize(("depth", "width"), [(1, 128), (3, 256), (4, 256), (12, 768), (25, 1664)])
def test_width_is_rounded_up_to_whole_heads(depth: int, width: int) -> None:
    assert laws.model_width(depth, 64, 128) == width
    model = model_config(default_config(), depth, VOCAB)
    assert (model.n_embd, model.n_head, model.head_dim) == (width, width // 128, 128)


def test_flops_per_token() -> None:
    """6 per matmul parameter + 12 per head channel and visible token (July's windows)."""
    model = GPTConfig(
        sequence_len=2048, vocab_size=VOCAB, n_layer=12, n_head=6, n_kv_head=6, n_embd=768
    )
    windows = [512, 512, 512, 2048] * 3
    matmul = expected_parameters(12) + 24  # the smear gate
    assert model.flops_per_token() == 6 * matmul + sum(12 * 768 * window for window in windows)
