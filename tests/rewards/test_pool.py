"""A reward that hangs, crashes or eats memory costs its completion, and the pool stays whole."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from medrl.configs.errors import RewardError, UserError
from medrl.configs.schema import RewardTerm
from medrl.rewards.pool import RewardPool

BEHAVE = (RewardTerm(use="hostile_rewards:behave"),)
PLAIN = (RewardTerm(use="format"), RewardTerm(use="accuracy"))


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def until(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def environment(pid: int | str) -> set[bytes]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:
        return set()


def family(pool: RewardPool) -> set[int]:
    """Every living process that came of a pool, wherever it went."""
    (mark,) = (entry for entry in environment(pool.pids[0]) if entry.startswith(b"MEDRL_REWARD_"))
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return {pid for pid in pids if mark in environment(pid) and alive(pid)}


@pytest.fixture(scope="module")
def pool():
    with RewardPool(BEHAVE, "no-think", 2, 1.0) as pool:
        yield pool


@pytest.mark.parametrize(
    ("action", "outcome", "reason"),
    [
        ("hang", "timeout", "behave: took longer than 1 s"),
        ("spin", "timeout", "behave: took longer than 1 s"),
        ("regex", "timeout", "behave: took longer than 1 s"),
        ("stop", "timeout", "behave: took longer than 1 s"),
        ("ignore_signals", "timeout", "behave: took longer than 1 s"),
        ("fork_and_hang", "timeout", "behave: took longer than 1 s"),
        ("exit", "error", "behave: the reward process died: exit status 3"),
        ("segfault", "error", "behave: the reward process died: signal SIGSEGV"),
        ("fork_and_die", "error", "behave: the reward process died: exit status 4"),
        ("close_all", "error", "behave: the reward process"),
        ("write_everywhere", "error", "the reward process answered nonsense"),  # over its note too
        ("sys_exit", "error", "behave: SystemExit: no licence"),
        ("raise", "error", "behave: LookupError: no such lesion"),
        ("recurse", "error", "behave: RecursionError"),
    ],
)
async def test_a_failing_reward_costs_its_completion_only(
    pool, make_prompt, action, outcome, reason
):
    group = ["fine", "fine", action, "fine", action, "fine"]
    begin = time.monotonic()
    scores = await pool.score(make_prompt(), group)
    assert [score.outcome for score in scores] == ["ok", "ok", outcome, "ok", outcome, "ok"]
    assert [score.total for score in scores if not score.failed] == [1.0] * 4
    assert all(reason in score.reason for score in scores if score.failed)
    assert time.monotonic() - begin < 2 * 1.0 + 15.0  # and no minute of them
    assert len(set(pool.pids)) == 2
    assert all(map(alive, pool.pids))
    assert until(lambda: family(pool) == set(pool.pids))  # no child is left
    again = await asyncio.gather(*(pool.score(make_prompt(), ["fine"] * 4) for _ in range(4)))
    assert {score.outcome for scores in again for score in scores} == {"ok"}


async def test_a_reward_that_hangs_is_named_among_others(make_prompt):
    """What was scored in time before it, and what comes after it, is not blamed."""
    terms = (RewardTerm(use="format"), *BEHAVE, RewardTerm(use="hostile_rewards:length"))
    with RewardPool(terms, "no-think", 1, 1.0) as pool:
        scores = await pool.score(make_prompt(), ["spin", "exit", "fine"])
    assert [score.reason for score in scores[:2]] == [
        "behave: took longer than 1 s",
        "behave: the reward process died: exit status 3",
    ]
    assert scores[2].components["length"] == 4


async def test_where_memory_ends_the_kernel_ends_rewards_first(pool):
    """And neither an engine nor a learner rank."""
    scores = [Path(f"/proc/{pid}/oom_score_adj").read_text().strip() for pid in pool.pids]
    assert scores == ["1000", "1000"]


async def test_a_reward_that_eats_memory_costs_its_completion(make_prompt):
    with RewardPool(BEHAVE, "no-think", 1, 20.0, memory_bytes=512 << 20) as pool:
        scores = await pool.score(make_prompt(), ["fine", "memory", "fine"])
    assert [score.outcome for score in scores] == ["ok", "error", "ok"]
    assert scores[1].reason == "behave: MemoryError"


@pytest.mark.parametrize("action", ["print", "fork_and_return"])
async def test_noise_and_forks_harm_nothing(make_prompt, action):
    with RewardPool(BEHAVE, "no-think", 1, 20.0) as pool:
        scores = await pool.score(make_prompt(), ["fine", action, "fine"])
        assert [score.outcome for score in scores] == ["ok"] * 3
        for _ in range(3):  # a forked child that answered too would shift all later answers
            await asyncio.sleep(0.1)
            scores = await pool.score(make_prompt(), ["raise", "fine", "raise"])
            assert [score.outcome for score in scores] == ["error", "ok", "error"]


async def test_nothing_is_left_after_close_not_even_what_rewards_started(make_prompt):
    with RewardPool(BEHAVE, "no-think", 2, 5.0) as pool:
        scores = await pool.score(make_prompt(), ["leave_children", "fine"])
        assert [score.outcome for score in scores] == ["ok", "ok"]
        # Two workers, a child, and one that left the group; a program that has only just started
        # shows no environment yet.
        assert until(lambda: len(family(pool)) == 4)
        started = family(pool)
        assert set(pool.pids) < started
    assert until(lambda: not any(map(alive, started)))
    pool.close()  # safe twice
    with pytest.raises(RewardError, match="closed"):
        await pool.score(make_prompt(), ["fine"])


async def test_close_does_not_wait_for_a_hanging_reward(make_prompt):
    pool = RewardPool(BEHAVE, "no-think", 1, 60.0)
    pids = pool.pids
    task = asyncio.create_task(pool.score(make_prompt(), ["hang", "hang"]))
    await asyncio.sleep(0.2)
    begin = time.monotonic()
    await asyncio.to_thread(pool.close)
    with pytest.raises(RewardError, match="closed"):
        await task
    assert time.monotonic() - begin < 2
    assert not any(map(alive, pids))


async def test_a_process_killed_from_outside_is_replaced(make_prompt):
    with RewardPool(PLAIN, "no-think", 1, 5.0) as pool:
        (pid,) = pool.pids
        os.kill(pid, signal.SIGKILL)
        assert until(lambda: not alive(pid))
        (score,) = await pool.score(make_prompt("C"), ["<answer>C</answer>"])
        assert score.outcome == "ok"
        assert pool.pids != (pid,)


def test_processes_die_with_a_driver_that_is_killed(tmp_path):
    """SIGKILL leaves it no time to clean up, and a worker that spins never looks at its link."""
    program = textwrap.dedent("""
        import sys, time, threading
        from medrl.actors.types import Prompt
        from medrl.configs.schema import RewardTerm
        from medrl.rewards.pool import RewardPool
        prompt = Prompt(id="1", question="?", options=(), answer="x", images=(), modality="",
                        question_type="", source="")
        pool = RewardPool((RewardTerm(use="hostile_rewards:behave"),), "no-think", 2, 60.0)
        threading.Thread(target=pool.score_pairs, args=([(prompt, "regex")],), daemon=True).start()
        time.sleep(0.3)
        print(*pool.pids, flush=True)
        time.sleep(100)
    """)
    driver = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert driver.stdout is not None
    with driver:
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        assert all(map(alive, pids))
        driver.kill()
    assert until(lambda: not any(map(alive, pids)))


SECRETS = {  # name -> value; half of them by no name that tells
    **{"WANDB_API_KEY": "s3cret-1", "HF_TOKEN": "s3cret-2", "AWS_SECRET_ACCESS_KEY": "s3cret-3"},
    **{"RAY_AUTH_TOKEN": "s3cret-4", "DATABASE_URL": "postgres://me:s3cret-5@host/db"},
    **{"HTTPS_PROXY": "http://me:s3cret-6@proxy", "PGPASS": "s3cret-7", "my_token": "s3cret-8"},
}


async def test_rewards_see_no_secret(make_prompt, monkeypatch, tmp_path):
    """Whatever they tell of their environment, and whatever they start in it."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("REWARD_DATA", "/lesions")
    terms = (RewardTerm(use="hostile_rewards:tell_all"),)
    with RewardPool(terms, "no-think", 1, 5.0) as pool:
        (score,) = await pool.score(make_prompt(), [str(tmp_path / "told")])
        assert score.reason == "tell_all: told"
    told = (tmp_path / "told").read_text()
    assert told.count("'REWARD_DATA': '/lesions'") == 2  # of itself, and of what it started
    assert "s3cret" not in told
    assert not [name for name in SECRETS if name in told]


