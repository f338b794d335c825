from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nanoray.engine.sampling import SamplingParams, sample
from nanoray.errors import NanorayError
from nanoray.rl.algorithms import ALGORITHMS
from nanoray.rl.objective import Metrics, Totals, advantages, policy_loss, score

MAX_NEW = 12
NAMES = list(ALGORITHMS)


@dataclass
class Step:
    """A made-up step: two groups of four completions with forced tokens and padding."""

    lp: Tensor
    behaviour: Tensor
    reference: Tensor
    entropy: Tensor
    rewards: Tensor
    mask: Tensor

    @property
    def totals(self) -> Totals:
        return Totals(int(self.mask.sum()), len(self.mask), MAX_NEW)

    def advantages(self, name: str) -> Tensor:
        return advantages(ALGORITHMS[name], self.rewards).flatten()

    def loss(
        self, name: str, on_policy: bool, kl_coef: float = 0.0, rows: slice = slice(None)
    ) -> tuple[Tensor, Metrics]:
        return policy_loss(
            ALGORITHMS[name],
            self.lp[rows],
            self.behaviour[rows],
            self.advantages(name)[rows],
            self.mask[rows],
            self.totals,
            on_policy=on_policy,
            entropy_BT=self.entropy[rows],
            reference_BT=self.reference[rows],
            kl_coef=kl_coef,
        )


def make_step(spread: float = 0.6, seed: int = 0) -> Step:
    """spread: deviation of the learner's log-probs from the sampler's."""
    rng = torch.Generator().manual_seed(seed)
    G, N, T = 2, 4, 10
    mask = torch.zeros(G * N, T, dtype=torch.uint8)
    for b in range(G * N):
        start = int(torch.randint(0, 3, (), generator=rng))
        end = int(torch.randint(5, T + 1, (), generator=rng))
        mask[b, start:end] = 1
        mask[b, start + 2] = b % 2  # a forced token inside
    lp = -3 * torch.rand(G * N, T, generator=rng) - 0.1
    behaviour = lp - spread * torch.randn(G * N, T, generator=rng)
    reference = lp + 0.3 * torch.randn(G * N, T, generator=rng)
    entropy = torch.rand(G * N, T, generator=rng)
    rewards = torch.rand(G, N, generator=rng, dtype=torch.float64)
    # Whatever stands where nothing was sampled must not matter.
    for values in (lp, behaviour, reference, entropy):
        values[mask == 0] = torch.inf
    lp[mask == 0] = torch.nan
    return Step(lp.requires_grad_(), behaviour, reference, entropy, rewards, mask)


