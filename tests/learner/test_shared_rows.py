"""A shared row gives what the model's ordinary attention gives for each sequence by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from made_groups import PlainStepper, gradient_gap, mixed_batch, scored_group, settings
from torch import Tensor

from medrl.actors.chat import render_chat
from medrl.actors.types import ScoredGroup
from medrl.learner import attention, attention_cpu, head, rows, tiny
from medrl.learner.model import PromptReader, load_policy
from medrl.learner.update import Updater


def plain_logprobs(vlm: Any, scored: ScoredGroup, reader: PromptReader) -> list[Tensor]:
    """[G][C] by transformers alone: its processor, its positions, its attention, no padding."""
    group = scored.group
    images = [reader.images.source.load(path).image for path in group.request.prompt.images]
    chat = render_chat(reader.processor, group.request.text, len(images))
    inputs = reader.processor(text=[chat], images=images or None, return_tensors="pt")
    inputs.pop("attention_mask")
    found = []
    for completion in group.completions:
        ids = torch.cat([inputs["input_ids"], torch.tensor([completion.token_ids])], dim=1)
        kinds = (ids == reader.config.image_token_id).int()
        rest = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
        logits = vlm(input_ids=ids, mm_token_type_ids=kinds, **rest).logits
        logits[..., list(reader.forbidden)] = -torch.inf  # as the engine does
        logits = logits / group.request.sampling.temperature
        of_completion = logits[0, -len(completion.token_ids) - 1 : -1].log_softmax(-1)
        found.append(of_completion[range(len(completion.token_ids)), list(completion.token_ids)])
    return found


def ordinary(model: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).train()


def expected_gradients(
    vlm: Any, batch: list[ScoredGroup], reader: PromptReader, advantages: Any
) -> dict[str, Tensor]:
    """Of GRPO's loss at ratio 1: the mean over completions of -A times the mean log-prob."""
    total, count = torch.zeros(()), 0
    for scored, of_group in zip(batch, advantages, strict=True):
        plain = plain_logprobs(vlm, scored, reader)
        for score, logprobs, advantage in zip(scored.scores, plain, of_group, strict=True):
            if not score.failed:
                total, count = total - advantage * logprobs.mean(), count + 1
    (total / count).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in vlm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logprobs_and_gradients_are_those_of_single_sequences(
    family: str,
    tiny_models: dict[str, Path],
    readers: dict[str, PromptReader],
    image_root: Path,
) -> None:
    reader, model = readers[family], tiny_models[family]
    batch = mixed_batch(reader)
    policy = load_policy(str(model), torch.float32, forbidden=reader.forbidden)
    stepper = PlainStepper(policy, reader)
    updater = Updater(stepper, reader, settings(model, image_root))
    for scored in batch:
        plain = plain_logprobs(ordinary(model), scored, reader)
        ours = updater.logprobs(scored.group)
        for want, got in zip(plain, ours, strict=True):
            torch.testing.assert_close(torch.tensor(got), want.detach(), atol=1e-5, rtol=1e-5)
    metrics = updater.update(batch, version=0)
    vlm = ordinary(model)
    want = expected_gradients(vlm, batch, reader, metrics.advantages)
    assert gradient_gap(stepper.gradients(), want) < 1e-5


def test_logprobs_are_at_the_temperature_that_was_sampled_with(
    tiny_models: dict[str, Path], readers: dict[str, PromptReader], image_root: Path
) -> None:
    reader, model = readers["qwen2_vl"], tiny_models["qwen2_vl"]
    policy = load_policy(str(model), torch.float32, forbidden=reader.forbidden)
    updater = Updater(PlainStepper(policy, reader), reader, settings(model, image_root))
    scored = scored_group(reader, ("a.png",), seed=0, rewards=[0.0, 1.0], temperature=0.5)
    plain = plain_logprobs(ordinary(model), scored, reader)
    for want, got in zip(plain, updater.logprobs(scored.group), strict=True):
        torch.testing.assert_close(torch.tensor(got), want.detach(), atol=1e-5, rtol=1e-5)


def run(
    tiny_models: Mapping[str, Path], reader: PromptReader, images: Path, **learner: Any
) -> tuple[float, dict[str, Tensor], PlainStepper]:
    model = tiny_models["qwen2_vl"]
    policy = load_policy(str(model), torch.float32, forbidden=reader.forbidden)
    start = load_policy(str(model), torch.float32, forbidden=reader.forbidden)
    stepper = PlainStepper(policy, reader, reference=start)
    chosen = settings(model, images, **({"kl_coefficient": 0.1} | learner))
    metrics = Updater(stepper, reader, chosen).update(mixed_batch(reader), version=0)
    return metrics.loss, stepper.gradients(), stepper


