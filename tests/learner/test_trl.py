"""The reference is TRL's own GRPOTrainer and RLOOTrainer, on the same model, images, completions
and rewards.

Completions reach them through the public `rollout_func`, or where there is none (RLOO) in place of
their own. They run padded rows through the model's ordinary attention; ours runs shared rows.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from made_groups import PlainStepper, gradient_gap, scored_group, settings
from torch import Tensor

from medrl.actors.types import ScoredGroup
from medrl.configs.algorithms import PRESETS
from medrl.configs.schema import LearnerConfig
from medrl.learner.grpo import group_advantages
from medrl.learner.model import PromptReader, load_policy
from medrl.learner.update import Updater

TRL_OF = {
    "completion_mean": "grpo",
    "token_mean": "dapo",
    "constant": "dr_grpo",
    "standardized": "group",
    "centered": "none",
}


PLAIN = {
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "model_init_kwargs": {"dtype": "float32"},
}


@dataclass
class Case:
    """Variants by our names, which `trl_arguments` translates."""

    learner: dict[str, Any] = field(default_factory=dict)  # keys of section learner
    size: int = 4
    off_policy: bool = False  # ratios away from 1, so that clipping acts
    clips: bool = True  # then some tokens are clipped

    @property
    def config(self) -> LearnerConfig:
        return LearnerConfig(**self.learner)


def trl_arguments(config: LearnerConfig) -> dict[str, Any]:
    """TRL's CISPO bounds the weight by `epsilon_high` itself and has no lower bound; ours is
    bounded by 1 - clip_low and 1 + clip_high, as the paper writes it."""
    cispo = config.surrogate == "cispo"
    assert not cispo or (config.clip_low == 1 and config.aggregation == "token_mean")
    return {
        "beta": config.kl_coefficient,
        "use_bias_correction_kl": config.kl_gradient == "unbiased",
        "loss_type": "cispo" if cispo else TRL_OF[config.aggregation],
        "scale_rewards": TRL_OF[config.advantage],
        "importance_sampling_level": config.ratio,
        "epsilon": config.clip_low,
        "epsilon_high": config.clip_high + cispo,
        "mask_truncated_completions": config.mask_truncated,
    }


def made_batch(reader: PromptReader, size: int, end: int) -> list[ScoredGroup]:
    """Two images, one image, equal rewards; one completion of the first group is truncated."""
    lengths = [16, *(3 + i for i in range(size - 1))]
    rewards = [float(i % 3) for i in range(size)]
    images = [("b.png", "d.png"), ("a.png",), ("c.png",)]
    batch = []
    for seed, names in enumerate(images):
        scored = scored_group(
            reader,
            names,
            seed=seed,
            rewards=[1.1] * size if seed == 2 else rewards[::-1] if seed else rewards,
            lengths=lengths,
            text="Which?" if seed else "What modality is this image?",
            end=end,
        )
        batch.append(scored)
    return batch


def trl_result(
    case: Case, batch: list[ScoredGroup], reader: PromptReader, model: Path, out: Path
) -> tuple[float, Tensor, dict[str, Tensor]]:
    """Its loss, advantages and gradients."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    flat = [(one, i) for one in batch for i in range(case.size)]

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        completions = [one.group.completions[i] for one, i in flat]
        return {
            "prompt_ids": [list(one.group.prompt_token_ids) for one, _ in flat],
            "completion_ids": [list(completion.token_ids) for completion in completions],
            "logprobs": [list(completion.logprobs) for completion in completions],
        }

    def reward(**_: Any) -> list[float | None]:
        return [None if one.scores[i].failed else one.scores[i].total for one, i in flat]

    config = GRPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=len(flat),
        num_generations=case.size,
        max_completion_length=16,
        **trl_arguments(case.config),
        **PLAIN,
    )
    rows = [trl_row(one, reader) for one, _ in flat]
    trainer = GRPOTrainer(
        model=str(model),
        reward_funcs=reward,
        args=config,
        processing_class=trl_processor(reader),
        train_dataset=Dataset.from_list([{"prompt": rows[0]["prompt"]}]),
        rollout_func=rollout,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # what a training loop would have set
    inputs = trainer._generate_and_score_completions(rows)
    if case.off_policy:
        inputs["old_per_token_logps"] = trl_logprobs(trainer, inputs)
    perturb(trainer.model)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss), inputs["advantages"], gradients


def trl_row(one: ScoredGroup, reader: PromptReader) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": one.group.request.text}],
        "images": [reader.images.source.load(p).image for p in one.group.request.prompt.images],
    }


def trl_processor(reader: PromptReader) -> Any:
    processor = copy.deepcopy(reader.processor)
    processor.tokenizer.padding_side = "left"  # TRL pads prompts so, and asks the processor to
    return processor


def trl_logprobs(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """[completions, C] under the model as it is."""
    with torch.no_grad():
        found: Tensor = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            **{k: inputs[k] for k in ("pixel_values", "image_grid_thw", "num_images")},
            mm_token_type_ids=inputs["mm_token_type_ids"],
        )[0]
    return found


