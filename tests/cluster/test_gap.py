"""The gate on the log-prob gap: it warns, says which of three causes it is and on what evidence,
and stops the run between two updates."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import make_receipt, make_scored, make_update

from medrl.actors.types import ScoredGroup, UpdateMetrics
from medrl.cluster.alarm_rules import Bounds
from medrl.cluster.alarms import GAP, Alarms
from medrl.cluster.gap import LIMITS, PATIENCE, GapGate, gap_limits
from medrl.cluster.journal import Journal
from medrl.configs.errors import GapError, UserError
from medrl.configs.schema import GapConfig
from medrl.reports.lines import read_lines

LIMIT = LIMITS["float32"]


def batch_of(engines: tuple[int, ...], version: int = 3) -> list[ScoredGroup]:
    made = [make_scored(draw, version=version) for draw in range(len(engines))]
    return [
        replace(one, group=replace(one.group, engine=engine))
        for one, engine in zip(made, engines, strict=True)
    ]


def update_of(batch: list[ScoredGroup], gaps: tuple[float, ...], **changes: Any) -> UpdateMetrics:
    measured: dict[str, Any] = {
        "group_gaps": gaps,
        "logprob_gap_max": max(gaps),
        "logprob_gap_mean": sum(gaps) / len(gaps) / 10,
        "gap_tokens": 6 * len(batch),
    }
    return replace(make_update(batch), **(measured | changes))


def look(gate: GapGate, gaps: tuple[float, ...], engines: tuple[int, ...] = (0, 1, 0, 1)) -> None:
    batch = batch_of(engines)
    gate.look(batch, update_of(batch, gaps), make_receipt(3))


SOUND = (1e-6, 2e-6, 1e-6, 9e-6)
OFF = (0.02, 0.03, 0.02, 0.04)  # on all engines, 4 times the limit's maximum


def test_a_sound_gap_is_no_cause() -> None:
    gate = GapGate(LIMIT)
    for _ in range(2 * PATIENCE):
        look(gate, SOUND)
        gate.refuse()
    assert gate.cause == ""


def test_above_the_limit_it_warns_and_after_some_steps_in_a_row_it_stops() -> None:
    gate = GapGate(LIMIT)
    for _ in range(PATIENCE - 1):
        look(gate, (1e-5, 0.02, 1e-5, 1e-5))
        assert gate.cause
        gate.refuse()
    look(gate, SOUND)  # in a row, or not at all
    for _ in range(PATIENCE - 1):
        look(gate, (1e-5, 0.02, 1e-5, 1e-5))
        gate.refuse()
    look(gate, (1e-5, 0.02, 1e-5, 1e-5))
    with pytest.raises(GapError, match=rf"0\.02 at most over 24 .*after {PATIENCE} such step"):
        gate.refuse()


@pytest.mark.parametrize("gap", [11 * LIMIT.max, math.inf, math.nan])
def test_far_above_or_no_number_stops_at_once(gap: float) -> None:
    gate = GapGate(LIMIT)
    look(gate, (gap, 1e-6, 1e-6, 1e-6))
    with pytest.raises(GapError):
        gate.refuse()


def test_a_mean_above_its_own_limit_counts_though_no_token_is_far_off() -> None:
    gate = GapGate(LIMIT)
    batch = batch_of((0, 1))
    gate.look(batch, update_of(batch, (5e-4, 5e-4), logprob_gap_mean=2e-4), make_receipt(3))
    assert re.search(r"differ by 0\.0002 on average .*gap\.mean 0\.0001", gate.cause)


def test_tokens_of_older_versions_are_no_evidence() -> None:
    """With stale completions alone the gap is what training changed, and may be anything."""
    gate = GapGate(LIMIT)
    batch = batch_of((0, 1))
    for _ in range(2 * PATIENCE):
        gate.look(batch, update_of(batch, (3.0, 3.0), gap_tokens=0), make_receipt(3))
        gate.refuse()
    assert gate.cause == ""


def test_a_batch_without_evidence_neither_ends_nor_lengthens_a_row() -> None:
    gate = GapGate(LIMIT)
    stale = batch_of((0, 1))
    for _ in range(PATIENCE):
        gate.refuse()
        look(gate, (1e-5, 0.02, 1e-5, 1e-5))
        gate.look(stale, update_of(stale, (3.0, 3.0), gap_tokens=0), make_receipt(3))
    with pytest.raises(GapError, match=rf"after {PATIENCE} such step"):
        gate.refuse()


def test_weights_differ_where_one_engine_is_off_and_the_others_are_not() -> None:
    gate = GapGate(LIMIT)
    look(gate, (1e-6, 0.3, 2e-6, 0.05), engines=(0, 1, 0, 1))
    assert "inputs are the same (ids and image hashes of 4 prompts" in gate.cause
    assert "weights differ: version 3 arrived with equal digests" in gate.cause
    assert "all groups of engine 1 are off and none of engine 0" in gate.cause
    assert "engine 0 2e-06, engine 1 0.3" in gate.cause


def test_weights_differ_where_no_receipt_proves_them() -> None:
    gate = GapGate(LIMIT)
    batch = batch_of((0, 1))
    gate.look(batch, update_of(batch, (0.3, 0.3)), None)
    assert "weights differ: no receipt" in gate.cause


def test_arithmetic_differs_where_weights_are_proved_and_engines_agree() -> None:
    gate = GapGate(LIMIT)
    look(gate, OFF)
    assert "weights are the same (version 3 arrived with equal digests" in gate.cause
    assert "so arithmetic differs, most on prompt p3 with 1 image(s) on engine 1" in gate.cause


def test_some_prompts_of_an_engine_are_not_its_weights() -> None:
    gate = GapGate(LIMIT)
    look(gate, (1e-6, 0.3, 2e-6, 1e-6))
    assert "arithmetic differs, most on prompt p1" in gate.cause


def test_limits_follow_the_type_and_bfloat16_refuses_those_of_float32() -> None:
    assert gap_limits(GapConfig(), "float32") == LIMITS["float32"]
    assert gap_limits(GapConfig(), "bfloat16").mean == 0.05
    assert gap_limits(GapConfig(mean=0.02, max=3.0), "bfloat16").mean == 0.02
    with pytest.raises(UserError, match=r"gap\.mean: got 0\.0001.* bfloat16"):
        gap_limits(GapConfig(mean=1e-4), "bfloat16")
    with pytest.raises(UserError, match=r"gap\.max: got 0\.01, and the weights are bfloat16"):
        gap_limits(GapConfig(max=0.01), "bfloat16")


def test_the_journal_raises_the_alarm_and_refuses_by_it(tmp_path: Path) -> None:
    bounds = Bounds(
        completions=2,
        max_tokens=16,
        staleness=0,
        max_replaced=0,
        max_failed_fraction=0.1,
        updates_per_batch=1,
        importance_cap=0.0,
    )
    journal = Journal(tmp_path, alarms=Alarms(bounds, GapGate(LIMIT)))
    batch = batch_of((0, 1, 0, 1), version=0)
    journal.record_sync(make_receipt(0))
    journal.record_step(1, batch, update_of(batch, SOUND), make_receipt(1), 0.0)
    journal.refuse_gap()
    journal.record_step(2, batch, update_of(batch, (0.3,) * 4), make_receipt(2), 0.0)
    alarms = {one["name"]: one for one in read_lines(tmp_path / "alarms.jsonl")}
    assert alarms[GAP]["step"] == 2
    assert "version 1 arrived with equal digests" in alarms[GAP]["message"]
    with pytest.raises(GapError, match="arithmetic differs"):
        journal.refuse_gap()
    journal.record_step(3, batch, update_of(batch, (0.3,) * 4), None, 0.0)  # the push failed
    with pytest.raises(GapError, match="arithmetic differs"):
        journal.refuse_gap()
    journal.record_step(4, batch, update_of(batch, (0.3,) * 4), make_receipt(4), 0.0)
    with pytest.raises(GapError, match="weights differ: no receipt proves"):
        journal.refuse_gap()
    journal.rewind(1)  # back at a checkpoint, with engines and ranks made anew
    journal.refuse_gap()
    assert not (tmp_path / "alarms.jsonl").read_text()
