"""Messages between the pool and its processes: a length, then JSON. Standard library only.

JSON rather than pickle: what a reward's process sends cannot run code in the one that reads it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

_LENGTH = struct.Struct("!I")


def pack(message: Any) -> bytes:
    """Return a message as it travels. Any str survives, lone surrogates included."""
    body = json.dumps(message).encode("ascii")
    return _LENGTH.pack(len(body)) + body


def unpack(receive: Callable[[int], bytes], longest: int = 2**32) -> Any:
    """Read one message with `receive(n)` (at most n bytes; none at the end of the stream).

    Raises EOFError at the end, ValueError for anything but a message.
    """
    (length,) = _LENGTH.unpack(_exactly(receive, _LENGTH.size))
    if length > longest:
        raise ValueError(f"message of {length} bytes, at most {longest}")
    return json.loads(_exactly(receive, length))


def _exactly(receive: Callable[[int], bytes], size: int) -> bytes:
    parts = []
    while size:
        part = receive(min(size, 1 << 20))
        if not part:
            raise EOFError("the other side closed")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
