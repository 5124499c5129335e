"""How many: a number, or a range such as "2..8". As it is written in a file, and read back."""

from __future__ import annotations

import re

from pydantic_core import PydanticCustomError

Count = int | str

_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")


def bounds(count: Count) -> tuple[int, int]:
    """Fewest and most."""
    fewest, _, most = str(count).partition("..")
    return int(fewest), int(most or fewest)


def checked_count(value: object) -> Count:
    """`value`, if it is a count; at least one."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number or (isinstance(value, str) and _RANGE.fullmatch(value)):
        assert isinstance(value, int | str)
        fewest, most = bounds(value)
        if 1 <= fewest <= most:
            return value
    raise PydanticCustomError(
        "count", 'a number of at least 1, or from and to, such as "2..8", the smaller first'
    )
