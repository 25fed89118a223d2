"""``rowwise`` inside and around JAX's other transformations, models and heads, and bad input."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lrjax
from graphs import assert_row_local, fallbacks, graphs_of
from lrjax.testing import Results, assert_same_as_column, check
from marks import STRATEGIES

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def convolve(image, weights, strides=(1, 1), padding="SAME"):
    return lax.conv_general_dilated(
        image, weights, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def max_pool(image):
    return lax.reduce_window(image, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def network(params, image):
    image = max_pool(jax.nn.relu(convolve(image, params["w"]) + params["b"]))
    return convolve(image, params["v"])


def loss(params, image):
    return (network(params, image) ** 2).mean()


PARAMS = {"w": normal(3, 3, 1, 2), "b": normal(2, seed=1) / 4, "v": normal(3, 1, 2, 1, seed=2)}
IMAGE = normal(2, 11, 4, 1, seed=3)


def by_rows(fun, strategy="stream", in_axes=(None, 1), num_blocks=3, **options):
    return lrjax.rowwise(fun, in_axes=in_axes, num_blocks=num_blocks, strategy=strategy, **options)


def assert_equal(found, expected):
    check(Results(found), Results(expected))


# --- Transformations inside it (those around it: test_composition) -------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestTransformations:
    def test_grad_of_one_of_several_outputs(self, strategy):
        """The others have no cotangent at all, not one of zeros."""

        def fun(params, image):
            image = convolve(image, params["w"])
            return image.sum((0, 2)), jnp.tanh(image), image.mean()

        def first(fun):
            return jax.grad(lambda *args: (fun(*args)[0] ** 2).sum(), argnums=(0, 1))

        found = jax.jit(first(by_rows(fun, strategy)))(PARAMS, IMAGE)
        assert_equal(found, first(fun)(PARAMS, IMAGE))

    def test_checkpoint_inside(self, strategy):
        fun = jax.checkpoint(network)
        assert_same_as_column(fun, (PARAMS, IMAGE), (None, 1), num_blocks=3, strategy=strategy)

    def test_jit_inside(self, strategy):
        def fun(params, image):
            return jax.jit(network)(params, jax.jit(jnp.sin)(image))

        assert_row_local(fun, (PARAMS, IMAGE), (None, 1))
        assert_same_as_column(fun, (PARAMS, IMAGE), (None, 1), num_blocks=3, strategy=strategy)


class TestAroundAGradient:
    def test_value_and_grad_inside(self):
        found = jax.jit(by_rows(jax.value_and_grad(loss)))(PARAMS, IMAGE)
        assert_equal(found, jax.value_and_grad(loss)(PARAMS, IMAGE))

    def test_it_is_one_row_loop(self):
        graphs = graphs_of(jax.value_and_grad(loss), (PARAMS, IMAGE), (None, 1))
        first = graphs[0]
        assert fallbacks(first) == []
        assert len(first.loops) == 1

    def test_gradient_of_the_image(self):
        found = jax.jit(by_rows(jax.grad(loss, argnums=1)))(PARAMS, IMAGE)
        assert_equal(found, jax.grad(loss, argnums=1)(PARAMS, IMAGE))

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_its_own_gradient(self, strategy):
        def fun(params, image):
            return jax.grad(lambda x: jnp.sin(convolve(x, params["w"])).sum())(image)

        assert_same_as_column(fun, (PARAMS, IMAGE), (None, 1), num_blocks=3, strategy=strategy)


# --- Arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestArguments:
    def test_pytrees(self, strategy):
        def fun(params, batch):
            features = convolve(batch["image"], params["w"]) * batch["masks"][0]
            return {"features": features, "rest": (features.sum(), batch["masks"][1] * 2)}

        masks = (normal(2, 11, 4, 1, seed=5), normal(2, 11, 4, 1, seed=6))
        args = ({"w": PARAMS["w"]}, {"image": IMAGE, "masks": masks})
        assert_same_as_column(fun, args, (None, 1), num_blocks=3, strategy=strategy)

    def test_axes_as_a_prefix(self, strategy):
        def fun(params, batch):
            return convolve(batch["image"], params["w"]) * batch["scale"]

        args = (PARAMS, {"image": IMAGE, "scale": normal(2)})
        in_axes = (None, {"image": 1, "scale": None})
        assert_same_as_column(fun, args, in_axes, num_blocks=3, strategy=strategy)

    def test_one_axis_for_all(self, strategy):
        args = (IMAGE, normal(2, 11, 4, 1, seed=4))
        assert_same_as_column(
            lambda x, y: jnp.sin(x[:, 1:] * y[:, :-1]), args, 1, num_blocks=3, strategy=strategy
        )

    def test_keyword_arrays_and_flags(self, strategy):
        def fun(params, image, *, scale, train, name=None):
            out = convolve(image, params["w"]) * scale
            assert name == "first"
            return jnp.tanh(out) if train else out

        for train in (True, False):
            kwargs = {"scale": normal(2), "train": train, "name": "first"}
            assert_same_as_column(
                fun, (PARAMS, IMAGE), (None, 1), kwargs=kwargs, num_blocks=3, strategy=strategy
            )

    def test_gradient_of_a_keyword_array(self, strategy):
        def fun(image, *, w):
            return (convolve(image, w) ** 2).sum()

        def total(fun):
            return jax.grad(lambda w: fun(IMAGE, w=w))

        found = jax.jit(total(by_rows(fun, strategy, in_axes=1)))(PARAMS["w"])
        assert_equal(found, total(fun)(PARAMS["w"]))

    def test_numbers(self, strategy):
        def fun(params, image, scale):
            return convolve(image, params["w"]) * scale

        assert_same_as_column(
            fun, (PARAMS, IMAGE, 2.5), (None, 1, None), num_blocks=3, strategy=strategy
        )

    def test_empty_subtrees(self, strategy):
        def fun(params, image, extra):
            assert extra == {"nothing": None}
            return convolve(image, params["w"])

        row_fun = by_rows(fun, strategy, in_axes=(None, 1, None))
        assert_equal(row_fun(PARAMS, IMAGE, {"nothing": None}), convolve(IMAGE, PARAMS["w"]))

    def test_random_keys(self, strategy):
        def fun(params, image, key):
            keep = jax.random.bernoulli(key, 0.7, image.shape)
            return convolve(jnp.where(keep, image, 0.0), params["w"])

        row_fun = by_rows(fun, strategy, in_axes=(None, 1, None))
        key = jax.random.key(3)
        assert_equal(jax.jit(row_fun)(PARAMS, IMAGE, key), fun(PARAMS, IMAGE, key))
        found = jax.jit(jax.grad(lambda p: (row_fun(p, IMAGE, key) ** 2).sum()))(PARAMS)
        assert_equal(found, jax.grad(lambda p: (fun(p, IMAGE, key) ** 2).sum())(PARAMS))

    def test_float32_results_stay_float32_under_x64(self, strategy):
        args = jax.tree.map(lambda x: x.astype(np.float32), (PARAMS, IMAGE))
        assert_same_as_column(network, args, (None, 1), num_blocks=3, strategy=strategy)


# --- Heads and barriers --------------------------------------------------------------------------


def flattened(params, image):
    features = network(params, image)
    return features.reshape(len(features), -1) @ params["head"]


def pooled(params, image):
    return network(params, image).mean((1, 2)) @ params["head"][:1]


def cross_entropy(params, image):
    logits = flattened(params, image)
    return -jax.nn.log_softmax(logits)[:, 1].mean()


HEAD_PARAMS = {**PARAMS, "head": normal(10, 3, seed=9)}


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestHeadsAndBarriers:
    @pytest.mark.parametrize("fun", [flattened, pooled, cross_entropy])
    def test_heads(self, fun, strategy):
        args = (HEAD_PARAMS, IMAGE)
        assert_same_as_column(fun, args, (None, 1), num_blocks=3, strategy=strategy)

    def test_batch_statistics(self, strategy):
        def fun(params, image):
            for _ in range(2):
                image = jnp.sin(convolve(image, params["u"]))
                mean, variance = image.mean((0, 1, 2)), image.var((0, 1, 2))
                image = (image - mean) * lax.rsqrt(variance + 1e-5) * params["b"]
            return image**2, (mean, variance)

        params = {"u": normal(3, 3, 2, 2), "b": PARAMS["b"]}
        args = (params, normal(2, 11, 4, 2))
        assert_same_as_column(fun, args, (None, 1), num_blocks=3, strategy=strategy)
        assert all(fallbacks(graph) == [] for graph in graphs_of(fun, args, (None, 1)))

    def test_group_norm_and_squeeze_excite(self, strategy):
        def fun(params, image):
            image = convolve(image, params["w"])
            mean = image.mean((1, 2), keepdims=True)
            image = (image - mean) * lax.rsqrt(image.var((1, 2), keepdims=True) + 1e-5)
            gate = jax.nn.sigmoid((image**2).mean((1, 2)) @ params["gate"])
            return convolve(jnp.tanh(image) * gate[:, None, None], params["v"])

        args = ({**PARAMS, "gate": normal(2, 2, seed=4)}, IMAGE)
        assert_same_as_column(fun, args, (None, 1), num_blocks=3, strategy=strategy)

    @pytest.mark.parametrize("middle", [lambda x: jnp.cumsum(x, 1), lambda x: jnp.flip(x, 1)])
    def test_column_operation_in_the_middle(self, middle, strategy):
        def fun(params, image):
            return convolve(middle(jnp.tanh(convolve(image, params["w"]))), params["v"])

        args = (PARAMS, IMAGE)
        assert_same_as_column(fun, args, (None, 1), num_blocks=3, strategy=strategy)
        assert any(fallbacks(graph) for graph in graphs_of(fun, args, (None, 1)))

    def test_a_loop_within(self, strategy):
        """``lax.scan`` over layers stays whole: column-wise, and exact."""

        def fun(params, image):
            def layer(image, weights):
                return jnp.tanh(convolve(image, weights)), None

            image, _ = lax.scan(layer, jnp.sin(image), params["layers"])
            return convolve(image, params["w"])

        args = ({"layers": normal(2, 3, 3, 1, 1), "w": PARAMS["w"]}, IMAGE)
        assert_same_as_column(fun, args, (None, 1), num_blocks=3, strategy=strategy)

    def test_a_branch_within(self, strategy):
        def fun(params, image, flag):
            image = jnp.sin(convolve(image, params["w"]))
            return lax.cond(flag, lambda x: x * 2, lambda x: x**3, image)

        args = (PARAMS, IMAGE, np.bool_(True))
        assert_same_as_column(fun, args, (None, 1, None), num_blocks=3, strategy=strategy)


# --- Flax ----------------------------------------------------------------------------------------


class SmallNet(nn.Module):
    """Convolution, BatchNorm, pooling, dropout and a dense head."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(3, (3, 3), use_bias=False, dtype=x.dtype, param_dtype=x.dtype)(x)
        x = nn.BatchNorm(not train, dtype=x.dtype, param_dtype=x.dtype)(x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        x = checkpoint_name(x, "middle")
        x = nn.Conv(2, (3, 3), (2, 2), dtype=x.dtype, param_dtype=x.dtype)(x)
        x = nn.avg_pool(nn.gelu(x), (2, 2), (1, 1))
        return nn.Dense(3, dtype=x.dtype, param_dtype=x.dtype)(x.mean((1, 2)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cuts", [(), ("middle",)])
def test_flax_module(strategy, cuts):
    model = SmallNet()
    image = normal(2, 17, 8, 2)
    variables = model.init(jax.random.key(0), image, train=False)

    def fun(params, image):
        out, updates = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]},
            image,
            train=True,
            mutable=["batch_stats"],
        )
        return out, updates

    args = (variables["params"], image)
    assert_same_as_column(fun, args, (None, 1), num_blocks=3, strategy=strategy, cuts=cuts)


