"""The step benchmark's other side: what becomes of a process that ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from medrl.bench.facts import Refused
from medrl.bench.shapes import coin
from medrl.bench.step import make_config
from medrl.bench.trl_process import TrlProcess


def test_answers_of_a_group_differ_in_the_coins_they_toss() -> None:
    tossed = [coin(f"answer {i}") for i in range(1000)]
    assert set(tossed) == {0.0, 1.0}
    assert 400 < sum(tossed) < 600
    assert coin("answer 1") == coin("answer 1")


def test_a_trainer_that_ends_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path, tokens=8)
    trl = TrlProcess(config, tmp_path / "trl")
    trl._asked["model"] = str(tmp_path / "none")
    with trl.running(), pytest.raises(Refused, match="TRL's trainer ended"):
        trl.begin(checkpointing=False)
