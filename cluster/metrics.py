"""What a step's numbers are made of: pure functions from what was measured to flat keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from medrl.actors.types import Receipt, ScoredGroup, UpdateMetrics
from medrl.configs.errors import RewardError

SHOWN_FAILURES = 3
SHOWN_CHARACTERS = 80  # of a completion


def refuse_failures(batch: Sequence[ScoredGroup], limit: float) -> None:
    """Raise `RewardError` when more than a share `limit` of a batch failed to be scored: it says
    which rewards failed how often, and shows some completions."""
    scores = [
        ((group.group.request.prompt.id, completion.text), score)
        for group in batch
        for completion, score in zip(group.group.completions, group.scores, strict=True)
    ]
    failed = [(what, score) for what, score in scores if score.failed]
    if len(failed) > limit * len(scores):
        rewards = Counter(score.reason.partition(":")[0] for _, score in failed)
        named = ", ".join(f"{name} failed {count}" for name, count in rewards.most_common())
        examples = [
            f"  prompt {prompt_id}, {text[:SHOWN_CHARACTERS]!r}: {score.outcome}, {score.reason}"
            for (prompt_id, text), score in failed[:SHOWN_FAILURES]
        ]
        raise RewardError(
            f"{len(failed)} of {len(scores)} completions could not be scored, above the limit "
            f"of {limit:.0%} (reward.max_failed_fraction): {named}. Mend it and go on with "
            "--resume; for instance\n" + "\n".join(examples)
        )


def reward_means(batch: Sequence[ScoredGroup]) -> dict[str, float]:
    """`reward.mean` and `reward.<component>` over the completions that have a score."""
    scores = [score for group in batch for score in group.scores if not score.failed]
    if not scores:
        return {"reward.mean": 0.0}
    names = sorted({name for score in scores for name in score.components})
    return {"reward.mean": fmean(score.total for score in scores)} | {
        f"reward.{name}": fmean(score.components.get(name, 0.0) for score in scores)
        for name in names
    }


def step_metrics(
    step: int,
    batch: Sequence[ScoredGroup],
    update: UpdateMetrics,
    receipt: Receipt | None,
    seconds: Mapping[str, float],
    replaced: Sequence[ScoredGroup] = (),
) -> dict[str, float | int]:
    """The object of one line of metrics.jsonl, less what the journal measures of the driver.

    `seconds`: "step", "idle_learner" and "idle_rollout". seconds.rollout and seconds.reward are
    those of the batch's slowest group; tokens.completion counts all G completions, tokens.prompt
    and tokens.visual count a group's prompt once. No `receipt`: the push failed. All are of the
    batch but replaced_groups and tokens.replaced, the completion tokens of `replaced`.
    """
    completions = [c for group in batch for c in group.group.completions]
    outcomes = Counter(score.outcome for group in batch for score in group.scores)
    tokens = sum(len(c.token_ids) for c in completions)
    return {
        "step": step,
        "version": step,
        **reward_means(batch),
        "loss": update.loss,
        "kl": update.kl,
        "entropy": update.entropy,
        "clip_fraction": update.clip_fraction,
        "importance.mean": update.importance_mean,
        "gradient_norm": update.gradient_norm,
        "learning_rate": update.learning_rate,
        "logprob_gap.mean": update.logprob_gap_mean,
        "logprob_gap.max": update.logprob_gap_max,
        "logprob_gap.tokens": update.gap_tokens,
        "logprob_gap.stale": update.logprob_gap_stale,
        "staleness.max": step - 1 - min(g.group.version for g in batch),
        "groups": len(batch),
        "replaced_groups": len(replaced),
        "zero_variance_groups": update.zero_variance_groups,
        "identical_groups": sum(_identical(group) for group in batch),
        "failed_completions": outcomes["error"] + outcomes["timeout"],
        "unparsed_completions": outcomes["unparsed"],
        "truncated_completions": sum(c.finish_reason == "length" for c in completions),
        "tokens.prompt": update.prompt_tokens,
        "tokens.completion": tokens,
        "tokens.visual": update.visual_tokens,
        "tokens.replaced": sum(len(c.token_ids) for g in replaced for c in g.group.completions),
        "tokens.per_completion": tokens / len(completions),
        "tokens.per_second": tokens / seconds["step"],
        "row_sharing": update.sharing,
        "seconds.step": seconds["step"],
        "seconds.rollout": max(g.group.seconds for g in batch),
        "seconds.reward": max(g.seconds for g in batch),
        "seconds.learn": update.seconds,
        "seconds.sync": receipt.seconds if receipt else 0.0,
        "seconds.idle_learner": seconds["idle_learner"],
        "seconds.idle_rollout": seconds["idle_rollout"],
    } | ({"sync.canary_gap": receipt.canary_gap} if receipt else {})


def _identical(group: ScoredGroup) -> bool:
    """Whether all its completions are the same, token for token."""
    return len({completion.token_ids for completion in group.group.completions}) == 1
