"""Groups of cuts: maps that live only while the backward pass is in their group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lrjax
from lrjax.testing import assert_same_as_column, results

pytestmark = pytest.mark.usefixtures("x64")

NAMES = ("a", "b", "c", "d")


def convolve(image, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jnp.tanh(
        lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers)
    )


def net(kernels, image):
    """Named maps of 3, 4, 5 and 6 channels; the last convolution reads the second again."""
    x = image
    maps = {}
    for name, kernel in zip(NAMES, kernels, strict=False):
        x = maps[name] = checkpoint_name(convolve(x, kernel), name)
    return convolve(jnp.concatenate([x, maps["b"]], axis=3), kernels[-1])


def arguments():
    generator = np.random.default_rng(0)
    shapes = [(2, 3), (3, 4), (4, 5), (5, 6), (6 + 4, 2)]
    kernels = [generator.standard_normal((3, 3, *shape)) for shape in shapes]
    return kernels, generator.standard_normal((1, 17, 4, 2))


ARGS = arguments()


@pytest.fixture(scope="module")
def expected():
    with jax.enable_x64(True):
        return results(net, ARGS)


@pytest.mark.parametrize(
    ("cuts", "strategy", "num_blocks"),
    [
        ([("a", "b"), "c"], "stream", 3),
        (["a", ("b", "c"), "d"], "2ps", 4),
        ([("a", "b", "c", "d")], "overl", 5),
        (
            [("a",), "b", ["c", "d"]],
            ("stream", "2ps", "overl", "column", "stream"),
            (2, 3, 4, 1, 5),
        ),
    ],
)
def test_same_as_column(cuts, strategy, num_blocks, expected):
    assert_same_as_column(
        net,
        ARGS,
        (None, 1),
        cuts=cuts,
        strategy=strategy,
        num_blocks=num_blocks,
        expected=expected,
    )


def kept_channels(cuts):
    """Channels of the named maps that wait for the backward pass."""
    fun = lrjax.rowwise(net, in_axes=(None, 1), num_blocks=3, cuts=cuts)
    residuals = jax.eval_shape(lambda *args: jax.tree.leaves(jax.vjp(fun, *args)[1]), *ARGS)
    shapes = [leaf.shape for leaf in residuals if len(leaf.shape) == 4]
    return sorted({shape[3] for shape in shapes if shape[:3] == (1, 17, 4)} - {2})


def test_maps_in_a_group_are_not_kept():
    assert kept_channels(NAMES) == [3, 4, 5, 6]
    # The second map is read outside its group.
    assert kept_channels([("a", "b"), "c", ("d",)]) == [4, 5]
    assert kept_channels([("a",), "b", ("c", "d")]) == [4]


def test_explain_names_the_group():
    found = lrjax.explain(
        net, *ARGS, in_axes=(None, 1), num_blocks=3, cuts=[("a", "b"), "c", ("d",)]
    )
    assert [s.group for s in found.segments] == [(0, 1, 2)] * 3 + [(3, 4)] * 2
    assert "group of segments 0 to 2, run again for the backward pass" in str(found)
    flat = lrjax.explain(net, *ARGS, in_axes=(None, 1), num_blocks=3, cuts=["a"])
    assert [s.group for s in flat.segments] == [(0,), (1,)]
    assert "group" not in str(flat)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([("a",), ("b",)], r"groups \('a',\) and \('b',\) have no kept map between them"),
        ([("a", 3)], r"\('a', 3\) is neither a name nor a group"),
        ([(), "a"], r"\(\) is neither a name nor a group"),
        ([3.5], "3.5 is neither a name nor a group"),
        ([("a", "e")], "no value is named 'e'"),
        ([("b", "a")], r"\['b', 'a'\] must follow one another in fun"),
        ([("a", "a")], "each once"),
    ],
)
def test_bad_groups(cuts, message):
    with pytest.raises(ValueError, match=message):
        lrjax.rowwise(net, in_axes=(None, 1), num_blocks=3, cuts=cuts)(*ARGS)
