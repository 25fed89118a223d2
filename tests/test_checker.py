"""The checker refuses what is wrong, in every precision, and accepts what is only rounded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lrjax.testing import assert_same_as_column, check, results

DTYPES = ("float64", "float32", "bfloat16", "float16")
HALF = ("bfloat16", "float16")
# An error of one element that must be seen, relative to its array; and of a bias.
ONE_ELEMENT = {"float64": 2e-11, "float32": 1e-5, "bfloat16": 0.2, "float16": 0.03}
# Far beyond what rounding leaves of a gradient that cancels, relative to the largest gradient.
IN_WHAT_CANCELS = {"float64": 1e-13, "float32": 1e-4, "bfloat16": 1.0, "float16": 0.5}


def convolve(image, weights):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(image, weights, (1, 1), "SAME", dimension_numbers=numbers)


def network(params, image):
    """Two biases whose gradients cancel, one of them exactly, beside gradients of any size."""
    x = convolve(image, params["kernel"]) + params["cancels"]
    x = (x - x.mean((0, 1, 2))) * lax.rsqrt(x.var((0, 1, 2)) + 1e-3)
    x = convolve(jnp.tanh(x * params["scale"] + params["bias"]), params["large"]) + params["faint"]
    label = jnp.sum(image > 0.5, (1, 2, 3))
    return {"map": x, "faint": x.mean() * 1e-3, "label": label}


def cast(dtype, *shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@functools.cache
def case(dtype):
    """The network's arguments and column's results."""
    shapes = {"kernel": (3, 3, 1, 2), "large": (3, 3, 2, 2)}
    shapes |= dict.fromkeys(("cancels", "scale", "bias", "faint"), (2,))
    params = {name: cast(dtype, *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    params["large"] = params["large"] / 20  # so that what comes before has fainter gradients
    args = params, cast(dtype, 2, 12, 7, 1, seed=9)
    return args, results(network, args)


@pytest.fixture(params=DTYPES)
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def with_gradient(found, name, change):
    """Results of which one gradient is changed, in its own dtype."""
    (key,) = (k for k in found.gradients if name in k)
    old = np.asarray(found.gradients[key])
    new = np.asarray(change(old.astype(np.float64)), old.dtype)
    return dataclasses.replace(found, gradients={**found.gradients, key: jnp.asarray(new)})


def with_output(found, name, change):
    outputs = {**found.outputs, name: change(found.outputs.get(name))}
    return dataclasses.replace(found, outputs=outputs)


def one_element(by):
    def change(array):
        array.flat[0] += by * np.abs(array).max()
        return array

    return change


def without_a_row(found, dtype):
    """The gradient of the kernel without what one row of the image's cotangent adds."""
    args, _ = case(dtype)

    def masked(params, image):
        keep = jnp.ones(image.shape, image.dtype).at[:, 5].set(0)
        x = network(params, image)["map"]
        return {"map": x * keep, "faint": x.mean() * 0, "label": jnp.sum(image > 0.5, (1, 2, 3))}

    other = results(masked, args)
    (name,) = (k for k in found.gradients if "large" in k)
    return dataclasses.replace(found, gradients={**found.gradients, name: other.gradients[name]})


def swapped(found, dtype):
    first, second = (k for k in found.gradients if "scale" in k or "'bias'" in k)
    gradients = {**found.gradients, first: found.gradients[second]}
    return dataclasses.replace(found, gradients={**gradients, second: found.gradients[first]})


def beside_what_cancels(found, dtype):
    largest = max(float(jnp.abs(g).max()) for g in found.gradients.values())
    return with_gradient(found, "cancels", lambda g: g + IN_WHAT_CANCELS[dtype] * largest)


