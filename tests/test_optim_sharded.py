"""The sharded optimiser: worlds of 1 to 4 ranks do the same, and states move between them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gloo import run_gloo
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear

from nanoray.optim.buckets import StateShard
from nanoray.optim.groups import ParamGroup, build_groups
from nanoray.optim.schedule import Schedule
from nanoray.optim.sharded import MuonAdamW

NUM_MICRO_BATCHES = 4
NUM_STEPS = 20
WIDTH = 32


class TinyModel(nn.Module):
    """Plain matrices under nanochat's names; 67 rows divide by none of the world sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weights = nn.ParameterDict()

        def add(name: str, *shape: int) -> None:
            self.weights[name.replace(".", "/")] = nn.Parameter(torch.randn(shape) * 0.1)

        add("transformer.wte.weight", 67, WIDTH)
        for layer in range(3):
            add(f"transformer.h.{layer}.attn.c_q.weight", WIDTH, WIDTH)
            add(f"transformer.h.{layer}.attn.c_proj.weight", WIDTH, WIDTH)
            add(f"transformer.h.{layer}.mlp.c_fc.weight", 3 * WIDTH, WIDTH)
            add(f"transformer.h.{layer}.mlp.c_proj.weight", WIDTH, 3 * WIDTH)
        add("transformer.h.2.attn.ve_gate.weight", 2, 12)
        add("value_embeds.2.weight", 67, WIDTH)
        add("lm_head.weight", 67, WIDTH)
        add("resid_lambdas", 3)
        add("x0_lambdas", 3)
        add("smear_gate.weight", 1, 24)
        add("smear_lambda", 1)

    def named(self) -> dict[str, nn.Parameter]:
        return {key.replace("/", "."): p for key, p in self.weights.items()}

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Sum of the losses of predicting a token's successor."""
        w = self.named()
        x0 = embedding(tokens_BT, w["transformer.wte.weight"]).float()
        x = x0
        for layer in range(3):
            prefix = f"transformer.h.{layer}."
            x = x * (1 + w["resid_lambdas"][layer]) + w["x0_lambdas"][layer] * x0
            h = linear(x, w[prefix + "attn.c_q.weight"]).tanh()
            if layer == 2:
                gate = linear(x[..., :12], w[prefix + "attn.ve_gate.weight"]).sigmoid()
                h = h + gate.sum(-1, keepdim=True) * embedding(
                    tokens_BT, w["value_embeds.2.weight"]
                )
            x = x + linear(h, w[prefix + "attn.c_proj.weight"])
            h = linear(x, w[prefix + "mlp.c_fc.weight"]).relu().square()
            x = x + linear(h, w[prefix + "mlp.c_proj.weight"])
        smear = linear(x[..., :24], w["smear_gate.weight"]).sigmoid()
        x = x + w["smear_lambda"] * smear * x0
        logits = linear(x, w["lm_head.weight"])
        targets = (tokens_BT + 1) % 67
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def tiny_groups(named: dict[str, nn.Parameter]) -> list[ParamGroup]:
    return build_groups(
        {name: tuple(p.shape) for name, p in named.items()},
        "july",
        embedding_lr=0.02,
        unembedding_lr=0.004,
        matrix_lr=0.02,
        scalar_lr=0.05,
        weight_decay=0.1,
        width=768,
        batch_tokens=2**19,
    )


def build(table_dtype: torch.dtype = torch.float32) -> tuple[TinyModel, MuonAdamW]:
    model = TinyModel()
    named = model.named()
    for name in ("transformer.wte.weight", "value_embeds.2.weight"):
        named[name].data = named[name].data.to(table_dtype)
    optimizer = MuonAdamW(
        named, tiny_groups(named), recipe="july", compute_dtype=torch.float32, compile=False
    )
    return model, optimizer


def micro_batches(step: int, rank: int, world_size: int) -> list[Tensor]:
    """A rank's part of a step: uneven, and in every third step only rank 0 has any."""
    generator = torch.Generator().manual_seed(step)
    batches = list(torch.randint(67, (NUM_MICRO_BATCHES, 2, 8), generator=generator))
    if step % 3 == 1:
        return batches if rank == 0 else []
    return batches[rank::world_size]


