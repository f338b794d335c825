"""Scores of our GPT in its cache, against a full forward of each row alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanoray.errors import NanorayError
from nanoray.evals import core_score
from nanoray.evals.core import evaluate_examples
from nanoray.evals.core_bundle import Example, Task
from nanoray.evals.core_render import Question
from nanoray.evals.core_score import EMPTY_SPAN, CachedScorer, SpanScore, token_scores
from nanoray.model.config import GPTConfig
from nanoray.model.gpt import GPT
from nanoray.tokenizer.byte import ByteTokenizer

TOKENIZER = ByteTokenizer()
VOCAB_SIZE = TOKENIZER.vocab_size


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(recipe: Any = "july", **changes: Any) -> GPT:
    """Every weight is noise; windows are shorter than the longest rows."""
    shape = {"sequence_len": 64, "vocab_size": VOCAB_SIZE, "n_layer": 3, "n_head": 4}
    config = GPTConfig(**{**shape, "n_kv_head": 2, "n_embd": 64, "recipe": recipe, **changes})
    model = GPT(config)
    model.init_weights(seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.2, generator=generator)
        model.lm_head.weight.normal_(0, 0.3, generator=generator)
    return model


@torch.no_grad()
def naive(model: GPT, question: Question) -> list[SpanScore]:
    scores = []
    for row, start in zip(question.rows, question.starts):
        if start == len(row):
            scores.append(EMPTY_SPAN)
            continue
        logits_TV = model(torch.tensor([row]))[0, start - 1 : -1]
        targets = torch.tensor(row[start:])
        loss = F.cross_entropy(logits_TV, targets).item()
        own = logits_TV[range(len(targets)), targets]
        others = logits_TV.clone()
        others[range(len(targets)), targets] = -torch.inf
        greedy = bool((logits_TV.argmax(1) == targets).all())
        scores.append(SpanScore(loss, (own - others.max(1).values).min().item(), greedy))
    return scores


def assert_close(ours: list[SpanScore], theirs: list[SpanScore]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.loss == pytest.approx(b.loss, abs=1e-4, nan_ok=True)
        assert a.gap == pytest.approx(b.gap, abs=1e-3)
        assert a.greedy == b.greedy


def random_questions(count: int, longest: int, seed: int) -> list[Question]:
    """Questions of 1 to 5 rows that share a random beginning, possibly none of it."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(VOCAB_SIZE) for _ in range(count)]

    questions = []
    for _ in range(count):
        shared = ids(rng.randint(1, longest - 20))
        rows = [shared + ids(rng.randint(1, 20)) for _ in range(rng.randint(1, 5))]
        starts = [rng.randint(max(1, len(row) - 25), len(row) - 1) for row in rows]
        questions.append(Question(tuple(rows), tuple(starts)))
    return questions


@pytest.mark.parametrize("recipe", ["july", "february"])
def test_equals_a_full_forward_of_each_row(recipe: str) -> None:
    model = tiny(recipe)
    # Up to 600 tokens: several chunks of prefix, and of tails where nothing is shared.
    questions = random_questions(12, 600, seed=0) + random_questions(12, 40, seed=1)
    questions.append(Question(([5] * 400 + [6, 7], [6] * 300 + [6, 7]), (1, 299)))  # shares nothing
    questions.append(Question(([1, 2], [1, 2, 3, 4]), (2, 2)))  # an empty span
    questions.append(Question(([1, 2], [1, 2]), (2, 2)))  # nothing to do
    scored = CachedScorer(model, TOKENIZER).score(questions)
    for scores, question in zip(scored, questions, strict=True):
        assert_close(scores, naive(model, question))


def test_greedy_continuations_are_found() -> None:
    """Random weights never guess right, so the right answer is the model's own."""
    model = tiny()
    questions = []
    for seed in range(4):
        row = random_questions(1, 60 + 100 * seed, seed)[0].rows[0]
        start = len(row)
        for _ in range(3):
            row = [*row, int(model(torch.tensor([row]))[0, -1].argmax())]
        wrong = [*row[:-1], (row[-1] + 1) % VOCAB_SIZE]
        questions += [Question((row,), (start,)), Question((wrong,), (start,))]
    scored = CachedScorer(model, TOKENIZER).score(questions)
    assert [scores[0].greedy for scores in scored] == [True, False] * 4
    assert all((scores[0].gap > 0) == scores[0].greedy for scores in scored)