WRONG = {
    "a row is missing": without_a_row,
    "an element": lambda r, d: with_gradient(r, "kernel", one_element(ONE_ELEMENT[d])),
    "an element of a small array": lambda r, d: with_gradient(
        r, "scale", one_element(ONE_ELEMENT[d])
    ),
    "a bias": lambda r, d: with_gradient(
        r, "'bias'", lambda g: g * (1 + (0.1 if d in HALF else 1e-3))
    ),
    "a gradient that is never made": lambda r, d: with_gradient(r, "scale", np.zeros_like),
    "twice": lambda r, d: with_gradient(r, "scale", lambda g: 2 * g),
    "sign": lambda r, d: with_gradient(r, "faint", lambda g: -g),
    "what cancels": beside_what_cancels,
    "swapped": swapped,
    "not a number": lambda r, d: with_gradient(r, "scale", lambda g: g * np.nan),
    "infinite": lambda r, d: with_output(r, "map", lambda x: x.at[0, 0, 0, 0].set(jnp.inf)),
    "rows moved by one": lambda r, d: with_output(r, "map", lambda x: jnp.roll(x, 1, 1)),
    "an output": lambda r, d: with_output(
        r, "map", lambda x: x.at[1, -1].multiply(1 + 3 * ONE_ELEMENT[d])
    ),
    "another dtype": lambda r, d: with_output(r, "map", lambda x: x.astype(jnp.complex64)),
    "another shape": lambda r, d: with_output(r, "map", lambda x: x[:, :-1]),
    "another structure": lambda r, d: with_output(r, "more", lambda _: jnp.zeros(2)),
    "an integer": lambda r, d: with_output(r, "label", lambda x: x.at[0].add(1)),
}


STRATEGY = {"float64": "stream", "float32": "2ps", "bfloat16": "overl", "float16": "stream"}


def test_accepts_what_is_only_rounded(dtype):
    args, expected = case(dtype)
    assert_same_as_column(
        network, args, (None, 1), num_blocks=3, strategy=STRATEGY[dtype], expected=expected
    )
    check(with_gradient(expected, "cancels", np.negative), expected)


@pytest.mark.parametrize("name", WRONG)
def test_refuses(name, dtype):
    _, expected = case(dtype)
    with pytest.raises(AssertionError, match="column"):
        check(WRONG[name](expected, dtype), expected)


def test_refuses_gradients_that_are_all_zero():
    expected = results(lambda x: lax.stop_gradient(x) + 0 * x, (cast("float32", 3),))
    with pytest.raises(AssertionError, match="every gradient is zero"):
        check(expected, expected)


def test_refuses_what_column_itself_does_not_know():
    """The gradient is of size one and moves by a hundredth where arguments move by one rounding."""
    expected = results(lambda x: jnp.sin(1e5 * x) / 1e5, (cast("float32", 40),))
    with pytest.raises(AssertionError, match="which may hide anything"):
        check(with_gradient(expected, "args", lambda g: g * (1 + 1e-5)), expected)


def random_mask(weights, image):
    """In float64 the mask is drawn from other bits."""
    return convolve(image * jax.random.bernoulli(jax.random.key(0), 0.5, image.shape), weights)


def in_float32(weights, image):
    return convolve(jnp.tanh(image.astype(jnp.float32)), weights.astype(jnp.float32))


def in_bfloat16(weights, image):
    x = convolve(image.astype(jnp.bfloat16), weights.astype(jnp.bfloat16))
    return jnp.tanh(x).astype(jnp.float32)


def not_in_float64(weights, image):
    assert image.dtype == jnp.float32
    return convolve(image, weights)


@pytest.mark.parametrize(
    ("fun", "dtype", "wrong"),
    [
        (random_mask, "float32", 1e-5),
        (in_float32, "float32", 1e-5),
        (in_float32, "float64", 1e-5),
        (in_bfloat16, "float32", 5e-2),
        (not_in_float64, "float32", 1e-5),
    ],
)
def test_functions_whose_float64_form_says_nothing(fun, dtype, wrong):
    with jax.enable_x64(dtype == "float64"):
        args = cast(dtype, 3, 3, 2, 2), cast(dtype, 2, 12, 7, 2, seed=1)
        expected = assert_same_as_column(fun, args, (None, 1), num_blocks=3, strategy="2ps")
        with pytest.raises(AssertionError, match=r"gradient of args\[0\]"):
            check(with_gradient(expected, "[0]", lambda g: g * (1 + wrong)), expected)