def one_step(
    model: TinyModel, optimizer: MuonAdamW, step: int, rank: int, world_size: int
) -> float:
    """This rank's part of the step's mean loss."""
    batches = micro_batches(step, rank, world_size)
    total = 0.0
    for i, tokens in enumerate(batches):
        loss = model(tokens) / (NUM_MICRO_BATCHES * tokens.numel())
        if i == len(batches) - 1:
            optimizer.prepare_last_backward()
        loss.backward()
        total += loss.item()
    schedule = Schedule(NUM_STEPS, warmup_steps=5)
    optimizer.step(*schedule.at(step))
    return total


def local_gradients(model: TinyModel, rank: int, world_size: int) -> dict[str, Tensor]:
    for tokens in micro_batches(0, rank, world_size):
        (model(tokens) / (NUM_MICRO_BATCHES * tokens.numel())).backward()
    gradients = {name: p.grad.clone() for name, p in model.named().items()}
    for p in model.parameters():
        p.grad = None  # a user who does this must not break the buffers
    return gradients


def train(
    rank: int,
    world_size: int,
    start: int = 0,
    stop: int = NUM_STEPS,
    saved: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train from `start` to `stop`, from a saved state if there is one."""
    model, optimizer = build()
    gradients = local_gradients(model, rank, world_size)
    if saved is not None:
        with torch.no_grad():
            for name, p in model.named().items():
                p.copy_(saved["params"][name])
        optimizer.load_state(functools.partial(read_rows, saved["states"]))
    losses = []
    for step in range(start, stop):
        losses.append(one_step(model, optimizer, step, rank, world_size))
        assert all(not p.grad.any() for p in model.parameters())
    return {
        "gradients": gradients,
        "losses": losses,
        "params": {name: p.detach().clone() for name, p in model.named().items()},
        "shards": [
            StateShard(s.param, s.state, s.start_row, s.stop_row, s.num_rows, s.tensor.clone())
            for s in optimizer.state_shards()
        ],
    }


def read_rows(states: dict, param: str, state: str, start: int, stop: int) -> Tensor:
    return states[param, state][start:stop]


def assemble(results: list[dict[str, Any]]) -> dict[tuple[str, str], Tensor]:
    """Whole states from all ranks' shards; every row must be there exactly once."""
    states: dict[tuple[str, str], Tensor] = {}
    rows_seen: dict[tuple[str, str], list[int]] = {}
    for result in results:
        for s in result["shards"]:
            key = (s.param, s.state)
            assert s.tensor.shape[0] == s.stop_row - s.start_row > 0
            states.setdefault(key, torch.zeros(s.num_rows, *s.tensor.shape[1:]))
            states[key][s.start_row : s.stop_row] = s.tensor
            rows_seen.setdefault(key, []).extend(range(s.start_row, s.stop_row))
    for key, rows in rows_seen.items():
        assert sorted(rows) == list(range(states[key].shape[0])), key
    return states


@functools.cache
def world(world_size: int) -> list[dict[str, Any]]:
    return [train(0, 1)] if world_size == 1 else run_gloo(train, world_size)


def total_losses(results: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([r["losses"] for r in results]).sum(dim=0)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "world_size", [2, pytest.param(3, marks=SLOW), pytest.param(4, marks=SLOW)]
)
def test_worlds_agree(world_size: int) -> None:
    one, many = world(1), world(world_size)
    for name, expected in one[0]["gradients"].items():
        summed = torch.stack([r["gradients"][name] for r in many]).sum(dim=0)
        torch.testing.assert_close(summed, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(total_losses(many), total_losses(one), atol=1e-4, rtol=0)
    assert total_losses(one)[-1] < total_losses(one)[0] - 0.1, "the model must learn"
    for result in many[1:]:
        for name, p in result["params"].items():
            assert torch.equal(p, many[0]["params"][name]), f"ranks differ in {name}"
    expected_states, states = assemble(one), assemble(many)
    assert states.keys() == expected_states.keys()
    for key, expected in expected_states.items():
        assert states[key].shape == expected.shape, key
    assert all(states[key].item() == NUM_STEPS for key in states if key[1] == "step")


def test_same_inputs_same_bits() -> None:
    first, second = world(1)[0], train(0, 1)
    assert first["losses"] == second["losses"]
    for name, p in first["params"].items():
        assert torch.equal(p, second["params"][name])


@functools.cache
def half_by_two_ranks() -> list[dict[str, Any]]:
    """Half of the steps, by two ranks."""
    return run_gloo(train, 2, 0, NUM_STEPS // 2)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_saved_by_two_ranks_continues_anywhere(world_size: int) -> None:
    half = NUM_STEPS // 2
    saved_by = half_by_two_ranks()
    saved = {"params": saved_by[0]["params"], "states": assemble(saved_by)}
    if world_size == 1:
        rest = [train(0, 1, half, NUM_STEPS, saved)]
    else:
        rest = run_gloo(train, world_size, half, NUM_STEPS, saved)
    losses = torch.cat([total_losses(saved_by), total_losses(rest)])
    torch.testing.assert_close(losses, total_losses(world(1)), atol=1e-4, rtol=0)
    if world_size == 2:
        unbroken = world(2)
        assert [r["losses"] for r in rest] == [r["losses"][half:] for r in unbroken]
        for name, p in unbroken[0]["params"].items():
            assert torch.equal(p, rest[0]["params"][name]), "resuming must be bitwise"


@pytest.mark.slow
def test_states_are_shared_out() -> None:
    """Each of 4 ranks holds about a quarter, and a matrix belongs to one rank."""
    results = world(4)
    sizes = [sum(s.tensor.numel() for s in r["shards"]) for r in results]
    assert max(sizes) < 0.4 * sum(sizes)
    owners = [{s.param for s in r["shards"] if s.state == "momentum"} for r in results]
    assert sum(len(o) for o in owners) == len(set().union(*owners)) == 13


def overlap(rank: int, world_size: int) -> list[int]:
    """How many buckets are under way after a backward that is not, and one that is the last."""
    model, optimizer = build()
    batches = micro_batches(0, 0, 1)
    counts = []
    for i in range(2):
        if i == 1:
            optimizer.prepare_last_backward()
        model(batches[i]).backward()
        counts.append(sum(bucket.launched for bucket in optimizer._buckets))
    counts.append(len(optimizer._buckets))
    optimizer.step(1.0, 0.9, 1.0)
    return counts


def test_gradients_are_sent_during_the_last_backward() -> None:
    for first, last, num_buckets in run_gloo(overlap, 2):
        assert first == 0
        assert last == num_buckets


def train_bf16_tables(rank: int, world_size: int) -> tuple[list[float], dict[str, Tensor]]:
    model, optimizer = build(torch.bfloat16)
    losses = [one_step(model, optimizer, step, rank, world_size) for step in range(6)]
    return losses, {name: p.detach().clone() for name, p in model.named().items()}


def test_tables_in_bf16() -> None:
    """Embeddings live in bf16 on GPUs, and so do their gradients and moments."""
    one, two = train_bf16_tables(0, 1), run_gloo(train_bf16_tables, 2)
    assert one[1]["transformer.wte.weight"].dtype == torch.bfloat16
    losses = torch.tensor([losses for losses, _ in two]).sum(dim=0)
    torch.testing.assert_close(losses, torch.tensor(one[0]), atol=1e-2, rtol=0)
    for name, p in two[0][1].items():
        assert torch.equal(p, two[1][1][name]), name


def test_all_gradients_missing_is_a_step_of_zeros() -> None:
    model, optimizer = build()
    before = {name: p.detach().clone() for name, p in model.named().items()}
    for p in model.parameters():
        p.grad = None
    optimizer.step(1.0, 0.9, 0.0)
    name = "transformer.h.0.attn.c_q.weight"
    assert torch.equal(before[name], model.named()[name])


def _without(groups: list, index: int) -> list:
    return groups[:index] + groups[index + 1 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda named, groups: (named, _without(groups, 0)), "lm_head"),
        (lambda named, groups: (named, [*groups, groups[0]]), "twice"),
        (
            lambda named, groups: (
                {
                    name: nn.Parameter(p.data.bfloat16()) if ".h." in name else p
                    for name, p in named.items()
                },
                groups,
            ),
            "fp32",
        ),
    ],
)
def test_mistakes_are_named(change: Callable, message: str) -> None:
    named = TinyModel().named()
    groups = tiny_groups(named)
    named, groups = change(named, groups)
    with pytest.raises(ValueError, match=message):
        MuonAdamW(named, groups, recipe="july", compute_dtype=torch.float32, compile=False)


def test_a_state_of_another_shape_is_refused() -> None:
    _, optimizer = build()
    with pytest.raises(ValueError, match="same architecture"):
        optimizer.load_state(lambda param, state, start, stop: torch.zeros(3, 3, 3))


def failing(rank: int, world_size: int) -> None:
    if rank == 1:
        raise KeyError("the reason")


def test_the_harness_reports_a_failing_rank() -> None:
    with pytest.raises(RuntimeError, match="the reason"):
        run_gloo(failing, 2, timeout_s=30)
