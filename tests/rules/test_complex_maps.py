"""Complex maps and parameters: spectra of images, and reductions of complex rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lrjax.testing import assert_same_as_column
from marks import STRATEGIES

pytestmark = pytest.mark.usefixtures("x64")

UNDER_STRATEGIES = pytest.mark.parametrize("strategy", STRATEGIES)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape) / 2


def complex_normal(*shape, seed=0):
    return normal(*shape, seed=seed) + 1j * normal(*shape, seed=seed + 1)


def convolve(image, kernel):
    return lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def spectral_layer(image, weights):
    """The lowest frequencies of both signs, mixed by complex weights (Fourier neural operator)."""
    spectrum = jnp.fft.rfft2(image, axes=(1, 2))
    mixed = jnp.zeros(spectrum.shape, spectrum.dtype)
    rows, columns = weights.shape[1:3]
    for part, kernel in zip((slice(rows), slice(-rows, None)), weights, strict=True):
        found = jnp.einsum("bhwc,hwcd->bhwd", spectrum[:, part, :columns], kernel)
        mixed = mixed.at[:, part, :columns].set(found)
    return jnp.fft.irfft2(mixed, s=image.shape[1:3], axes=(1, 2))


def fourier_operator(image, params):
    image = convolve(image, params["lift"])
    for i, (weights, skip) in enumerate(params["blocks"]):
        image = jax.nn.gelu(spectral_layer(image, weights) + convolve(image, skip))
        image = checkpoint_name(image, f"block{i}")
    return convolve(image, params["head"])


def operator_arguments(blocks):
    params = {
        "lift": normal(3, 3, 2, 2, seed=1),
        "blocks": [
            (complex_normal(2, 4, 3, 2, 2, seed=3 + i), normal(1, 1, 2, 2, seed=9 + i))
            for i in range(blocks)
        ],
        "head": normal(3, 3, 2, 1, seed=2),
    }
    return normal(1, 13, 6, 2), params


@UNDER_STRATEGIES
def test_a_fourier_neural_operator(strategy):
    args = operator_arguments(2)
    assert_same_as_column(fourier_operator, args, (1, None), num_blocks=3, strategy=strategy)


def test_a_fourier_neural_operator_between_checkpoints():
    """JAX's checkpoint rounds what it saves by an operation without a complex form."""
    args = operator_arguments(2)
    assert_same_as_column(
        fourier_operator, args, (1, None), num_blocks=2, cuts=[("block0",), "block1"]
    )


@UNDER_STRATEGIES
def test_complex_convolutions_and_reductions(strategy):
    def fun(image, first, second):
        padded = jnp.pad(image, ((0, 0), (1, 1), (0, 0), (0, 0)), constant_values=2j)
        image = convolve(padded, first)
        centred = image - image.mean((0, 1, 2))
        centred /= jnp.sqrt((jnp.abs(centred) ** 2).mean((0, 1, 2)) + 1e-3)
        ends = [lax.stop_gradient(f(image, axis=(1, 2))) for f in (jnp.max, jnp.min)]
        return convolve(centred, second), *ends

    kernels = complex_normal(3, 3, 2, 2), complex_normal(3, 3, 2, 2, seed=4)
    args = complex_normal(2, 9, 5, 2), *kernels
    assert_same_as_column(fun, args, (1, None, None), num_blocks=3, strategy=strategy)
