"""Peak resident memory in a fresh process: sizes known beforehand, and failures."""

import sys

import jax
import jax.numpy as jnp
import pytest

from lrjax.memory import measure_rss

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the mark is read from /proc")

MIB = 2**20


def prepare_ones(mib):
    """A compiled computation whose only large value is ``mib`` MiB of float32 ones."""
    return jax.jit(lambda: jnp.ones(mib * MIB // 4, jnp.float32)).lower().compile()


def prepare_ones_after_garbage(mib):
    """The same, after as much memory was used and freed."""
    computation = prepare_ones(mib)
    computation().block_until_ready()
    return computation


def prepare_failure():
    raise RuntimeError("no such luck")


@pytest.mark.slow
@pytest.mark.parametrize("prepare", ["prepare_ones", "prepare_ones_after_garbage"])
def test_growth_is_what_the_computation_takes(prepare):
    growth = measure_rss(f"{__name__}:{prepare}", 400)
    assert growth.baseline_bytes > 0
    assert growth.growth_bytes == pytest.approx(400 * MIB, rel=0.1)


def test_failure_in_the_process_is_reported():
    with pytest.raises(RuntimeError, match="no such luck"):
        measure_rss(f"{__name__}:prepare_failure")


def test_name_without_function_is_refused():
    with pytest.raises(ValueError, match="module:function"):
        measure_rss("tests.memory")
