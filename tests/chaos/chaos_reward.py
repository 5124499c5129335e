"""A reward that misbehaves on one completion each time it is ordered to."""

from __future__ import annotations

import os
from pathlib import Path

from hostile_rewards import behave

from medrl.actors.types import Prompt


def obey(completion: str, prompt: Prompt) -> float:
    """Carry out the oldest order there is, NUMBER-ACTION.order: whoever renames it has it."""
    for order in sorted(Path(os.environ["REWARD_ORDERS"]).glob("*.order")):
        try:
            order.rename(order.with_suffix(".claimed"))
        except FileNotFoundError:
            continue  # the other process was first
        behave(order.stem.partition("-")[2], prompt)
        break
    return 0.0
