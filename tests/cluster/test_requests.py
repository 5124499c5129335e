"""What engines are asked."""

from __future__ import annotations

from builders import make_prompt

from medrl.cluster.requests import requests_of
from medrl.configs.schema import Config, DataConfig, ModelConfig, RunConfig


def test_only_the_canary_sees_small_images() -> None:
    """And it is of a prompt that has an image, where there is one."""
    config = Config(
        run=RunConfig(name="run"), model=ModelConfig(path="none"), data=DataConfig(train="none")
    )
    prompts = (make_prompt("bare", images=()), make_prompt("with", images=("a.png",)))
    requests = requests_of(config, prompts)
    canary = requests.canary()
    assert canary.small
    assert canary.prompt.id == "with"
    assert canary.sampling.temperature == 0
    assert not requests.train(0).small
    assert not requests.greedy(0, prompts[1]).small
    assert requests_of(config, prompts[:1]).canary().prompt.id == "bare"
