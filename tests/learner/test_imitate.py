"""The reference is plain transformers: labels of -100 on the prompt, rows padded by its own
processor, the model's ordinary attention."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_groups import PlainStepper, examples, gradient_gap, settings
from torch import Tensor

from medrl.actors.chat import render_chat
from medrl.actors.types import Example, ImitationMetrics
from medrl.configs.errors import LearnerError
from medrl.learner import tiny
from medrl.learner.imitate import Imitator, target_token_ids
from medrl.learner.model import PromptReader, load_policy

IGNORED = -100


@pytest.fixture
def made(tiny_models: dict[str, Path], readers: dict[str, PromptReader], image_root: Path) -> Any:
    def make(
        family: str = "qwen2_vl", forbidden: bool = True, **learner: Any
    ) -> tuple[Imitator, PlainStepper, PromptReader]:
        reader, model = readers[family], tiny_models[family]
        ids = reader.forbidden if forbidden else ()
        policy = load_policy(str(model), torch.float32, forbidden=ids)
        stepper = PlainStepper(policy, reader)
        return Imitator(stepper, reader, settings(model, image_root, **learner)), stepper, reader

    return make


def plain_transformers(
    model: Path,
    reader: PromptReader,
    batch: Sequence[Example],
    forbidden: Sequence[int] = (),
    *,
    masked: bool = True,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of transformers' own model in one padded batch, by its own loss."""
    from transformers import AutoModelForImageTextToText

    vlm: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    if forbidden:  # as an engine's logit bias
        bias = torch.zeros(vlm.config.text_config.vocab_size)
        bias[list(forbidden)] = -torch.inf
        vlm.lm_head.register_forward_hook(lambda *call: call[-1] + bias)
    tokenizer = reader.processor.tokenizer
    ids, labels, pixels, grids = [], [], [], []
    for example in batch:
        names = example.request.prompt.images
        images = [reader.images.source.load(name).image for name in names]
        chat = render_chat(reader.processor, example.request.text, len(names))
        out = reader.processor(text=[chat], images=images or None, return_tensors="pt")
        asked = out["input_ids"][0].tolist()
        said = [*tokenizer(example.target)["input_ids"], tokenizer.eos_token_id]
        ids.append(torch.tensor(asked + said))
        labels.append(torch.tensor(([IGNORED] * len(asked) if masked else asked) + said))
        if images:
            pixels.append(out["pixel_values"])
            grids.append(out["image_grid_thw"])
    pad = torch.nn.utils.rnn.pad_sequence
    padded = pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    lengths = torch.tensor([len(one) for one in ids])
    loss = vlm(
        input_ids=padded,
        attention_mask=(torch.arange(padded.shape[1])[None] < lengths[:, None]).long(),
        mm_token_type_ids=(padded == reader.config.image_token_id).int(),
        pixel_values=torch.cat(pixels),
        image_grid_thw=torch.cat(grids),
        labels=pad(labels, batch_first=True, padding_value=IGNORED),
    ).loss
    loss.backward()
    gradients = {name: p.grad for name, p in vlm.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("forbidden", [False, True], ids=["all tokens", "an engine's tokens"])
def test_loss_and_gradients_are_those_of_plain_transformers(
    family: str, forbidden: bool, made: Any, tiny_models: dict[str, Path]
) -> None:
    imitator, stepper, reader = made(family, forbidden)
    batch = examples()
    banned = reader.forbidden if forbidden else ()
    loss, gradients = plain_transformers(tiny_models[family], reader, batch, banned)
    metrics: ImitationMetrics = imitator.imitate(batch, version=0)
    assert metrics.loss == pytest.approx(loss, abs=1e-5)
    assert gradient_gap(stepper.gradients(), gradients) < 1e-5
    tokenizer = reader.processor.tokenizer
    assert metrics.tokens == sum(len(tokenizer(one.target)["input_ids"]) + 1 for one in batch)
    assert stepper.steps == 1


@pytest.mark.parametrize("budget", [1, 60, 200])
def test_any_split_over_micro_batches_is_the_same(budget: int, made: Any) -> None:
    whole, one, _ = made()
    want = whole.imitate(examples(), version=0)
    split, several, _ = made(tokens_per_micro_batch=budget)
    got = split.imitate(examples(), version=0)
    assert several.forwards > one.forwards == 1
    assert got.loss == pytest.approx(want.loss, abs=1e-6)
    assert got.tokens == want.tokens
    assert gradient_gap(several.gradients(), one.gradients()) < 1e-5


def test_no_prompt_token_is_a_target(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is scored is the targets and nothing else, however probable the prompts are: the loss
    is the mean of these log-probs, and its gradient to them -1 / tokens for each."""
    imitator, stepper, reader = made()
    seen: list[tuple[list[int], Tensor]] = []
    score = stepper.score

    def watched(rows: Any, images: Any, **kind: Any) -> Any:
        logprobs, entropies = score(rows, images, **kind)
        logprobs.retain_grad()
        seen.append((rows.targets[rows.trained].tolist(), logprobs))
        return logprobs, entropies

    monkeypatch.setattr(stepper, "score", watched)
    batch = examples()
    metrics = imitator.imitate(batch, version=0)
    tokenizer = reader.processor.tokenizer
    scored = sorted(token for tokens, _ in seen for token in tokens)
    assert scored == sorted(t for one in batch for t in target_token_ids(tokenizer, one))
    gradient = torch.cat([values.grad.flatten() for _, values in seen if values.grad is not None])
    torch.testing.assert_close(
        gradient[gradient != 0], torch.full((metrics.tokens,), -1 / metrics.tokens)
    )


def test_the_loss_with_prompts_as_targets_would_be_another(
    made: Any, tiny_models: dict[str, Path]
) -> None:
    """So that the comparison with transformers' masked loss says something."""
    imitator, stepper, reader = made(forbidden=False)
    model = tiny_models["qwen2_vl"]
    loss, gradients = plain_transformers(model, reader, examples(), masked=False)
    metrics = imitator.imitate(examples(), version=0)
    assert abs(metrics.loss - loss) > 1e-3
    assert gradient_gap(stepper.gradients(), gradients) > 0.1


def test_a_target_is_tokenised_apart_from_its_prompt() -> None:
    """A line break at the seam would merge with the prompt's own, which an engine has been given
    as a token by then."""
    tokenizer = tiny.train_tokenizer(["one\n\ntwo"] * 9, 1024)
    opened = "<|im_start|>assistant\n"
    prompt, across = tokenizer(opened)["input_ids"], tokenizer(opened + "\nA")["input_ids"]
    assert across[: len(prompt)] != prompt, "the case this test is for"
    target = target_token_ids(tokenizer, replace(examples()[0], target="\nA"))
    assert target == (*tokenizer("\nA")["input_ids"], tokenizer.eos_token_id)
    assert tokenizer.decode([*prompt, *target]) == opened + "\nA<|im_end|>"


def test_the_stop_token_is_what_the_chat_template_ends_an_answer_with(
    readers: dict[str, PromptReader],
) -> None:
    for reader in readers.values():
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        chat = reader.processor.apply_chat_template(turns, tokenize=False)
        assert chat.rstrip().endswith("A" + reader.processor.tokenizer.eos_token)


@pytest.mark.parametrize("target", ["A<|im_end|>B", "<|image_pad|>"])
def test_an_answer_with_special_tokens_is_refused(target: str, made: Any) -> None:
    imitator, stepper, _ = made()
    batch = examples()
    batch[2] = replace(batch[2], target=target)
    with pytest.raises(LearnerError, match=r"prompt e2: the answer to imitate holds special"):
        imitator.imitate(batch, version=0)
    assert stepper.forwards == stepper.steps == 0


def test_sampling_settings_do_not_matter(made: Any) -> None:
    imitator, _, _ = made()
    want = imitator.imitate(examples(), version=0)
    hot = [
        replace(
            one,
            request=replace(
                one.request, sampling=replace(one.request.sampling, temperature=0.3, max_tokens=1)
            ),
        )
        for one in examples()
    ]
    imitator, _, _ = made()
    got = imitator.imitate(hot, version=0)
    assert (got.loss, got.tokens) == (want.loss, want.tokens)


def test_the_learning_rate_follows_the_schedule(made: Any) -> None:
    imitator, _, _ = made(schedule="linear", learning_rate=1e-2, total_steps=10)
    assert imitator.imitate(examples(), version=5).learning_rate == pytest.approx(5e-3)


def test_an_empty_batch_is_refused(made: Any) -> None:
    imitator, _, _ = made()
    with pytest.raises(LearnerError, match="at least one example"):
        imitator.imitate([], version=0)


def test_a_loss_that_is_no_number_is_refused_before_the_step(made: Any) -> None:
    imitator, stepper, _ = made()
    with torch.no_grad():
        stepper.policy.vlm.lm_head.weight[3] = float("nan")
    with pytest.raises(LearnerError, match=r"step 6: the loss is nan, so .* sft\.learning_rate"):
        imitator.imitate(examples(), version=5)
    assert stepper.steps == 0


def test_a_gradient_that_is_no_number_is_refused(made: Any) -> None:
    imitator, stepper, _ = made()
    weight = stepper.policy.vlm.lm_head.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(LearnerError, match=r"step 1: the gradient's norm is (nan|inf)"):
        imitator.imitate(examples(), version=0)


def test_imitated_answers_become_probable(made: Any) -> None:
    """Plain gradient descent on the same examples: the loss falls to almost nothing."""
    imitator, stepper, _ = made()
    optimizer = torch.optim.AdamW(stepper.policy.parameters(), lr=3e-3, weight_decay=0.0)
    first = last = imitator.imitate(copy.deepcopy(examples()), version=0).loss
    for _ in range(40):
        optimizer.step()
        optimizer.zero_grad()
        last = imitator.imitate(examples(), version=0).loss
    assert first > 3
    assert last < 0.1
