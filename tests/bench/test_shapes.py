"""The model of the benchmarks is of the size they name, and its texts never end by themselves."""

import json
import math
from pathlib import Path

import pytest

from medrl.actors.chat import forbidden_token_ids
from medrl.bench import shapes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.make_model(tmp_path_factory.mktemp("bench"))


def test_a_text_ends_only_with_a_token_that_nobody_may_sample(model: Path) -> None:
    """What vLLM, transformers and TRL take for the end: generation config, config and tokenizer."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    forbidden = forbidden_token_ids(processor.tokenizer)
    config = json.loads((model / "config.json").read_text())
    generation = json.loads((model / "generation_config.json").read_text())
    ends = {
        processor.tokenizer.eos_token_id,
        generation["eos_token_id"],
        config["text_config"]["eos_token_id"],
    }
    assert len(ends) == 1
    assert ends <= set(forbidden)


def test_the_model_has_31_million_parameters_and_an_image_196_visual_tokens(model: Path) -> None:
    from PIL import Image
    from safetensors import safe_open
    from transformers import AutoProcessor

    with safe_open(model / "model.safetensors", framework="pt") as weights:
        sizes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
    count = sum(map(math.prod, sizes))
    assert count == pytest.approx(31e6, rel=0.03)
    processor = AutoProcessor.from_pretrained(model).image_processor
    image = Image.new("RGB", (shapes.SIDE, shapes.SIDE))
    grid = processor(images=[image], return_tensors="pt")["image_grid_thw"][0]
    assert int(grid.prod()) // processor.merge_size**2 == shapes.VISUAL_TOKENS
