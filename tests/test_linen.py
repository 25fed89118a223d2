"""A row-wise Linen module takes the place of the plain one: variables, values, gradients, keys."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lrjax.linen
from lrjax import testing
from lrjax.testing import assert_same_as_column

IMAGES = jax.random.normal(jax.random.key(0), (2, 21, 9, 3))
RNGS = {"params": jax.random.key(1), "dropout": jax.random.key(2)}


class Block(nn.Module):
    """What a block may do: batch statistics, dropout, a sown reduction, a static flag."""

    channels: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.channels, (3, 3), padding=1, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.3, deterministic=not train)(nn.relu(x))
        self.sow("intermediates", "mean", x.mean())
        return x


class Net(nn.Module):
    """Two blocks of the class it is given, and a head."""

    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x, train):
        x = self.block(4)(x, train)
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = self.block(channels=5)(x, train)
        return nn.Dense(2)(x.mean(axis=(1, 2)))


class NetWithSetup(nn.Module):
    """The same blocks made in ``setup``, as modules."""

    wrap: object = lambda module: module

    def setup(self):
        self.first = self.wrap(Block(4))
        self.blocks = [self.wrap(Block(5)), self.wrap(Block(6))]

    def __call__(self, x, train):
        x = self.first(x, train)
        for block in self.blocks:
            x = block(x, train)
        return x


rows = functools.partial(lrjax.linen.rowwise, in_axes=(1, None), num_blocks=4)


def training_step(model, train=True):
    """Outputs and every updated collection, as a function of variables and images."""

    def step(variables, images):
        mutable = ["batch_stats", "intermediates"]
        return model.apply(variables, images, train, mutable=mutable, rngs=RNGS)

    return step


def assert_same_model(row_model, plain, train=True):
    """The two give the same variables, bit for bit, and the same step up to rounding."""
    variables, row_variables = (m.init(RNGS, IMAGES, train) for m in (plain, row_model))
    assert jax.tree.structure(variables) == jax.tree.structure(row_variables)
    assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, variables, row_variables)))
    found, expected = (
        testing.results(training_step(m, train), (variables, IMAGES)) for m in (row_model, plain)
    )
    testing.check(found, expected)


@pytest.mark.parametrize(
    ("row_model", "plain"),
    [
        (Net(rows(Block)), Net()),
        pytest.param(NetWithSetup(rows), NetWithSetup(), marks=pytest.mark.slow),
        (rows(Net()), Net()),
    ],
    ids=["class, twice", "modules in setup", "whole model"],
)
def test_module_is_replaced(row_model, plain):
    assert_same_model(row_model, plain)


def test_running_statistics_are_used_when_not_training():
    assert_same_model(Net(rows(Block)), Net(), train=False)


def test_method_of_a_module_is_replaced():
    class Decorated(nn.Module):
        @functools.partial(lrjax.linen.rowwise, in_axes=(1, None), num_blocks=3)
        @nn.compact
        def __call__(self, x, train):
            return Block(4, name="block")(x, train)

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return Block(4, name="block")(x, train)

    assert_same_model(Decorated(), Plain())


def test_keeps_the_name_and_the_fields_of_the_class():
    row_block = rows(functools.partial(Block, channels=7))
    assert row_block.func.__name__ == "Block"
    assert issubclass(row_block.func, Block)
    assert row_block().channels == 7
    module = rows(Block(7, name="here"))
    assert (module.channels, module.name) == (7, "here")


def test_every_strategy_and_a_loop_over_rows_are_what_runs():
    variables = Block(4).init(RNGS, IMAGES, True)
    for strategy in ("stream", "2ps", "overl", "column"):
        model = rows(Block(4), strategy=strategy)
        jaxpr = str(jax.make_jaxpr(training_step(model))(variables, IMAGES))
        assert ("scan[" in jaxpr) == (strategy != "column")


class Flattened(nn.Module):
    """Rows and batch become one axis before the only convolution."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(3, (3,))(x.reshape(-1, *x.shape[2:]))


class Transposed(nn.Module):
    """Rows move to another axis, and stay on one of their own."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(3, (3, 3), strides=(2, 1))(x.transpose(0, 2, 1, 3))


class Cached(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3))(x)
        self.variable("cache", "map", jnp.zeros_like, x).value = x
        return x


def test_rows_that_move_to_another_axis_are_followed():
    model = Transposed()
    variables = model.init(RNGS, IMAGES)
    assert_same_as_column(model.apply, (variables, IMAGES), (None, 1), num_blocks=5)
    row_model = lrjax.linen.rowwise(model, in_axes=1, num_blocks=5)
    found, expected = (testing.results(m.apply, (variables, IMAGES)) for m in (row_model, model))
    testing.check(found, expected)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (nn.Dense(3), {}, "Dense has no convolution, pooling or dense layer over channels that"),
        (Flattened(), {}, r"reshape .* does not keep rows whole"),
        (Cached(), {"mutable": ["cache"]}, "Cached writes the variable 'cache/map', of shape"),
        (
            nn.Sequential([nn.Conv(3, (3, 3))]),
            {"capture_intermediates": True},
            r"'intermediates/.*__call__'.* carries rows.*Store or sow a reduction",
        ),
    ],
    ids=["no convolution", "rows merged away", "a cache of maps", "captured maps"],
)
def test_module_that_cannot_run_by_rows_says_why(module, options, message):
    images = IMAGES[0, :, :, 0] if isinstance(module, nn.Dense) else IMAGES
    variables = module.init(RNGS, images)
    row_module = lrjax.linen.rowwise(module, in_axes=0 if images.ndim == 2 else 1)
    if isinstance(module, nn.Dense):
        row_module = lrjax.linen.rowwise(module, in_axes=1)
    with pytest.raises(ValueError, match=message):
        row_module.apply(variables, images, **options)


def test_module_inside_another_one_is_refused():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lrjax.linen.rowwise(nn.Conv(3, (3, 3)), in_axes=1)(x)

    with pytest.raises(ValueError, match=r"already part of another module .* wrap its class"):
        Outer().init(RNGS, IMAGES)


def test_options_are_checked_when_wrapping():
    with pytest.raises(ValueError, match="strategy='rows' is unknown"):
        lrjax.linen.rowwise(Block, in_axes=1, strategy="rows")
