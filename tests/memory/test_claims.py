"""The memory this project promises, asserted for the device it promises it on.

The programs and their limits are those of ``experiments/vgg16_memory.py`` and
``experiments/barrier_memory.py``. Nothing is executed: XLA compiles for an H200 that need not be
there.
"""

import math

import pytest

from experiments import barrier_memory
from experiments import vgg16_memory as claims
from experiments.vgg16_stack import COLUMN, Method
from marks import COMPILES_FOR_H200

pytestmark = [*COMPILES_FOR_H200, pytest.mark.slow]

MIB = 2**20


def test_column_is_the_baseline_the_limits_refer_to():
    compiled = claims.compile_gradient(COLUMN, 4096)
    assert compiled.peak_bytes / MIB == pytest.approx(claims.COLUMN_4096_MIB, rel=1e-3)


@pytest.mark.parametrize("row", [row for row in claims.PEAKS if row.limit_mib], ids=str)
def test_peak_memory(row):
    compiled = claims.compile_gradient(row.method, row.size, image_dtype=row.image_dtype)
    assert compiled.peak_bytes / MIB <= row.limit_mib


def test_streams_memory_does_not_grow_with_height():
    lowest, *taller = (claims.height_temp_bytes(height) for height in claims.HEIGHTS)
    assert max(taller) <= claims.HEIGHTS_SPREAD * lowest, (lowest, taller)


@pytest.mark.parametrize("strategy", claims.COMPILE_BLOCKS)
def test_compile_time(strategy):
    """The processor time of a compilation each; the least of up to eight where times scatter.

    What disturbs a compilation only adds to its time: more turns come nearer to the truth.
    """
    few, many = (Method(strategy, num_blocks) for num_blocks in claims.COMPILE_BLOCKS[strategy])
    claims.compile_gradient(COLUMN, claims.COMPILE_SIZE)  # the first one warms the compiler up
    least = {COLUMN: math.inf, few: math.inf, many: math.inf}
    for _ in range(8):
        found = claims.compile_cpu_s(tuple(least), repeats=1)
        least = {method: min(seconds, found[method]) for method, seconds in least.items()}
        slowest = max(least.values()) / least[COLUMN]
        growth = least[many] / least[few]
        if slowest <= claims.COMPILE_LIMIT and growth <= claims.COMPILE_GROWTH_LIMIT:
            return
    pytest.fail(f"{slowest:.2f} times column's, {growth:.2f} from few blocks to many: {least}")


@pytest.mark.parametrize("row", [row for row in barrier_memory.ROWS if row.limit_mib], ids=str)
def test_peak_memory_of_modern_networks(row):
    found = barrier_memory.measure(row, "h200")
    assert found["peak_mib"] <= row.limit_mib
    if row.method == "stream":  # operations of segments are not counted
        assert found["operations"] <= 1.5
