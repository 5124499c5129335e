"""Groups are scored the same here and in a Ray actor, and no process outlives its scorer."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from pathlib import Path

import pytest

from medrl.actors.types import Completion, Group, RolloutRequest, Sampling
from medrl.configs.errors import RewardError
from medrl.configs.schema import RewardConfig, RewardTerm
from medrl.rewards.pool import RewardPool
from medrl.rewards.scorer import LocalScorer, StrictScorer

CONFIG = RewardConfig()
TEXTS = ("<answer>C</answer>", "<answer>A</answer>", "hm")


def group_of(prompt, texts=TEXTS) -> Group:
    sampling = Sampling(num_completions=3, max_tokens=8, temperature=1.0)
    request = RolloutRequest(draw=0, prompt=prompt, text="?", sampling=sampling, seed=0)
    completions = tuple(
        Completion(token_ids=(1,), logprobs=(-1.0,), text=text, finish_reason="stop", version=0)
        for text in texts
    )
    return Group(
        request=request,
        prompt_token_ids=(1,),
        image_hashes=("x",),
        completions=completions,
        engine=0,
        seconds=0.1,
    )


def marked(mark: str, program: bytes = b"medrl.rewards.worker") -> set[int]:
    """The processes of a program, else the reward's, that have a mark in their environment."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            named = program in (folder / "cmdline").read_bytes()
            if named and mark.encode() in (folder / "environ").read_bytes():
                found.add(int(folder.name))
        except OSError:
            continue
    return found


async def until(condition) -> bool:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return condition()


async def test_a_local_scorer_scores_a_group(make_prompt):
    pool = RewardPool(CONFIG.terms, "no-think", CONFIG.processes, CONFIG.timeout_s)
    scorer = LocalScorer(pool)
    group = group_of(make_prompt("C"))
    scored = await scorer.score_group(group)
    assert scored.group is group
    assert [score.outcome for score in scored.scores] == ["ok", "wrong", "unparsed"]
    assert [score.total for score in scored.scores] == [2.0, 1.0, 0.0]
    assert 0 < scored.seconds < 5
    await scorer.close()
    await scorer.close()


async def test_long_completions_cost_in_the_actors_scores(make_prompt, monkeypatch):
    """By tokens, which only the side that holds the group knows."""
    pytest.importorskip("ray")
    from medrl.rewards.actor import RayScorer, RewardActor

    config = RewardConfig(overlong_tokens=8)  # the completions are of 1 token, at most 8
    actor = RewardActor(config, "no-think")
    scorer = object.__new__(RayScorer)  # without its Ray actor
    monkeypatch.setattr(scorer, "_overlong_tokens", config.overlong_tokens, raising=False)
    monkeypatch.setattr(scorer, "_score", actor.score, raising=False)
    scored = await scorer.score_group(group_of(make_prompt("C")))
    await actor.close()
    assert [score.components["overlong"] for score in scored.scores] == [-0.125] * 3
    assert [score.total for score in scored.scores] == [1.875, 0.875, -0.125]


LOOSE = ("C", "<answer>(C)</answer>", "<answer>C</answer><answer>C</answer>")


@pytest.mark.parametrize(
    ("policy", "accuracy"),
    [
        ("strict", [0, 1, 0]),
        ("lenient", [1, 1, 1]),
        ("graded", [0, 0.5, 0]),
        ("medr1", [1, 0, 1]),
    ],
)
async def test_training_scores_by_its_policy_and_evaluation_strictly(make_prompt, policy, accuracy):
    """Or a run on a kinder policy would report a kinder accuracy."""
    pytest.importorskip("ray")
    from medrl.rewards.actor import RewardActor

    group = group_of(make_prompt("C"), LOOSE)
    actor = RewardActor(RewardConfig(policy=policy), "no-think")
    trained = await actor.score(group.request.prompt, LOOSE)
    await actor.close()
    assert [score.components["accuracy"] for score in trained] == accuracy
    evaluated = (await StrictScorer("no-think").score_group(group)).scores
    assert [score.components["accuracy"] for score in evaluated] == [0, 1, 0]
    assert [score.components["format"] for score in evaluated] == [0, 1, 0]
    assert [score.outcome for score in evaluated] == ["unparsed", "ok", "unparsed"]
    # Beside it, and in no total.
    assert [score.components["lenient"] for score in evaluated] == [1, 1, 1]
    assert [score.total for score in evaluated] == [0, 2, 0]


