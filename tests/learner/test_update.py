"""What an update measures, and what it leaves out."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_groups import PlainStepper, gradient_gap, mixed_batch, scored_group, settings

from medrl.actors.types import ScoredGroup
from medrl.configs.errors import LearnerError
from medrl.learner.batch import build_rows
from medrl.learner.model import PromptReader, load_policy
from medrl.learner.rows import plan_rows
from medrl.learner.update import Updater, _size


@pytest.fixture
def made(tiny_models: dict[str, Path], readers: dict[str, PromptReader], image_root: Path) -> Any:
    def make(**learner: Any) -> tuple[Updater, PlainStepper, PromptReader]:
        reader, model = readers["qwen2_vl"], tiny_models["qwen2_vl"]
        policy = load_policy(str(model), torch.float32, forbidden=reader.forbidden)
        stepper = PlainStepper(policy, reader)
        return Updater(stepper, reader, settings(model, image_root, **learner)), stepper, reader

    return make


def resampled(updater: Updater, scored: ScoredGroup) -> ScoredGroup:
    """The same group, as if the learner's own policy had sampled it."""
    logprobs = updater.logprobs(scored.group)
    completions = tuple(
        replace(completion, logprobs=mine)
        for completion, mine in zip(scored.group.completions, logprobs, strict=True)
    )
    return replace(scored, group=replace(scored.group, completions=completions))


def test_the_gap_to_the_sampler_is_measured_on_completions_of_this_version(made: Any) -> None:
    updater, _, reader = made()
    fresh = resampled(updater, scored_group(reader, ("a.png",), seed=0, rewards=[0.0, 1.0]))
    stale = scored_group(reader, ("b.png",), seed=1, rewards=[0.0, 1.0])  # version 0, noise
    assert updater.update([fresh, stale], version=0).logprob_gap_max > 0.1
    fresh = replace(
        fresh,
        group=replace(
            fresh.group,
            completions=tuple(replace(one, version=7) for one in fresh.group.completions),
        ),
    )
    metrics = updater.update([fresh, stale], version=7)
    assert metrics.logprob_gap_max < 1e-5
    assert metrics.logprob_gap_mean < 1e-6


def test_one_update_a_batch_runs_one_forward_and_several_run_two(made: Any) -> None:
    for updates, forwards in ((1, 1), (2, 4)):
        updater, stepper, reader = made(updates_per_batch=updates)
        updater.update(mixed_batch(reader)[:2], version=0)
        assert stepper.forwards == forwards


def test_a_failed_completion_is_as_if_it_had_not_been_sampled(made: Any) -> None:
    updater, stepper, reader = made()
    whole = scored_group(reader, ("a.png",), seed=3, rewards=[0.0, 5.0, 1.0, 2.0], failed=(1,))
    metrics = updater.update([whole], version=0)
    assert metrics.advantages[0][1] == 0
    assert metrics.trained_completions == 3
    keep = (0, 2, 3)
    request = replace(
        whole.group.request, sampling=replace(whole.group.request.sampling, num_completions=3)
    )
    less = ScoredGroup(
        group=replace(
            whole.group,
            request=request,
            completions=tuple(whole.group.completions[i] for i in keep),
        ),
        scores=tuple(whole.scores[i] for i in keep),
        seconds=0.0,
    )
    updater, other, _ = made()
    without = updater.update([less], version=0)
    assert without.loss == pytest.approx(metrics.loss, abs=1e-7)
    assert without.entropy == pytest.approx(metrics.entropy, abs=1e-6)
    assert gradient_gap(stepper.gradients(), other.gradients()) < 1e-5


def truncated(scored: ScoredGroup, *indices: int) -> ScoredGroup:
    """The same group, some of its completions cut off."""
    completions = tuple(
        replace(one, finish_reason="length") if index in indices else one
        for index, one in enumerate(scored.group.completions)
    )
    return replace(scored, group=replace(scored.group, completions=completions))


