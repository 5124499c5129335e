"""Faults planted between sampling and training are seen: images that are swapped are refused by
their hashes, and what no hash can see shows in the gap to the sampler, with its cause."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import make_receipt
from made_groups import PlainStepper, image_store, scored_group, settings

from medrl.actors.types import ScoredGroup
from medrl.cluster.gap import LIMITS, GapGate
from medrl.configs.errors import GapError, LearnerError
from medrl.learner.model import PromptReader, load_policy
from medrl.learner.update import Updater

NAMES = ("b.png", "c.png")  # of one number of patches: only their pixels tell them apart


class Rank:
    """A learner of one process, on a reader and a model of its own."""

    def __init__(self, model: Path, images: Path) -> None:
        self.reader = PromptReader(str(model), image_store(model, images))
        self.policy = load_policy(str(model), torch.float32, forbidden=self.reader.forbidden)
        self.stepper = PlainStepper(self.policy, self.reader)
        self.updater = Updater(self.stepper, self.reader, settings(model, images))

    def sampled(self, image: str, seed: int, *, engine: int = 0) -> ScoredGroup:
        """A group as an engine with this very policy samples it."""
        scored = scored_group(self.reader, (image,), seed=seed, rewards=[0.0, 1.0, 1.0])
        rows = self.updater.logprobs(scored.group)
        completions = tuple(
            replace(completion, logprobs=logprobs)
            for completion, logprobs in zip(scored.group.completions, rows, strict=True)
        )
        return replace(scored, group=replace(scored.group, completions=completions, engine=engine))

    def gated(self, batch: Sequence[ScoredGroup]) -> GapGate:
        gate = GapGate(LIMITS["float32"])
        gate.look(batch, self.updater.update(batch, version=0), make_receipt(0))
        return gate


@pytest.fixture
def rank(tiny_models: dict[str, Path], image_root: Path, tmp_path: Path) -> Rank:
    shutil.copytree(image_root, tmp_path / "images")
    return Rank(tiny_models["qwen2_vl"], tmp_path / "images")


def test_a_batch_as_it_was_sampled_passes(rank: Rank) -> None:
    batch = [rank.sampled(name, seed) for seed, name in enumerate(NAMES)]
    update = rank.updater.update(batch, version=0)
    assert len(update.group_gaps) == len(batch)
    assert max(update.group_gaps) == update.logprob_gap_max < 1e-5
    assert update.gap_tokens == update.completion_tokens
    assert rank.gated(batch).cause == ""


def test_two_groups_with_each_others_images_are_refused_before_anything_is_trained(
    rank: Rank,
) -> None:
    first, second = (rank.sampled(name, seed) for seed, name in enumerate(NAMES))
    hashes = first.group.image_hashes, second.group.image_hashes
    swapped = [
        replace(one, group=replace(one.group, image_hashes=its))
        for one, its in zip((first, second), reversed(hashes), strict=True)
    ]
    with pytest.raises(LearnerError, match=r"prompt p0: the images \['b\.png'\] here are not"):
        rank.updater.update(swapped, version=0)
    assert rank.stepper.steps == 0


def test_two_files_swapped_on_disk_between_engine_and_learner_are_refused(
    rank: Rank, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    batch = [rank.sampled(name, seed) for seed, name in enumerate(NAMES)]
    one, other = (tmp_path / "images" / name for name in NAMES)
    shutil.move(one, tmp_path / "aside.png")
    shutil.move(other, one)
    shutil.move(tmp_path / "aside.png", other)
    learner = Rank(tiny_models["qwen2_vl"], tmp_path / "images")  # has not decoded them yet
    with pytest.raises(LearnerError, match=r"prompt p0: the images \['b\.png'\] here are not"):
        learner.updater.update(batch, version=0)
    assert learner.stepper.steps == 0


def test_pixels_swapped_behind_right_hashes_stop_the_run_and_name_the_prompt(rank: Rank) -> None:
    """No hash can see this one: two images of as many patches, each where the other belongs."""
    batch = [rank.sampled(name, seed) for seed, name in enumerate((*NAMES, "a.png"))]
    cache = rank.reader.images._kept
    one, other = (batch[place].group.image_hashes[0] for place in (0, 1))
    pixels = {one: cache[other].pixels, other: cache[one].pixels}
    for key, value in pixels.items():
        cache[key] = replace(cache[key], pixels=value)
    update = rank.updater.update(batch, version=0)
    assert min(update.group_gaps[:2]) > 100 * update.group_gaps[2]
    gate = rank.gated(batch)
    assert "so arithmetic differs, most on prompt p" in gate.cause
    for _ in range(2):
        gate.look(batch, update, make_receipt(0))
    with pytest.raises(GapError, match="inputs are the same"):
        gate.refuse()


def test_an_engine_with_other_weights_is_named(rank: Rank) -> None:
    """As after a bit that flips in an engine's memory, or a copy that a sync has not reached."""
    mine = copy.deepcopy(rank.policy.state_dict())
    with torch.no_grad():
        for value in rank.policy.parameters():
            value += 0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    theirs = [rank.sampled(name, seed, engine=1) for seed, name in enumerate(NAMES)]
    rank.policy.load_state_dict(mine)
    batch = [*theirs, *(rank.sampled(name, seed) for seed, name in enumerate(NAMES, start=2))]
    gate = rank.gated(batch)
    assert "weights differ" in gate.cause
    assert "all groups of engine 1 are off and none of engine 0" in gate.cause
    with pytest.raises(GapError):
        gate.refuse()


def test_what_training_changed_is_told_apart_from_the_gap(rank: Rank) -> None:
    """A batch of fresh and stale groups: only the fresh ones are evidence."""
    stale = scored_group(rank.reader, ("a.png",), seed=5, rewards=[0.0, 1.0])  # noise, version 0
    fresh = rank.sampled("b.png", 1)
    completions = tuple(replace(one, version=4) for one in fresh.group.completions)
    fresh = replace(fresh, group=replace(fresh.group, completions=completions))
    update = rank.updater.update([stale, fresh], version=4)
    assert update.group_gaps[0] == 0.0 < update.logprob_gap_stale
    assert update.logprob_gap_stale > 0.1 > 1e-5 > update.logprob_gap_max
    assert update.gap_tokens == sum(len(one.token_ids) for one in completions)
    assert rank.updater.update([stale], version=4).gap_tokens == 0
