"""Small arrays that are added up as one vector."""

import jax
import numpy as np

from lrjax.loop.small_sums import MOST_ELEMENTS, SmallSums

ARRAYS = {
    0: np.arange(6, dtype=np.float32).reshape(2, 3),
    1: np.float32(7),
    2: np.zeros(MOST_ELEMENTS + 1, np.float32),
    3: np.arange(2, dtype=np.float64),
    4: np.ones((4, 1), np.float32),
}


def sums():
    return SmallSums((v, x, x.dtype) for v, x in ARRAYS.items())


def test_those_of_one_type_are_one_vector():
    with jax.enable_x64(True):
        packed = sums().packed({v: jax.numpy.asarray(x) for v, x in ARRAYS.items()})
    assert {v: x.shape for v, x in packed.items()} == {
        -1: (11,),
        2: (MOST_ELEMENTS + 1,),
        3: (2,),  # alone of its type
    }


def test_are_found_again():
    with jax.enable_x64(True):
        found = sums().unpacked(sums().packed({v: jax.numpy.asarray(x) for v, x in ARRAYS.items()}))
    assert found.keys() == ARRAYS.keys()
    for v, x in ARRAYS.items():
        np.testing.assert_array_equal(found[v], x)
        assert found[v].dtype == x.dtype