@pytest.mark.parametrize("aggregation", ["completion_mean", "token_mean", "constant"])
def test_a_truncated_completion_counts_in_its_group_and_is_not_trained(
    made: Any, aggregation: str
) -> None:
    """By hand, from the policy's own log-probs: rewards 0, 4, 1 and 3 have mean 2, the truncated
    one's 4 included; then the loss is over the other three, and so are its denominators."""
    updater, stepper, reader = made(
        mask_truncated=True, advantage="centered", aggregation=aggregation
    )
    rewards, lengths = [0.0, 4.0, 1.0, 3.0], [2, 5, 3, 4]
    whole = scored_group(reader, ("a.png",), seed=3, rewards=rewards, lengths=lengths)
    metrics = updater.update([truncated(whole, 1)], version=0)
    advantages = [-2.0, 2.0, -1.0, 1.0]
    assert metrics.advantages == (tuple(advantages),)
    kept = [0, 2, 3]
    tokens = sum(lengths[i] for i in kept)
    assert (metrics.trained_completions, metrics.completion_tokens) == (3, tokens)
    share = {
        "completion_mean": dict.fromkeys(kept, 1 / 3),
        "token_mean": {i: lengths[i] / tokens for i in kept},
        "constant": {i: lengths[i] / (3 * 16) for i in kept},
    }[aggregation]
    assert metrics.loss == pytest.approx(-sum(share[i] * advantages[i] for i in kept), abs=1e-6)

    _, other, _ = made()  # the same gradient from plain log-probs, a completion a time
    policy_updater = Updater(other, reader, updater._settings)
    total = torch.zeros(())
    for i in kept:
        one = replace(
            whole,
            group=replace(
                whole.group,
                request=replace(
                    whole.group.request,
                    sampling=replace(whole.group.request.sampling, num_completions=1),
                ),
                completions=(whole.group.completions[i],),
            ),
            scores=(whole.scores[i],),
        )
        total = total - share[i] * advantages[i] * mean_logprob(policy_updater, other, one)
    total.backward()  # type: ignore[no-untyped-call]
    assert gradient_gap(stepper.gradients(), other.gradients()) < 1e-5


def mean_logprob(updater: Updater, stepper: PlainStepper, scored: ScoredGroup) -> torch.Tensor:
    """Of the tokens of a group's one completion, with its gradient."""
    size = _size(scored, mask_truncated=False)
    (micro_batch,) = plan_rows([size], world=1, budget=10_000).ranks[0]
    prompts = {0: updater._reader.read(scored.group)}
    rows = build_rows(micro_batch, [scored], prompts, [[0.0]], updater._reader.blank)
    logprobs, _ = stepper.score(rows, [updater._reader.image(hash) for hash in rows.images])
    return logprobs[rows.trained].mean()


def test_without_the_mask_a_truncated_completion_is_like_any_other(made: Any) -> None:
    found = []
    for indices in ((), (1,)):
        updater, stepper, reader = made()
        whole = scored_group(reader, ("a.png",), seed=3, rewards=[0.0, 4.0, 1.0, 3.0])
        found.append((updater.update([truncated(whole, *indices)], version=0), stepper))
    (want, plain), (got, same) = found
    assert (got.loss, got.trained_completions) == (want.loss, 4)
    assert gradient_gap(same.gradients(), plain.gradients()) == 0


def test_a_batch_of_truncated_completions_alone_has_no_gradient(made: Any) -> None:
    updater, stepper, reader = made(mask_truncated=True)
    batch = [
        truncated(scored_group(reader, ("a.png",), seed=i, rewards=[0.0, 1.0]), 0, 1)
        for i in range(2)
    ]
    metrics = updater.update(batch, version=0)
    assert (metrics.trained_completions, metrics.completion_tokens) == (0, 0)
    assert (metrics.loss, metrics.gradient_norm, metrics.zero_variance_groups) == (0, 0, 0)
    assert stepper.forwards == 1, "the rank keeps the others company"


