"""A call is waited for as long as pings are answered beside it, and no longer."""

from __future__ import annotations

import asyncio

import pytest

from medrl.actors import heartbeat
from medrl.actors.heartbeat import Hangs, answer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.01)


class Process:
    """Its calls end when `work` is set; of its pings, those numbered in `deaf` are not answered."""

    def __init__(self, deaf: range = range(0)) -> None:
        self.work = asyncio.Event()
        self.deaf = deaf
        self.pings = 0

    async def call(self) -> str:
        await self.work.wait()
        return "done"

    async def ping(self) -> None:
        self.pings += 1
        if self.pings - 1 in self.deaf:
            await asyncio.Event().wait()
        if self.pings == 20:
            self.work.set()


async def test_a_long_call_of_a_process_that_answers_pings_is_waited_for() -> None:
    process = Process()
    assert await answer(process.call(), process.ping, heartbeat_s=2.0) == "done"
    assert process.pings == 20


async def test_one_ping_without_an_answer_is_not_enough() -> None:
    """The one who asks may have been held up, and hear both of the answer and of the time's end."""
    process = Process(deaf=range(3, 4))
    assert await answer(process.call(), process.ping, heartbeat_s=2.0) == "done"


async def test_a_process_that_answers_no_more_hangs_and_nothing_goes_on_behind() -> None:
    process = Process(deaf=range(3, 100))
    before = len(asyncio.all_tasks())
    with pytest.raises(Hangs, match=r"no answer to a ping within 2 s"):
        await answer(process.call(), process.ping, heartbeat_s=2.0)
    assert process.pings == 5
    assert len(asyncio.all_tasks()) == before


async def test_what_the_call_raises_is_raised() -> None:
    async def call() -> None:
        await asyncio.sleep(0.05)
        raise LookupError("its own")

    with pytest.raises(LookupError, match="its own"):
        await answer(call(), Process().ping, heartbeat_s=2.0)


async def test_a_call_may_be_given_up_and_leaves_nothing() -> None:
    process = Process()
    process.deaf = range(100)
    before = len(asyncio.all_tasks())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await answer(process.call(), process.ping, heartbeat_s=60)
    assert len(asyncio.all_tasks()) == before
