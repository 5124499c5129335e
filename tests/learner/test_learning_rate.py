from __future__ import annotations

import pytest

from medrl.configs.schema import LearnerConfig
from medrl.learner.settings import learning_rate


def rates(schedule: str, warmup: int, total: int) -> list[float]:
    config = LearnerConfig.model_validate(
        {"learning_rate": 1.0, "schedule": schedule, "warmup_steps": warmup}
    )
    return [learning_rate(config, step, total) for step in range(total + 2)]


def test_schedules_by_hand() -> None:
    assert rates("constant", 2, 4) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates("linear", 0, 4) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert rates("linear", 2, 4) == [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    cosine = rates("cosine", 0, 4)
    assert cosine == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466, 0.0, 0.0])


def test_no_step_of_a_run_has_a_rate_of_zero() -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert all(rate > 0 for rate in rates(schedule, 3, 10)[:10])