def test_scores_do_not_depend_on_what_is_asked_together(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = random_questions(10, 300, seed=2)
    scorer = CachedScorer(tiny(), TOKENIZER)
    together = scorer.score(questions)
    alone = [scorer.score([question])[0] for question in questions]
    backwards = scorer.score(questions[::-1])[::-1]
    monkeypatch.setattr(core_score, "_CHUNK", 7)
    monkeypatch.setattr(core_score, "_CPU_CACHE_TOKENS", 1)  # one question at a time
    chopped = scorer.score(questions)
    for scores in zip(together, alone, backwards, chopped):
        for other in scores[1:]:
            assert_close(other, scores[0])


@pytest.mark.parametrize(
    ("free", "positions"),
    [(0, 0), (24 * 2**30, 6 * 2**30 // (20 * 2 * 10 * 128 * 2)), (140 * 2**30, 256 * 2**10)],
)
def test_on_a_gpu_the_cache_takes_a_share_of_what_is_free(
    free: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GPTConfig(
        sequence_len=2048, vocab_size=2**15, n_layer=20, n_head=10, n_kv_head=10, n_embd=1280
    )
    model = SimpleNamespace(
        config=config, device=torch.device("cuda"), compute_dtype=torch.bfloat16
    )
    monkeypatch.setattr(core_score, "CachedModel", lambda _: model)
    monkeypatch.setattr(core_score, "free_bytes", lambda _: free)
    scorer = CachedScorer(model, TOKENIZER)  # type: ignore[arg-type]
    assert scorer._cache_tokens() == positions


@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
def test_whole_tasks_do_not_depend_on_the_split(kind: Any) -> None:
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(["red", "green", "blue", "yellow"]) for _ in range(count))

    def example() -> Example:
        if kind == "language_modeling":
            return Example((words(9),), (words(2),), 0)
        many = tuple(words(3) + str(i) for i in range(3))
        once = (words(6),) * 3
        return Example(*((once, many) if kind == "multiple_choice" else (many, once)), 1)

    task = Task("toy", kind, 2, "\nAnswer: ", 0.0, tuple(example() for _ in range(12)))
    scorer = CachedScorer(tiny(sequence_len=128), TOKENIZER)
    whole = evaluate_examples(task, range(12), scorer)
    split = [
        r
        for part in (range(0, 12, 3), [1, 2], range(4, 6))
        for r in evaluate_examples(task, part, scorer)
    ]
    for result in split:
        other = whole[result.index]
        assert dataclasses.replace(result, margin=0) == dataclasses.replace(other, margin=0)
        assert result.margin == pytest.approx(other.margin, abs=1e-4)


def test_rows_up_to_the_hard_context() -> None:
    model = tiny(sequence_len=16)  # reads 160 tokens
    scorer = CachedScorer(model, TOKENIZER)
    assert scorer.max_len == 160
    row = random_questions(1, 500, 3)[0].rows[0] * 3
    question = Question((row[:160], [*row[:159], 1]), (159, 159))
    assert_close(scorer.score([question])[0], naive(model, question))
    task = Task("toy", "multiple_choice", 0, " ", 0.0, (Example(("a" * 500,) * 2, ("b", "c"), 0),))
    assert len(evaluate_examples(task, [0], scorer)) == 1


def test_damaged_weights_are_noticed() -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(NanorayError, match="NaN or infinite logits; its weights are damaged"):
        CachedScorer(model, TOKENIZER).score(random_questions(1, 30, 0))


def test_of_equal_logits_the_lowest_id_is_greedy() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert [token_scores(logits, [i])[0].greedy for i in range(4)] == [False, True, False, False]
    assert token_scores(logits, [2])[0].gap == 0
