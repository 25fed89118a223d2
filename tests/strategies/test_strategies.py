"""Every strategy against column, in every geometry that might go wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lrjax
from graphs import assert_row_local, assert_same_in_blocks, largest_num_blocks
from lrjax.testing import assert_same_as_column, check, results
from marks import slow

STRATEGIES = ("stream", "2ps", "overl")


def normal(seed, *shape, dtype=np.float64, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def convolve(image, weights, strides=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(
        image, weights, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def max_pool(image, size=2, stride=2, padding="VALID"):
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return lax.reduce_window(image, -jnp.inf, lax.max, window, strides, padding)


# --- A VGG-like stack in every number of blocks --------------------------------------------------


def vgg(params, image):
    w1, b1, w2, b2, w3 = params
    image = jax.nn.relu(convolve(image, w1) + b1)
    image = checkpoint_name(max_pool(image), "pool1")
    image = jax.nn.relu(convolve(image, w2) + b2)
    image = checkpoint_name(max_pool(image), "pool2")
    return convolve(image, w3)


def vgg_params(dtype=np.float64):
    shapes = [(3, 3, 1, 2), (2,), (3, 3, 2, 2), (2,), (3, 3, 2, 1)]
    return [normal(i, *shape, dtype=dtype, scale=0.5) for i, shape in enumerate(shapes)]


@pytest.mark.usefixtures("x64")
class TestVGGStack:
    def test_runs_by_rows(self):
        assert_row_local(vgg, (vgg_params(), normal(9, 1, 20, 8, 1)), (None, 1))

    @pytest.mark.slow
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_every_number_of_blocks(self, strategy):
        args = (vgg_params(), normal(9, 1, 10, 6, 1))
        expected = None
        for blocks in range(1, largest_num_blocks(vgg, args, (None, 1), strategy) + 1):
            expected = assert_same_as_column(
                vgg, args, (None, 1), num_blocks=blocks, strategy=strategy, expected=expected
            )

    def test_stream_divides_input_rows(self):
        args = (vgg_params(), normal(9, 1, 13, 8, 1))
        assert largest_num_blocks(vgg, args, (None, 1), "stream") == 13

    @pytest.mark.parametrize("strategy", ["2ps", "overl"])
    def test_the_others_divide_output_rows(self, strategy):
        args = (vgg_params(), normal(9, 1, 13, 8, 1))
        assert largest_num_blocks(vgg, args, (None, 1), strategy) == 3

    @pytest.mark.parametrize("height", [5, 7, 16, *slow(4, 6, 9, 11)])
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_heights(self, height, strategy):
        args = (vgg_params(), normal(9, 2, height, 5, 1))
        blocks = largest_num_blocks(vgg, args, (None, 1), strategy)
        assert_same_as_column(vgg, args, (None, 1), num_blocks=blocks, strategy=strategy)

    @pytest.mark.parametrize(
        ("cuts", "num_blocks", "strategy"),
        [
            (("pool1",), 3, "stream"),
            (("pool1",), (5, 2), "2ps"),
            (("pool1", "pool2"), (5, 3, 2), ("overl", "2ps", "stream")),
            (("pool1", "pool2"), (5, 3, 2), ("stream", "column", "overl")),
            (("pool2",), 2, ("column", "stream")),
            (2, 3, "2ps"),
            (3, 2, "overl"),
        ],
    )
    def test_segments(self, cuts, num_blocks, strategy):
        args = (vgg_params(), normal(9, 1, 15, 8, 1))
        assert_same_as_column(
            vgg, args, (None, 1), num_blocks=num_blocks, strategy=strategy, cuts=cuts
        )

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_frozen_arguments(self, strategy):
        args = (vgg_params(), normal(9, 1, 12, 8, 1))
        for argnums in ((0,), (1,)):
            assert_same_as_column(
                vgg, args, (None, 1), num_blocks=3, strategy=strategy, argnums=argnums
            )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, *slow(jnp.float16)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_vgg_in_other_precisions(dtype, strategy):
    args = (vgg_params(dtype), normal(9, 2, 30, 16, 1, dtype=dtype))
    assert_same_as_column(vgg, args, (None, 1), num_blocks=3, strategy=strategy)


# --- Geometries by name --------------------------------------------------------------------------


def resnet_stem(params, image):
    image = jax.nn.relu(convolve(image, params[0], (2, 2), ((3, 3), (3, 3))))
    image = max_pool(image, 3, 2, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return image + convolve(jax.nn.relu(convolve(image, params[1])), params[2])


def strided_shortcut(params, image):
    image = convolve(image, params[0])
    return convolve(image, params[1], (2, 2)) + convolve(image, params[2], (2, 2), "VALID")


def atrous(params, image):
    rates = zip((1, 2, 4), params, strict=True)
    return sum(convolve(image, w, rhs_dilation=(rate, 1)) for rate, w in rates)


def even_kernels(params, image):
    for weights in params:
        image = jnp.tanh(convolve(image, weights))
    return image


def deep_and_narrow(params, image):
    """Five poolings: most steps have nothing new at the last ones."""
    for _ in range(5):
        image = max_pool(jnp.tanh(convolve(image, params[0])), 2, 2, "SAME")
    return image


def long_skip(params, image):
    """One branch lags far behind the other."""
    deep = image
    for _ in range(4):
        deep = jnp.tanh(convolve(deep, params[0]))
    return deep * image


def transposed(params, image):
    low = jnp.tanh(convolve(image, params[0], (2, 2)))
    return lax.conv_transpose(low, params[1], (2, 2), "SAME")


def pooled_pyramid(params, image):
    """Outputs at three resolutions and a scalar."""
    half = max_pool(jnp.tanh(convolve(image, params[0])))
    quarter = max_pool(jnp.tanh(convolve(half, params[1])))
    return {"full": image * 2, "half": half, "quarter": quarter, "loss": (quarter**2).sum()}


GEOMETRIES = {
    "resnet stem": (resnet_stem, [(7, 7, 1, 2), (3, 3, 2, 2), (3, 3, 2, 2)], (1, 21, 9, 1)),
    "strided shortcut": (
        strided_shortcut,
        [(3, 3, 1, 2), (3, 3, 2, 2), (1, 1, 2, 2)],
        (2, 9, 5, 1),
    ),
    "atrous": (atrous, [(3, 1, 1, 2), (3, 1, 1, 2), (3, 1, 1, 2)], (1, 12, 3, 1)),
    "even kernels": (even_kernels, [(2, 2, 1, 2), (4, 2, 2, 2), (6, 1, 2, 1)], (1, 11, 3, 1)),
    "deep and narrow": (deep_and_narrow, [(3, 3, 1, 1)], (1, 37, 4, 1)),
    "long skip": (long_skip, [(3, 3, 1, 1)], (1, 10, 3, 1)),
    "transposed": (transposed, [(3, 3, 1, 2), (3, 3, 2, 1)], (1, 12, 4, 1)),
    "pyramid": (pooled_pyramid, [(3, 3, 1, 2), (3, 3, 2, 2)], (2, 13, 8, 1)),
}


# OverL differs from 2PS in what its blocks compute twice: in two of these, at strides and in pools.
AT_EVERY_CHANGE = {
    "stream": tuple(GEOMETRIES),
    "2ps": ("resnet stem", "pyramid"),
    "overl": ("resnet stem", "pyramid"),
}
GEOMETRIES_UNDER_STRATEGIES = [
    pytest.param(name, strategy, marks=[] if name in fast else pytest.mark.slow)
    for strategy, fast in AT_EVERY_CHANGE.items()
    for name in GEOMETRIES
]


@pytest.mark.usefixtures("x64")
class TestGeometries:
    @pytest.mark.parametrize("name", GEOMETRIES)
    def test_runs_by_rows(self, name):
        fun, shapes, image = GEOMETRIES[name]
        args = ([normal(i, *s, scale=0.6) for i, s in enumerate(shapes)], normal(7, *image))
        assert_row_local(fun, args, (None, 1))

    @pytest.mark.parametrize(("name", "strategy"), GEOMETRIES_UNDER_STRATEGIES)
    def test_same_as_column(self, name, strategy):
        fun, shapes, image = GEOMETRIES[name]
        args = ([normal(i, *s, scale=0.6) for i, s in enumerate(shapes)], normal(7, *image))
        assert_same_in_blocks(fun, args, lambda most: (1, 2, (most + 1) // 2, most), strategy)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("height", [1, 2, 3])
def test_images_of_few_rows(strategy, height):
    def fun(params, image):
        image = jax.nn.relu(convolve(image, params[0]) + params[1])
        return (convolve(image, params[2], (2, 1)) ** 2).sum((2, 3))

    shapes = [(3, 3, 1, 2), (2,), (5, 1, 2, 1)]
    args = ([normal(i, *s) for i, s in enumerate(shapes)], normal(7, 2, height, 3, 1))
    most = largest_num_blocks(fun, args, (None, 1), strategy)
    for blocks in {1, most}:
        assert_same_as_column(fun, args, (None, 1), num_blocks=blocks, strategy=strategy)


# --- Arguments and outputs -----------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strategy", STRATEGIES)
class TestArguments:
    def test_two_images_of_equal_height(self, strategy):
        def fun(weights, image, mask):
            return (convolve(image, weights) * mask).sum((2, 3))

        args = (normal(0, 3, 3, 1, 2), normal(1, 1, 9, 4, 1), normal(2, 1, 9, 4, 1))
        assert_same_as_column(fun, args, (None, 1, 1), num_blocks=4, strategy=strategy)

    def test_labels_at_half_height(self, strategy):
        def fun(weights, image, labels):
            logits = max_pool(jnp.tanh(convolve(image, weights)))
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
            return -chosen.mean()

        labels = np.random.default_rng(3).integers(0, 3, (2, 6, 3))
        args = (normal(0, 3, 3, 1, 3), normal(1, 2, 13, 6, 1), labels)
        assert_same_as_column(fun, args, (None, 1, 1), num_blocks=3, strategy=strategy)

    def test_one_hot_labels_at_half_height(self, strategy):
        def fun(weights, image, labels):
            logits = max_pool(jnp.tanh(convolve(image, weights)))
            return -(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, 3)).sum()

        labels = np.random.default_rng(3).integers(0, 3, (2, 6, 3))
        args = (normal(0, 3, 3, 1, 3), normal(1, 2, 13, 6, 1), labels)
        assert_row_local(fun, args, (None, 1, 1))
        assert_same_as_column(fun, args, (None, 1, 1), num_blocks=3, strategy=strategy)

    def test_images_joined_at_different_heights(self, strategy):
        def fun(weights, image, small):
            half = convolve(image, weights, (2, 1))
            return jnp.concatenate([half, small], -1) ** 2

        args = (normal(0, 3, 3, 1, 2), normal(1, 1, 11, 4, 1), normal(2, 1, 6, 4, 1))
        assert_same_as_column(fun, args, (None, 1, 1), num_blocks=3, strategy=strategy)

    def test_unrelated_images(self, strategy):
        def fun(weights, image, other):
            return convolve(image, weights).sum((1, 2)), convolve(other, weights, (2, 1))

        args = (normal(0, 3, 3, 1, 2), normal(1, 1, 9, 4, 1), normal(2, 1, 14, 4, 1))
        assert_same_as_column(fun, args, (None, 1, 1), num_blocks=3, strategy=strategy)

    def test_byte_images(self, strategy):
        def fun(weights, image):
            return jnp.tanh(convolve(image.astype(weights.dtype) / 255, weights))

        image = np.random.default_rng(1).integers(0, 256, (1, 10, 4, 1), np.uint8)
        args = (normal(0, 3, 3, 1, 2), image)
        assert_same_as_column(fun, args, (None, 1), num_blocks=4, strategy=strategy)

    def test_closed_over_arrays_and_their_gradients(self, strategy):
        image, mask = normal(1, 1, 9, 4, 1), normal(2, 1, 9, 4, 2)

        def loss(weights, scale, by_rows):
            def fun(image):
                return (jnp.tanh(convolve(image, weights) * scale) * mask).sum((2, 3))

            if by_rows:
                fun = lrjax.rowwise(fun, in_axes=1, num_blocks=3, strategy=strategy)
            return (fun(image) ** 2).sum()

        args = (normal(0, 3, 3, 1, 2), normal(3, 2))
        expected = results(lambda *a: loss(*a, by_rows=False), args)
        found = results(lambda *a: loss(*a, by_rows=True), args)
        check(found, expected)

    @pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
    def test_row_axis_anywhere(self, strategy, axis):
        letters = "NCW"
        spec = letters[: axis % 4] + "H" + letters[axis % 4 :]

        def fun(weights, image):
            return lax.conv_general_dilated(
                image, weights, (2, 1), "SAME", dimension_numbers=(spec, "HWIO", spec)
            )

        sizes = {"N": 2, "H": 9, "W": 3, "C": 2}
        args = (normal(0, 3, 2, 2, 3), normal(1, *(sizes[a] for a in spec)))
        assert_row_local(fun, args, (None, axis))
        assert_same_as_column(fun, args, (None, axis), num_blocks=3, strategy=strategy)

    def test_several_outputs_of_several_kinds(self, strategy):
        def fun(weights, image):
            y = jnp.tanh(convolve(image, weights))
            bright = (y > 0.2).sum()
            bits = lax.population_count(bright)  # has no derivative, not even of an integer
            return {"map": y, "half": y[:, ::2], "n": (bright, bits), "sum": y.sum(), "p": weights}

        args = (normal(0, 3, 3, 1, 2), normal(1, 1, 9, 4, 1))
        assert_same_as_column(fun, args, (None, 1), num_blocks=3, strategy=strategy)

    def test_an_output_that_is_an_argument(self, strategy):
        def fun(weights, image):
            return convolve(image, weights), image, weights, 3.0

        args = (normal(0, 3, 3, 1, 2), normal(1, 1, 9, 4, 1))
        assert_same_as_column(fun, args, (None, 1), num_blocks=3, strategy=strategy)

    def test_the_same_output_twice(self, strategy):
        def fun(weights, image):
            y = jnp.tanh(convolve(image, weights))
            return y, y, y.sum()

        args = (normal(0, 3, 3, 1, 2), normal(1, 1, 9, 4, 1))
        assert_same_as_column(fun, args, (None, 1), num_blocks=3, strategy=strategy)

    def test_an_array_read_by_rows_and_whole(self, strategy):
        def fun(matrix, image):
            return jnp.sin(image * matrix) @ matrix

        args = (normal(0, 6, 6), normal(1, 6, 6))
        assert_row_local(fun, args, (None, 0), one_loop=False)
        assert_same_as_column(fun, args, (None, 0), num_blocks=3, strategy=strategy)

    def test_undefined_outside_the_image(self, strategy):
        """Rows outside the image must not leak a division by zero into any gradient."""

        def fun(params, image):
            y = convolve(image**2 + 0.1, params[0] ** 2)
            z = jnp.log(y) * params[1] + 1 / y
            return convolve(jnp.sqrt(z**2 + y), params[2])

        shapes = [(3, 3, 1, 2), (2,), (3, 3, 2, 1)]
        args = ([normal(i, *s) for i, s in enumerate(shapes)], normal(7, 1, 10, 3, 1))
        assert_same_as_column(fun, args, (None, 1), num_blocks=4, strategy=strategy)