def naive_advantages(name: str, rewards: list[float]) -> list[float]:
    N = len(rewards)
    mean = sum(rewards) / N
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / N)
    if name in ("reinforce", "dr_grpo"):
        return [r - mean for r in rewards]
    if name == "rloo":
        return [r - (sum(rewards) - r) / (N - 1) for r in rewards]
    return [(r - mean) / (std + 1e-6) for r in rewards]


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def naive(name: str, step: Step, on_policy: bool, kl_coef: float) -> tuple[float, Tensor]:
    """The loss and its gradient in the log-probs, from the papers' formulas, token by token."""
    lp, old = step.lp.tolist(), step.behaviour.tolist()
    adv = [a for group in step.rewards.tolist() for a in naive_advantages(name, group)]
    B, T = step.mask.shape
    sampled = [[t for t in range(T) if step.mask[b, t]] for b in range(B)]
    all_tokens = sum(map(len, sampled))
    loss, grad = 0.0, torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        n, A = len(sampled[b]), adv[b]
        ratios = {t: 1.0 if on_policy else math.exp(lp[b][t] - old[b][t]) for t in sampled[b]}
        s = math.prod(ratios.values()) ** (1 / n)
        for t in sampled[b]:
            r = ratios[t]
            if name in ("reinforce", "dapo", "cispo"):
                weight = 1 / all_tokens
            elif name in ("grpo", "gspo"):
                weight = 1 / (B * n)
            else:
                weight = {"dr_grpo": 1 / (B * MAX_NEW), "rloo": 1 / B}[name]
            if name in ("reinforce", "rloo"):
                value = slope = min(r, 2.0) * A
            elif name == "cispo":
                value = slope = min(r, 5.0) * A
            elif name == "gspo":
                bounded = clip(s, 1 - 3e-4, 1 + 4e-4) * A
                value = min(s * A, bounded)
                # d s / d lp_t = s / n for each of the n terms of the sum over the completion.
                slope = s * A if s * A <= bounded else 0.0
            else:
                high = 1.28 if name == "dapo" else 1.2
                bounded = clip(r, 0.8, high) * A
                value = min(r * A, bounded)
                slope = r * A if r * A <= bounded else 0.0
            toward = math.exp(step.reference[b, t].item() - lp[b][t])
            kl = toward - 1 - math.log(toward)
            loss += weight * (-value + kl_coef * kl)
            grad[b, t] += weight * (-slope + kl_coef * (1 - toward))
    return loss, grad


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_loss_and_gradient_are_those_of_a_loop_over_tokens(
    name: str, on_policy: bool, kl_coef: float
) -> None:
    for seed in range(3):
        step = make_step(seed=seed, spread=3e-4 if name == "gspo" else 0.6)
        loss, _ = step.loss(name, on_policy, kl_coef)
        loss.backward()
        want, want_grad = naive(name, step, on_policy, kl_coef)
        assert loss.item() == pytest.approx(want, abs=1e-5)
        torch.testing.assert_close(step.lp.grad, want_grad.float(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_clips_bind_in_the_made_up_steps(name: str) -> None:
    step = make_step(spread=3e-3 if name == "gspo" else 1.5)
    _, metrics = step.loss(name, on_policy=False)
    assert 0 < metrics.figures()["clip_fraction"] < 1
    assert step.loss(name, on_policy=True)[1].figures()["clip_fraction"] == 0


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up(name: str, on_policy: bool) -> None:
    whole = make_step(seed=5)
    loss, metrics = whole.loss(name, on_policy, 0.1)
    loss.backward()
    for size in (1, 2, 3, 8):
        step = make_step(seed=5)
        parts = [
            step.loss(name, on_policy, 0.1, slice(start, start + size))
            for start in range(0, 8, size)
        ]
        for part, _ in parts:
            part.backward()
        torch.testing.assert_close(step.lp.grad, whole.lp.grad, atol=1e-7, rtol=1e-6)
        assert sum(part.item() for part, _ in parts) == pytest.approx(loss.item(), abs=1e-6)
        merged = parts[0][1]
        for _, part_metrics in parts[1:]:
            merged = merged + part_metrics
        assert merged.figures() == pytest.approx(metrics.figures())


def test_padding_rows_and_columns_change_nothing() -> None:
    step, wider = make_step(), make_step()
    pad = torch.nn.functional.pad
    wider.lp = pad(wider.lp.detach(), (0, 3, 0, 2)).requires_grad_()
    for name in ("behaviour", "reference", "entropy", "mask"):
        setattr(wider, name, pad(getattr(wider, name), (0, 3, 0, 2)))
    for name in NAMES:
        adv_B = torch.cat((step.advantages(name), torch.ones(2)))
        loss, metrics = policy_loss(
            ALGORITHMS[name],
            wider.lp,
            wider.behaviour,
            adv_B,
            wider.mask,
            step.totals,
            on_policy=False,
            entropy_BT=wider.entropy,
        )
        want, want_metrics = step.loss(name, on_policy=False)
        assert loss.item() == pytest.approx(want.item(), abs=1e-6)
        figures, want_figures = metrics.figures(), want_metrics.figures()
        assert figures | {"kl": 0} == pytest.approx(want_figures | {"kl": 0}, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_gradient_never_sees_the_samplers_floats(name: str) -> None:
    step, other = make_step(), make_step()
    other.behaviour = other.behaviour + 1e-3 * torch.randn(other.behaviour.shape)
    for each in (step, other):
        each.loss(name, on_policy=True)[0].backward()
    assert step.lp.grad is not None
    assert other.lp.grad is not None
    assert torch.equal(step.lp.grad, other.lp.grad)


def test_advantages() -> None:
    rewards = torch.tensor([[1, 0, 0, 1], [0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    for name in NAMES:
        got = advantages(ALGORITHMS[name], rewards)
        want = [naive_advantages(name, group) for group in rewards.tolist()]
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))
        assert got[1].abs().max() < 1e-9  # nothing to learn from equal rewards
        with pytest.raises(NanorayError, match="at least 2"):
            advantages(ALGORITHMS[name], rewards[:, :1])


@pytest.mark.parametrize("name", NAMES)
def test_off_policy_gradient_of_a_two_armed_bandit_is_the_true_one(name: str) -> None:
    """All groups of two pulls enumerated, each as likely as the *sampler* makes it.

    The policy is a softmax over two arms; the sampler's differs by less than any clip. The
    expected gradient must be that of the *learner's* expected reward, but for what an algorithm
    adds on purpose: a constant (a baseline that contains the own reward takes 1 - 1/N, rloo
    nothing; dividing by the deviation of two different rewards, which is |r1 - r2| / 2).
    """
    arm_rewards = (1.0, 0.2)
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    shift = 1e-4 if name == "gspo" else 0.1  # stays within the clip's range
    learner = torch.stack((theta, -theta)).log_softmax(0)
    sampler = torch.tensor([0.3 + shift, -0.3 - shift], dtype=torch.float64).log_softmax(0)
    objective = (learner.exp() * torch.tensor(arm_rewards, dtype=torch.float64)).sum()
    true = torch.autograd.grad(objective, theta, retain_graph=True)[0].item()
    expected = 0.0
    for a in (0, 1):
        for b in (0, 1):
            arms = torch.tensor([a, b])
            rewards = torch.tensor([[arm_rewards[a], arm_rewards[b]]], dtype=torch.float64)
            loss, _ = policy_loss(
                ALGORITHMS[name],
                learner[arms].unsqueeze(1),
                sampler[arms].unsqueeze(1),
                advantages(ALGORITHMS[name], rewards).flatten(),
                torch.ones(2, 1),
                Totals(tokens=2, samples=2, max_new_tokens=1),
                on_policy=False,
                entropy_BT=torch.zeros(2, 1),
            )
            probability = sampler[arms].sum().exp().item()
            gradient = torch.autograd.grad(loss, theta, retain_graph=True)[0].item()
            expected -= probability * gradient
    adv = ALGORITHMS[name].advantage
    if adv == "standardised":
        constant = 1 / (arm_rewards[0] - arm_rewards[1])
    else:
        constant = 1.0 if adv == "leave-one-out" else 0.5
    assert expected == pytest.approx(constant * true, rel=1e-5)


def test_importance_weights_are_truncated() -> None:
    """One token of each sign, sampled with a hundredth and a hundred times the probability."""
    lp = torch.tensor([[-1.0], [-1.0], [-5.0], [-5.0]], requires_grad=True)
    behaviour = torch.tensor([[-5.6], [-5.6], [-0.4], [-0.4]])
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0])
    r = math.exp(-4.6)
    want = {
        "reinforce": [2, -2, r, -r],
        "cispo": [5, -5, r, -r],
        "dapo": [0, -5, r, 0],  # a bad action that got likelier is still pushed down
    }
    for name, slopes in want.items():
        lp.grad = None
        loss, _ = policy_loss(
            ALGORITHMS[name],
            lp,
            behaviour,
            adv,
            torch.ones(4, 1),
            Totals(4, 4, 1),
            on_policy=False,
            entropy_BT=torch.zeros(4, 1),
        )
        loss.backward()
        assert lp.grad is not None
        assert (-4 * lp.grad.flatten()).tolist() == pytest.approx(slopes, rel=1e-5)


def test_absurd_ratios_stay_finite() -> None:
    lp = torch.tensor([[-1.0], [-200.0]], requires_grad=True)
    behaviour = torch.tensor([[-200.0], [-1.0]])
    for name in NAMES:
        for adv in (1.0, -1.0):
            loss, metrics = policy_loss(
                ALGORITHMS[name],
                lp,
                behaviour,
                torch.full((2,), adv),
                torch.ones(2, 1),
                Totals(2, 2, 1),
                on_policy=False,
                entropy_BT=torch.zeros(2, 1),
                reference_BT=behaviour,
                kl_coef=0.1,
            )
            (grad,) = torch.autograd.grad(loss, lp)
            assert loss.isfinite()
            assert grad.isfinite().all()
            assert all(map(math.isfinite, metrics.figures().values()))


def test_metrics_are_those_of_a_loop_over_tokens() -> None:
    step = make_step(seed=2)
    for on_policy in (True, False):
        figures = step.loss("grpo", on_policy)[1].figures()
        kept = step.mask.bool()
        ratios = (step.lp.detach() - step.behaviour)[kept].exp().tolist()
        towards = (step.reference - step.lp.detach())[kept].exp().tolist()
        n = len(ratios)
        assert figures["entropy"] == pytest.approx(step.entropy[kept].mean().item())
        assert figures["ratio_mean"] == pytest.approx(sum(ratios) / n)
        assert figures["ratio_max"] == pytest.approx(max(ratios))
        ess = sum(ratios) ** 2 / sum(r * r for r in ratios) / n
        assert figures["ess"] == pytest.approx(ess)
        assert 0 < figures["ess"] < 1
        mismatch = sum(r - 1 - math.log(r) for r in ratios) / n
        assert figures["mismatch_kl"] == pytest.approx(mismatch, rel=1e-4)
        kl = sum(r - 1 - math.log(r) for r in towards) / n
        assert figures["kl"] == pytest.approx(kl, rel=1e-4)


def test_metrics_of_a_batch_without_sampled_tokens() -> None:
    nothing = torch.zeros(1, 2)
    loss, metrics = policy_loss(
        ALGORITHMS["grpo"],
        nothing.clone().requires_grad_(),
        nothing,
        torch.ones(1),
        nothing,
        Totals(7, 2, 4),
        on_policy=True,
        entropy_BT=nothing,
    )
    assert loss.item() == 0
    assert metrics.figures()["ratio_mean"] == 0


@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 99])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_score_is_the_log_probability_of_the_truncated_softmax(
    top_k: int, temperature: float
) -> None:
    V = 40
    rng = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, 6, V, generator=rng)).requires_grad_()
    targets = torch.randint(0, V, (4, 6), generator=rng)
    logprobs, entropy = score(logits, targets, temperature, top_k)
    weights = torch.rand(4, 6, generator=rng)
    (logprobs * weights).sum().backward()
    assert logits.grad is not None
    assert not entropy.requires_grad
    for b in range(4):
        for t in range(6):
            row = (logits[b, t].detach() / temperature).tolist()
            target = int(targets[b, t])
            order = sorted(range(V), key=lambda i: -row[i])
            kept = order[:top_k] if top_k else order
            if target not in kept:
                kept = [*kept[:-1], target]
            total = sum(math.exp(row[i]) for i in kept)
            probs = {i: math.exp(row[i]) / total for i in kept}
            assert logprobs[b, t].item() == pytest.approx(math.log(probs[target]), abs=1e-5)
            want = -sum(p * math.log(p) for p in probs.values())
            assert entropy[b, t].item() == pytest.approx(want, abs=1e-5)
            for i in range(V):
                slope = ((i == target) - probs.get(i, 0.0)) / temperature
                got = logits.grad[b, t, i].item()
                assert got == pytest.approx(weights[b, t].item() * slope, abs=1e-5)


