"""Operations on every element alone, and scans along axes other than the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from graphs import check_rule
from lrjax.testing import assert_same_as_column

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def positive(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0.2, 0.7, shape)


UNARY = {
    "trigonometry": lambda x: jnp.sin(x) + jnp.cos(x) * jnp.tan(x / 4) + jnp.arctan(x),
    "hyperbolic": lambda x: jnp.tanh(x) + jnp.sinh(x) / jnp.cosh(x) + jnp.arcsinh(x),
    "inverse": lambda x: jnp.arcsin(x / 9) + jnp.arccos(x / 9) + jnp.arctanh(x / 9),
    "exponentials": lambda x: jnp.exp(x) + jnp.exp2(x) + jnp.expm1(x) + lax.logistic(x),
    "signs": lambda x: jnp.abs(x) * jnp.sign(x) - x,
    "masks of a rectifier": lambda x: (
        jnp.maximum(x, 0.0) * (x > 0.0) + jnp.where(x >= 0.0, x**2, x**3)
    ),
    "rounding": lambda x: x * jnp.floor(x) + x * jnp.ceil(x) + x * jnp.round(x),
    "powers": lambda x: x**3 + lax.integer_pow(x, 5) + jnp.cbrt(x**2 + 1) + jnp.square(x),
    "erf": lambda x: lax.erf(x) + lax.erfc(x) + lax.erf_inv(jnp.tanh(x) / 2),
    "isfinite": lambda x: jnp.where(jnp.isfinite(x), x, 0.0),
    "bessel": lambda x: lax.bessel_i0e(x) + lax.bessel_i1e(x),
    "reduce_precision": lambda x: lax.reduce_precision(x, 8, 7) * x,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
    "elu": jax.nn.elu,
    "hard_swish": jax.nn.hard_swish,
    "relu6": jax.nn.relu6,
    "log_sigmoid": jax.nn.log_sigmoid,
}

POSITIVE = {
    "logarithms": lambda x: jnp.log(x) + jnp.log1p(x) + jnp.log2(x),
    "roots": lambda x: jnp.sqrt(x) + lax.rsqrt(x),
    "reciprocal": lambda x: 1 / x,
    "gammas": lambda x: lax.lgamma(x) + lax.digamma(x),
    "power": lambda x: x**0.3 + 2**x,
}


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    check_rule(UNARY[name], normal(2, 7, 3), strategies=("stream", "2ps"))


@pytest.mark.parametrize("name", POSITIVE)
def test_unary_on_positive_numbers(name):
    """Not defined at zero, which is what rows outside the image hold."""
    check_rule(POSITIVE[name], positive(2, 7, 3))


BINARY = {
    "arithmetic": lambda x, y: x + y - x * y,
    "division": lambda x, y: x / (y**2 + 1),
    "division by rows": lambda x, y: x / y,
    "extremes": lambda x, y: jnp.maximum(x, y) * jnp.minimum(x, 0.1),
    "power": lambda x, y: jnp.abs(x) ** y,
    "remainder": lambda x, y: lax.rem(x, y),
    "arctan2": lambda x, y: jnp.arctan2(x, y),
    "comparisons": lambda x, y: jnp.where((x > y) | (x < -1) & ~(x == 0), x, y * 2),
    "select_n": lambda x, y: lax.select_n((x > 0.3).astype(jnp.int32), x, y),
    "clamp": lambda x, y: lax.clamp(-0.5, x, 0.5) * y,
    "clamp by rows": lambda x, y: lax.clamp(-jnp.abs(y), x, jnp.abs(y)),
    "add_any": lambda x, y: x * x * y + x * y,
    "hypot": jnp.hypot,
    "logaddexp": jnp.logaddexp,
}


@pytest.mark.parametrize("name", BINARY)
def test_binary(name):
    images = normal(2, 7, 3), normal(2, 7, 3, seed=1)
    check_rule(BINARY[name], *images, strategies=("stream", "2ps"))


@pytest.mark.parametrize("name", ["arithmetic", "division", "comparisons", "select_n", "clamp"])
def test_a_whole_map_meets_rows(name):
    """An array that no argument marks as rows is read by rows all the same."""
    images = normal(2, 7, 3), normal(2, 7, 3, seed=1)
    check_rule(BINARY[name], *images, axes=(1, None))


@pytest.mark.parametrize("shape", [(), (3,), (1, 1, 3), (2, 1, 3), (7, 1), (1, 7, 1)])
def test_broadcasting(shape):
    images = normal(2, 7, 3), normal(*shape, seed=1)
    check_rule(lambda x, y: jnp.tanh(x + y) * y, *images, axes=(1, None))


@pytest.mark.parametrize("height", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 3), (3,), (2, 1, 1)])
def test_broadcasting_to_few_rows(shape, height):
    images = normal(2, height, 3), normal(*shape, seed=1)
    check_rule(lambda x, y: jnp.tanh(x + y) * y, *images, axes=(1, None), num_blocks=height)


@pytest.mark.parametrize("strategy", ["stream", "2ps", "overl"])
def test_one_row_meets_all_rows(strategy):
    """A row that an operation made by rows, and one that rows were reduced to."""

    def fun(image):
        first = jnp.tanh(image[:, :1])
        joined = jnp.concatenate([image[:, -1:], jnp.sin(image), first], axis=1)
        return joined * first - joined.max((1, 2), keepdims=True), image - first

    image = normal(2, 9, 3, 2)
    assert_same_as_column(fun, (image,), 1, num_blocks=1, strategy=strategy)


def test_integers_and_booleans():
    def op(image, labels):
        bits = (labels ^ 3) | (labels << 1) & ~labels
        counted = lax.population_count(labels) + lax.clz(labels) + lax.shift_right_logical(bits, 1)
        return bits, counted, (labels > 2) & (labels != 4), image * labels

    labels = np.random.default_rng(0).integers(0, 9, (2, 7, 3))
    check_rule(op, normal(2, 7, 3), labels)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_conversions(dtype):
    def op(image, labels):
        return image.astype(dtype) * labels.astype(dtype) + (image > 0).astype(dtype)

    labels = np.random.default_rng(0).integers(0, 9, (2, 7, 3)).astype(np.uint8)
    check_rule(op, normal(2, 7, 3), labels)


def test_complex_numbers():
    def op(image):
        z = lax.complex(image, jnp.sin(image))
        return jnp.real(z * jnp.conj(z)) + jnp.imag(z * z)

    check_rule(op, normal(2, 7, 3))


def test_stop_gradient():
    check_rule(lambda x: lax.stop_gradient(jnp.sin(x)) * x, normal(2, 7, 3))


def test_stop_gradient_of_everything_else():
    check_rule(lambda x: (lax.stop_gradient(x), x - lax.stop_gradient(x**2)), normal(2, 7, 3))


def test_optimization_barrier():
    check_rule(lambda x: lax.optimization_barrier(jnp.sin(x)) * x, normal(2, 7, 3))


def test_optimization_barrier_of_several():
    """Rows at two heights, a scalar and an array without rows behind one barrier."""

    def op(image, weights):
        half = lax.slice_in_dim(image, 0, None, 2, axis=1)
        values = (image, half, weights, jnp.float64(3.0))
        image, half, weights, three = lax.optimization_barrier(values)
        return image * weights, half * three

    check_rule(op, normal(2, 8, 3), normal(3, seed=1), axes=(1, None))


def test_rounded_cotangents_do_not_add_up():
    """Rows that two blocks read get theirs in parts in OverL; the sum is rounded in column."""

    def op(image):
        rounded = lax.reduce_precision(jnp.sin(image), 8, 12)
        return rounded[:, 1:] * rounded[:, :-1]

    check_rule(op, normal(2, 8, 3), strategies=("overl",))


def test_copies_and_names():
    from jax.ad_checkpoint import checkpoint_name

    check_rule(lambda x: checkpoint_name(jnp.array(x, copy=True), "copy") ** 2, normal(2, 7, 3))


@pytest.mark.parametrize(
    "scan", [jnp.cumsum, jnp.cumprod, lax.cummax, lax.cummin, lax.cumlogsumexp]
)
@pytest.mark.parametrize("axis", [0, 2])
def test_scans_along_another_axis(scan, axis):
    check_rule(lambda x: scan(x, axis=axis) * x, normal(2, 6, 3), strategies=("stream",))


def test_scans_along_rows_fall_back():
    check_rule(lambda x: jnp.cumsum(jnp.sin(x), axis=1) * x, normal(2, 6, 3), falls_back=True)


def test_sort_along_another_axis():
    check_rule(lambda x: jnp.sort(jnp.sin(x), axis=2) * x, normal(2, 6, 5))


def test_sort_with_several_operands():
    def op(image, other):
        keys, values = lax.sort((image, other), dimension=2, num_keys=1)
        return keys * values

    check_rule(op, normal(2, 6, 5), normal(2, 6, 5, seed=1), strategies=("stream",))


def test_a_few_of_the_largest():
    def op(image):
        values, indices = lax.top_k(jnp.sin(image), 2)
        return values * indices

    check_rule(op, normal(2, 6, 5))


def test_fourier_transforms_along_another_axis():
    """The width's spectrum, filtered: a product with complex numbers, row by row."""

    def op(image, weights):
        spectrum = jnp.fft.rfft(jnp.sin(image), axis=2) * lax.complex(weights, weights[::-1])
        return jnp.fft.irfft(spectrum, n=5, axis=2)

    check_rule(op, normal(2, 6, 5), normal(3, seed=1), axes=(1, None))