def test_a_truncated_completion_is_scored_like_any_other(made: Any) -> None:
    """The canary of a sync may well be cut off."""
    updater, _, reader = made(mask_truncated=True)
    whole = scored_group(reader, ("a.png",), seed=3, rewards=[0.0, 1.0])
    assert updater.logprobs(truncated(whole, 0, 1).group) == updater.logprobs(whole.group)


def test_equal_rewards_give_zero_gradient_and_are_counted(made: Any) -> None:
    updater, stepper, reader = made()
    batch = [scored_group(reader, ("a.png",), seed=i, rewards=[1.1] * 3) for i in range(2)]
    metrics = updater.update(batch, version=0)
    assert metrics.zero_variance_groups == 2
    assert metrics.gradient_norm == 0
    assert not any(gradient.any() for gradient in stepper.gradients().values())


def test_a_batch_without_a_single_valid_completion_has_no_gradient(made: Any) -> None:
    updater, _, reader = made()
    batch = [scored_group(reader, ("a.png",), seed=0, rewards=[1.0, 0.0], failed=(0, 1))]
    metrics = updater.update(batch, version=0)
    assert (metrics.trained_completions, metrics.gradient_norm, metrics.loss) == (0, 0, 0)


def test_counts(made: Any) -> None:
    updater, _, reader = made()
    batch = mixed_batch(reader)
    metrics = updater.update(batch, version=0)
    trained = [
        completion
        for scored in batch
        for completion, score in zip(scored.group.completions, scored.scores, strict=True)
        if not score.failed
    ]
    assert metrics.trained_completions == len(trained)
    assert metrics.completion_tokens == sum(len(one.token_ids) for one in trained)
    assert metrics.prompt_tokens == sum(len(one.group.prompt_token_ids) for one in batch)
    image = reader.config.image_token_id
    assert metrics.visual_tokens == sum(one.group.prompt_token_ids.count(image) for one in batch)
    assert metrics.visual_tokens > 0
    assert metrics.sharing > 1


def test_more_updates_than_groups_are_refused(made: Any) -> None:
    updater, _, reader = made(updates_per_batch=3)
    with pytest.raises(LearnerError, match="updates_per_batch = 3"):
        updater.update(mixed_batch(reader)[:2], version=0)


@pytest.mark.parametrize("where", ["policy", "reference"])
def test_a_loss_that_is_no_number_is_refused_before_the_step(made: Any, where: str) -> None:
    """Of a reference, the gradient would be finite: a clamp lets none of it through."""
    updater, stepper, reader = made(kl_coefficient=0.1)
    stepper.reference = copy.deepcopy(stepper.policy)
    broken = stepper.policy if where == "policy" else stepper.reference
    with torch.no_grad():
        broken.vlm.lm_head.weight[3] = float("nan")
    with pytest.raises(LearnerError, match=r"step 6: the loss is nan, so .* was not made"):
        updater.update(mixed_batch(reader), version=5)
    assert stepper.steps == 0


def test_a_gradient_that_is_no_number_is_refused(made: Any) -> None:
    updater, stepper, reader = made()
    weight = stepper.policy.vlm.lm_head.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(LearnerError, match=r"step 1: the gradient's norm is (nan|inf)"):
        updater.update(mixed_batch(reader), version=0)


def test_a_refusal_says_whether_steps_of_its_batch_were_made(made: Any) -> None:
    """Weights after some of them are of no version, and no checkpoint may hold them."""
    updater, stepper, reader = made(updates_per_batch=2)
    weight = stepper.policy.vlm.lm_head.weight
    weight.register_hook(lambda gradient: gradient * (float("inf") if stepper.steps else 1.0))
    with pytest.raises(LearnerError, match="the gradient's norm") as caught:
        updater.update(mixed_batch(reader), version=0)
    assert caught.value.half_way
    stepper.steps = 1
    with pytest.raises(LearnerError, match="the gradient's norm") as caught:
        updater.update(mixed_batch(reader), version=0)
    assert not caught.value.half_way
