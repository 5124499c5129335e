"""The learner's end of a sync: one sender a transport, chosen by `SyncPlan.transport`.

gloo moves packed buckets between CPUs and is what every test runs. nccl and ipc (`gpu_senders`)
reuse vLLM's packed GPU transfers. All ranks send, for gathering is a collective; rank 0 (for ipc:
the rank on the engine's GPU) is the one whose bytes leave.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

from medrl.actors.lane import Lane, threads_spared
from medrl.actors.types import Sent, SyncPlan, WeightMeta
from medrl.actors.wire import buffer_bytes, digest, lie_packed, num_bytes, split_buckets, views
from medrl.configs.errors import WeightSyncError
from medrl.learner.weight_source import WeightSource


class Sender(Protocol):
    """An open transfer group, seen from a learner rank."""

    def send(self) -> Sent:
        """Send all weights once; on ranks other than 0 only the gathering. The engines must
        receive at the same time. After a `WeightSyncError` the group is of no further use."""
        ...

    def close(self) -> None: ...


def open_sender(plan: SyncPlan, rank: int, source: WeightSource) -> Sender:
    """Form the transfer group of `plan`; returns when every engine joined. `rank` is the ZeRO rank.

    Raises `WeightSyncError` where an engine does not join within `plan.timeout_s`.
    """
    if plan.transport == "gloo":
        return GlooSender(plan, rank, source)
    from medrl.learner.gpu_senders import IpcSender, NcclSender

    return (NcclSender if plan.transport == "nccl" else IpcSender)(plan, rank, source)


def summary(source: WeightSource, digests: dict[str, str], started: float) -> Sent:
    """What was sent since `started` (a `perf_counter`)."""
    weights = source.metadata()
    return Sent(
        tensors=len(weights),
        bytes=sum(map(num_bytes, weights)),
        digests=digests,
        seconds=time.perf_counter() - started,
    )


class GlooSender:
    """Packs a bucket, and gathers and packs the next while the first is on its way. What lies
    packed already goes as it lies."""

    def __init__(self, plan: SyncPlan, rank: int, source: WeightSource) -> None:
        self._plan = plan
        self._source = source
        self._lane: Lane | None = None  # rank 0 alone has one
        if rank:
            return
        buckets = split_buckets(source.metadata(), plan.bucket_bytes)
        try:
            self._lane = Lane(
                plan.address,
                plan.port,
                0,
                plan.world_size,
                plan.timeout_s,
                plan.bucket_bytes,
                slot_bytes=max(map(buffer_bytes, buckets)),
                weights=source.memory(),
                share_memory=plan.share_memory,
            )
        except RuntimeError as error:
            raise WeightSyncError(
                f"sync: not all of {plan.world_size - 1} engine(s) joined the transfer group at "
                f"{plan.address}:{plan.port} within {plan.timeout_s:g} s: {error}"
            ) from error

    def send(self) -> Sent:
        try:
            with threads_spared():
                return self._send()
        except BaseException:
            # Without it engines would wait for the rest until their deadline.
            self.close()
            raise

    def _send(self) -> Sent:
        started = time.perf_counter()
        start = 0  # of the bucket, in bytes
        digests: dict[str, str] = {}
        failure: Exception | None = None
        lane = self._lane
        # Where the lane says otherwise none gathers by the bucket: others need not cut as rank 0.
        bucket_bytes = lane.bucket_bytes if lane else self._plan.bucket_bytes
        leaving: list[Future[None]] = []
        with ThreadPoolExecutor(1, "medrl-send") as thread:
            for number, (bucket, tensors) in enumerate(self._source.buckets(bucket_bytes)):
                if lane is None or failure:
                    continue  # the other ranks gather on: leaving them alone would hang them
                try:
                    if number >= 2:
                        leaving[number - 2].result()
                    slot = lane.slot(number, start, buffer_bytes(bucket))
                    start += slot.numel()
                    wholes = list(tensors)
                    if not lie_packed(wholes, slot.data_ptr()):
                        _copy(wholes, bucket, slot)
                    leaving.append(thread.submit(self._pass_on, lane, number, slot))
                    for meta, tensor in zip(bucket, wholes, strict=True):
                        digests[meta.name] = digest(tensor)
                except WeightSyncError as error:
                    failure = error
            for sending in leaving[-2:]:
                failure = failure or sending.exception()  # type: ignore[assignment]
        if failure:
            raise failure
        return summary(self._source, digests, started)

    def close(self) -> None:
        if self._lane is not None:
            self._lane.close()

    def _pass_on(self, lane: Lane, number: int, slot: torch.Tensor) -> None:
        try:
            lane.pass_on(slot)
        except RuntimeError as error:
            raise WeightSyncError(
                f"sync: sending bucket {number} to {self._plan.world_size - 1} engine(s) failed: "
                f"{error}"
            ) from error


def _copy(
    tensors: Iterable[torch.Tensor], bucket: Sequence[WeightMeta], slot: torch.Tensor
) -> None:
    """Into the slot, but for those that lie there."""
    for tensor, place in zip(tensors, views(bucket, slot), strict=True):
        if tensor.data_ptr() != place.data_ptr():
            place.copy_(tensor)
