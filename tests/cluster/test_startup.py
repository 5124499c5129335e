"""Where a start's time went is written once, by part, and the parts are all of it."""

import asyncio
import time
from pathlib import Path

import psutil
import pytest

from medrl.cluster.startup import Startup, process_start
from medrl.reports.lines import read_lines


async def test_the_parts_of_a_start_add_up_to_it(tmp_path: Path) -> None:
    began = time.monotonic() - 3.0
    startup = Startup(began)
    startup.reached("imports")
    assert await startup.timed("engines", asyncio.sleep(0.01, "up")) == "up"
    startup.reached("engines and learner")
    startup.reached("imports")  # over long ago
    startup.write(tmp_path, None)  # no completion is there yet
    first = time.monotonic() + 5.0
    startup.write(tmp_path, first)
    startup.write(tmp_path, first + 1.0)
    (line,) = read_lines(tmp_path / "startup.jsonl")
    assert line["seconds"] == pytest.approx(first - began, abs=0.01)
    assert sum(line["parts"].values()) == pytest.approx(line["seconds"], abs=0.01)
    assert list(line["parts"]) == ["imports", "engines and learner", "first completion"]
    assert line["parts"]["imports"] >= 3.0
    assert line["side_by_side"]["engines"] >= 0.01


def test_a_process_knows_when_it_was_started() -> None:
    age = time.monotonic() - process_start()
    assert age == pytest.approx(time.time() - psutil.Process().create_time(), abs=2.0)