@pytest.mark.parametrize("aggregation", ["completion_mean", "token_mean", "constant"])
def test_any_micro_batching_gives_the_same_loss_and_gradient(
    aggregation: str,
    tiny_models: dict[str, Path],
    readers: dict[str, PromptReader],
    image_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = readers["qwen2_vl"]
    want_loss, want, whole = run(tiny_models, reader, image_root, aggregation=aggregation)
    for budget in (1, 300):
        loss, got, cut = run(
            tiny_models, reader, image_root, aggregation=aggregation, tokens_per_micro_batch=budget
        )
        assert cut.forwards > whole.forwards
        assert loss == pytest.approx(want_loss, abs=1e-6)
        assert gradient_gap(got, want) < 1e-5
    monkeypatch.setattr(rows, "WORTH_SHARING", 1e9)  # padded rows only
    loss, got, _ = run(tiny_models, reader, image_root, aggregation=aggregation)
    assert loss == pytest.approx(want_loss, abs=1e-6)
    assert gradient_gap(got, want) < 1e-5


def test_the_head_in_chunks_is_the_head_at_once(
    tiny_models: dict[str, Path],
    readers: dict[str, PromptReader],
    image_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    want_loss, want, _ = run(tiny_models, readers["qwen2_vl"], image_root)
    monkeypatch.setattr(head, "_CHUNK_LOGITS", 7 * 1024)  # a few tokens a chunk
    loss, got, _ = run(tiny_models, readers["qwen2_vl"], image_root)
    assert loss == pytest.approx(want_loss, abs=1e-6)
    assert gradient_gap(got, want) < 1e-5


def test_attention_in_blocks_of_queries_is_attention_at_once(
    tiny_models: dict[str, Path],
    readers: dict[str, PromptReader],
    image_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Completions of 1 to 14 tokens, so the last block is short and some completions end before.
    Blocks are of devices other than the CPU, whose way gives what they are compared with."""
    want_loss, want, _ = run(tiny_models, readers["qwen2_vl"], image_root)
    monkeypatch.setattr(attention_cpu, "takes", lambda *states: False)
    for block in (1, 3, 14):
        monkeypatch.setattr(attention, "BLOCK", block)
        loss, got, _ = run(tiny_models, readers["qwen2_vl"], image_root)
        assert loss == pytest.approx(want_loss, abs=1e-6)
        assert gradient_gap(got, want) < 1e-5


def test_an_image_is_encoded_once_however_many_rows_show_it(
    tiny_models: dict[str, Path],
    readers: dict[str, PromptReader],
    image_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows, "WORTH_SHARING", 1e9)
    reader = readers["qwen2_vl"]
    policy = load_policy(str(tiny_models["qwen2_vl"]), torch.float32)
    patches: list[int] = []
    policy.vlm.model.visual.register_forward_pre_hook(
        lambda module, arguments: patches.append(len(arguments[0]))
    )
    batch = [scored_group(reader, ("a.png",), seed=i, rewards=[0.0, 1.0, 2.0]) for i in range(2)]
    chosen = settings(tiny_models["qwen2_vl"], image_root)
    Updater(PlainStepper(policy, reader), reader, chosen).update(batch, version=0)
    (image,) = {hash for scored in batch for hash in scored.group.image_hashes}
    assert patches == [int(reader.image(image).grid.prod())]


def test_a_blank_image_changes_nothing(
    tiny_models: dict[str, Path], readers: dict[str, PromptReader], image_root: Path
) -> None:
    """What keeps the tower running beside ranks with images must not be seen by the text."""
    from medrl.learner.batch import build_rows
    from medrl.learner.rows import MicroBatch, Row

    reader = readers["qwen3_vl"]
    policy = load_policy(str(tiny_models["qwen3_vl"]), torch.float32)
    scored = scored_group(reader, (), seed=5, rewards=[0.0, 1.0, 2.0])
    prompts = {0: reader.read(scored.group)}
    found = []
    for vision in (False, True):
        micro_batch = MicroBatch(rows=(Row(group=0, completions=(0, 1, 2)),), vision=vision)
        batch = build_rows(micro_batch, [scored], prompts, [[1.0, 2.0, 3.0]], reader.blank)
        policy.zero_grad()
        logprobs, _ = policy(batch, [reader.image(hash) for hash in batch.images])
        (logprobs * batch.advantages[..., None]).sum().backward()
        tower = [p.grad for p in policy.vlm.model.visual.parameters()]
        assert all((g is not None) == vision for g in tower)  # it runs, backward too
        assert not any(g.any() for g in tower if g is not None)
        text = policy.vlm.model.language_model.named_parameters()
        found.append((logprobs.detach(), {name: p.grad.clone() for name, p in text}))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-6)
    assert gradient_gap(found[1][1], found[0][1]) < 1e-5
