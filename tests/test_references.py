"""Mutable arrays and callbacks in a function: what comes first stays first, by rows as whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback

import lrjax
from lrjax.testing import Results, assert_same_as_column, check
from marks import STRATEGIES

pytestmark = pytest.mark.usefixtures("x64")

WEIGHTS = [np.random.default_rng(i).standard_normal((3, 1, c, 2)) / 2 for i, c in ((0, 1), (1, 2))]
IMAGE = np.random.default_rng(2).standard_normal((1, 9, 4, 1))


def convolve(image, weights):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(image, weights, (1, 1), "SAME", dimension_numbers=layout)


def network(weights, image):
    image = checkpoint_name(jnp.tanh(convolve(image, weights[0])), "middle")
    return convolve(image, weights[1])


def written_and_read(weights, image):
    """What is read between two writes is what the first one wrote."""
    rows = network(weights, image)
    ref = jax.new_ref(jnp.zeros(rows.shape))
    ref[:, 2:4] = rows[:, 2:4]
    first = ref[...]
    ref[...] = jnp.sin(rows)
    return first * ref[...], rows.mean()


def added_up(weights, image):
    """``addupdate`` has no result."""
    rows = network(weights, image)
    ref = jax.new_ref(jnp.zeros(2))
    jax.ref.addupdate(ref, ..., rows.sum((0, 1, 2)))
    jax.ref.addupdate(ref, slice(0, 1), jnp.tanh(rows).sum((0, 1, 2))[:1])
    return ref[...], rows.mean()


def in_a_branch(weights, image):
    rows = network(weights, image)
    ref = jax.new_ref(jnp.zeros(()))
    lax.cond(rows.sum() > 0, lambda: ref.__setitem__(..., rows.sum()), lambda: None)
    return rows * ref[...]


def on_the_host(array):
    """Signs only: a callback's thread may have no double precision."""
    struct = jax.ShapeDtypeStruct(array.shape, np.bool_)
    call = lambda x: np.asarray(x) > 0  # noqa: E731
    positive = jax.pure_callback(call, struct, array, vmap_method="expand_dims")
    return jnp.where(positive, 1, 0.25)


def scaled_by_the_host(weights, image):
    """A scalar of what takes no tangents, and a sum over rows."""
    rows = network(weights, image)
    return rows.sum() * on_the_host(lax.stop_gradient(rows)).sum()


def behind_a_cut(weights, image):
    rows = convolve(image, weights[0])
    still = checkpoint_name(lax.stop_gradient(rows), "middle")
    return convolve(jnp.tanh(rows) * on_the_host(still), weights[1])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fun", [written_and_read, added_up, scaled_by_the_host])
def test_what_has_an_order_keeps_it(fun, strategy):
    assert_same_as_column(fun, (WEIGHTS, IMAGE), (None, 1), num_blocks=3, strategy=strategy)


@pytest.mark.parametrize("cuts", [["middle"], [("middle",)]])
@pytest.mark.parametrize("strategy", ["stream", "2ps"])
def test_a_map_without_tangents_has_none_behind_a_cut(strategy, cuts):
    options = {"num_blocks": 3, "strategy": strategy, "cuts": cuts}
    assert_same_as_column(behind_a_cut, (WEIGHTS, IMAGE), (None, 1), **options)


@pytest.mark.parametrize("strategy", ["stream", "2ps"])
def test_a_result_without_tangents_has_none(strategy):
    def metrics(weights, image):
        rows = network(weights, image)
        return (rows**2).mean(), lax.stop_gradient(rows)

    def loss(fun):
        def call(weights, image):
            value, rows = fun(weights, image)
            return value * on_the_host(rows).sum()

        return jax.jit(jax.grad(call))(WEIGHTS, IMAGE)

    by_rows = lrjax.rowwise(metrics, in_axes=(None, 1), num_blocks=3, strategy=strategy)
    check(Results(loss(by_rows)), Results(loss(metrics)))


def of_outside(weights, image, ref):
    ref[...] = lax.stop_gradient(network(weights, image).mean())
    return network(weights, image)


def without_a_result_first(weights, image):
    rows = network(weights, image)
    io_callback(lambda _: None, None, rows, ordered=True)
    return rows * io_callback(
        np.sin, jax.ShapeDtypeStruct(rows.shape, rows.dtype), rows, ordered=True
    )


@pytest.mark.parametrize("cuts", [(), ("middle",), 2])
@pytest.mark.parametrize("strategy", ["stream", "2ps"])
def test_callbacks_run_once_and_in_order(strategy, cuts):
    """Those that no row touches too, and those whose result nobody reads."""
    met = []

    def called(name, *operands):
        def call(*_):
            met.append(name)
            return np.int32(2)

        return io_callback(call, jax.ShapeDtypeStruct((), np.int32), *operands, ordered=True)

    def fun(weights, image):
        first = called("first")
        rows = jnp.tanh(convolve(image * first, weights[0]))
        called("unread", lax.stop_gradient(rows.sum()))
        rows = convolve(checkpoint_name(rows, "middle"), weights[1])
        second = called("second", lax.stop_gradient(rows[0, 0, 0, 0]))
        return (rows * second * called("third")).mean()

    by_rows = lrjax.rowwise(fun, in_axes=(None, 1), num_blocks=3, strategy=strategy, cuts=cuts)
    found = jax.jit(jax.grad(by_rows))(WEIGHTS, IMAGE)
    jax.effects_barrier()
    assert met == ["first", "unread", "second", "third"]
    check(Results(found), Results(jax.jit(jax.grad(fun))(WEIGHTS, IMAGE)))


REFUSED = {
    "a branch without results": (in_a_branch, {}, "a cond without results that writes to"),
    "an ordered callback": (without_a_result_first, {}, "io_callback without a result before one"),
    "cuts": (added_up, {"cuts": ["middle"]}, "cannot be cut into 2 segments: it uses a mutable"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_keep_its_order_is_refused(name):
    fun, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lrjax.rowwise(fun, in_axes=(None, 1), **options), WEIGHTS, IMAGE)


@pytest.mark.parametrize("strategy", ["stream", "2ps"])
def test_a_mutable_array_from_outside(strategy):
    def step(fun):
        def call(weights, image):
            ref = jax.new_ref(jnp.zeros(()))
            rows = fun(weights, image, ref)
            return rows, ref[...]

        return jax.jit(call)(WEIGHTS, IMAGE)

    by_rows = lrjax.rowwise(of_outside, in_axes=(None, 1, None), num_blocks=3, strategy=strategy)
    if strategy == "stream":
        with pytest.raises(ValueError, match=r"a mutable array .* that it does not make"):
            step(by_rows)
        return
    check(Results(step(by_rows)), Results(step(of_outside)))