def test_a_literal_of_which_all_rows_are_made():
    """It reaches the rule as an array of its type, not as a number of Python's."""
    check_rule(lambda x: jnp.where(x > 0, 1.0, -1.0) * x, normal(2, 6, 3))


def test_sort_along_rows_falls_back():
    check_rule(lambda x: jnp.sort(x, axis=1) ** 2, normal(2, 6, 3), falls_back=True)


def test_dropout_mask():
    """Random bits exist whole and are read by rows."""

    def op(image):
        keep = jax.random.bernoulli(jax.random.key(0), 0.6, image.shape)
        return jnp.where(keep, image / 0.6, 0.0) ** 2

    check_rule(op, normal(2, 8, 3))


def test_own_derivatives():
    """``custom_jvp`` and ``custom_vjp`` keep theirs, which need not be the true ones."""

    @jax.custom_vjp
    def straight_through(x):
        return jnp.round(x)

    straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, ct: (ct * 3,))

    @jax.custom_jvp
    def clipped(x):
        return jnp.minimum(x, 1.0)

    clipped.defjvp(lambda primals, tangents: (clipped(*primals), tangents[0] * 0.5))
    check_rule(lambda x: straight_through(x) * clipped(x), normal(2, 7, 3))


def test_own_derivative_with_a_parameter():
    @jax.custom_vjp
    def scaled(x, w):
        return x * w

    def backward(residuals, ct):
        x, w = residuals
        return ct * w * 2, jnp.sum(ct * x * 3, axis=(0, 1))

    scaled.defvjp(lambda x, w: (x * w, (x, w)), backward)
    check_rule(lambda x, w: scaled(jnp.sin(x), w), normal(2, 7, 3), normal(3), axes=(1, None))


def test_own_derivative_that_mixes_rows():
    """Not point by point, so the call cannot stay one operation; stream sees through it."""

    @jax.custom_vjp
    def blurred(x):
        return x[:, 1:] + x[:, :-1]

    blurred.defvjp(
        lambda x: (blurred(x), None),
        lambda _, ct: (jnp.pad(ct, ((0, 0), (1, 0), (0, 0))) * 2,),
    )
    from graphs import assert_same_as_column

    args = (normal(2, 9, 3), normal(3))
    for strategy in ("stream", "2ps", "overl"):
        assert_same_as_column(
            lambda x, w: blurred(x * w), args, (1, None), num_blocks=3, strategy=strategy
        )
