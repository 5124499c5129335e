"""What flows through the system, one frozen type a stage. Standard library only.

    Prompt -> Completion* -> Group -> (Score*) -> ScoredGroup -> learner's rows

Letters: P prompts a step, G completions a prompt, C completion tokens, T prompt tokens
(image placeholders expanded). A later stage is a new type, so no field is None "until later".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LETTERS = "ABCDEFGHIJ"

Outcome = Literal["ok", "wrong", "unparsed", "error", "timeout"]
"""How a score came about. `ok`/`wrong`: an answer was read and judged. `unparsed`: no answer could
be read (a fair zero). `error`/`timeout`: the reward failed, so there is no score to learn from."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One question with its images."""

    id: str
    question: str  # as asked, without the options
    options: tuple[str, ...]  # 2 to 10 texts, or () for an open question
    answer: str  # gold: a letter of LETTERS where there are options, else text
    images: tuple[str, ...]  # paths relative to the data set's image root
    modality: str
    question_type: str
    source: str

    def __post_init__(self) -> None:
        if self.options:
            if not 2 <= len(self.options) <= len(LETTERS):
                raise ValueError(
                    f"prompt {self.id}: {len(self.options)} option(s), needs 2 to {len(LETTERS)}"
                )
            letters = LETTERS[: len(self.options)]
            if len(self.answer) != 1 or self.answer not in letters:
                raise ValueError(
                    f"prompt {self.id}: gold {self.answer!r} is not one of the letters {letters}"
                )
        elif not self.answer.strip():
            raise ValueError(f"prompt {self.id}: empty gold answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are drawn; every field is sent to the engine explicitly."""

    num_completions: int  # G
    max_tokens: int  # longest completion, in tokens
    temperature: float  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """A prompt to be sampled: what the driver sends to an engine. No pixels."""

    draw: int  # position in the run's schedule; unique in a run
    prompt: Prompt
    text: str  # the user turn: question, options and instructions of the mode
    sampling: Sampling
    seed: int  # completion i draws from stream seed + i
    blind: bool = False  # each image as plain grey of its size: to evaluate, never to be trained on
    small: bool = (
        False  # each image as small as the model takes it: for the canary, which is no work
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer, as it was sampled."""

    token_ids: tuple[int, ...]  # [C], the end token included where one was sampled
    logprobs: tuple[float, ...]  # [C], natural log, of each token under the sampling policy
    text: str  # without special tokens
    finish_reason: FinishReason
    version: int  # of the weights; the oldest, should a completion span two

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"{len(self.token_ids)} token ids but {len(self.logprobs)} log-probs: "
                "a completion has one log-prob a token"
            )
        if not self.token_ids:
            raise ValueError("a completion has at least one token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A prompt's G completions, all from one engine."""

    request: RolloutRequest
    prompt_token_ids: tuple[int, ...]  # [T] as the engine saw them, image placeholders expanded
    image_hashes: tuple[str, ...]  # SHA-256 of each image's pixels as the engine saw them
    completions: tuple[Completion, ...]  # [G]
    engine: int  # which engine
    seconds: float  # from submission to the last completion

    def __post_init__(self) -> None:
        want = self.request.sampling.num_completions
        if len(self.completions) != want:
            raise ValueError(f"{len(self.completions)} completions, asked for {want}")
        if len(self.image_hashes) != len(self.request.prompt.images):
            raise ValueError(
                f"{len(self.image_hashes)} image hashes for "
                f"{len(self.request.prompt.images)} images"
            )

    @property
    def version(self) -> int:
        """The oldest version any of its completions was sampled from."""
        return min(completion.version for completion in self.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What the rewards say of one completion."""

    components: Mapping[str, float]  # by reward name, unweighted; empty where the reward failed
    total: float  # weighted sum of the components
    outcome: Outcome
    reason: str = ""  # why, where that is not plain: "two answer tags", a traceback's last line
    answer: str = ""  # as `accuracy` read it: the option's letter, else the text; "": none was read

    def __post_init__(self) -> None:
        if not math.isfinite(self.total) or not all(map(math.isfinite, self.components.values())):
            raise ValueError(f"a score must be finite, got {self.total} of {dict(self.components)}")

    @property
    def failed(self) -> bool:
        """True where the reward crashed or ran out of time: the completion is left out."""
        return self.outcome in ("error", "timeout")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group and what the rewards say of each of its completions."""

    group: Group
    scores: tuple[Score, ...]  # [G]
    seconds: float  # spent scoring

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.group.completions):
            raise ValueError(
                f"{len(self.scores)} scores for {len(self.group.completions)} completions"
            )

    @property
    def uniform(self) -> bool:
        """Whether all scores are equal, failed ones aside: then there is nothing to compare.

        As `learner.grpo.zero_variance` finds it.
        """
        return len({score.total for score in self.scores if not score.failed}) <= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateMetrics:
    """What one learner update over a batch measured. Means are over the trained completions."""

    loss: float
    kl: float  # k3 estimate against the reference, 0 where there is none; nats a token
    entropy: float  # of the next-token distribution, nats a token
    clip_fraction: float  # share of tokens whose ratio was clipped
    gradient_norm: float  # before clipping
    learning_rate: float
    logprob_gap_mean: float  # |sampler - learner| over the trained tokens, nats
    logprob_gap_max: float
    zero_variance_groups: int
    trained_completions: int
    prompt_tokens: int  # summed over groups, image placeholders included, each prompt once
    completion_tokens: int
    visual_tokens: int  # summed over groups, each prompt once
    sharing: float  # tokens of padded rows / tokens of the rows run
    advantages: tuple[tuple[float, ...], ...]  # [P][G], 0 for a failed completion
    seconds: float
    importance_mean: float = 1.0  # of the truncated sampler-to-learner weights
    gap_tokens: int = 0  # tokens of the learner's own version, which the gap is over; 0: over all
    logprob_gap_stale: float = 0.0  # mean over the tokens of older versions: what training changed
    group_gaps: tuple[float, ...] = ()  # [P] largest gap of a group's tokens of the own version


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt and the answer to imitate: what supervised fine-tuning trains on."""

    request: RolloutRequest  # its sampling is not used
    target: str  # the completion, without the end token


@dataclass(frozen=True, slots=True, kw_only=True)
class ImitationMetrics:
    """What one supervised step measured. Prompts are not trained."""

    loss: float  # mean -log p of a target token, the end token included, nats
    gradient_norm: float  # before clipping
    learning_rate: float
    tokens: int  # of the targets
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightMeta:
    """One tensor of a sync."""

    name: str  # as in transformers' `named_parameters()`
    dtype: str  # "float32", "bfloat16": as it travels
    shape: tuple[int, ...]  # full, not a rank's part


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncPlan:
    """How the weights travel: agreed by learner and engines before a transfer group is formed."""

    transport: Literal["gloo", "nccl", "ipc"]
    address: str  # host of learner rank 0
    port: int
    world_size: int  # 1 sender + engine workers (an engine has one a GPU, or one on the CPU)
    bucket_bytes: int
    timeout_s: float = 300.0  # longest wait for the group to form, and for any one collective
    share_memory: bool = True  # gloo: where all are on one machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """The learner's side of a sync."""

    tensors: int
    bytes: int
    digests: Mapping[str, str]  # tensor name -> digest as it left
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Proof that a version arrived at every engine."""

    version: int
    step: int
    transport: str
    engines: int
    tensors: int
    bytes: int
    seconds: float  # from pause to resume, canary included
    seconds_transfer: float
    digests_equal: bool
    canary_gap: float  # largest |engine - learner| log-prob over engines and tokens, nats