@pytest.mark.parametrize("top_k", [0, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_agrees_with_the_engines_sampler(top_k: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(1)
    # In bf16, and from few values, many logits are equal: a tie at the k-th place is no loss.
    logits = (torch.randn(64, 30, generator=rng) * 4).round().div(2).to(dtype)
    params = SamplingParams(temperature=0.8, top_k=top_k)
    drawn = sample(logits.float(), [params] * 64, torch.rand(64, generator=rng).tolist())
    logprobs, _ = score(logits, torch.tensor(drawn.tokens), 0.8, top_k)
    assert logprobs.dtype == torch.float32
    assert logprobs.tolist() == pytest.approx(drawn.sampled_logprobs, abs=1e-5)


def test_figures_leave_their_device() -> None:
    """Workers on several GPUs add theirs up; and Apple's GPUs know no float64."""
    with FakeTensorMode():
        scores_BT = torch.zeros(2, 3, device="cuda")
        sampled_BT = torch.ones(2, 3, dtype=torch.bool, device="cuda")
        figures = Metrics.of(sampled_BT, scores_BT, scores_BT, sampled_BT, scores_BT)
    assert (figures.sums.device.type, figures.sums.dtype) == ("cpu", torch.float64)
    assert (figures.ratio_max.device.type, figures.ratio_max.dtype) == ("cpu", torch.float64)
