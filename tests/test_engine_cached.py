"""CachedModel against GPT.forward: chunks, rows, windows, recipes, weights of another dtype."""

from __future__ import annotations

import random

import pytest
import torch
from engine_models import full_logits, one_thread, random_tokens, tiny  # noqa: F401
from torch import Tensor

from nanoray.engine.cached import CachedModel, KVCache, aligned
from nanoray.engine.slots import Prefix
from nanoray.engine.weights import Matrix
from nanoray.errors import NanorayError
from nanoray.model.gpt import GPT, SOFTCAP
from nanoray.model.loss import softcapped_logits

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS: dict[str, dict[str, object]] = {
    "july": {},
    "february": {"recipe": "february"},
    "plain heads": {"n_kv_head": 4},
    "one kv head": {"n_kv_head": 1, "window_pattern": "LS"},
}


def extend(
    model: CachedModel, cache: KVCache, rows: list[tuple[int, list[int], int, int]]
) -> list[Tensor]:
    """One call for rows (slot, sequence, start, end): logits [end - start, V] of each."""
    T = max(end - start for _, _, start, end in rows)
    tokens_BT = torch.full((len(rows), T), 9)
    for b, (_, tokens, start, end) in enumerate(rows):
        tokens_BT[b, : end - start] = torch.tensor(tokens[start:end])
    hidden_BTD = model.forward(
        cache,
        [slot for slot, *_ in rows],
        [start for _, _, start, _ in rows],
        tokens_BT,
        [end - start for _, _, start, end in rows],
        [tokens[start - 1] if start else -1 for _, tokens, start, _ in rows],
    )
    return [
        model.logits(hidden_TD[: end - start])
        for hidden_TD, (_, _, start, end) in zip(hidden_BTD, rows)
    ]


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_random_chunks_of_random_rows_equal_the_full_forward(changes: dict[str, object]) -> None:
    model = tiny(**changes)
    cached = CachedModel(model)
    rng = random.Random(0)
    # Longer than both windows (July's short one is 128), in slots with a gap and out of order.
    sequences = {slot: random_tokens(length, slot) for slot, length in enumerate((200, 40, 150))}
    wanted = {slot: full_logits(model, tokens) for slot, tokens in sequences.items()}
    cache = KVCache(cached, num_slots=5, max_len=200)
    place = {0: 4, 1: 1, 2: 2}
    done = dict.fromkeys(sequences, 0)
    while todo := [slot for slot, tokens in sequences.items() if done[slot] < len(tokens)]:
        rng.shuffle(todo)
        rows = []
        for slot in todo[: rng.randint(1, 3)]:
            tokens, start = sequences[slot], done[slot]
            done[slot] = min(len(tokens), start + rng.choice([1, 1, 2, 7, 64]))
            rows.append((place[slot], tokens, start, done[slot]))
        for (slot, _, start, end), logits in zip(rows, extend(cached, cache, rows)):
            source = next(s for s, p in place.items() if p == slot)
            torch.testing.assert_close(logits, wanted[source][start:end], rtol=0, atol=5e-5)


