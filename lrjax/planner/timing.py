"""Measured time of programs on the device at hand, side by side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

TURNS = 5


def median_seconds(
    programs: Sequence[Callable[..., Any]], structs: Sequence[Any], turns: int = TURNS
) -> list[float]:
    """Median seconds of a call, of every program, on one device.

    Programs take turns, so that whatever else the device does meets all of them.

    Args:
      programs: functions of the same arguments; compiled and run once before they are timed.
      structs: shapes and dtypes of the arguments (pytrees), which are made up: normal numbers,
        zeros where they are integers.
      turns: timed calls of every program.

    Returns:
      Seconds; infinity for a program that does not fit in the device's memory.
    """
    args = jax.block_until_ready(jax.tree.map(_array, tuple(structs)))
    seconds: list[list[float]] = [[] for _ in programs]
    compiled = [jax.jit(program).lower(*args).compile() for program in programs]
    for turn in range(turns + 1):
        for own, run in zip(seconds, compiled, strict=True):
            spent = _spent(run, args)
            if turn:  # the first call warms up
                own.append(spent)
    return list(map(statistics.median, seconds))


def _spent(run: Callable[..., Any], args: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    try:
        jax.block_until_ready(run(*args))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    return time.perf_counter() - start


def _array(struct: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(struct.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), struct.shape)
    if jnp.issubdtype(struct.dtype, jnp.inexact):
        # Small, so that no depth of layers overflows.
        return 0.05 * jax.random.normal(jax.random.key(0), struct.shape, struct.dtype)
    return jnp.zeros(struct.shape, struct.dtype)
