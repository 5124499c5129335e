"""A local cluster keeps to this machine: all its processes listen on 127.0.0.1 and nowhere else.

Nobody but this machine's own processes has to reach them, and Ray, vLLM and torch would otherwise
listen on every address of the machine. A cluster of several nodes is the administrator's: there the
nodes' addresses are those that `ray start` was given.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESS = "127.0.0.1"
_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"

ENVIRONMENT = {
    "VLLM_HOST_IP": ADDRESS,
    "GLOO_SOCKET_IFNAME": _INTERFACE,
    "TP_SOCKET_IFNAME": _INTERFACE,
    "NCCL_SOCKET_IFNAME": _INTERFACE,
}
"""What has engines and ranks do so; NCCL moves data by the GPUs' own links all the same."""


@contextmanager
def ray_on_loopback() -> Iterator[None]:
    """Have a Ray cluster that is started in the block take 127.0.0.1 for this node's address.

    Ray does so by itself where it supports no clusters of several nodes (macOS, Windows), and has
    no other setting for it: it replaces a loopback address that it is given (2.60,
    `resolve_ip_for_localhost`)."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
