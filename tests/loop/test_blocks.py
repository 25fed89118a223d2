"""Blocks of rows of whole arrays: rows outside are filled when read, dropped when written."""

import jax.numpy as jnp
import numpy as np
import pytest

from lrjax.loop.blocks import read_rows, write_rows

FILL = 7.0
# Extremes of the start: inside, across either edge or both, and beyond them by more than a block.
BOUNDS = [(0, 1), (-2, 0), (-1, 4), (1, 6), (-9, -7), (6, 11), (-8, 9)]


def _array(rows: int, sign: int) -> np.ndarray:
    return sign * np.arange(1.0, 2 * rows + 1, dtype=np.float32).reshape(1, rows, 2)


@pytest.mark.parametrize("is_static", [True, False])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize(("height", "size"), [(5, 2), (5, 5), (3, 4), (1, 1)])
def test_any_start_within_the_bounds(height, size, bounds, is_static):
    whole, rows = _array(height, 1), _array(size, -1)
    for start in sorted({*bounds, sum(bounds) // 2}):
        read = np.full((1, size, 2), FILL, np.float32)
        written, added = whole.copy(), whole.copy()
        for i in range(size):
            if 0 <= start + i < height:
                read[:, i] = whole[:, start + i]
                written[:, start + i] = rows[:, i]
                added[:, start + i] += rows[:, i]
        at = start if is_static else jnp.int32(start)
        found = read_rows(jnp.asarray(whole), at, size, 1, FILL, bounds)
        np.testing.assert_array_equal(found, read)
        put = jnp.asarray(whole), jnp.asarray(rows), at, 1, bounds
        np.testing.assert_array_equal(write_rows(*put), written)
        np.testing.assert_array_equal(write_rows(*put, jnp.add), added)
