"""Numbers worked out by hand beside each formula, and what must hold for any numbers."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from medrl.learner.grpo import (
    aggregate,
    cispo_surrogate,
    clipped_surrogate,
    group_advantages,
    grpo_loss,
    importance_ratio,
    kl_estimate,
    truncated_importance,
    zero_variance,
)
from medrl.learner.objective import Denominators, Objective

ALL = torch.tensor([[True, True, True, True]])


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[0.0, 1.0, 1.0, 2.0]])  # mean 1, squares 1+0+0+1, std sqrt(2/3)
    std = math.sqrt(2 / 3) + 1e-4
    for kind, want in {
        "standardized": [-1 / std, 0, 0, 1 / std],
        "centered": [-1, 0, 0, 1],
        "leave_one_out": [0 - 4 / 3, 1 - 1, 1 - 1, 2 - 2 / 3],  # minus the mean of the other three
    }.items():
        got = group_advantages(rewards, ALL, kind)
        torch.testing.assert_close(got, torch.tensor([want], dtype=torch.float32))


def test_a_failed_completion_is_left_out_of_its_group() -> None:
    valid = torch.tensor([[True, False, True, True]])
    rewards = torch.tensor([[0.0, 99.0, 1.0, 2.0]])
    got = group_advantages(rewards, valid, "centered")
    torch.testing.assert_close(got, torch.tensor([[-1.0, 0.0, 0.0, 1.0]]))
    std = 1 + 1e-4  # of 0, 1, 2
    got = group_advantages(rewards, valid)
    torch.testing.assert_close(got, torch.tensor([[-1 / std, 0.0, 0.0, 1 / std]]))


@pytest.mark.parametrize("kind", ["standardized", "centered", "leave_one_out"])
def test_equal_rewards_or_a_single_valid_one_give_exactly_zero(kind: str) -> None:
    rewards = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.0, 1.0, 2.0, 3.0]])
    valid = torch.tensor([[True] * 4, [False, True, False, False]])
    assert not group_advantages(rewards, valid, kind).any()
    assert zero_variance(rewards, valid).tolist() == [True, True]
    # 0.1 is not representable: the mean of seven of them is not quite 0.1
    seven = torch.full((1, 7), 0.1)
    assert not group_advantages(seven, torch.ones(1, 7, dtype=torch.bool), kind).any()


@given(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=8))
@settings(deadline=None, max_examples=50)
def test_advantages_of_a_group_sum_to_zero_and_ignore_a_shift(rewards: list[float]) -> None:
    valid = torch.ones(1, len(rewards), dtype=torch.bool)
    values = torch.tensor([rewards], dtype=torch.float64)
    for kind in ("standardized", "centered", "leave_one_out"):
        got = group_advantages(values, valid, kind)
        assert abs(float(got.sum())) < 1e-9 * len(rewards) * max(1, float(got.abs().max()))
        shifted = group_advantages(values + 0.5, valid, kind)
        torch.testing.assert_close(got, shifted, atol=1e-6, rtol=1e-6)


def test_ratios_by_hand() -> None:
    log_ratio = torch.tensor([[math.log(2), math.log(8), 7.0]])
    mask = torch.tensor([[True, True, False]])
    token = importance_ratio(log_ratio, mask, "token")
    torch.testing.assert_close(token[:, :2], torch.tensor([[2.0, 8.0]]))
    sequence = importance_ratio(log_ratio, mask, "sequence")
    torch.testing.assert_close(sequence, torch.tensor([[4.0]]))  # sqrt(2 * 8)
    huge = importance_ratio(torch.tensor([[1e4]]), torch.tensor([[True]]), "token")
    assert torch.isfinite(huge).all()


def test_the_surrogate_is_pessimistic() -> None:
    ratio = torch.tensor([[0.5, 1.0, 1.5]])
    gain, clipped = clipped_surrogate(ratio, torch.tensor([[1.0]]), 0.2, 0.3)
    torch.testing.assert_close(gain, -torch.tensor([[0.5, 1.0, 1.3]]))
    assert clipped.tolist() == [[False, False, True]]
    loss, clipped = clipped_surrogate(ratio, torch.tensor([[-1.0]]), 0.2, 0.3)
    torch.testing.assert_close(loss, torch.tensor([[0.8, 1.0, 1.5]]))
    assert clipped.tolist() == [[True, False, False]]


def test_a_clipped_token_has_no_gradient() -> None:
    ratio = torch.tensor([[0.5, 1.0, 1.5]], requires_grad=True)
    for advantage, want in ((1.0, [-1.0, -1.0, 0.0]), (-1.0, [0.0, 1.0, 1.0])):
        surrogate, clipped = clipped_surrogate(ratio, torch.tensor([[advantage]]), 0.2, 0.2)
        (gradient,) = torch.autograd.grad(surrogate.sum(), ratio)
        assert gradient.tolist() == [want]
        assert (gradient == 0).tolist() == clipped.tolist()


def test_cispo_bounds_a_tokens_weight_and_never_cuts_its_gradient() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    ratio = torch.tensor([[0.5, 1.0, 1.5]])
    for advantage in (1.0, -1.0):  # the bound does not look at the advantage's sign
        loss, clipped = cispo_surrogate(ratio, torch.tensor([[advantage]]), logprobs, 0.2, 0.3)
        weights = torch.tensor([[0.8, 1.0, 1.3]])
        torch.testing.assert_close(loss, -weights * advantage * logprobs)
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        torch.testing.assert_close(gradient, -weights * advantage)
        assert clipped.tolist() == [[True, False, True]]
    _, clipped = cispo_surrogate(ratio / 100, torch.tensor([[1.0]]), logprobs, 1.0, 4.0)
    assert not clipped.any(), "clip_low 1 is no lower bound"


def test_cispos_weight_is_a_constant() -> None:
    """The ratio is of the very log-probs that are trained, and no gradient comes from it."""
    logprobs, old, sampler, _, advantages, mask = made(4)
    counts = Denominators(completions=6, tokens=int(mask.sum()))
    chosen = Objective(surrogate="cispo", clip_high=0.1, aggregation="token_mean")
    terms = grpo_loss(logprobs, old, sampler, None, advantages, mask, chosen, counts)
    (got,) = torch.autograd.grad(terms.loss, logprobs)
    weights = (logprobs - old).exp().clamp(0.8, 1.1).detach()
    torch.testing.assert_close(got, -weights * advantages[:, None] * mask / mask.sum())
    outside = ((logprobs - old).exp() - 0.95).abs() > 0.15
    assert 0 < int(terms.clipped_sum) == int((outside & mask).sum())


def test_kl_by_hand_and_never_negative() -> None:
    got = kl_estimate(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -1.0 + math.log(2)]))
    torch.testing.assert_close(got, torch.tensor([0.0, 2 - math.log(2) - 1]))
    assert (kl_estimate(torch.randn(100), torch.randn(100)) >= 0).all()


def test_the_kl_gradient_is_that_of_the_kl_itself() -> None:
    """In expectation over the policy's own samples, here summed over a vocabulary of 5."""
    logits = torch.randn(5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    reference = torch.randn(5, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    policy = logits.log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    (want,) = torch.autograd.grad(exact, logits, retain_graph=True)
    got = {}
    for kind in ("unbiased", "paper"):
        chosen = Objective(kl_coefficient=1.0, kl_gradient=kind)
        total = torch.zeros(())
        for token in range(5):
            one = policy[token].view(1, 1)
            terms = grpo_loss(
                one,
                one.detach(),
                one.detach(),
                reference[token].view(1, 1),
                torch.zeros(1),
                torch.tensor([[True]]),
                chosen,
                Denominators(completions=1, tokens=1),
            )
            total = total + policy[token].exp().detach() * terms.loss
        (got[kind],) = torch.autograd.grad(total, logits, retain_graph=True)
    torch.testing.assert_close(got["unbiased"], want)
    assert (got["paper"] - want).norm() > 0.1 * want.norm()


def test_importance_is_truncated_and_a_constant() -> None:
    learner = torch.tensor([[0.0, 0.0]], requires_grad=True)
    weights = truncated_importance(learner, torch.tensor([[math.log(4), -math.log(4)]]), 2.0)
    torch.testing.assert_close(weights, torch.tensor([[0.25, 2.0]]))
    assert not weights.requires_grad


def test_aggregations_by_hand() -> None:
    values = torch.tensor([[1.0, 3.0, 9.0], [6.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    counts = Denominators(completions=2, tokens=3)
    for kind, want in {
        "completion_mean": (2 + 6) / 2,
        "token_mean": (1 + 3 + 6) / 3,
        "constant": (1 + 3 + 6) / (2 * 5),
    }.items():
        got = aggregate(values, mask, Objective(aggregation=kind, max_tokens=5), counts)
        assert float(got) == pytest.approx(want)


def made(
    seed: int, completions: int = 6, length: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logprobs, old, sampler, reference = (
        -torch.rand(completions, length, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    lengths = torch.randint(1, length + 1, (completions,), generator=generator)
    mask = torch.arange(length)[None] < lengths[:, None]
    advantages = torch.randn(completions, generator=generator, dtype=torch.float64)
    return logprobs.requires_grad_(), old, sampler, reference, advantages, mask


VARIANTS = [
    Objective(
        ratio=ratio,
        surrogate=surrogate,
        aggregation=kind,
        kl_coefficient=0.1,
        importance_cap=cap,
        max_tokens=5,
    )
    for ratio in ("token", "sequence")
    for surrogate in ("clipped", "cispo")
    for kind in ("completion_mean", "token_mean", "constant")
    for cap in (0.0, 1.5)
]


@pytest.mark.parametrize("objective", VARIANTS, ids=str)
def test_loss_and_gradient_are_the_same_for_any_split(objective: Objective) -> None:
    logprobs, old, sampler, reference, advantages, mask = made(0)
    counts = Denominators(completions=6, tokens=int(mask.sum()))
    whole = grpo_loss(logprobs, old, sampler, reference, advantages, mask, objective, counts)
    (want,) = torch.autograd.grad(whole.loss, logprobs)
    for cut in ([6], [1, 2, 3], [1] * 6):
        loss, got = torch.zeros(()), torch.zeros_like(want)
        for part in torch.split(torch.arange(6), cut):
            terms = grpo_loss(
                *(t[part] for t in (logprobs, old, sampler, reference, advantages, mask)),
                objective,
                counts,
            )
            loss = loss + terms.loss
            got += torch.autograd.grad(terms.loss, logprobs)[0]
        torch.testing.assert_close(loss.double(), whole.loss)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_at_ratio_one_the_gradient_is_reinforce(ratio: str) -> None:
    logprobs, _, sampler, _, advantages, mask = made(1)
    counts = Denominators(completions=6, tokens=int(mask.sum()))
    terms = grpo_loss(
        logprobs, logprobs, sampler, None, advantages, mask, Objective(ratio=ratio), counts
    )
    (got,) = torch.autograd.grad(terms.loss, logprobs)
    reinforce = -(advantages[:, None] * logprobs * mask / mask.sum(-1, keepdim=True)).sum() / 6
    (want,) = torch.autograd.grad(reinforce, logprobs)
    torch.testing.assert_close(got, want)


def test_zero_advantages_give_zero_gradient_and_padding_never_counts() -> None:
    logprobs, old, sampler, _, advantages, mask = made(2)
    counts = Denominators(completions=6, tokens=int(mask.sum()))
    none = grpo_loss(logprobs, old, sampler, None, advantages * 0, mask, Objective(), counts)
    (gradient,) = torch.autograd.grad(none.loss, logprobs)
    assert not gradient.any()
    terms = grpo_loss(logprobs, old, sampler, None, advantages, mask, Objective(), counts)
    (gradient,) = torch.autograd.grad(terms.loss, logprobs)
    assert not gradient[~mask].any()
    assert gradient[mask].any()


def test_importance_weights_scale_the_gradient() -> None:
    logprobs, old, sampler, _, advantages, mask = made(3)
    counts = Denominators(completions=6, tokens=int(mask.sum()))
    arguments = (logprobs, old, sampler, None, advantages, mask)
    plain = grpo_loss(*arguments, Objective(), counts)
    capped = grpo_loss(*arguments, replace(Objective(), importance_cap=1.2), counts)
    (before,) = torch.autograd.grad(plain.loss, logprobs)
    (after,) = torch.autograd.grad(capped.loss, logprobs)
    weights = (old - sampler).exp().clamp(max=1.2)
    torch.testing.assert_close(after, before * weights)
    assert float(capped.importance_sum) == pytest.approx(float((weights * mask).sum()))


def test_the_maths_loads_without_anything_but_torch() -> None:
    code = (
        "import sys, medrl.learner.grpo; "
        "heavy = {'ray', 'vllm', 'deepspeed', 'transformers', 'PIL'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