# --- Bad input -----------------------------------------------------------------------------------


def row_fun(**options):
    options = {"in_axes": (None, 1), "num_blocks": 2, **options}
    return lrjax.rowwise(network, **options)


BAD = {
    "no rows": (lambda: row_fun(in_axes=(None, None))(PARAMS, IMAGE), "in_axes", "no argument"),
    "too few axes": (lambda: row_fun(in_axes=(1,))(PARAMS, IMAGE), "in_axes", "1 entries for 2"),
    "no such axis": (lambda: row_fun(in_axes=(None, 4))(PARAMS, IMAGE), "args[1]", "-4 to 3"),
    "negative axis": (lambda: row_fun(in_axes=(None, -5))(PARAMS, IMAGE), "axis -5", "-4 to 3"),
    "not an axis": (lambda: row_fun(in_axes=(None, "H"))(PARAMS, IMAGE), "in_axes", "'H'"),
    "axis of nothing": (lambda: row_fun(in_axes=({"w": 0}, 1))(PARAMS, IMAGE), "in_axes", "prefix"),
    "axis of a scalar": (
        lambda: lrjax.rowwise(lambda x, s: x * s, in_axes=(1, 0))(IMAGE, 2.0),
        "args[1]",
        "does not exist",
    ),
    "no block": (lambda: row_fun(num_blocks=0), "num_blocks=0", "at least 1"),
    "negative blocks": (lambda: row_fun(num_blocks=-3), "num_blocks=-3", "at least 1"),
    "half a block": (lambda: row_fun(num_blocks=2.5), "num_blocks=2.5", "int"),
    "many blocks": (
        lambda: row_fun(num_blocks=12)(PARAMS, IMAGE),
        "num_blocks=12",
        "largest allowed is 11",
    ),
    "many blocks of output": (
        lambda: row_fun(num_blocks=6, strategy="2ps")(PARAMS, IMAGE),
        "num_blocks=6",
        "largest allowed is 5",
    ),
    "blocks per segment": (
        lambda: row_fun(num_blocks=(2, 3))(PARAMS, IMAGE),
        "num_blocks",
        "2 entries for 1",
    ),
    "strategy": (lambda: row_fun(strategy="3ps"), "strategy='3ps'", "'stream', '2ps'"),
    "strategies": (lambda: row_fun(strategy=("2ps", "no")), "strategy[1]='no'", "'overl'"),
    "cut name": (lambda: row_fun(cuts=("pool9",))(PARAMS, IMAGE), "pool9", "checkpoint_name"),
    "cut number": (lambda: row_fun(cuts=0), "cuts=0", "at least 1"),
    "many cuts": (lambda: row_fun(cuts=99)(PARAMS, IMAGE), "cuts=99", "operations on rows"),
    "empty": (lambda: row_fun()(PARAMS, IMAGE[:, :0]), "args[1]", "empty"),
    "nothing row-local": (
        lambda: lrjax.rowwise(lambda x: jnp.flip(x, 1), in_axes=1)(IMAGE),
        "no operation that is local in rows: rev",
        "nothing to run row by row",
    ),
    "no operation on rows": (
        lambda: lrjax.rowwise(lambda x, y: (x, jnp.sin(y)), in_axes=(1, None))(IMAGE, IMAGE),
        "no operation on an argument that carries rows",
        "check in_axes",
    ),
    "heights": (
        lambda: lrjax.rowwise(lambda x, y: x + y, in_axes=(1, 1))(IMAGE, IMAGE[:, 1:]),
        "[11, 10]",
        "aligned",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    """The message names the argument, what was given, and what to do."""
    call, *parts = BAD[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is checked below
        call()
    for part in parts:
        assert re.search(re.escape(part), str(error.value)), str(error.value)


@pytest.mark.parametrize("name", ["many blocks", "empty", "cut name"])
def test_bad_input_under_jit(name):
    """Raised while tracing, before anything is compiled."""
    call = BAD[name][0]
    with pytest.raises(ValueError, match=re.escape(BAD[name][2])):
        jax.eval_shape(call)


def test_an_error_of_the_function_is_its_own():
    def fun(params, image):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        by_rows(fun)(PARAMS, IMAGE)


def test_results_are_arrays_of_jax():
    def fun(params, image):
        return network(params, image), np.arange(3), 2.5, params["w"]

    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(by_rows(fun)(PARAMS, IMAGE)))


def test_the_function_keeps_its_name():
    assert by_rows(network).__name__ == "network"


def test_default_number_of_blocks():
    row_network = lrjax.rowwise(network, in_axes=(None, 1))
    assert_equal(jax.jit(row_network)(PARAMS, IMAGE), network(PARAMS, IMAGE))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_runs_is_what_explain_says(strategy):
    """The strategy and the blocks asked for, not others that give the same values."""
    told = lrjax.explain(network, PARAMS, IMAGE, in_axes=(None, 1), num_blocks=3, strategy=strategy)
    forward = told.segments[0].passes[0]
    fun = by_rows(network, strategy)
    program = str(jax.make_jaxpr(fun)(PARAMS, IMAGE))
    assert tuple(map(int, re.findall(r"length=(\d+)", program))) == forward.steps == (3,)
    residuals = jax.eval_shape(lambda *args: jax.tree.leaves(jax.vjp(fun, *args)[1]), PARAMS, IMAGE)
    lines = [leaf for leaf in residuals if leaf.ndim == 1 + IMAGE.ndim]  # of every step
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in lines) == forward.saved_bytes
    assert bool(lines) == (strategy == "2ps")


def test_column_is_the_function_itself():
    assert_same_as_column(network, (PARAMS, IMAGE), (None, 1), num_blocks=3, strategy="column")


# --- Maps of one row -----------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("height", [1, 28])
def test_one_row_that_is_broadcast_to_all(strategy, height):
    """The row is a map of a row loop; its copies take it whole."""

    def rolled(x):
        x = (x + jnp.roll(x, 1, 1)) / 2
        return jnp.where((x > 1).any(1, keepdims=True), x, x / 2)

    def attention(x):
        rows = jnp.moveaxis(x, 1, -1)
        weights = jax.nn.softmax(rows[..., :, None] * rows[..., None, :])
        return x + jnp.moveaxis((weights * rows[..., None, :]).sum(-1), -1, 1)

    image = np.random.default_rng(0).standard_normal((1, height, 4, 1))
    for fun in (rolled, attention):
        assert_same_as_column(fun, (image,), 1, num_blocks=min(height, 3), strategy=strategy)