def test_a_copied_prefix_serves_and_what_lies_behind_it_does_not_show() -> None:
    model = tiny()
    cached = CachedModel(model)
    cache = KVCache(cached, num_slots=3, max_len=100)
    shared, ending = random_tokens(60, 1), random_tokens(30, 2)
    extend(cached, cache, [(0, random_tokens(100, 3), 0, 100)])
    extend(cached, cache, [(2, shared + random_tokens(40, 4), 0, 100)])
    cache.copy(2, 0, 60)
    (logits,) = extend(cached, cache, [(0, shared + ending, 60, 90)])
    wanted = full_logits(model, shared + ending)[60:]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=5e-5)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_rows_that_read_one_prefix_equal_the_full_forward(changes: dict[str, object]) -> None:
    model = tiny(**changes)
    cached = CachedModel(model)
    # Two families and a stranger, in slots with gaps; some rows' short window leaves the prefix.
    prefixes = {"a": Prefix(1, 90), "b": Prefix(2, 40), "": None}
    family_of = {0: "a", 1: "a", 3: "a", 4: "a", 5: "b", 6: "", 7: "b", 8: "b"}
    own_lengths = {0: 1, 1: 30, 3: 30, 4: 65, 5: 3, 6: 50, 7: 3, 8: 100}
    beginnings = {"a": random_tokens(90, 1), "b": random_tokens(40, 2), "": []}
    sequences = {
        slot: beginnings[family] + random_tokens(own_lengths[slot] + 6, 10 + slot)
        for slot, family in family_of.items()
    }
    cache = KVCache(cached, num_slots=9, max_len=170)
    starts = {slot: len(tokens) - 6 for slot, tokens in sequences.items()}
    for slot, tokens in sequences.items():
        extend(cached, cache, [(slot, tokens, 0, starts[slot])])
    order = sorted(family_of, key=lambda slot: (family_of[slot], slot))
    wanted = {slot: full_logits(model, tokens) for slot, tokens in sequences.items()}
    for step in range(6):
        at = [starts[slot] + step for slot in order]
        tokens_B1 = torch.tensor([[sequences[slot][i]] for slot, i in zip(order, at)])
        hidden_B1D = cached.forward(
            cache,
            order,
            at,
            tokens_B1,
            [1] * len(order),
            [sequences[slot][i - 1] for slot, i in zip(order, at)],
            prefixes_B=[prefixes[family_of[slot]] for slot in order],
        )
        for slot, i, logits in zip(order, at, cached.logits(hidden_B1D[:, 0])):
            torch.testing.assert_close(logits, wanted[slot][i], rtol=0, atol=5e-5)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_last_only_gives_each_rows_last_token(changes: dict[str, object]) -> None:
    cached = CachedModel(tiny(**changes))
    tokens_BT = torch.tensor([random_tokens(70, seed) for seed in range(3)])
    rows = ([4, 0, 1], [0, 0, 0], tokens_BT, [70, 1, 33], [-1, -1, -1])
    caches = [KVCache(cached, num_slots=5, max_len=70) for _ in range(2)]
    whole_BTD = cached.forward(caches[0], *rows)
    last_B1D = cached.forward(caches[1], *rows, last_only=True)
    wanted_B1D = whole_BTD[[0, 1, 2], [69, 0, 32]].unsqueeze(1)
    torch.testing.assert_close(last_B1D, wanted_B1D, rtol=0, atol=1e-5)
    for one, other in zip(caches[0].layers, caches[1].layers):
        torch.testing.assert_close(one[:, ..., :70, :], other[:, ..., :70, :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_matrix_gives_what_a_plain_one_gives(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(70, 48, generator=generator).to(dtype)
    packed = Matrix(weight_OI)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = Matrix(weight_OI)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2  # sums of about 7, 8 bits
    for shape in ((1,), (1, 1), (3, 1), (2, 17), (300,)):
        x = torch.randn(*shape, 48, generator=generator).to(dtype)
        other = torch.randn(*shape, 70, generator=generator).to(dtype)
        wanted = x.double() @ weight_OI.double().T
        for matrix in (packed, plain):
            for y, reference in (
                (matrix(x), wanted),
                (matrix.relu(x), wanted.relu()),
                (matrix.plus(x, other), wanted + other),
            ):
                assert y.dtype == dtype
                torch.testing.assert_close(y.double(), reference, rtol=0, atol=tolerance)


def test_logits_are_softcapped_as_the_models_are() -> None:
    model = tiny()
    hidden_ND = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 40
    hidden_ND[3, 7] = torch.nan
    logits_NV = CachedModel(model).logits(hidden_ND)
    wanted_NV = softcapped_logits(hidden_ND, model.lm_head.weight[:257], SOFTCAP)
    assert wanted_NV.nan_to_num().abs().max() > 14.99  # far into the cap
    torch.testing.assert_close(logits_NV, wanted_NV, rtol=0, atol=2e-5, equal_nan=True)


def test_padding_at_the_end_of_a_full_slot_touches_nothing() -> None:
    model = tiny()
    cached = CachedModel(model)
    cache = KVCache(cached, num_slots=2, max_len=50)
    first, second = random_tokens(50, 1), random_tokens(50, 2)
    extend(cached, cache, [(0, first, 0, 49), (1, second, 0, 20)])
    before = [kv[:, :, :, :20].clone() for kv in cache.layers]
    last, rest = extend(cached, cache, [(0, first, 49, 50), (1, second, 20, 50)])
    torch.testing.assert_close(last, full_logits(model, first)[49:], rtol=0, atol=5e-5)
    torch.testing.assert_close(rest, full_logits(model, second)[20:], rtol=0, atol=5e-5)
    for old, kv in zip(before, cache.layers):
        assert torch.equal(old, kv[:, :, :, :20])


@pytest.mark.parametrize("recipe", ["july", "february"])
def test_bf16_follows_the_models_bf16(recipe: str) -> None:
    reference = tiny(recipe=recipe)
    model = GPT(reference.config, torch.bfloat16)
    model.load_state_dict(reference.state_dict())
    cached = CachedModel(model)
    tokens = random_tokens(90, 0)
    cache = KVCache(cached, 1, 90)
    logits = torch.cat(
        [extend(cached, cache, [(0, tokens, start, start + 30)])[0] for start in (0, 30, 60)]
    )
    wanted = full_logits(model, tokens)
    exact = full_logits(reference, tokens)
    # As far from exact as the model itself is, not farther.
    assert (logits - exact).abs().mean() < 1.3 * (wanted - exact).abs().mean()
    assert cache.layers[0].dtype == torch.bfloat16


def test_other_weights_are_taken_whole_and_wrong_ones_not_at_all() -> None:
    model, other = tiny(), tiny(seed=5)
    cached = CachedModel(model)
    tokens = random_tokens(20, 0)

    def logits() -> Tensor:
        return extend(cached, KVCache(cached, 1, 20), [(0, tokens, 0, 20)])[0]

    wrong = other.state_dict()
    wrong["lm_head.weight"] = wrong["lm_head.weight"][:-1]
    with pytest.raises(NanorayError, match=r"lm_head\.weight is \[319, 64\]"):
        cached.load_weights(wrong)
    with pytest.raises(NanorayError, match="is absent"):
        cached.load_weights({})
    torch.testing.assert_close(logits(), full_logits(model, tokens), rtol=0, atol=5e-5)
    cached.load_weights(other.state_dict())
    wanted = full_logits(other, tokens)
    with torch.no_grad():
        other.lm_head.weight.zero_()  # the trainer goes on; the engine keeps what it was given
    torch.testing.assert_close(logits(), wanted, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (3, 150), (151, 302), (7, 8)])
def test_biases_for_gpus_lie_aligned(start: int, stop: int) -> None:
    whole = torch.randn(3, 1, 2, 303).to(torch.bfloat16)
    part = whole[1:, ..., start:stop]
    copy = aligned(part)
    assert torch.equal(copy, part)
    assert all(stride % 8 == 0 for stride in copy.stride()[:-1])
    assert copy.storage_offset() == 0