async def test_any_text_arrives_as_it_is(make_prompt):
    texts = ["", "\ud800", "\0", "超声🙂", "\u2028\n\r", "x" * 3_000_000]
    with RewardPool((RewardTerm(use="hostile_rewards:length"),), "no-think", 1, 5.0) as pool:
        scores = await pool.score(make_prompt(), texts)
    assert [score.total for score in scores] == [float(len(text)) for text in texts]


async def test_groups_and_chunks_keep_their_order(make_prompt):
    terms = (RewardTerm(use="hostile_rewards:length"),)
    with RewardPool(terms, "no-think", 2, 5.0) as pool:
        pairs = [(make_prompt(), "x" * (number % 97)) for number in range(1001)]
        scores = await asyncio.to_thread(pool.score_pairs, pairs)
        assert [score.total for score in scores] == [float(len(text)) for _, text in pairs]
        groups = [["y" * n, "y" * (n + 1)] for n in range(40)]
        scored = await asyncio.gather(*(pool.score(make_prompt(), group) for group in groups))
        totals = [[score.total for score in scores] for scores in scored]
        assert totals == [[float(n), float(n + 1)] for n in range(40)]
        assert await pool.score(make_prompt(), []) == ()


def test_a_pool_of_bad_rewards_raises_the_users_mistake_and_leaves_nothing():
    before = threading.active_count()
    with pytest.raises(UserError, match="No module named 'a_package_nobody_has'"):
        RewardPool((RewardTerm(use="broken_rewards:f"),), "no-think", 2, 5.0)
    assert until(lambda: threading.active_count() <= before)


async def test_the_pool_costs_less_than_a_millisecond_a_completion(make_prompt):
    prompt, group = make_prompt("C"), ["<think>why</think><answer>C</answer>"] * 8
    with RewardPool(PLAIN, "think-before", 2, 5.0) as pool:
        await pool.score(prompt, group)
        seconds = []
        for _ in range(3):  # the best of three: the machine may be busy
            begin = time.perf_counter()
            await asyncio.gather(*(pool.score(prompt, group) for _ in range(50)))
            seconds.append((time.perf_counter() - begin) / (50 * len(group)))
    assert min(seconds) < 1e-3


def test_a_process_is_up_in_a_moment():
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        RewardPool(PLAIN, "no-think", 1, 5.0).close()
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1.5
