"""The model as a whole: weights, invariances, limits, checkpoints' recipes, hooks, compile."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from nanoray.errors import NanorayError
from nanoray.model import gpt
from nanoray.model.compile import compile_model
from nanoray.model.config import GPTConfig, RecipeName
from nanoray.model.gpt import GPT, detect_recipe, norm

RECIPES: list[RecipeName] = ["july", "february"]


def tiny(recipe: RecipeName = "july", randomised: bool = True, **changes: object) -> GPT:
    """A small model; weights that start at zero become noise, so that nothing hides."""
    shape = {"sequence_len": 160, "vocab_size": 70, "n_layer": 3, "n_head": 4, "n_kv_head": 2}
    model = GPT(GPTConfig(**{**shape, "n_embd": 64, "recipe": recipe, **changes}))
    model.init_weights(seed=0)
    if randomised:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.2, generator=generator)
    return model


def tokens(B: int = 3, T: int = 150, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 70, (B, T + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, :7] = -1
    return ids[:, :-1], targets


@pytest.mark.parametrize("recipe", RECIPES)
def test_initial_weights_follow_the_recipe(recipe: RecipeName) -> None:
    model = tiny(recipe, randomised=False, vocab_size=4000, n_layer=5)
    july = recipe == "july"
    assert model.wte.weight.std().item() == pytest.approx(0.8 if july else 1.0, rel=0.02)
    assert model.lm_head.weight.std().item() == pytest.approx(0.001, rel=0.02)
    bound = (3 / 64) ** 0.5
    for block in model.blocks:
        for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
            assert bound * 0.97 < linear.weight.abs().max().item() <= bound
        fc_bound = bound * (0.4 if july else 1)
        assert fc_bound * 0.99 < block.mlp.c_fc.weight.abs().max().item() <= fc_bound
        assert not block.attn.c_proj.weight.any()
        assert not block.mlp.c_proj.weight.any()
        if block.attn.ve_gate is not None:
            gate = block.attn.ve_gate.weight
            assert gate.shape == (2, 12 if july else 32)
            assert gate.min().item() >= 0
            assert gate.max().item() <= (0.02 if july else 0)
    for table in model.value_embeds.parameters():
        assert table.std().item() == pytest.approx(1 / 8, rel=0.02)
    ends = {"july": ([1.15, 1.05], [0.2, 0.05]), "february": ([1, 1], [0.1, 0.1])}[recipe]
    torch.testing.assert_close(model.resid_lambdas[[0, -1]], torch.tensor(ends[0]) * 1.0)
    torch.testing.assert_close(model.x0_lambdas[[0, -1]], torch.tensor(ends[1]) * 1.0)
    if july:
        assert model.smear_lambda.item() == 0
        assert model.backout_lambda.item() == pytest.approx(0.2)
        assert 0 <= model.smear_gate.weight.min() < model.smear_gate.weight.max() <= 0.02
    else:
        assert not hasattr(model, "smear_lambda")


def test_initial_weights_depend_on_the_seed_alone() -> None:
    code = (
        "import hashlib; from nanoray.model.gpt import GPT, GPTConfig;"
        "m = GPT(GPTConfig(sequence_len=64, vocab_size=3000, n_layer=2, n_head=2, n_kv_head=2,"
        "n_embd=64)); m.init_weights(seed=5);"
        "weights = b''.join(p.detach().numpy().tobytes() for p in m.parameters());"
        "digest = hashlib.sha256(weights).hexdigest()"
    )
    other = f"import torch; torch.set_num_threads(2); {code}; print(digest)"
    ran = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=True)
    here: dict[str, str] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    exec(code, here)
    torch.set_num_threads(threads)
    assert ran.stdout.strip() == here["digest"]
    first, other = tiny(randomised=False), tiny(randomised=False)
    other.init_weights(seed=1)
    assert not torch.equal(first.wte.weight, other.wte.weight)


@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_and_later_tokens_do_not_matter(recipe: RecipeName) -> None:
    model = tiny(recipe)
    idx_BT, targets_BT = tokens()
    with torch.no_grad():
        losses_BT = model(idx_BT, targets_BT, reduction="none")
        flipped = model(idx_BT.flip(0), targets_BT.flip(0), reduction="none").flip(0)
        torch.testing.assert_close(flipped, losses_BT, rtol=0, atol=1e-5)
        total = model(idx_BT, targets_BT)
        torch.testing.assert_close(total, losses_BT.sum(), rtol=1e-6, atol=0)
        logits = model(idx_BT)
        assert logits.shape == (3, 150, 70)
        assert logits.dtype == torch.float32
        prefix = model(idx_BT[:, :61])  # causal: what comes after does not enter
        torch.testing.assert_close(prefix, logits[:, :61], rtol=0, atol=1e-5)
        assert model(idx_BT[:, :1]).shape == (3, 1, 70)


def test_micro_batches_add_up() -> None:
    model = tiny()
    idx_BT, targets_BT = tokens(B=4)
    num_targets = (targets_BT != -1).sum()
    (model(idx_BT, targets_BT) / num_targets).backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        (model(idx_BT[rows], targets_BT[rows]) / num_targets).backward()
    for parameter, expected in zip(model.parameters(), whole):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_smear_reads_the_raw_previous_embedding() -> None:
    model = tiny()
    idx_BT, _ = tokens(T=20)
    x_BTD = norm(model.wte(idx_BT))
    expected = x_BTD.clone()
    weight, strength = model.smear_gate.weight[0], model.smear_lambda
    for t in range(1, 20):
        gate = torch.sigmoid(x_BTD[:, t, :24] @ weight).unsqueeze(1)
        expected[:, t] = x_BTD[:, t] + strength * gate * x_BTD[:, t - 1]
    torch.testing.assert_close(model.embed(model.wte(idx_BT)), expected)


def test_input_beyond_the_rotary_tables_is_refused() -> None:
    model = tiny(sequence_len=8)
    with torch.no_grad():
        model(torch.zeros(1, 80, dtype=torch.long))
        with pytest.raises(NanorayError, match="81 tokens"):
            model(torch.zeros(1, 81, dtype=torch.long))


def test_recipes_are_told_apart() -> None:
    states = {recipe: tiny(recipe).state_dict() for recipe in RECIPES}
    for recipe, state in states.items():
        assert detect_recipe({f"_orig_mod.{name}": t for name, t in state.items()}) == recipe
    mixed = {**states["february"], "smear_lambda": torch.zeros(1)}
    with pytest.raises(NanorayError, match="neither recipe"):
        detect_recipe(mixed)


def test_gradients_arrive_block_by_block() -> None:
    """Communication can start at the first hook: later blocks finish before earlier ones."""
    model = tiny()
    order: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    model(*tokens()).backward()
    assert sorted(order) == sorted(name for name, _ in model.named_parameters())
    blocks = [int(name.split(".")[2]) for name in order if name.startswith("transformer.h.")]
    assert blocks == sorted(blocks, reverse=True)
    assert order[0] == "lm_head.weight"


def test_unknown_compile_mode_is_refused() -> None:
    with pytest.raises(NanorayError, match="compile mode"):
        compile_model(tiny(), "fast")


@pytest.mark.slow
def test_compiled_equals_eager_and_further_shapes_stay_eager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpt, "MAX_COMPILED_INPUTS", 1)
    torch._dynamo.reset()
    eager, compiled = tiny(n_layer=2), tiny(n_layer=2)
    compile_model(compiled)
    idx_BT, targets_BT = tokens(T=100)
    order: list[str] = []
    for name, parameter in compiled.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    losses = []
    for model in (eager, compiled):
        loss = model(idx_BT, targets_BT)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for (name, ours), theirs in zip(compiled.named_parameters(), eager.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)
    blocks = [int(name.split(".")[2]) for name in order if name.startswith("transformer.h.")]
    assert blocks == sorted(blocks, reverse=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    with torch.no_grad():
        for T in (20, 30, 40):
            compiled(idx_BT[:, :T], targets_BT[:, :T], reduction="none")
            compiled(idx_BT[:, :T])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