def perturb(vlm: Any) -> None:
    """Away from the starting model, so that KL is not 0; the same each time."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in vlm.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


CASES = {
    "group of 4": Case(),
    "group of 8": Case(size=8),
    "group of 8 with KL": Case({"kl_coefficient": 0.1}, size=8),
    "with KL, clipped": Case({"kl_coefficient": 0.1}, off_policy=True),
    "with the paper's KL": Case({"kl_coefficient": 0.1, "kl_gradient": "paper"}),
    "with the paper's KL, clipped": Case(
        {"kl_coefficient": 0.1, "kl_gradient": "paper"}, off_policy=True
    ),
    "clipped": Case(off_policy=True),
    "sequence ratio, clipped": Case({"ratio": "sequence"}, off_policy=True, clips=False),
    "token mean": Case({"aggregation": "token_mean"}, off_policy=True),
    "constant, centered": Case(
        {"aggregation": "constant", "advantage": "centered", "kl_coefficient": 0.05}
    ),
    "cispo, clipped": Case({"algorithm": "cispo", "clip_high": 0.2}, off_policy=True),
    "cispo with KL": Case(
        {"algorithm": "cispo", "clip_high": 0.2, "kl_coefficient": 0.1}, off_policy=True
    ),
} | {  # as `learner.algorithm` alone sets them
    name: Case({"algorithm": name}, off_policy=True, clips=name != "cispo")
    for name in PRESETS
    if name != "rloo"
}


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_advantages_are_those_of_trl(
    name: str,
    tiny_models: dict[str, Path],
    readers: dict[str, PromptReader],
    image_root: Path,
    tmp_path: Path,
) -> None:
    case, reader, model = CASES[name], readers["qwen2_vl"], tiny_models["qwen2_vl"]
    batch = made_batch(reader, case.size, reader.processor.tokenizer.eos_token_id)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss, advantages, gradients = trl_result(case, batch, reader, model, tmp_path)

    start = load_policy(str(model), torch.float32)
    policy = load_policy(str(model), torch.float32)
    perturb(policy.vlm)
    stepper = PlainStepper(policy, reader, reference=start, before=start)
    # Old log-probs are taken where a batch has several optimiser steps: here two, over the same
    # groups and without a change of weights between, so that gradients are exactly doubled.
    repeats = 2 if case.off_policy else 1
    chosen = settings(model, image_root, **case.learner, updates_per_batch=repeats)
    metrics = Updater(stepper, reader, chosen).update(batch * repeats, version=0)

    ours = torch.tensor(metrics.advantages[: len(batch)]).flatten()
    torch.testing.assert_close(ours, advantages, atol=1e-5, rtol=1e-5)
    assert metrics.loss == pytest.approx(loss, abs=1e-5)
    got = {n: g / repeats for n, g in stepper.gradients().items()}
    assert gradient_gap(got, gradients) < 1e-5
    assert metrics.zero_variance_groups == repeats
    if case.off_policy and case.clips:
        assert 0 < metrics.clip_fraction < 1
    if case.config.mask_truncated:
        assert metrics.trained_completions < len(batch) * repeats * case.size


def test_advantages_beside_an_unscorable_completion_are_those_of_trl(
    tiny_models: dict[str, Path], readers: dict[str, PromptReader], tmp_path: Path
) -> None:
    reader, model = readers["qwen2_vl"], tiny_models["qwen2_vl"]
    rewards = [0.0, 2.0, 1.0, 0.5]
    batch = [scored_group(reader, ("a.png",), seed=0, rewards=rewards, failed=(2,))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, advantages, _ = trl_result(Case(), batch, reader, model, tmp_path)
    valid = torch.tensor([[True, True, False, True]])
    ours = group_advantages(torch.tensor([rewards]), valid)[0]
    torch.testing.assert_close(ours, advantages, atol=1e-5, rtol=1e-5)


def test_rloo_is_that_of_trl(
    tiny_models: dict[str, Path], readers: dict[str, PromptReader], image_root: Path, tmp_path: Path
) -> None:
    """Advantages and gradients on-policy, where both are REINFORCE. TRL sums over a completion's
    tokens, ours divides that by the longest completion allowed, 16 here."""
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    reader, model = readers["qwen2_vl"], tiny_models["qwen2_vl"]
    batch = made_batch(reader, 4, reader.processor.tokenizer.eos_token_id)
    flat = [(one, i) for one in batch for i in range(4)]
    config = RLOOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(flat),
        num_generations=4,
        max_completion_length=16,
        beta=0.0,
        **PLAIN,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = RLOOTrainer(
            model=str(model),
            reward_funcs=lambda **_: [one.scores[i].total for one, i in flat],
            args=config,
            processing_class=trl_processor(reader),
            train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "Which?"}]}]),
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        ids = [list(one.group.completions[i].token_ids) for one, i in flat]
        trainer._generate_single_turn = lambda *_: ids
        inputs = trainer._generate_and_score_completions([trl_row(one, reader) for one, _ in flat])
        trainer._compute_loss(trainer.model, inputs).backward()
    named = trainer.model.named_parameters()
    gradients = {name: p.grad / 16 for name, p in named if p.grad is not None}

    stepper = PlainStepper(load_policy(str(model), torch.float32), reader)
    chosen = settings(model, image_root, algorithm="rloo")
    metrics = Updater(stepper, reader, chosen).update(batch, version=0)
    ours = torch.tensor(metrics.advantages).flatten()
    torch.testing.assert_close(ours, inputs["advantages"], atol=1e-5, rtol=1e-5)
    assert gradient_gap(stepper.gradients(), gradients) < 1e-5
