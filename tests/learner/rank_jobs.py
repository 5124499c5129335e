"""What the processes of `test_deepspeed_ranks` do: real DeepSpeed ranks, job after job."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from made_groups import mixed_batch, settings
from torch import Tensor

from medrl.actors.common_memory import Offer
from medrl.actors.types import ScoredGroup
from medrl.actors.wire import views
from medrl.configs.errors import CheckpointError, LearnerError
from medrl.learner.deepspeed_engine import DeepSpeedRank
from medrl.learner.gathering import WholeOnFirst
from medrl.learner.settings import LearnerSettings

STAGES = (0, 1, 2, 3)
GOING_ON = [(stage, dtype) for dtype in ("float32", "bfloat16") for stage in STAGES]
BUDGET = 100  # tokens a micro-batch: a group each


class Tapped(DeepSpeedRank):
    """Keeps the whole gradient before each optimiser step."""

    gradients: dict[str, Tensor]
    factor: float = 1.0  # of the loss, where it becomes a gradient

    def backward(self, loss: Tensor, *, last: bool) -> None:
        super().backward(loss * self.factor, last=last)

    def step(self, learning_rate: float) -> float:
        from deepspeed.utils import safe_get_full_grad

        named = list(self._policy.vlm.named_parameters())
        found = {name: safe_get_full_grad(p) for name, p in named if p.requires_grad}
        self.gradients = {name: g.clone() for name, g in found.items() if g is not None}
        return super().step(learning_rate)

    def values(self) -> dict[str, Tensor]:
        """Whole on rank 0; elsewhere nothing, for nobody sends from there."""
        return {
            meta.name: tensor.clone()
            for metas, tensors in self._source.buckets(2**20)
            for meta, tensor in zip(metas, () if self.rank else tensors, strict=not self.rank)
        }

    def lying(self) -> dict[str, Tensor]:
        """What engines of this machine read in rank 0's memory."""
        memory = self._source.memory()
        if memory is None:
            return {}
        metas = self.weights()
        tensors = views(metas, memory.part(0, memory.size))
        return {meta.name: one.clone() for meta, one in zip(metas, tensors, strict=True)}


class Ranks:
    """Builds ranks of one world, in this process."""

    def __init__(self, model: Path, images: Path, rank: int, world: int, port: int) -> None:
        self.model, self.images, self.rank, self.world, self.port = model, images, rank, world, port

    def settings(self, **changes: Any) -> LearnerSettings:
        changes = {"tokens_per_micro_batch": BUDGET} | changes
        return settings(self.model, self.images, **changes)

    def make(self, **changes: Any) -> Tapped:
        gc.collect()  # the last rank's: how to load weights is a global of transformers'
        # What is left are modules. DeepSpeed collects up to nine times as it builds a rank, and
        # would go through them each time: half of these tests' seconds.
        gc.freeze()
        return Tapped(
            self.settings(**changes),
            rank=self.rank,
            world=self.world,
            address="127.0.0.1",
            port=self.port,
        )


def gradients(ranks: Ranks, groups: int = 7, **changes: Any) -> dict[str, Any]:
    rank = ranks.make(kl_coefficient=0.1, **changes)
    metrics = rank.update(mixed_batch(rank._reader)[:groups])
    return {"metrics": metrics, "gradients": rank.gradients}


def all_truncated(ranks: Ranks) -> dict[str, Any]:
    """No completion is trained in the first update, and all are in the second."""
    rank = ranks.make(zero_stage=3, mask_truncated=True)
    batch = mixed_batch(rank._reader)
    cut = [
        replace(
            one,
            group=replace(
                one.group,
                completions=tuple(
                    replace(c, finish_reason="length") for c in one.group.completions
                ),
            ),
        )
        for one in batch
    ]
    before = rank.values()
    nothing = rank.update(cut)
    after = rank.values()
    return {
        "nothing": nothing,
        "kept": all(after[name].equal(before[name]) for name in before),
        "next": rank.update(batch),
    }


def frozen_tower_lying(ranks: Ranks) -> bool:
    """Whether engines read what a step made, of DeepSpeed's buffers and what is frozen beside."""
    rank = ranks.make(zero_stage=2, freeze_vision=True, learning_rate=1e-2)
    rank.update(mixed_batch(rank._reader))
    lying, values = rank.lying(), rank.values()
    return lying.keys() == values.keys() and all(map(torch.equal, lying.values(), values.values()))


def frozen_tower(ranks: Ranks) -> dict[str, Any]:
    rank = ranks.make(zero_stage=3, freeze_vision=True)
    before = rank.values()
    rank.update(mixed_batch(rank._reader))
    after = rank.values()
    return {"changed": {name for name in before if not before[name].equal(after[name])}}


