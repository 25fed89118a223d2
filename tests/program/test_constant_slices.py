"""``lax.dynamic_slice`` and ``lax.dynamic_update_slice`` at positions that no input changes."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lrjax
from lrjax.testing import assert_same_as_column

pytestmark = pytest.mark.usefixtures("x64")

FUNCTIONS = {
    "rows": lambda z: lax.dynamic_slice_in_dim(z, 2, 9, 1),
    "rows beyond the end": lambda z: lax.dynamic_slice_in_dim(z, 14, 9, 1),
    "rows and columns": lambda z: lax.dynamic_slice(z, (0, 3, 1, 0), (2, 8, 4, 3)),
    "the last column": lambda z: z + lax.dynamic_index_in_dim(z, -1, 2),
    "a computed position": lambda z: lax.dynamic_slice_in_dim(z, jnp.int32(1) + 1, 9, 1),
    "an update": lambda z: lax.dynamic_update_slice_in_dim(z, z[:, :2] * 2, 4, 1),
    "an update at the top": lambda z: lax.dynamic_update_slice_in_dim(z, z[:, :2] * 2, 0, 1),
    "an update beyond the end": lambda z: lax.dynamic_update_slice_in_dim(z, z[:, :2] * 2, 40, 1),
    "an update by numbers": lambda z: lax.dynamic_update_slice_in_dim(
        z, jnp.ones((2, 2, 6, 3)), 4, 1
    ),
    "an update of all": lambda z: lax.dynamic_update_slice_in_dim(z, z * 2, 4, 1),
    "an update of columns": lambda z: lax.dynamic_update_slice_in_dim(z, z[:, :, :2] * 2, 4, 2),
}
WHOLE = {
    "an update of rows and columns": lambda z: lax.dynamic_update_slice(
        z, z[:, :2, :2] * 2, (0, 4, 1, 0)
    ),
    "a position that the image gives": lambda z: lax.dynamic_slice_in_dim(
        z, (z[0, 0, 0, 0] > 0).astype(np.int32), 9, 1
    ),
}


def arguments():
    generator = np.random.default_rng(0)
    return generator.standard_normal((3, 3, 3, 3)) / 9, generator.standard_normal((2, 17, 6, 3))


def between_convolutions(function):
    def convolved(image, kernel):
        return lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return lambda kernel, image: convolved(function(jnp.tanh(convolved(image, kernel))), kernel)


@pytest.mark.parametrize("name", [*FUNCTIONS, *WHOLE])
def test_same_as_column(name):
    network, column = between_convolutions({**FUNCTIONS, **WHOLE}[name]), None
    for strategy in ("stream", "2ps", "overl"):
        column = assert_same_as_column(
            network, arguments(), (None, 1), num_blocks=4, strategy=strategy, expected=column
        )
    explained = lrjax.explain(network, *arguments(), in_axes=(None, 1), num_blocks=4)
    assert bool(explained.fallbacks) == (name in WHOLE)
