"""The policy is the model that lies on disk, all of it, or none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from medrl.configs.errors import UserError
from medrl.learner.model import load_policy


@pytest.mark.parametrize("name", ["visual.patch_embed", "layers.1.mlp.down_proj"])
def test_a_model_that_is_not_whole_is_refused(
    tiny_models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """transformers would draw what is absent at random, and training would go on with that."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["qwen2_vl"], folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    kept = {key: tensor for key, tensor in tensors.items() if name not in key}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"lacks \d+ of the model's tensors, first .*{name}"):
        load_policy(str(folder), torch.float32)


def test_a_tied_head_is_not_missed(tiny_models: dict[str, Path]) -> None:
    """It is no tensor of the file, and none is absent."""
    assert "lm_head.weight" not in load_file(tiny_models["qwen2_vl"] / "model.safetensors")
    load_policy(str(tiny_models["qwen2_vl"]), torch.float32)
