"""What both ends of a weight transfer must agree on: buckets, digests, the gloo group. Torch only.

Weights travel as packed buckets: a flat uint8 tensor that holds whole tensors in their order, each
at a multiple of `ALIGNMENT` bytes. Both ends cut the buckets from the same list of `WeightMeta`.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import xxhash
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    ProcessGroup,
    ProcessGroupGloo,
    TCPStore,
)

from medrl.actors.types import WeightMeta

ALIGNMENT = 8  # bytes: any element type may start there


def num_bytes(meta: WeightMeta) -> int:
    """Size of one tensor on the wire, without padding."""
    dtype: torch.dtype = getattr(torch, meta.dtype)
    return math.prod(meta.shape) * dtype.itemsize


def split_buckets(weights: Sequence[WeightMeta], bucket_bytes: int) -> Iterator[list[WeightMeta]]:
    """Consecutive runs of at most `bucket_bytes`; a larger tensor is a bucket of its own."""
    bucket: list[WeightMeta] = []
    size = 0
    for meta in weights:
        added = padded(num_bytes(meta))
        if bucket and size + added > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append(meta)
        size += added
    if bucket:
        yield bucket


def views(bucket: Sequence[WeightMeta], buffer: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bucket's tensors as views of `buffer`, a uint8 tensor of `buffer_bytes(bucket)`."""
    start = 0
    as_type = {dtype: buffer.view(getattr(torch, dtype)) for dtype in {m.dtype for m in bucket}}
    for meta in bucket:
        typed = as_type[meta.dtype]
        first, size = start // typed.itemsize, math.prod(meta.shape)
        yield typed[first : first + size].view(meta.shape)
        start += padded(size * typed.itemsize)


def buffer_bytes(bucket: Sequence[WeightMeta]) -> int:
    """Size of the bucket's buffer, padding included."""
    return sum(padded(num_bytes(meta)) for meta in bucket)


def digest(tensor: torch.Tensor) -> str:
    """Of the bytes, not the shape: XXH3 on the CPU (33 GB/s a core); on a GPU two sums, the second
    weighted by position, so that the bytes need not leave it. The two kinds never compare."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if not tensor.is_cuda:
        return xxhash.xxh3_64_hexdigest(flat.numpy().data)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    position = torch.arange(1, 2 * padded.numel(), 2, device=padded.device)
    plain, weighted = padded.sum().item(), (padded * position).sum().item()
    return f"{int(plain) & (2**64 - 1):016x}{int(weighted) & (2**64 - 1):016x}"


def open_store(
    address: str, port: int, world_size: int | None = None, *, is_master: bool, **options: Any
) -> TCPStore:
    """torch's key-value store, whose server listens on loopback alone where `address` is that: by
    itself torch has it listen on every address of the machine."""
    if is_master and address.startswith("127."):
        options["master_listen_fd"] = socket.create_server((address, port)).detach()
    return TCPStore(address, port, world_size, is_master=is_master, **options)


def open_gloo(
    address: str, port: int, rank: int, world_size: int, timeout_s: float
) -> ProcessGroupGloo:
    """Join a group beside torch's default one. Rank 0 listens on `port`; returns when all joined.

    Every collective of the group fails after `timeout_s`; so does joining.
    """
    timeout = timedelta(seconds=timeout_s)
    store = open_store(address, port, world_size, is_master=rank == 0, timeout=timeout)
    return ProcessGroupGloo(PrefixStore("medrl_sync", store), rank, world_size, timeout)


def collective(group: ProcessGroup | ProcessGroupGloo | None, name: str, *arguments: Any) -> None:
    """Call a collective of `group`, and wait. Raises `RuntimeError` past the group's timeout."""
    if group is None:
        raise RuntimeError("the transfer group is closed")
    work = getattr(group, name)(*arguments)
    try:
        work.wait()
    finally:
        del group, work  # else an error's traceback would keep the connections open


def encode_ipc_handle(arguments: Sequence[Any]) -> list[Any]:
    """CUDA IPC arguments of a uint8 tensor (`torch.multiprocessing.reductions`) as plain JSON, for
    they cross a socket: unpickling there would run whatever a stranger sends."""
    _, size, stride, offset, _, _, *rest = arguments
    plain = [{"hex": it.hex()} if isinstance(it, bytes) else it for it in rest]
    return [list(size), list(stride), offset, plain]


def decode_ipc_handle(encoded: Sequence[Any]) -> tuple[Any, ...]:
    """What `encode_ipc_handle` was given."""
    size, stride, offset, plain = encoded
    rest = [bytes.fromhex(it["hex"]) if isinstance(it, dict) else it for it in plain]
    head = (torch.Tensor, torch.Size(size), tuple(stride), offset)
    return (*head, torch.UntypedStorage, torch.uint8, *rest)


def padded(size: int) -> int:
    """`size` bytes and the room to the next tensor."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def starts(sizes: Iterable[int]) -> list[int]:
    """Where tensors of `sizes` bytes begin in a bucket, and where it ends."""
    return [*accumulate(map(padded, sizes), initial=0)]


def lie_packed(tensors: Sequence[torch.Tensor], address: int) -> bool:
    """Whether they lie at `address` as a bucket of them would."""
    begins = starts(tensor.nbytes for tensor in tensors)
    return all(
        tensor.data_ptr() == address + begin and tensor.is_contiguous()
        for tensor, begin in zip(tensors, begins, strict=False)
    )
