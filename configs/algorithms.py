"""What `learner.algorithm` stands for: the keys of section learner it sets where a file does not.

Each entry holds what differs from the defaults, which are GRPO's. A key that the file or an
override names wins. No entry sets a KL term (`learner.kl_coefficient`): DAPO and CISPO have none,
and in the others its weight is a choice of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

PRESETS: Mapping[str, Mapping[str, str | float | bool]] = {
    # arXiv 2402.03300: (r - mean) / std; a mean over each completion's tokens, then over these.
    "grpo": {},
    # arXiv 2503.20783: neither the group's spread nor a completion's length weighs anything.
    "dr_grpo": {"advantage": "centered", "aggregation": "constant"},
    # arXiv 2402.14740: REINFORCE of whole completions against the mean of the others. Its sum over
    # a completion's tokens is here divided by rollout.max_tokens, a constant.
    "rloo": {"advantage": "leave_one_out", "aggregation": "constant"},
    # arXiv 2507.18071: one ratio a completion, with the ranges of its experiments.
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    # arXiv 2506.13585: over all tokens of the batch, the weight bounded from above only. It names
    # no number: 5 is what arXiv 2510.13786 and TRL take.
    "cispo": {
        "surrogate": "cispo",
        "clip_low": 1.0,
        "clip_high": 4.0,
        "aggregation": "token_mean",
    },
    # arXiv 2503.14476: clip-higher, token-level loss, overlong filtering. Its dynamic sampling and
    # soft overlong punishment lie in other sections: `configs.loader` sets them likewise.
    "dapo": {"clip_high": 0.28, "aggregation": "token_mean", "mask_truncated": True},
}


def with_preset(learner: object) -> object:
    """The keys of section learner as read, with those of its algorithm below them."""
    if not isinstance(learner, Mapping) or not isinstance(name := learner.get("algorithm"), str):
        return learner
    return {**PRESETS.get(name, {}), **learner}
