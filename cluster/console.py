"""The console that commands print to."""

from __future__ import annotations

import sys

from rich.console import Console


def make_console() -> Console:
    # A pipe has no width of its own, and 80 columns would break the tables.
    return Console() if sys.stdout.isatty() else Console(width=120)
