"""A tower that is not trained sees an image once a run, and nothing else changes by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from lora_jobs import attach_trained
from made_groups import PlainStepper, gradient_gap, mixed_batch, scored_group, settings
from torch import Tensor

from medrl.actors.types import ScoredGroup, UpdateMetrics
from medrl.configs.schema import ModelConfig
from medrl.learner import tiny
from medrl.learner.model import Policy, PromptReader, load_policy
from medrl.learner.update import Updater
from medrl.learner.vision import FeatureCache, Features

ENOUGH = 2**30
families = pytest.mark.parametrize("family", tiny.FAMILIES)


class Learner:
    """A policy and its reference, and how many patches their towers have seen."""

    def __init__(
        self,
        model: Path,
        reader: PromptReader,
        images: Path,
        cache_bytes: int,
        *,
        freeze: bool = True,
        lora_rank: int = 0,
    ) -> None:
        self.cache = FeatureCache(cache_bytes)
        self.runs: list[int] = []  # patches of each run of a tower

        def load(freeze: bool) -> Policy:
            policy = load_policy(
                str(model),
                torch.float32,
                forbidden=reader.forbidden,
                freeze_vision=freeze,
                features=self.cache,
            )
            policy.vlm.model.visual.register_forward_pre_hook(self._count)
            return policy

        self.policy, reference = load(freeze), load(freeze).requires_grad_(False)
        if lora_rank:
            config = ModelConfig(path=str(model), lora_rank=lora_rank)
            assert attach_trained(self.policy.vlm, config, 0)
        self.stepper = PlainStepper(self.policy, reader, reference=reference)
        chosen = settings(model, images, kl_coefficient=0.1, tokens_per_micro_batch=100)
        self.updater, self.reader = Updater(self.stepper, reader, chosen), reader

    def _count(self, module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.runs.append(len(arguments[0]))

    def update(self) -> tuple[UpdateMetrics, dict[str, Tensor]]:
        self.policy.zero_grad()
        metrics = self.updater.update(mixed_batch(self.reader), version=0)
        return metrics, {name: g.clone() for name, g in self.stepper.gradients().items()}

    def images(self, batch: Sequence[ScoredGroup]) -> list[int]:
        """Patches of each different image."""
        hashes = {hash for scored in batch for hash in scored.group.image_hashes}
        return [int(self.reader.image(hash).grid.prod()) for hash in hashes]


@pytest.mark.parametrize("lora_rank", [0, 4], ids=["text trained", "adapters in the text"])
@families
def test_kept_features_give_the_same_gradients_and_are_made_once(
    family: str,
    lora_rank: int,
    tiny_models: dict[str, Path],
    readers: dict[str, PromptReader],
    image_root: Path,
) -> None:
    """Over micro-batches, updates, and for policy and reference together."""
    place = tiny_models[family], readers[family], image_root
    freeze = not lora_rank  # adapters in the text alone leave the tower as it is, too
    without = Learner(*place, 0, freeze=freeze, lora_rank=lora_rank)
    kept = Learner(*place, ENOUGH, freeze=freeze, lora_rank=lora_rank)
    want, gradients = without.update()
    for _ in range(2):
        got, same = kept.update()
        assert got.loss == pytest.approx(want.loss, abs=1e-6)
        assert got.kl == pytest.approx(want.kl, abs=1e-6)
        assert gradient_gap(same, gradients) < 1e-6
    assert sorted(kept.runs) == sorted(kept.images(mixed_batch(kept.reader)))
    assert sum(without.runs) > sum(kept.runs)
    assert not any(name.startswith("model.visual") for name in gradients)


def test_a_tower_that_is_trained_keeps_nothing(
    tiny_models: dict[str, Path], readers: dict[str, PromptReader], image_root: Path
) -> None:
    """Its features are of yesterday's weights. The reference's, the start's, are kept."""
    place = tiny_models["qwen2_vl"], readers["qwen2_vl"], image_root
    trained = Learner(*place, ENOUGH, freeze=False)
    trained.updater.update(mixed_batch(trained.reader), version=0)
    with torch.no_grad():
        for parameter in trained.policy.vlm.model.visual.parameters():
            parameter.mul_(1.01)
    uncached = Learner(*place, 0, freeze=False)
    uncached.policy.load_state_dict(trained.policy.state_dict())
    (got, gradients), (want, expected) = trained.update(), uncached.update()
    assert got.loss == pytest.approx(want.loss, abs=1e-7)
    assert gradient_gap(gradients, expected) < 1e-6
    assert any(name.startswith("model.visual") for name in gradients)


def test_a_tower_trained_from_now_on_is_no_longer_recalled(
    tiny_models: dict[str, Path], readers: dict[str, PromptReader], image_root: Path
) -> None:
    """The parameters say whether the tower is trained, not a key that was read at the start."""
    reader = readers["qwen2_vl"]
    learner = Learner(tiny_models["qwen2_vl"], reader, image_root, ENOUGH)
    learner.update()
    learner.policy.vlm.model.visual.requires_grad_(True)
    before = len(learner.runs)
    _, gradients = learner.update()
    assert len(learner.runs) > before
    assert any(name.startswith("model.visual") for name in gradients)


@families
def test_what_is_kept_of_an_image_does_not_depend_on_its_company(
    family: str,
    tiny_models: dict[str, Path],
    readers: dict[str, PromptReader],
    image_root: Path,
) -> None:
    """Else a resumed run, which meets images in other micro-batches, would not be the same run."""
    reader, caches = readers[family], []
    for names in (("a.png",), ("b.png", "a.png")):
        learner = Learner(tiny_models[family], reader, image_root, ENOUGH)
        scored = scored_group(reader, names, seed=0, rewards=[0.0, 1.0])
        learner.updater.update([scored], version=0)
        assert sorted(learner.runs) == sorted(learner.images([scored]))
        caches.append(learner.cache.get(scored.group.image_hashes[-1]))
    alone, beside = caches
    assert alone is not None
    assert beside is not None
    assert torch.equal(alone.pooler_output, beside.pooler_output)
    assert len(alone.deepstack) == (family == "qwen3_vl")
    assert all(map(torch.equal, alone.deepstack, beside.deepstack))


def features(rows: int) -> Features:
    """Of 40 bytes a row."""
    return Features(pooler_output=torch.zeros(rows, 8), deepstack=(torch.zeros(rows, 2),))


def test_the_cache_stays_below_its_bytes_and_drops_what_was_used_least_recently() -> None:
    cache = FeatureCache(100)
    cache.put("a", features(1))
    cache.put("b", features(1))
    assert cache.get("a") is not None
    cache.put("c", features(1))
    assert cache.nbytes == 80
    assert [cache.get(hash) is not None for hash in "abc"] == [True, False, True]
    cache.put("too large", features(3))
    assert cache.get("too large") is None
    assert cache.nbytes == 80
    cache.clear()
    assert (cache.nbytes, cache.get("a")) == (0, None)


def test_a_cache_too_small_for_a_micro_batch_changes_no_gradient(
    tiny_models: dict[str, Path], readers: dict[str, PromptReader], image_root: Path
) -> None:
    place = tiny_models["qwen2_vl"], readers["qwen2_vl"], image_root
    _, want = Learner(*place, 0).update()
    small = Learner(*place, 9 * 128 * 4)  # the features of an image of 84 x 84
    assert gradient_gap(small.update()[1], want) < 1e-6
    assert small.cache.nbytes <= small.cache.max_bytes
