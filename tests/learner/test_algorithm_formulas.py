"""Each `learner.algorithm` against its paper's formula, written out in plain numbers and loops."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev

import pytest
import torch

from medrl.configs.algorithms import PRESETS
from medrl.configs.schema import LearnerConfig
from medrl.learner.grpo import group_advantages, grpo_loss
from medrl.learner.objective import Denominators
from medrl.learner.update import objective_of

MAX_TOKENS = 6
FLOOR = 1e-4  # under a standard deviation, as TRL has it; the papers have none


@dataclass
class Answer:
    """A completion: log-probs of its tokens now and before, its reward."""

    new: list[float]
    old: list[float]
    reward: float
    truncated: bool = False

    @property
    def ratios(self) -> list[float]:
        return [math.exp(a - b) for a, b in zip(self.new, self.old, strict=True)]


Groups = list[list[Answer]]


def made() -> Groups:
    """Three groups of four; ratios between about 0.6 and 1.6, and one of 8."""
    random.seed(5)
    groups = []
    for group in range(3):
        answers = []
        for index in range(4):
            old = [-random.uniform(0.1, 3) for _ in range(random.randint(1, MAX_TOKENS))]
            new = [value + random.uniform(-0.5, 0.5) for value in old]
            answers.append(Answer(new, old, random.choice([0.0, 1.0, 2.0]), index == group == 1))
        answers[0].reward, answers[1].reward = 0.0, 2.0
        groups.append(answers)
    groups[0][1].new[0] = groups[0][1].old[0] + math.log(8)
    return groups


def standardized(group: list[Answer]) -> list[float]:
    rewards = [one.reward for one in group]
    return [(r - fmean(rewards)) / (stdev(rewards) + FLOOR) for r in rewards]


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def pairs(groups: Groups) -> list[tuple[Answer, float]]:
    return [pair for group in groups for pair in zip(group, standardized(group), strict=True)]


def grpo(groups: Groups) -> float:
    """1/G sum_i 1/|o_i| sum_t min(w A, clip(w, 0.8, 1.2) A)"""
    return -fmean(
        fmean(min(w * a, clip(w, 0.8, 1.2) * a) for w in one.ratios) for one, a in pairs(groups)
    )


def dr_grpo(groups: Groups) -> float:
    """1/G sum_i sum_t min(w A, clip(w, 0.8, 1.2) A) with A = r - mean r, over a constant."""
    total = 0.0
    for group in groups:
        mean = fmean(one.reward for one in group)
        for one in group:
            a = one.reward - mean
            total += sum(min(w * a, clip(w, 0.8, 1.2) * a) for w in one.ratios)
    return -total / (12 * MAX_TOKENS)


def gspo(groups: Groups) -> float:
    """1/G sum_i min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A), s = (pi(o)/pi_old(o))^(1/|o|)"""
    losses = []
    for one, a in pairs(groups):
        s = math.exp((sum(one.new) - sum(one.old)) / len(one.new))
        losses.append(min(s * a, clip(s, 1 - 3e-4, 1 + 4e-4) * a))
    return -fmean(losses)


def cispo(groups: Groups) -> float:
    """1/sum |o_i| sum_i sum_t sg(min(w, 5)) A log pi"""
    terms = [
        min(w, 5.0) * a * logprob
        for one, a in pairs(groups)
        for w, logprob in zip(one.ratios, one.new, strict=True)
    ]
    return -fmean(terms)


def dapo(groups: Groups) -> float:
    """1/sum |o_i| sum_i sum_t min(w A, clip(w, 0.8, 1.28) A), the truncated left out of the sums
    (and not of their groups' means)."""
    terms = [
        min(w * a, clip(w, 0.8, 1.28) * a)
        for one, a in pairs(groups)
        if not one.truncated
        for w in one.ratios
    ]
    return -fmean(terms)


def ours(name: str, groups: Groups) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The loss, the log-probs [B, C] it is of, and how many tokens were clipped."""
    config = LearnerConfig(algorithm=name)  # type: ignore[arg-type]
    rewards = torch.tensor([[one.reward for one in g] for g in groups], dtype=torch.float64)
    valid = torch.ones_like(rewards, dtype=torch.bool)
    advantages = group_advantages(rewards, valid, config.advantage).flatten()
    answers = [one for group in groups for one in group]
    new, old = (
        torch.tensor(
            [values + [0.0] * (MAX_TOKENS - len(values)) for values in rows], dtype=torch.float64
        )
        for rows in ([one.new for one in answers], [one.old for one in answers])
    )
    mask = torch.tensor([[t < len(one.new) for t in range(MAX_TOKENS)] for one in answers])
    # As an update does it: who is not trained is in no row.
    kept = torch.tensor([not (config.mask_truncated and one.truncated) for one in answers])
    new, old, mask, advantages = new[kept].requires_grad_(), old[kept], mask[kept], advantages[kept]
    terms = grpo_loss(
        new,
        old,
        old,
        None,
        advantages,
        mask,
        objective_of(config, MAX_TOKENS),
        Denominators(completions=len(mask), tokens=int(mask.sum())),
    )
    return terms.loss, new, float(terms.clipped_sum)


FORMULAS: dict[str, Callable[[Groups], float]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "gspo": gspo,
    "cispo": cispo,
    "dapo": dapo,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_is_the_papers(name: str) -> None:
    loss, _, clipped = ours(name, made())
    assert clipped > 0, "the ratios are to be such that the clip matters"
    assert float(loss.detach()) == pytest.approx(FORMULAS[name](made()), abs=1e-12)


def test_no_two_algorithms_are_the_same() -> None:
    losses = [float(ours(name, made())[0].detach()) for name in PRESETS]
    assert len({round(loss, 6) for loss in losses}) == len(PRESETS)


def test_rloos_gradient_is_the_papers() -> None:
    """1/G sum_i (r_i - mean of the others) grad log pi(o_i), on-policy; over a constant."""
    groups = made()
    for group in groups:
        for one in group:
            one.old = one.new
    loss, logprobs, _ = ours("rloo", groups)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    row = 0
    for group in groups:
        for one in group:
            others = fmean(other.reward for other in group if other is not one)
            for token in range(MAX_TOKENS):
                want = -(one.reward - others) / 12 / MAX_TOKENS if token < len(one.new) else 0.0
                assert float(gradient[row, token]) == pytest.approx(want, abs=1e-12)
            row += 1


def test_cispos_gradient_is_the_papers() -> None:
    """That of A log pi times the bounded ratio, which is a constant."""
    loss, logprobs, _ = ours("cispo", made())
    (gradient,) = torch.autograd.grad(loss, logprobs)
    tokens = sum(len(one.new) for group in made() for one in group)
    for row, (one, a) in enumerate(pairs(made())):
        for token, w in enumerate(one.ratios):
            assert float(gradient[row, token]) == pytest.approx(
                -min(w, 5.0) * a / tokens, abs=1e-12
            )


def test_every_algorithm_has_a_formula_here() -> None:
    assert {*FORMULAS, "rloo"} == set(PRESETS)
