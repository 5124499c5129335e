"""vLLM's end of a sync on CPUs, and what every transport's receiver shares.

`register` is the entry point `vllm.general_plugins`: vLLM calls it in each process it starts, so
that `weight_transfer_config = {"backend": "medrl_gloo"}` finds its class there.

Two of the three traps of a sync are mended here (the third, stale caches, in `vllm_engine`):
- each tensor's digest is taken as it arrived, for on CPUs vLLM's own checksums hash the empty
  tensors that packing leaves behind;
- a tied `lm_head` keeps a packed copy of its own on CPUs, which the reload forgets: packed anew.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.distributed_c10d import ProcessGroupGloo
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from medrl.actors.leftovers import name_shared_memory
from medrl.actors.types import WeightMeta
from medrl.actors.wire import broadcast, buffer_bytes, digest, open_gloo, split_buckets, views

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
        self._reloading = False

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if self._reloading:  # the last update broke off: forget the part that arrived
            self._end_reload()
        initialize_layerwise_reload(self.model)
        self._reloading = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        info = self.parse_update_info(update_info)
        self._digests = {}
        self.receive_weights(info)
        path = Path(f"{info.digests_path}.{self.parallel_config.rank}")
        path.write_text(json.dumps(self._digests))

    def finish_weight_update(self) -> None:
        self._end_reload()
        self.repack_tied_head()

    def load(self, weights: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Take the digests of tensors that arrived, and hand them to the model."""
        for name, tensor in weights:
            self._digests[name] = digest(tensor)
        self.model.load_weights(weights)

    def repack_tied_head(self) -> None:
        """Linear layers on CPUs multiply with a packed copy; the reload renews all but lm_head's
        where it is tied, for its weight is loaded as the embedding's."""
        if self.device.type != "cpu":
            return
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.model.modules():
            if isinstance(module, ParallelLMHead) and module.weight.numel():
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def _end_reload(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        self._reloading = False


class GlooReceiver(Receiver):
    """Takes packed buckets from rank 0: loads one while the next arrives."""

    _group: ProcessGroupGloo | None = None
    _bucket_bytes = 0

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        self.shutdown()
        self._bucket_bytes = init_info.bucket_bytes
        self._group = open_gloo(
            init_info.address,
            init_info.port,
            init_info.rank,
            init_info.world_size,
            init_info.timeout_s,
        )

    def receive_weights(self, update_info: UpdateInfo) -> None:
        buckets = list(split_buckets(update_info.weights, self._bucket_bytes))
        with ThreadPoolExecutor(1, "medrl-receive") as receiver:
            arriving = receiver.submit(self._take, 0, buckets[0])
            for number, bucket in enumerate(buckets):
                buffer = arriving.result()
                if number + 1 < len(buckets):
                    arriving = receiver.submit(self._take, number + 1, buckets[number + 1])
                names = [meta.name for meta in bucket]
                self.load(list(zip(names, views(bucket, buffer), strict=True)))

    def shutdown(self) -> None:
        if self._group is not None:
            self._group.shutdown()
            self._group = None

    def _take(self, number: int, bucket: Sequence[WeightMeta]) -> torch.Tensor:
        # A fresh buffer each: the reload keeps views until all of a layer's tensors are there.
        buffer = torch.empty(buffer_bytes(bucket), dtype=torch.uint8)
        if self._group is None:
            raise RuntimeError("receiving needs a transfer group")
        try:
            broadcast(self._group, buffer)
        except RuntimeError as error:
            raise RuntimeError(f"bucket {number} from the learner: {error}") from error
        return buffer
