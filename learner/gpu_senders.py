"""The learner's end of a sync between GPUs, over vLLM's own packed transfers.

Unmeasured so far: written against vLLM 0.32's sources, and not yet run on a GPU. NCCL knows no
deadline: where an engine dies in mid-transfer, `Sync` gives up and the learner must be restarted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from vllm.distributed.weight_transfer.nccl_common import trainer_init
from vllm.distributed.weight_transfer.packed_tensor import (
    packed_ipc_producer,
    packed_nccl_broadcast_producer,
)

from medrl.actors.types import Sent, SyncPlan
from medrl.actors.wire import digest, encode_ipc_handle, num_bytes, open_store
from medrl.learner.transports import summary
from medrl.learner.weight_source import WeightSource


def _pairs(
    source: WeightSource, bucket_bytes: int, digests: dict[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies, for a transfer holds on to them after the gathered bucket is gone."""
    for bucket, tensors in source.buckets(bucket_bytes):
        for meta, tensor in zip(bucket, tensors, strict=True):
            copy = tensor.detach().clone()
            digests[meta.name] = digest(copy)
            yield meta.name, copy


def _value(item: tuple[str, torch.Tensor]) -> torch.Tensor:
    return item[1]


class NcclSender:
    """Rank 0 broadcasts to engines on other GPUs; the other ranks only gather."""

    def __init__(self, plan: SyncPlan, rank: int, source: WeightSource) -> None:
        self._plan, self._source = plan, source
        self._group: Any = None
        if rank == 0:
            where = {"master_address": plan.address, "master_port": plan.port}
            self._group = trainer_init(where | {"world_size": plan.world_size})

    def send(self) -> Sent:
        started = time.perf_counter()
        digests: dict[str, str] = {}
        if self._group is None:
            for _ in self._source.buckets(self._plan.bucket_bytes):
                pass
            return summary(self._source, digests, started)
        packed_nccl_broadcast_producer(
            iterator=_pairs(self._source, self._plan.bucket_bytes, digests),
            group=self._group,
            src=0,
            post_iter_func=_value,
            buffer_size_bytes=self._plan.bucket_bytes,
        )
        torch.cuda.synchronize()
        return summary(self._source, digests, started)

    def close(self) -> None:
        if self._group is not None:
            self._group.destroy()
            self._group = None


class IpcSender:
    """Every rank shares a buffer with the engine on its own GPU; handles go through a store.

    Keys: `engine/UUID` an engine is there; `ROUND/UUID/NUMBER` a chunk, empty after the last;
    `.../taken` it was read, so the buffer may be written again.
    """

    def __init__(self, plan: SyncPlan, rank: int, source: WeightSource) -> None:
        self._plan, self._source = plan, source
        self._timeout = timedelta(seconds=plan.timeout_s)
        self._store = open_store(
            plan.address,
            plan.port,
            is_master=rank == 0,
            timeout=self._timeout,
            wait_for_workers=False,
        )
        self._gpu = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        self._round = 0

    def send(self) -> Sent:
        started = time.perf_counter()
        digests: dict[str, str] = {}
        pairs = _pairs(self._source, self._plan.bucket_bytes, digests)
        if self._store.check([f"engine/{self._gpu}"]):
            self._share(pairs)
        else:
            for _ in pairs:  # no engine on this GPU, but gathering needs every rank
                pass
        self._round += 1
        return summary(self._source, digests, started)

    def close(self) -> None:
        """The store ends with this object."""

    def _share(self, pairs: Iterator[tuple[str, torch.Tensor]]) -> None:
        largest = max(map(num_bytes, self._source.metadata()))  # a chunk never splits a tensor
        chunks = packed_ipc_producer(
            iterator=pairs,
            gpu_uuid=self._gpu,
            post_iter_func=_value,
            buffer_size_bytes=max(self._plan.bucket_bytes, largest),
        )
        number = 0
        for number, chunk in enumerate(chunks, start=1):
            key = f"{self._round}/{self._gpu}/{number}"
            content = {
                "names": chunk.names,
                "shapes": [list(shape) for shape in chunk.shapes],
                "dtype_names": chunk.dtype_names,
                "tensor_sizes": chunk.tensor_sizes,
                "handle": encode_ipc_handle(chunk.ipc_handle[self._gpu]),
            }
            self._store.set(key, json.dumps(content))
            self._store.wait([f"{key}/taken"], self._timeout)
        self._store.set(f"{self._round}/{self._gpu}/{number + 1}", "")
