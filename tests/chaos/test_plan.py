"""The plan of faults: as many as the soak promises, at moments that a seed decides."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from faults import FAULTS
from harm import cut_in_half, flip_a_byte
from plan import FULL, SHORT, fewer, plan


def test_the_soak_is_as_large_as_it_says() -> None:
    """At least 100 faults of all kinds, half of them kills of engines, ranks and the driver."""
    kills = {fault.name for fault in FAULTS if fault.is_kill}
    counts = dict.fromkeys((fault.name for fault in FAULTS), 0)
    for phase in FULL.values():
        for name, count in phase.items():
            counts[name] += count
    assert min(counts.values()) > 0
    assert sum(counts.values()) >= 100
    assert 2 * sum(counts[name] for name in kills) >= sum(counts.values())
    assert 8 <= sum(sum(of.values()) for of in SHORT.values()) <= 12
    fewest = fewer(FULL, 12)
    assert 6 <= sum(sum(of.values()) for of in fewest.values()) <= 20


def test_a_seed_is_a_plan() -> None:
    """All faults, in an order and at moments that the seed decides, none before `first`."""
    counts = FULL["equal"]
    plans = [plan(counts, random.Random(seed), first=11, last=190) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    for planned in plans:
        assert sorted(it.fault.name for it in planned) == sorted(
            name for name, n in counts.items() for _ in range(n)
        )
        steps = [it.step for it in planned if it.step]
        assert steps == sorted(steps)
        assert 11 <= min(steps) <= max(steps) < 190


def test_a_phase_has_its_own_faults_only() -> None:
    phases = {fault.name: fault.phases for fault in FAULTS}
    for sizes in (FULL, SHORT):
        for phase, counts in sizes.items():
            assert all(phase in phases[name] for name in counts)


def test_damage_is_damage(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    flip_a_byte(file)
    flipped = file.read_bytes()
    assert len(flipped) == 10
    assert flipped != b"0123456789"
    cut_in_half(file)
    assert file.read_bytes() == flipped[:5]


def test_it_is_a_program() -> None:
    soak = Path(__file__).with_name("soak.py")
    done = subprocess.run([sys.executable, soak, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--seed" in done.stdout
