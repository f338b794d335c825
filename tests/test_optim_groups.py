"""Groups: the recipe's table, for both recipes."""

from __future__ import annotations

import pytest

from nanoray.optim.groups import backward_order, build_groups

JULY = {
    "transformer.wte.weight": (512, 128),
    "transformer.h.0.attn.c_q.weight": (128, 128),
    "transformer.h.0.attn.c_k.weight": (64, 128),
    "transformer.h.0.mlp.c_fc.weight": (512, 128),
    "transformer.h.0.mlp.c_proj.weight": (128, 512),
    "transformer.h.1.attn.c_q.weight": (128, 128),
    "transformer.h.1.attn.ve_gate.weight": (2, 12),
    "lm_head.weight": (512, 128),
    "resid_lambdas": (2,),
    "x0_lambdas": (2,),
    "smear_gate.weight": (1, 24),
    "smear_lambda": (1,),
    "backout_lambda": (1,),
    "value_embeds.1.weight": (512, 64),
}
FEBRUARY = {
    name: shape for name, shape in JULY.items() if not name.startswith(("smear", "backout"))
}
BASE = {"matrix_lr": 0.02, "embedding_lr": 0.3, "scalar_lr": 0.5, "weight_decay": 0.28}


def by_name(recipe: str, **changes: float) -> dict:
    arguments = {"unembedding_lr": 0.008, "width": 192, "batch_tokens": 2**21} | BASE | changes
    shapes = JULY if recipe == "july" else FEBRUARY
    groups = build_groups(shapes, recipe, **arguments)
    found = {name: group for group in groups for name in group.names}
    assert sorted(name for group in groups for name in group.names) == sorted(shapes)
    return found


def test_july_table() -> None:
    groups = by_name("july")
    # width 192 doubles the first three, four times the batch doubles the first five and Muon
    expected = {
        "lm_head.weight": (0.032, 0.8, 0.96, 0.01),
        "transformer.wte.weight": (1.2, 0.8, 0.995, 0.001),
        "value_embeds.1.weight": (0.6, 0.8, 0.995, 0.01),
        "resid_lambdas": (0.01, 0.8, 0.95, 0.05),
        "x0_lambdas": (1.0, 0.96, 0.95, 0.0),
        "smear_gate.weight": (0.2, 0.8, 0.95, 0.0),
        "backout_lambda": (0.2, 0.8, 0.95, 0.0),
    }
    for name, row in expected.items():
        group = groups[name]
        assert group.kind == "adamw"
        assert group.eps == 1e-10
        values = (group.lr, group.beta1, group.beta2, group.weight_decay)
        assert values == pytest.approx(row), name


def test_february_table() -> None:
    groups = by_name("february", unembedding_lr=0.004, width=768, batch_tokens=2**19)
    expected = {
        "lm_head.weight": (0.004, 0.8, 0.95, 0.0),
        "transformer.wte.weight": (0.3, 0.8, 0.95, 0.0),
        "value_embeds.1.weight": (0.3, 0.8, 0.95, 0.0),
        "resid_lambdas": (0.005, 0.8, 0.95, 0.0),
        "x0_lambdas": (0.5, 0.96, 0.95, 0.0),
    }
    for name, row in expected.items():
        group = groups[name]
        assert (group.lr, group.beta1, group.beta2, group.weight_decay) == pytest.approx(row)
    assert groups["transformer.h.0.attn.c_q.weight"].beta2 == 0.95


def test_muon_groups_by_shape() -> None:
    groups = by_name("july", batch_tokens=2**19)
    q = groups["transformer.h.0.attn.c_q.weight"]
    assert q is groups["transformer.h.1.attn.c_q.weight"]
    assert (q.kind, q.lr, q.beta2, q.weight_decay) == ("muon", 0.02, 0.9, 0.28)
    assert groups["transformer.h.0.mlp.c_fc.weight"].lr == pytest.approx(0.04)  # 4 rows a column
    assert groups["transformer.h.0.mlp.c_proj.weight"].lr == pytest.approx(0.02)


def test_mistakes_are_named() -> None:
    arguments = {"unembedding_lr": 0.008, "width": 192, "batch_tokens": 2**19} | BASE
    with pytest.raises(ValueError, match="surprise"):
        build_groups({"surprise": (3,)}, "july", **arguments)
    with pytest.raises(ValueError, match="unknown recipe"):
        build_groups(JULY, "march", **arguments)
    with pytest.raises(ValueError, match="smear"):
        build_groups(JULY, "february", **arguments)
    with pytest.raises(ValueError, match="matrices"):
        build_groups({"transformer.h.0.norm.weight": (8,)}, "july", **arguments)


def test_backward_order() -> None:
    order = backward_order(list(JULY))
    assert order[0] == "lm_head.weight"
    assert order[1].startswith(("transformer.h.1", "value_embeds.1"))
    layer_1 = max(order.index(name) for name in order if ".1." in name)
    layer_0 = [order.index(name) for name in order if name.startswith("transformer.h.0")]
    assert layer_1 < min(layer_0)
    assert order.index("transformer.wte.weight") > max(layer_0)
