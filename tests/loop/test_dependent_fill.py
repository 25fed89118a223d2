"""What loops start with: the values asked for, and no earlier than the loop can start."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lrjax
from lrjax import memory
from lrjax.loop import engine
from lrjax.loop.dependent_fill import full_depending_on
from lrjax.rules.reduction import identity_of
from lrjax.strategies import micro_batches, tiled
from lrjax.testing import assert_same_as_column
from marks import COMPILES_FOR_H200 as H200

ARRAYS = {
    "ordinary": np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4),
    "nan": np.full((2,), np.nan, np.float32),
    "infinite": np.full((2,), -np.inf, np.float32),
    "bfloat16": jnp.full((2, 2), -jnp.inf, jnp.bfloat16),
    "least integer": np.full((2,), np.iinfo(np.int32).min),
    "false": np.zeros((2,), bool),
    "complex": np.full((2,), complex(-np.inf, np.nan), np.complex64),
    "scalar": np.float32(-np.inf),
}


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize(
    ("fill", "dtype"),
    [
        (0, np.float32),
        (0, jnp.bfloat16),
        (1, np.int32),
        (False, bool),
        (True, bool),
        (identity_of("max", np.dtype(np.float32)), np.float32),
        (identity_of("min", np.dtype(np.int32)), np.int32),
    ],
)
def test_the_values_are_those_of_full(name, fill, dtype):
    made = jax.jit(
        lambda array: full_depending_on([ARRAYS["ordinary"], array])((2, 3), fill, dtype)
    )
    found = made(ARRAYS[name])
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.full((2, 3), fill, dtype))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32])
def test_unsigned_all_ones(dtype):
    fill = identity_of("and", np.dtype(dtype))
    found = full_depending_on([ARRAYS["ordinary"]])((2,), fill, dtype)
    np.testing.assert_array_equal(found, np.full(2, np.iinfo(dtype).max, dtype))


def test_what_has_no_numbers_is_passed_over():
    keys = jax.random.split(jax.random.key(0), 2)
    nothing = [keys, np.zeros((0, 3), np.float32), np.zeros(2, jax.dtypes.float0)]
    for arrays in (nothing, [*nothing, ARRAYS["nan"]]):
        found = full_depending_on(arrays)((2,), 1, np.float32)
        np.testing.assert_array_equal(found, np.ones(2, np.float32))
        assert full_depending_on(arrays)((2,), 0, keys.dtype).dtype == keys.dtype


IMAGE = np.random.default_rng(0).random((2, 17, 4, 3), np.float32)


@pytest.mark.parametrize("strategy", ["stream", "2ps", "overl"])
@pytest.mark.parametrize(
    ("fun", "image"),
    [
        (lambda x: jnp.where(IMAGE > 0.5, jnp.sin(x), 0), IMAGE),
        (lambda x: lax.reduce_and(x, (1,)), (255 * IMAGE).astype(np.uint8) | 3),
        (lambda x: x[:, :, ::-1], jax.random.split(jax.random.key(0), (2, 17, 4))),
    ],
    ids=["constant", "unsigned", "keys"],
)
def test_loops_start_with_any_dtype_and_behind_constants(fun, image, strategy):
    assert_same_as_column(fun, (image,), (1,), num_blocks=4, strategy=strategy)


# --- What it is for ------------------------------------------------------------------------------


def convolve(image, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def network(kernels, image):
    x = image
    for i, kernel in enumerate(kernels):
        x = checkpoint_name(jnp.maximum(convolve(x, kernel), 0), f"map{i}")
    return jnp.sum(x.astype(jnp.float32), axis=(0, 1, 2))


def normalised(kernels, image):
    """Statistics of all rows, so that every convolution is a stage of its own."""
    x = image
    for kernel in kernels:
        x = convolve(x, kernel)
        x = jnp.maximum((x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-5), 0)
    return jnp.sum(x, axis=(0, 1, 2))


def peaks(monkeypatch, fun, channels, size, dtype, target, **options):
    """XLA's peaks of the gradient: as it is, and where loops start with plain zeros."""
    kernels = [jax.ShapeDtypeStruct((3, 3, *pair), dtype) for pair in itertools.pairwise(channels)]
    image = jax.ShapeDtypeStruct((2, size, size, channels[0]), dtype)

    def peak():
        rows = lrjax.rowwise(fun, in_axes=(None, 1), **options)
        gradient = jax.grad(lambda kernels, image: jnp.sum(rows(kernels, image)))
        return memory.peak_bytes(memory.compile_for(gradient, kernels, image, target=target))

    late = peak()
    for module in (engine, tiled, micro_batches):
        monkeypatch.setattr(module, "full_depending_on", lambda arrays: jnp.full)
    return late, peak()


@pytest.mark.parametrize("channels", [pytest.param((3, 16, 24, 32, 40, 48, 8), marks=H200)])
def test_later_segments_zeros_do_not_wait_for_them_on_a_gpu(channels, monkeypatch):
    """From jax 0.12 on XLA:GPU makes most of them late by itself."""
    late, early = peaks(
        *(monkeypatch, network, channels, 512, jnp.bfloat16, "h200"),
        num_blocks=16,
        cuts=["map1", "map3"],
    )
    assert late <= (0.97 if jax.__version_info__ < (0, 12) else 1) * early


@pytest.mark.users_compiler
def test_later_stages_zeros_do_not_wait_for_them_on_a_cpu(monkeypatch):
    channels = (3, 8, 8, 8, 8, 8)
    late, early = peaks(
        *(monkeypatch, normalised, channels, 128, jnp.float32, "cpu"),
        num_blocks=8,
        strategy="2ps",
    )
    assert late <= 0.7 * early
