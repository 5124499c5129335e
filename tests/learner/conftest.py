from __future__ import annotations

from pathlib import Path

import pytest
from made_groups import CORPUS, draw_images, image_store

from medrl.learner import tiny
from medrl.learner.model import PromptReader


@pytest.fixture(scope="session")
def image_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    draw_images(root)
    return root


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family; Qwen3-VL's head is not tied."""
    root = tmp_path_factory.mktemp("models")
    for family in tiny.FAMILIES:
        tiny.build(family, root / family, corpus=CORPUS, tied=family != "qwen3_vl")
    return {family: root / family for family in tiny.FAMILIES}


@pytest.fixture(scope="session")
def readers(tiny_models: dict[str, Path], image_root: Path) -> dict[str, PromptReader]:
    return {
        family: PromptReader(str(path), image_store(path, image_root))
        for family, path in tiny_models.items()
    }