@pytest.fixture
def mark(monkeypatch):
    """A local Ray whose processes can be told from all others on the machine."""
    ray = pytest.importorskip("ray")
    mark = uuid.uuid4().hex
    monkeypatch.setenv("RAY_DISABLE_USAGE_STATS", "1")
    variables = {"PYTHONPATH": str(Path(__file__).parent), "REWARD_MARK": mark}
    ray.init(
        address="local",  # whatever else runs on the machine
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": variables},
    )
    yield mark
    ray.shutdown()


@pytest.mark.engines
async def test_a_ray_scorer_scores_groups_survives_its_actor_and_leaves_nothing(make_prompt, mark):
    import ray

    from medrl.rewards.actor import RayScorer

    terms = (*CONFIG.terms, RewardTerm(use="hostile_rewards:length"))
    scorer = RayScorer(CONFIG.model_copy(update={"terms": terms}), "no-think")
    group = group_of(make_prompt("C"))
    for scored in await asyncio.gather(*(scorer.score_group(group) for _ in range(20))):
        assert [score.outcome for score in scored.scores] == ["ok", "wrong", "unparsed"]
        assert scored.scores[0].components["length"] == len(TEXTS[0])
    first = marked(mark)
    assert len(first) == CONFIG.processes
    ray.kill(scorer._actor)
    assert await until(lambda: not first & marked(mark))  # they follow the actor
    assert (await scorer.score_group(group)).scores[0].outcome == "ok"
    assert len(marked(mark)) == CONFIG.processes
    await scorer.close()
    await scorer.close()
    assert await until(lambda: not marked(mark))
    with pytest.raises(RewardError, match="reward actor"):
        await scorer.score_group(group)


async def pid_of(scorer) -> int:
    pid: int = await scorer._actor.__ray_call__.remote(lambda actor: os.getpid())
    return pid


@pytest.mark.engines
async def test_an_actor_that_dies_or_hangs_is_started_again_and_no_score_is_lost(make_prompt, mark):
    """Whatever groups are with it are scored by the next one, and it is said once."""
    from medrl.rewards.actor import RayScorer

    terms = (*CONFIG.terms, RewardTerm(use="hostile_rewards:slow"))
    config = CONFIG.model_copy(update={"terms": terms, "timeout_s": 60.0})
    scorer, told = RayScorer(config, "no-think", heartbeat_s=10.0), []
    scorer.tell = told.append
    group = group_of(make_prompt("C"))
    await scorer.score_group(group)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        pid = await pid_of(scorer)
        scoring = [asyncio.create_task(scorer.score_group(group)) for _ in range(6)]
        await asyncio.sleep(0.2)
        os.kill(pid, number)
        for scored in await asyncio.gather(*scoring):
            assert [score.outcome for score in scored.scores] == ["ok", "wrong", "unparsed"]
    assert [(one.who, one.event) for one in told] == [
        ("rewards", "left"),
        ("rewards", "returned"),
    ] * 2
    assert "died" in told[0].cause
    assert "hangs: no answer to a ping within 10 s" in told[2].cause
    assert all(one.seconds > 0 for one in told[1::2])
    await scorer.close()
    assert await until(lambda: not marked(mark))


@pytest.mark.engines
async def test_what_rewards_of_a_killed_run_left_running_ends_when_it_is_resumed(make_prompt, mark):
    """A program that outlives its reward outlives a driver that is killed, too."""
    from medrl.rewards.actor import RayScorer

    config = CONFIG.model_copy(update={"terms": (RewardTerm(use="hostile_rewards:behave"),)})
    killed = RayScorer(config, "no-think", owner="runs/one")
    await killed.score_group(group_of(make_prompt("C"), ("leave_children", "", "")))
    workers = marked(mark)
    os.kill(await pid_of(killed), signal.SIGKILL)
    assert await until(lambda: not workers & marked(mark))
    left = marked(mark, b"987")
    assert left
    for owner, still_there in (("runs/two", left), ("runs/one", set())):
        scorer = RayScorer(CONFIG, "no-think", owner=owner)
        assert (await scorer.score_group(group_of(make_prompt("C")))).scores[0].outcome == "ok"
        assert marked(mark, b"987") == still_there
        await scorer.close()


@pytest.mark.engines
async def test_completions_that_kill_the_actor_again_and_again_end_in_the_first_cause(
    make_prompt, mark
):
    from medrl.rewards.actor import RayScorer

    terms = (RewardTerm(use="hostile_rewards:kill_the_actor"),)
    scorer, told = RayScorer(CONFIG.model_copy(update={"terms": terms}), "no-think"), []
    scorer.tell = told.append
    with pytest.raises(RewardError, match=r"died: .*\nthe reward actor died 4 times over .* row-1"):
        await scorer.score_group(group_of(make_prompt("C")))
    assert [one.event for one in told] == ["left", "given up"]
    await scorer.close()
