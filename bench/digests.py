"""What the digests of a receipt cost, as a share of the syncs of a finished run.

    python bench/digests.py RUN

Both sides take the digest of every tensor of RUN/export, one side after the other: in a sync each
does so while the next bucket is on its way, so the share is at most what this prints.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

from safetensors.torch import load_file
from torch import Tensor

from medrl.actors.wire import digest
from medrl.reports.lines import read_lines

REPEATS = 7


def main() -> None:
    """Print one line. Times are medians; the first sync opens connections and is left out."""
    run = Path(sys.argv[1])
    syncs = read_lines(run / "syncs.jsonl")[1:]
    files = sorted((run / "export").glob("*.safetensors"))
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    sync_s = median(line["seconds"] for line in syncs)
    transfer_s = median(line["seconds_transfer"] for line in syncs)
    both_s = 2 * median(_seconds(tensors) for _ in range(REPEATS))
    print(
        f"{syncs[0]['bytes'] / 1e6:.1f} MB in {len(tensors)} tensors: sync {1e3 * sync_s:.0f} ms, "
        f"of that moving {1e3 * transfer_s:.0f} ms; digests of both sides {1e3 * both_s:.2f} ms: "
        f"{both_s / sync_s:.1%} of the sync"
    )


def _seconds(tensors: list[Tensor]) -> float:
    began = time.perf_counter()
    for tensor in tensors:
        digest(tensor)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
