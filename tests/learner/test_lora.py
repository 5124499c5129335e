"""Adapters in one plain process: against PEFT over transformers, and the weights others see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_jobs import RANK, attach_trained
from made_groups import PlainStepper, gradient_gap, mixed_batch, settings
from safetensors import safe_open
from test_shared_rows import expected_gradients, ordinary, plain_logprobs
from torch import Tensor, nn

from medrl.configs.schema import ModelConfig
from medrl.learner import lora, tiny
from medrl.learner.model import Policy, PromptReader, load_policy, save_model
from medrl.learner.update import Updater
from medrl.learner.weight_source import ModuleSource

both = pytest.mark.parametrize("vision", [False, True], ids=["language", "tower too"])
families = pytest.mark.parametrize("family", tiny.FAMILIES)


class Made:
    """A policy with trained adapters, and what its learner writes."""

    def __init__(self, model: Path, reader: PromptReader, images: Path, vision: bool) -> None:
        self.model, self.reader = model, reader
        self.policy = load_policy(str(model), torch.float32, forbidden=reader.forbidden)
        config = ModelConfig(path=str(model), lora_rank=RANK, lora_vision=vision)
        adapters = attach_trained(self.policy.vlm, config, 0)
        assert adapters is not None
        self.adapters: lora.Adapters = adapters
        self.source = adapters.source(None)
        self.stepper = PlainStepper(self.policy, reader)
        self.updater = Updater(self.stepper, reader, settings(model, images))

    def merged(self, bucket_bytes: int = 2**14) -> dict[str, Tensor]:
        return {
            meta.name: tensor.clone()
            for metas, tensors in self.source.buckets(bucket_bytes)
            for meta, tensor in zip(metas, tensors, strict=True)
        }

    def write(self, folder: Path) -> None:
        save_model(self.policy, self.merged(), self.reader, folder)
        self.adapters.save(folder / "adapter", self.source.gather, write=True)

    def logprobs(self) -> list[tuple[tuple[float, ...], ...]]:
        return [self.updater.logprobs(one.group) for one in mixed_batch(self.reader)]


@pytest.fixture
def make(tiny_models: dict[str, Path], readers: dict[str, PromptReader], image_root: Path) -> Any:
    return lambda family, vision: Made(tiny_models[family], readers[family], image_root, vision)


def with_peft(made: Made, folder: Path) -> Any:
    """transformers' own model and attention, with the adapters that were written."""
    from peft import PeftModel

    return PeftModel.from_pretrained(ordinary(made.model), folder / "adapter", is_trainable=True)


def assert_logprobs(vlm: Any, made: Made, want: Any, atol: float = 1e-5) -> None:
    for scored, of_group in zip(mixed_batch(made.reader), want, strict=True):
        for mine, theirs in zip(plain_logprobs(vlm, scored, made.reader), of_group, strict=True):
            torch.testing.assert_close(mine.detach(), torch.tensor(theirs), atol=atol, rtol=0)


@both
@families
def test_gradients_of_adapters_are_those_of_peft(
    family: str, vision: bool, make: Any, tmp_path: Path
) -> None:
    made = make(family, vision)
    made.write(tmp_path)
    batch = mixed_batch(made.reader)
    metrics = made.updater.update(batch, version=0)
    vlm = with_peft(made, tmp_path).get_base_model()
    want = expected_gradients(vlm, batch, made.reader, metrics.advantages)
    assert all(".lora_" in name for name in want)
    assert any("visual" in name for name in want) == vision
    assert gradient_gap(made.stepper.gradients(), want) < 1e-5


@both
@families
def test_merged_adapter_and_learner_give_the_same_logprobs(
    family: str, vision: bool, make: Any, tmp_path: Path
) -> None:
    """The export alone, the adapter over the starting model, and the policy as it is trained."""
    made = make(family, vision)
    made.write(tmp_path)
    want = made.logprobs()
    assert_logprobs(ordinary(tmp_path), made, want)
    assert_logprobs(with_peft(made, tmp_path), made, want)
    with pytest.raises(AssertionError):  # else the adapters do nothing
        assert_logprobs(ordinary(made.model), made, want, atol=1e-3)


@both
@families
def test_others_see_the_names_shapes_and_order_of_the_model_without_adapters(
    family: str, vision: bool, make: Any, tmp_path: Path
) -> None:
    made = make(family, vision)
    plain = {m.name: m.shape for m in ModuleSource(ordinary(made.model)).metadata()}
    sent = {meta.name: meta.shape for meta in made.source.metadata()}
    assert list(sent.items()) == list(plain.items())
    assert {name: tuple(tensor.shape) for name, tensor in made.merged().items()} == plain
    made.write(tmp_path)
    assert stored(tmp_path) == stored(made.model)


def stored(folder: Path) -> dict[str, list[int]]:
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


@both
@families
def test_all_linear_layers_but_the_head_have_adapters_and_nothing_else_is_trained(
    family: str, vision: bool, make: Any
) -> None:
    made = make(family, vision)
    linear = {
        name
        for name, module in ordinary(made.model).named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head" and (vision or "visual" not in name)
    }
    trained = {name for name, p in made.policy.named_parameters() if p.requires_grad}
    assert trained == {
        f"vlm.{name}.lora_{factor}.default.weight" for name in linear for factor in "AB"
    }
    start, merged = dict(ordinary(made.model).named_parameters()), made.merged()
    changed = {name for name in merged if not merged[name].equal(start[name])}
    assert changed == {f"{name}.weight" for name in linear}


@families
def test_without_adapters_the_policy_is_the_starting_model(family: str, make: Any) -> None:
    made = make(family, True)
    path, forbidden = str(made.model), made.reader.forbidden
    start = load_policy(path, torch.float32, forbidden=forbidden)
    trained = made.logprobs()

    def logprobs(policy: Policy) -> list[Tensor]:
        stepper = PlainStepper(policy, made.reader)
        updater = Updater(stepper, made.reader, made.updater._settings)
        groups = [one.group for one in mixed_batch(made.reader)]
        return [torch.tensor(sum(updater.logprobs(group), ())) for group in groups]

    got = logprobs(made.adapters.without(made.policy))  # type: ignore[arg-type]
    torch.testing.assert_close(got, logprobs(start), atol=1e-6, rtol=0)
    assert made.logprobs() == trained  # on again


def test_untrained_adapters_change_nothing_and_follow_from_the_seed(
    tiny_models: dict[str, Path],
) -> None:
    """Every rank makes its own: they must be the same. B is 0 and A is not."""
    path = str(tiny_models["qwen2_vl"])
    found = []
    for seed in (3, 3, 4):
        vlm = load_policy(path, torch.float32).vlm
        before = torch.get_rng_state()
        adapters = lora.attach(vlm, ModelConfig(path=path, lora_rank=RANK), seed)
        assert adapters is not None
        assert torch.get_rng_state().equal(before)
        start = dict(ordinary(Path(path)).named_parameters())
        for metas, tensors in adapters.source(None).buckets(2**20):
            assert all(t.equal(start[m.name]) for m, t in zip(metas, tensors, strict=True))
        found.append({n: p.detach() for n, p in vlm.named_parameters() if ".lora_A." in n})
    assert all(value.equal(found[1][name]) for name, value in found[0].items())
    assert not any(value.equal(found[2][name]) for name, value in found[0].items())


def test_no_rank_is_no_adapters(tiny_models: dict[str, Path]) -> None:
    path = str(tiny_models["qwen2_vl"])
    assert lora.attach(load_policy(path, torch.float32).vlm, ModelConfig(path=path), 0) is None
