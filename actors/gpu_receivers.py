"""vLLM's end of a sync between GPUs, over vLLM's own packed transfers.

Unmeasured so far: written against vLLM 0.32's sources, and not yet run on a GPU.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from vllm.distributed.weight_transfer.nccl_common import stateless_init_process_group
from vllm.distributed.weight_transfer.packed_tensor import (
    PackedBufferImporter,
    packed_ipc_consumer,
    packed_nccl_broadcast_consumer,
)

from medrl.actors.gloo_receiver import JoinInfo, Receiver, UpdateInfo
from medrl.actors.wire import decode_ipc_handle


class NcclReceiver(Receiver):
    """Every tensor-parallel worker takes whole tensors from learner rank 0 and keeps its part."""

    _group: Any = None
    _bucket_bytes = 0

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        self.shutdown()
        self._bucket_bytes = init_info.bucket_bytes
        self._group = stateless_init_process_group(
            init_info.address,
            init_info.port,
            init_info.rank + self.parallel_config.rank,
            init_info.world_size,
            torch.accelerator.current_device_index(),
        )

    def receive_weights(self, update_info: UpdateInfo) -> None:
        packed_nccl_broadcast_consumer(
            iterator=(
                (meta.name, (list(meta.shape), getattr(torch, meta.dtype)))
                for meta in update_info.weights
            ),
            group=self._group,
            src=0,
            post_unpack_func=self.load,
            buffer_size_bytes=self._bucket_bytes,
            device=self.device,
        )
        torch.accelerator.synchronize()

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.destroy()
            self._group = None


class IpcReceiver(Receiver):
    """Reads the buffer of the learner rank on the same GPU; `learner.gpu_senders` has the keys."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._importer = PackedBufferImporter()
        self._round = 0

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        self._timeout = timedelta(seconds=init_info.timeout_s)
        self._store = TCPStore(
            init_info.address, init_info.port, is_master=False, timeout=self._timeout
        )
        self._gpu = str(torch.cuda.get_device_properties(self.device.index).uuid)
        self._store.set(f"engine/{self._gpu}", "here")
        self._round = 0

    def receive_weights(self, update_info: UpdateInfo) -> None:
        number = 1
        while True:
            key = f"{self._round}/{self._gpu}/{number}"
            self._store.wait([key], self._timeout)
            if not (text := self._store.get(key)):
                break
            chunk = json.loads(text)
            handle = {self._gpu: decode_ipc_handle(chunk.pop("handle"))}
            self.load(
                packed_ipc_consumer(
                    ipc_handle=handle,
                    device_index=self.device.index,
                    importer=self._importer,
                    **chunk,
                )
            )
            torch.accelerator.synchronize()  # the copies are made: the buffer may change
            self._store.set(f"{key}/taken", "yes")
            number += 1
        self._round += 1

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._importer.close()

    def shutdown(self) -> None:
        self._importer.close()