def going_on(
    ranks: Ranks, folder: Path, stage: int, dtype: str = "float32", **changes: Any
) -> dict[str, Any]:
    """Three updates in one go, and again from a checkpoint after the first."""
    chosen: dict[str, Any] = {"zero_stage": stage, "schedule": "linear", "dtype": dtype} | changes
    rank = ranks.make(**chosen)
    batch = mixed_batch(rank._reader)
    rank.update(batch)
    rank.save(folder)
    metrics = [rank.update(batch) for _ in range(2)]
    uninterrupted = rank.values()
    del rank
    rank = ranks.make(**chosen)
    rank.load(folder)
    again = [rank.update(batch) for _ in range(2)]
    return {
        "uninterrupted": uninterrupted,
        "resumed": rank.values(),
        "losses": [(a.loss, b.loss) for a, b in zip(metrics, again, strict=True)],
        "rates": [(a.learning_rate, b.learning_rate) for a, b in zip(metrics, again, strict=True)],
        "lying": rank.lying(),
    }


def other_run(ranks: Ranks, folder: Path) -> str:
    """A checkpoint of stage 2 for a rank of stage 3."""
    rank = ranks.make(zero_stage=3)
    try:
        rank.load(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def exported(ranks: Ranks, folder: Path) -> dict[str, Any]:
    rank = ranks.make(zero_stage=3, learning_rate=1e-2)
    batch = mixed_batch(rank._reader)
    rank.update(batch)
    rank.export(folder)
    return {"logprobs": [rank.logprobs(one.group) for one in batch], "weights": rank.weights()}


def gathered(ranks: Ranks) -> dict[str, Any]:
    """Parameters after a step, by both ways of ours and by DeepSpeed's; what ours leaves behind."""
    rank = ranks.make(zero_stage=3, learning_rate=1e-2)
    rank.update(mixed_batch(rank._reader))
    named = dict(rank._policy.vlm.named_parameters())
    before = {name: p.data.data_ptr() for name, p in named.items()}
    gather: Any = rank._source.gather
    ours, in_common = rank.values(), gather.shares_memory
    gather.shares_memory = False  # as on two machines
    received = rank.values()
    after = {name: p.data.data_ptr() for name, p in named.items()}
    with rank._deepspeed.zero.GatheredParameters(list(named.values())):
        theirs = {name: p.detach().clone() for name, p in named.items()}
    return {
        "in common": in_common,
        "ours": [ours, received],
        "deepspeed's": theirs,
        "as before": before == after,
    }


def odd_parts(ranks: Ranks, monkeypatch: pytest.MonkeyPatch | None = None) -> dict[str, Any]:
    """Parameters that no number of ranks divides, in buckets of all sizes, twice. Rank 0 is slow
    with each, the others with the first. With `monkeypatch` the last rank is on another machine, or
    may have no such memory."""
    if monkeypatch and ranks.rank == ranks.world - 1:
        monkeypatch.setattr(Offer, "mapped", lambda offer, **access: None)
        monkeypatch.setattr(os, "memfd_create", partial(os.open, flags=os.O_RDONLY))  # no such file
    generator = torch.Generator().manual_seed(0)
    buckets = [
        [torch.randn(3, size, generator=generator).bfloat16() for size in sizes]
        for sizes in [(3,), (7, 5), (1, 11), (501, 9), (3, 8), (501,), (499,), (2,)]
    ]
    parts = [[partitioned(whole, ranks) for whole in wholes] for wholes in buckets]
    gather, same = WholeOnFirst(chain(*parts)), []
    for number, (wholes, parameters) in enumerate(2 * [*zip(buckets, parts, strict=True)]):
        if ranks.rank and number == 0:
            time.sleep(0.5)
        with gather(parameters):
            if not ranks.rank:
                time.sleep(0.05)
                pairs = zip(parameters, wholes, strict=True)
                same += [one.data.equal(whole) for one, whole in pairs]
    return {"same": same, "in common": gather.shares_memory}


def partitioned(whole: Tensor, ranks: Ranks) -> torch.nn.Parameter:
    """As DeepSpeed has it: this rank's part, the last one padded."""
    size = -(-whole.numel() // ranks.world)
    flat = torch.nn.functional.pad(whole.flatten(), (0, size * ranks.world - whole.numel()))
    parameter: Any = torch.nn.Parameter(torch.empty(0, dtype=whole.dtype))
    parameter.ds_tensor = flat[size * ranks.rank :][:size].clone()
    parameter.ds_numel, parameter.ds_shape = whole.numel(), whole.shape
    return parameter  # type: ignore[no-any-return]


def refusal(ranks: Ranks) -> dict[str, Any]:
    """One rank meets a prompt it must refuse; the other has nothing to complain of."""
    rank = ranks.make(zero_stage=3)
    batch = mixed_batch(rank._reader)
    swapped: list[ScoredGroup] = [
        replace(batch[0], group=replace(batch[0].group, image_hashes=("0" * 64,))),
        *batch[1:],
    ]
    error = ""
    try:
        rank.update(swapped)
    except LearnerError as caught:
        error = str(caught)
    return {"error": error, "loss_after": rank.update(batch).loss}


def changed_image(ranks: Ranks) -> str:
    """The last rank finds, in the midst of the batch, that an image is another one than before."""
    rank = ranks.make(zero_stage=3)

    def changed(hash: str) -> Any:
        raise LearnerError("image a.png changed while the run was using it")

    if ranks.rank == ranks.world - 1:
        rank._reader.image = changed  # type: ignore[method-assign]
    try:
        rank.update(mixed_batch(rank._reader))
    except LearnerError as error:
        return str(error)
    return ""


def poisoned(ranks: Ranks, **changes: Any) -> dict[str, Any]:
    """The last rank's gradient is no number; all ranks must say so, and keep their weights."""
    rank = ranks.make(**changes)
    batch = mixed_batch(rank._reader)
    rank.update(batch)
    before = rank.values()
    if ranks.rank == ranks.world - 1:
        rank.factor = float("nan")
    error = ""
    try:
        rank.update(batch)
    except LearnerError as caught:
        error = str(caught)
    after = rank.values()
    return {"error": error, "kept": all(after[name].equal(before[name]) for name in before)}


def bfloat16(ranks: Ranks) -> dict[str, Any]:
    rank = ranks.make(zero_stage=0, dtype="bfloat16", learning_rate=1e-4)
    before = rank.values()
    metrics = rank.update(mixed_batch(rank._reader))
    return {"metrics": metrics, "before": before, "after": rank.values()}


def all_jobs(ranks: Ranks, out: Path) -> dict[str, Any]:
    results: dict[str, Any] = {
        f"zero {stage}": gradients(ranks, zero_stage=stage) for stage in STAGES
    }
    results["checkpointed"] = gradients(ranks, zero_stage=3, gradient_checkpointing=True)
    results["two updates"] = gradients(ranks, zero_stage=3, updates_per_batch=2)
    for stage in (1, 2, 3):
        results[f"bfloat16 {stage}"] = gradients(ranks, zero_stage=stage, dtype="bfloat16")
    results["gathered"] = gathered(ranks)
    results["odd parts"] = odd_parts(ranks)
    with pytest.MonkeyPatch.context() as monkeypatch:
        results["odd parts apart"] = odd_parts(ranks, monkeypatch)
    if ranks.world == 1:
        return results
    results["one group"] = gradients(ranks, groups=1, zero_stage=3)
    results["all truncated"] = all_truncated(ranks)
    results["frozen tower"] = frozen_tower(ranks)
    results["frozen tower, lying"] = frozen_tower_lying(ranks)
    for stage, dtype in GOING_ON:
        folder = out / f"stage{stage}{dtype}"
        folder.mkdir(exist_ok=True)
        results[f"going on {stage} {dtype}"] = going_on(ranks, folder, stage, dtype)
    results["other run"] = other_run(ranks, out / "stage2float32")
    results["exported"] = exported(ranks, out / "export")
    results["refusal"] = refusal(ranks)
    results["changed image"] = changed_image(ranks)
    for stage in STAGES:
        results[f"poisoned {stage} float32"] = poisoned(ranks, zero_stage=stage)
    for stage in (1, 2, 3):
        results[f"poisoned {stage} bfloat16"] = poisoned(ranks, zero_stage=stage, dtype="bfloat16")
    results["bfloat16"] = bfloat16(ranks)
    return results


Jobs = Callable[[Ranks, Path], dict[str, Any]]


def _main(
    rank: int, world: int, port: int, model: Path, images: Path, out: Path, jobs: Jobs
) -> None:
    torch.set_num_threads(1)
    results = jobs(Ranks(model, images, rank, world, port), out)
    torch.save(results, out / f"results_{rank}.pt")
    # As Ray ends a rank: where Python ends itself, a thread of gloo's that still holds a tensor
    # finds no interpreter, and aborts the process now and then.
    os._exit(0)


def run_ranks(
    world: int, model: Path, images: Path, out: Path, timeout_s: float, jobs: Jobs = all_jobs
) -> Callable[[], Any]:
    """Start `world` processes; call what is returned to wait for rank 0's results."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ["HF_HUB_OFFLINE"] = "1"
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=_main, args=(rank, world, port, model, images, out, jobs), daemon=True
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()

    def wait() -> Any:
        for process in processes:
            process.join(timeout_s)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert codes == [0] * world, f"exit codes of {world} rank(s), None: hung: {codes}"
        return torch.load(out / "results_0.pt", weights_only=False)

    return wait
