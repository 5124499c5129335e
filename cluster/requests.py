"""From the data set to what engines are asked: which prompt a draw is, its words, its seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from medrl.actors.types import Example, Prompt, RolloutRequest, Sampling
from medrl.configs.schema import Config, RolloutConfig
from medrl.data.schedule import Schedule, group_seed
from medrl.rewards.modes import Mode, get_mode

CANARY_TOKENS = 2  # one of the prompt's own pass, one of a step after it


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
        return self.sampled(draw, self.prompts[self.schedule[draw]], self.rollout.completions)

    def sampled(self, number: int, prompt: Prompt, completions: int) -> RolloutRequest:
        """So many completions of a prompt, drawn as in training; `number` is their stream's."""
        sampling = Sampling(
            num_completions=completions,
            max_tokens=self.rollout.max_tokens,
            temperature=self.rollout.temperature,
            top_p=self.rollout.top_p,
            top_k=self.rollout.top_k,
        )
        seed = group_seed(self.seed, number, completions)
        return self._request(number, prompt, sampling, seed)

    def example(self, draw: int) -> Example:
        """The prompt of a draw with its answer in the mode's form, to be imitated."""
        request = self.train(draw)
        return Example(request=request, target=self.mode.write(request.prompt.answer))

    def greedy(self, number: int, prompt: Prompt) -> RolloutRequest:
        """One greedy completion: for evaluation and canary; `number` only tells them apart."""
        sampling = Sampling(num_completions=1, max_tokens=self.rollout.max_tokens, temperature=0.0)
        return self._request(number, prompt, sampling, seed=0)

    def canary(self) -> RolloutRequest:
        """A few greedy tokens on a prompt with an image, if the data has one: proves a sync. The
        image is small, for the engines wait, and what is proved does not depend on its size."""
        with_image = (prompt for prompt in self.prompts if prompt.images)
        prompt = next(with_image, self.prompts[0])
        sampling = Sampling(num_completions=1, max_tokens=CANARY_TOKENS, temperature=0.0)
        return replace(self._request(0, prompt, sampling, seed=0), small=True)

    def _request(self, draw: int, prompt: Prompt, sampling: Sampling, seed: int) -> RolloutRequest:
        text = self.mode.render(prompt)
        return RolloutRequest(draw=draw, prompt=prompt, text=text, sampling=sampling, seed=seed)


def requests_of(config: Config, prompts: Sequence[Prompt]) -> Requests:
    """A run's requests; its draws are of `prompts`."""
    return Requests(
        prompts=prompts,
        schedule=Schedule(len(prompts), config.run.seed, shuffled=config.data.order == "shuffled"),
        mode=get_mode(config.data.mode, config.data.instruction),
        rollout=config.rollout,
        seed=config.run.seed,
    )
