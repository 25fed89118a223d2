"""NNX modules by rows: values, gradients, updated statistics and random streams are the same."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lrjax.nnx
from lrjax import testing

IMAGES = jax.random.normal(jax.random.key(0), (2, 21, 9, 3))
rows = functools.partial(lrjax.nnx.rowwise, in_axes=1, num_blocks=4)


class Block(nnx.Module):
    """Batch statistics and dropout."""

    def __init__(self, before, after, rngs):
        self.conv = nnx.Conv(before, after, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(after, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return self.dropout(nnx.relu(self.norm(self.conv(x))))


class Net(nnx.Module):
    """Two blocks, run through ``wrap``, and a head."""

    def __init__(self, wrap=lambda call: call):
        rngs = nnx.Rngs(0, dropout=1)
        self.first, self.second = Block(3, 4, rngs), Block(4, 5, rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)
        self.wrap = wrap

    def __call__(self, x):
        x = self.wrap(self.second)(self.wrap(self.first)(x))
        return self.head(x.mean(axis=(1, 2)))


def whole(model, images):
    return model(images)


def results(model, call):
    """Outputs and gradients of two steps, and the state after them."""
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def steps(parameters, images):
        merged = nnx.merge(graph, parameters, rest, copy=True)
        outputs = [call(merged, images), call(merged, images)]
        _, state = nnx.split(merged)
        numbers = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.number)]
        return outputs, numbers

    return testing.results(steps, (parameters, IMAGES))


@pytest.mark.parametrize(
    ("wrap", "call", "train"),
    [
        (rows, whole, True),
        (lambda module: rows(module.__call__), whole, False),
        (lambda call: call, lrjax.nnx.rowwise(whole, in_axes=(None, 1), num_blocks=3), True),
    ],
    ids=["modules, twice", "bound methods", "function of a model"],
)
def test_module_runs_by_rows(wrap, call, train):
    row_model, plain = Net(wrap), Net()
    for model in (row_model, plain):
        model.train() if train else model.eval()
    testing.check(results(row_model, call), results(plain, whole))


def test_module_is_trained_in_place_under_jit():
    def state_after_a_step(call):
        graph, state = nnx.split(Net())

        def train(state, images):
            model = nnx.merge(graph, state, copy=True)

            @nnx.jit
            def step(model):
                return nnx.grad(lambda model: call(model, images).sum())(model)

            gradients = step(model)
            kinds = (nnx.BatchStat, nnx.RngCount)
            return [nnx.to_pure_dict(s) for s in (gradients, *nnx.state(model, *kinds))]

        return testing.results(train, (state, IMAGES), argnums=())

    row_call = lrjax.nnx.rowwise(whole, in_axes=(None, 1), num_blocks=4)
    found, expected = map(state_after_a_step, (row_call, whole))
    testing.check(found, expected)
    _, statistics, counts = found.outputs
    untrained = map(nnx.to_pure_dict, nnx.state(Net(), nnx.BatchStat, nnx.RngCount))
    for after, before in zip((statistics, counts), untrained, strict=True):
        assert not jax.tree.all(jax.tree.map(jnp.array_equal, after, before))


def test_method_in_a_class_body_and_random_streams_among_the_arguments():
    class Noisy(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))

        @functools.partial(lrjax.nnx.rowwise, in_axes=(None, 1, None), num_blocks=3)
        def __call__(self, x, train, *, rngs):
            noise = jax.random.normal(rngs.noise(), x.shape) if train else 0
            return self.conv(x + noise)

    model, rngs, plain_rngs = Noisy(), nnx.Rngs(noise=5), nnx.Rngs(noise=5)
    found = [model(IMAGES, True, rngs=rngs) for _ in range(2)]
    noise = [jax.random.normal(plain_rngs.noise(), IMAGES.shape) for _ in range(2)]
    expected = [model.conv(IMAGES + n) for n in noise]
    testing.check(testing.Results(found), testing.Results(expected))
    assert rngs.noise.count[...] == 2


class Cached(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(3, 3, (3, 3), rngs=nnx.Rngs(0))
        self.cache = nnx.Variable(jnp.zeros(IMAGES.shape))

    def __call__(self, x):
        self.cache[...] = self.conv(x)
        return self.cache[...]


class Growing(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(3, 3, (3, 3), rngs=nnx.Rngs(0))

    def __call__(self, x):
        self.seen = nnx.Variable(x.mean())
        return self.conv(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nnx.Linear(9, 2, rngs=nnx.Rngs(0)), "Linear has no convolution, pooling or dense layer"),
        (Cached(), "Cached writes the variable 'self/cache', of shape .* carries rows"),
        (Growing(), "Growing adds, removes or replaces variables"),
    ],
    ids=["no convolution", "a cache of maps", "a new variable"],
)
def test_module_that_cannot_run_by_rows_says_why(module, message):
    images = IMAGES[0, :, :, 0] if isinstance(module, nnx.Linear) else IMAGES
    with pytest.raises(ValueError, match=message):
        lrjax.nnx.rowwise(module, in_axes=1)(images)


def test_options_are_checked_when_wrapping():
    with pytest.raises(ValueError, match="num_blocks=0 must be at least 1"):
        lrjax.nnx.rowwise(whole, in_axes=(None, 1), num_blocks=0)
