"""From the data set to what engines are asked: which prompt a draw is, its words, its seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medrl.actors.types import Prompt, RolloutRequest, Sampling
from medrl.configs.schema import RolloutConfig
from medrl.data.schedule import Schedule, group_seed
from medrl.rewards.modes import Mode

CANARY_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Training requests by draw, evaluation requests by prompt. Pure: a draw is always the same."""

    prompts: Sequence[Prompt]
    schedule: Schedule
    mode: Mode
    rollout: RolloutConfig
    seed: int

    def train(self, draw: int) -> RolloutRequest:
        """The request of a draw: sampled, G completions."""
        prompt = self.prompts[self.schedule[draw]]
        sampling = Sampling(
            num_completions=self.rollout.completions,
            max_tokens=self.rollout.max_tokens,
            temperature=self.rollout.temperature,
            top_p=self.rollout.top_p,
            top_k=self.rollout.top_k,
        )
        seed = group_seed(self.seed, draw, self.rollout.completions)
        return self._request(draw, prompt, sampling, seed)

    def greedy(self, number: int, prompt: Prompt) -> RolloutRequest:
        """One greedy completion: for evaluation and canary; `number` only tells them apart."""
        sampling = Sampling(num_completions=1, max_tokens=self.rollout.max_tokens, temperature=0.0)
        return self._request(number, prompt, sampling, seed=0)

    def canary(self) -> RolloutRequest:
        """A few greedy tokens on a prompt with an image, if the data has one: proves a sync."""
        with_image = (prompt for prompt in self.prompts if prompt.images)
        prompt = next(with_image, self.prompts[0])
        sampling = Sampling(num_completions=1, max_tokens=CANARY_TOKENS, temperature=0.0)
        return self._request(0, prompt, sampling, seed=0)

    def _request(self, draw: int, prompt: Prompt, sampling: Sampling, seed: int) -> RolloutRequest:
        text = self.mode.render(prompt)
        return RolloutRequest(draw=draw, prompt=prompt, text=text, sampling=sampling, seed=seed)
