"""A memory budget as users write it -> bytes."""

from __future__ import annotations

import re

import numpy as np

from lrjax.memory.profiling import device_memory_bytes

_UNITS = {
    "B": 1,
    **{f"{prefix}iB": 2 ** (10 * k) for k, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}B": 1000**k for k, prefix in enumerate("kMGT", 1)},
}
_TEXT = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*")


def parse_budget(budget: int | float | str, target: str | None) -> int:
    """Bytes that a budget stands for.

    Args:
      budget: bytes as an int; text with a unit, such as ``"8GiB"``; or the fraction of the target's
        memory as a float of at most 1.
      target: the device whose memory is meant; None for JAX's default.

    Raises:
      ValueError: it is none of these; names what is allowed.
    """
    allowed = (
        'give bytes as an int, text such as "8GiB" or "500MB", or a fraction of the target\'s '
        "memory as a float above 0 and at most 1"
    )
    if isinstance(budget, str):
        return _from_text(budget, allowed)
    if isinstance(budget, np.integer | np.floating):
        budget = budget.item()
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise ValueError(f"budget={budget!r} is no amount of memory; {allowed}.")
    if not budget > 0:
        raise ValueError(f"budget={budget!r} must be more than nothing; {allowed}.")
    if isinstance(budget, int):
        return budget
    if budget > 1 and budget.is_integer():  # 8e9 is a float
        raise ValueError(
            f"budget={budget!r} is a float, and so a fraction, above 1; give bytes as an int, "
            f'{int(budget)}, or as text, "{int(budget)}B".'
        )
    if budget > 1:
        raise ValueError(f"budget={budget!r} is a fraction above 1; {allowed}.")
    memory = device_memory_bytes(target)
    if memory is None:
        raise ValueError(
            f"budget={budget!r}: the default device does not say how much memory it has; give "
            "bytes, or a target."
        )
    return int(budget * memory)


def _from_text(budget: str, allowed: str) -> int:
    match = _TEXT.fullmatch(budget)
    if match is None:
        raise ValueError(f"budget={budget!r} is no number with a unit; {allowed}.")
    number, unit = match.groups()
    near = {one.lower(): one for one in _UNITS}.get(unit.lower())
    if unit not in _UNITS and near is not None:
        raise ValueError(
            f"budget={budget!r}: there is no unit {unit!r}; did you mean '{number}{near}'?"
        )
    if unit not in _UNITS:
        raise ValueError(
            f"budget={budget!r}: there is no unit {unit!r}; units are {', '.join(_UNITS)}."
        )
    found = int(float(number) * _UNITS[unit])
    if found < 1:
        raise ValueError(f"budget={budget!r} must be more than nothing; {allowed}.")
    return found
