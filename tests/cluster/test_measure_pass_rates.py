"""Measuring pass rates: right counts, a line as soon as a prompt is done, and gone on with."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from builders import make_prompt, pool_of
from rich.console import Console

from medrl.actors.fake_engine import FakeEngine, FakeWire
from medrl.actors.sampler import Sampler
from medrl.actors.types import Group, Prompt, RolloutRequest
from medrl.cluster.pass_rates import about_of, histogram, measure, measured_already
from medrl.cluster.requests import Requests
from medrl.configs.errors import EngineError, UserError
from medrl.configs.schema import Config, DataConfig, ModelConfig, RolloutConfig, RunConfig
from medrl.data.pass_rates import ABOUT, read_pass_rates
from medrl.data.schedule import Schedule
from medrl.rewards.modes import get_mode
from medrl.rewards.scorer import StrictScorer

PROMPTS = [make_prompt(f"p{i}") for i in range(12)]
CONFIG = Config(
    run=RunConfig(name="x"),
    model=ModelConfig(path="model"),
    data=DataConfig(train="train"),
    rollout=RolloutConfig(temperature=0.5, completions=2),
)
ABOUT_THIS = about_of(CONFIG, "model", samples=8)


async def measure_with(
    out: Path, left: list[tuple[int, Prompt]], engine: FakeEngine, skill: float = 0.5
) -> None:
    requests = Requests(
        prompts=PROMPTS,
        schedule=Schedule(len(PROMPTS), seed=0),
        mode=get_mode("no-think"),
        rollout=CONFIG.rollout,
        seed=3,
    )
    engine._weights = {"skill": (skill,)}
    await engine.resume(0)
    sampler = Sampler(pool_of([engine]), max_sequences=16, timeout_s=5)
    await measure(left, requests, sampler, StrictScorer("no-think"), out, ABOUT_THIS)


async def test_a_rate_is_the_share_of_right_completions(tmp_path: Path) -> None:
    """All `samples` of them, whatever rollout.completions is; on the disk as soon as known."""
    asked: list[RolloutRequest] = []
    lines: list[int] = []
    out = tmp_path / "rates.jsonl"

    class Heard(FakeEngine):
        async def generate(self, request: RolloutRequest) -> Group:
            asked.append(request)
            lines.append(out.read_text().count("\n"))
            return await super().generate(request)

    await measure_with(out, list(enumerate(PROMPTS)), Heard(FakeWire(), index=0))
    assert lines == sorted(lines)
    assert lines[-1] >= 9  # two are in flight at once
    rates = read_pass_rates(out).by_id
    assert set(rates) == {prompt.id for prompt in PROMPTS}
    assert {(r.sampling.num_completions, r.sampling.temperature) for r in asked} == {(8, 0.5)}
    assert len({r.seed + i for r in asked for i in range(8)}) == 96
    assert all(rate * 8 == int(rate * 8) for rate in rates.values())
    assert len(set(rates.values())) > 2
    line = json.loads(out.read_text().splitlines()[0])
    assert line | ABOUT_THIS == line
    assert (line["modality"], line["question_type"]) == ("CT", "Modality Recognition")


async def test_what_was_measured_before_an_end_is_kept_and_gone_on_with(tmp_path: Path) -> None:
    class Dying(FakeEngine):
        async def generate(self, request: RolloutRequest) -> Group:
            if request.prompt.id == "p7":
                raise EngineError("engine 0 died")
            return await super().generate(request)

    out = tmp_path / "rates.jsonl"
    everything = list(enumerate(PROMPTS))
    with pytest.raises(EngineError, match="died"):
        await measure_with(out, everything, Dying(FakeWire(), index=0))
    with out.open("a") as file:
        file.write('{"id": "p7", "pass_r')  # cut off as it was written
    done = measured_already(out, ABOUT_THIS)
    assert 0 < len(done) < 12
    left = [(number, prompt) for number, prompt in everything if prompt.id not in done]
    await measure_with(out, left, FakeEngine(FakeWire(), index=0))
    whole = tmp_path / "whole.jsonl"
    await measure_with(whole, everything, FakeEngine(FakeWire(), index=0))
    assert read_pass_rates(out).by_id == read_pass_rates(whole).by_id


async def test_a_file_of_another_model_or_mode_is_not_added_to(tmp_path: Path) -> None:
    out = tmp_path / "rates.jsonl"
    assert measured_already(out, ABOUT_THIS) == set()
    await measure_with(out, list(enumerate(PROMPTS)), FakeEngine(FakeWire(), index=0))
    with pytest.raises(UserError, match=r"mode 'no-think' \(now 'think-after'\)"):
        measured_already(out, {**ABOUT_THIS, "mode": "think-after"})


@pytest.mark.parametrize("key", ["temperature", "top_p", "top_k", "max_tokens"])
async def test_rates_of_other_sampling_are_not_mixed(tmp_path: Path, key: str) -> None:
    """A completion cut off at fewer tokens is right less often, for one."""
    assert tuple(ABOUT_THIS) == ABOUT
    out = tmp_path / "rates.jsonl"
    await measure_with(out, list(enumerate(PROMPTS)), FakeEngine(FakeWire(), index=0))
    other = {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "max_tokens": 7}[key]
    rollout = CONFIG.rollout.model_copy(update={key: other})
    now = about_of(CONFIG.model_copy(update={"rollout": rollout}), "model", samples=8)
    with pytest.raises(UserError, match=rf"{key} .*\(now {other}\)"):
        measured_already(out, now)


def test_a_histogram_counts_every_prompt_once() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(histogram([0.0, 0.0, 0.25, 0.3, 0.5, 0.99, 1.0]))
    counts = [
        line.split("│")[2].strip() for line in console.export_text().splitlines() if "│" in line
    ]
    assert counts == ["2", "1", "2", "0", "1", "1"]
