"""vLLM's end of a sync on CPUs, and what every transport's receiver shares.

`register` is the entry point `vllm.general_plugins`: vLLM calls it in each process it starts, so
that `weight_transfer_config = {"backend": "medrl_gloo"}` finds its class there.

One of the three traps of a sync is mended here: each tensor's digest is taken as it arrived, for on
CPUs vLLM's own checksums hash the empty tensors that packing leaves behind. (Stale packed weights:
`loaders`; stale caches: `vllm_engine`.)
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from medrl.actors.lane import Lane, threads_spared
from medrl.actors.leftovers import name_shared_memory
from medrl.actors.loaders import Loader, make_loader
from medrl.actors.types import WeightMeta
from medrl.actors.wire import buffer_bytes, digest, split_buckets, views

BACKENDS = {
    "medrl_gloo": ("medrl.actors.gloo_receiver", "GlooReceiver"),
    "medrl_nccl": ("medrl.actors.gpu_receivers", "NcclReceiver"),
    "medrl_ipc": ("medrl.actors.gpu_receivers", "IpcReceiver"),
}


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def register() -> None:
    """Make the receivers known to vLLM in this process, and the process one that leaves nothing
    behind; again is harmless."""
    if parent := multiprocessing.parent_process():
        _end_with(parent.pid)
    name_shared_memory()
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    for backend, (module, name) in BACKENDS.items():
        if backend not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(backend, module, name)


def _end_with(parent: int | None) -> None:
    """vLLM's processes look for a parent's death in part only: killed, an actor would leave one
    that holds its memory, and the engine started in its place would lack it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that call
        os._exit(1)


@dataclass
class JoinInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """What a worker needs to join a transfer group; the fields of `SyncPlan`."""

    address: str
    port: int
    rank: int  # of the engine's first worker, in the group
    world_size: int
    bucket_bytes: int
    timeout_s: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One update: what will arrive, and where to write the digests of what did arrive."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    digests_path: str  # plus the worker's rank; a JSON object, tensor name -> digest

    @property
    def weights(self) -> list[WeightMeta]:
        return [
            WeightMeta(name=name, dtype=dtype, shape=tuple(shape))
            for name, dtype, shape in zip(self.names, self.dtype_names, self.shapes, strict=True)
        ]


class Receiver(WeightTransferEngine[JoinInfo, UpdateInfo]):  # type: ignore[misc]
    """The life of an update; subclasses say in `receive_weights` how tensors come."""

    init_info_cls = JoinInfo
    update_info_cls = UpdateInfo

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._digests: dict[str, str] = {}
        self._loader: Loader | None = None  # made at the first update, which says what will come
        self._threads = torch.get_num_threads()  # an update is spared some of them

    def start_weight_update(self) -> None:
        """All is in `update_weights`, of which an update has one."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        info = self.parse_update_info(update_info)
        self._digests = {}
        if self._loader is None:
            self._loader = make_loader(
                self.model, self.model_config, self.device, info.weights, self._threads
            )
        self._loader.begin()
        self.receive_weights(info)
        self._loader.end()
        path = Path(f"{info.digests_path}.{self.parallel_config.rank}")
        path.write_text(json.dumps(self._digests))

    def finish_weight_update(self) -> None:
        """See `start_weight_update`."""

    def load(self, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Hand tensors that arrived to the model. The thread that loads one takes its digest first:
        then it is in that core's cache."""
        assert self._loader is not None
        self._loader.load(weights, self._note)

    def _note(self, name: str, tensor: torch.Tensor) -> None:
        self._digests[name] = digest(tensor)


class GlooReceiver(Receiver):
    """Takes packed buckets from rank 0: the next arrives while the last are loaded."""

    _lane: Lane | None = None

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        self.shutdown()
        self._lane = Lane(
            init_info.address,
            init_info.port,
            init_info.rank,
            init_info.world_size,
            init_info.timeout_s,
            init_info.bucket_bytes,
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            with threads_spared():
                super().update_weights(update_info)
        except BaseException:
            self.shutdown()  # else all others would wait for this one until their deadline
            raise

    def receive_weights(self, update_info: UpdateInfo) -> None:
        lane = self._lane
        if lane is None:
            raise RuntimeError("receiving needs a transfer group")
        with ThreadPoolExecutor(1, "medrl-receive") as thread:
            slots = list(_slots(lane, update_info.weights))
            arriving = thread.submit(_take, lane, slots[0])
            for slot, ahead in zip(slots, [*slots[1:], None], strict=True):
                names = [meta.name for meta in slot.bucket]
                weights = list(zip(names, views(slot.bucket, slot.memory), strict=True))
                arriving.result()
                if ahead:
                    arriving = thread.submit(_take, lane, ahead)
                self.load(weights)

    def shutdown(self) -> None:
        if self._lane is not None:
            self._lane.close()
            self._lane = None


class Slot(NamedTuple):
    """Where a bucket comes to lie."""

    number: int
    bucket: Sequence[WeightMeta]
    memory: torch.Tensor  # uint8


def _slots(lane: Lane, weights: Sequence[WeightMeta]) -> Iterator[Slot]:
    start = 0
    for number, bucket in enumerate(split_buckets(weights, lane.bucket_bytes)):
        memory = lane.slot(number, start, buffer_bytes(bucket))
        yield Slot(number, bucket, memory)
        start += memory.numel()


def _take(lane: Lane, slot: Slot) -> None:
    try:
        lane.pass_on(slot.memory)
    except RuntimeError as error:
        raise RuntimeError(f"bucket {slot.number} from the learner: {error}") from error
