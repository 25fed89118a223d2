"""Reshapes that merge rows with what comes before them: what follows is written for rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero

import lrjax
from lrjax.program.batched_gathers import with_batched_gathers
from lrjax.program.inline import evaluate, flatten
from lrjax.rowgraph.graph import build
from lrjax.rowgraph.merged_axes import merge_of, with_axes_apart
from lrjax.testing import assert_same_as_column

pytestmark = pytest.mark.usefixtures("x64")

BATCH, HEIGHT, WIDTH, CLASSES = 2, 12, 4, 3
GENERATOR = np.random.default_rng(0)
KERNEL = GENERATOR.standard_normal((3, 3, CLASSES, CLASSES)) / 3
IMAGE = GENERATOR.standard_normal((BATCH, HEIGHT, WIDTH, CLASSES))
LABELS = GENERATOR.integers(0, CLASSES, (BATCH, HEIGHT, WIDTH))
SQUARE = GENERATOR.standard_normal((12, 24))
DENSE = GENERATOR.standard_normal((HEIGHT * WIDTH * CLASSES, 2))
MATRIX = GENERATOR.standard_normal((CLASSES, 5))


def pixels(z):
    return z.reshape(-1, CLASSES)


def picked(z, labels):
    """Every pixel's own class's number."""
    return jnp.take_along_axis(z, labels.reshape(-1, 1), 1)[:, 0]


def windows(z):
    """2 x 2 windows of all images, one behind another, as Swin's attention takes them."""
    z = z.reshape(BATCH, HEIGHT // 2, 2, WIDTH // 2, 2, CLASSES)
    return z.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, CLASSES)


def attention(z, labels):
    query, key, value = jnp.split(windows(z) @ jnp.tile(MATRIX[:, :3], (1, 3)), 3, -1)
    weights = jax.nn.softmax(jnp.einsum("nqc,nkc->nqk", query, key))
    back = (weights @ value).reshape(BATCH, HEIGHT // 2, WIDTH // 2, 2, 2, CLASSES)
    return back.transpose(0, 1, 3, 2, 4, 5).reshape(z.shape)


def cross_entropy(z, labels):
    logits = pixels(z)
    return (jax.nn.logsumexp(logits, 1) - picked(logits, labels)).mean()


def normalised(z, labels):
    logits = pixels(z)
    return ((logits - logits.mean(0)) * lax.rsqrt(logits.var(0) + 1e-3)).reshape(z.shape)


def along_rows(z, labels):
    """Every row a sequence."""
    rows = z.reshape(BATCH * HEIGHT, WIDTH, CLASSES)
    return jnp.einsum("nvc,nwc->nvw", rows, jnp.cumsum(jnp.flip(rows, 1), 1)).sum(0)


def log_sigmoids(z, labels):
    """``log_sigmoid`` has a derivative of its own, so has what it calls."""
    target = (labels > 0).reshape(-1)
    logits = z[..., 0].ravel()
    return jnp.where(target, jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)).sum()


LOSSES = {f.__name__: f for f in (cross_entropy, log_sigmoids, normalised, attention, along_rows)}
MERGED = {
    **LOSSES,
    "a dense layer": lambda z, labels: jnp.sin(pixels(z) @ MATRIX).reshape(2, HEIGHT, WIDTH, 5),
    "a matrix from the left": lambda z, labels: jnp.sin(MATRIX.T @ pixels(z).T).max(1),
    "a product of all pixels": lambda z, labels: pixels(z).T @ jnp.tanh(pixels(z)),
    "a product of pixels": lambda z, labels: jnp.einsum("nc,nc->n", pixels(z), pixels(z)).sum(),
    "counted": lambda z, labels: (pixels(z).sum(), (pixels(z).argmax(1) == labels.ravel()).sum()),
    "one-hot": lambda z, labels: (pixels(z) * jax.nn.one_hot(labels.ravel(), CLASSES)).sum(0),
    "sorted, padded, sliced": lambda z, labels: jnp.sort(jnp.pad(pixels(z), ((0, 0), (1, 2))), 1)[
        :, ::2
    ].max(0),
    "top": lambda z, labels: lax.top_k(pixels(z), 2)[0].sum(),
    "joined": lambda z, labels: jnp.concatenate([pixels(z), pixels(z) ** 2], 1).sum(0),
    "one column": lambda z, labels: jnp.sin(pixels(z)[:, 1]).sum(),
    "numbers for all pixels": lambda z, labels: (
        pixels(z) * jnp.linspace(0, 1, BATCH * HEIGHT * WIDTH)[:, None]
    ).sum(),
    "sums by class": lambda z, labels: jax.ops.segment_sum(pixels(z), labels.ravel(), CLASSES),
    "counted pixels": lambda z, labels: pixels(z)[
        jnp.arange(BATCH * HEIGHT * WIDTH), labels.ravel()
    ].prod(),
    "a table": lambda z, labels: (jnp.array(MATRIX.T)[labels.ravel()] * pixels(z)).sum(0),
    "twice": lambda z, labels: (
        jnp.tanh(z.reshape(BATCH * HEIGHT, WIDTH, CLASSES)).reshape(-1, CLASSES).prod(1).sum()
    ),
    "more axes than before": lambda z, labels: (
        jnp.sin(z.reshape(BATCH * HEIGHT, 2, WIDTH // 2, CLASSES, 1)).sum((1, 3)).max()
    ),
    "channels first": lambda z, labels: jnp.log1p(
        z.transpose(0, 3, 1, 2).reshape(-1, WIDTH) ** 2
    ).mean(),
}
WHOLE = {
    "sorted pixels": lambda z, labels: jnp.sort(pixels(z), 0)[:9].sum(),
    "flat results": lambda z, labels: pixels(z),
    "a running sum of pixels": lambda z, labels: jnp.cumsum(pixels(z), 0).max(),
    "some pixels": lambda z, labels: pixels(z)[3:50].sum(),
    "reversed pixels": lambda z, labels: (pixels(z)[::-1] * pixels(z)).sum(),
    "a pixel": lambda z, labels: pixels(z).sum(1).argmax() + pixels(z).sum(),
    "the first pixel": lambda z, labels: (pixels(z) - pixels(z)[:1]).sum(),
    "every pixel with every other": lambda z, labels: jnp.tanh(pixels(z) @ pixels(z).T).sum(),
    "a dense layer on flattened maps": lambda z, labels: jnp.sin(
        z.transpose(0, 3, 1, 2).reshape(BATCH, -1) @ jnp.array(DENSE)
    ),
    "a slice that begins somewhere": lambda z, labels: jax.vmap(
        lambda i: lax.dynamic_slice_in_dim(pixels(z), i, 2, 1)
    )(labels[0, 0, :2]).sum(),
    "odd ones": lambda z, labels: jnp.sin(z.reshape(8, -1)[::2]).sum(),
}


def network(function):
    def convolved(image, kernel):
        return lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return lambda kernel, image, labels: function(convolved(image, kernel), labels)


def programs(function):
    """The function's program, and the same with axes apart."""
    program = flatten(jax.make_jaxpr(network(function))(KERNEL, IMAGE, LABELS))
    program = with_batched_gathers(program)
    return program, with_axes_apart(program, (None, 1, 1))


@pytest.mark.parametrize("name", MERGED)
def test_all_that_follows_goes_by_rows(name):
    merged, apart = programs(MERGED[name])
    assert any(node.reason for node in build(merged, (None, 1, 1)).nodes)
    assert not any(node.reason for node in build(apart, (None, 1, 1)).nodes)
    for program in (merged, apart):
        assert [program.aval(v).shape for v in program.outputs] == [
            merged.aval(v).shape for v in merged.outputs
        ]
    args = (KERNEL, IMAGE, LABELS)
    for own, expected in zip(evaluate(apart, args), evaluate(merged, args), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", WHOLE)
def test_what_needs_the_merged_axis_has_it(name):
    _, apart = programs(WHOLE[name])
    assert any(node.reason for node in build(apart, (None, 1, 1)).nodes)
    column = assert_same_as_column(
        network(WHOLE[name]), (KERNEL, IMAGE, LABELS), (None, 1, 1), num_blocks=4
    )
    assert column.gradients


@pytest.mark.parametrize("name", LOSSES)
def test_same_as_column(name):
    column = None
    for strategy in ("stream", "2ps", "overl"):
        column = assert_same_as_column(
            network(LOSSES[name]),
            (KERNEL, IMAGE, LABELS),
            (None, 1, 1),
            num_blocks=5,
            strategy=strategy,
            expected=column,
        )
    explained = lrjax.explain(
        network(LOSSES[name]), KERNEL, IMAGE, LABELS, in_axes=(None, 1, 1), num_blocks=4
    )
    assert not explained.fallbacks


def doubling(x):
    return 2.0 * x


def test_a_rule_of_ones_own_is_kept():
    """The slope is not the function's, and neither is the slope of the slope."""
    call = jax.custom_jvp(doubling)
    call.defjvp(lambda x, t: (call(*x), 5.0 * jnp.sin(x[0]) * t[0]))

    def slope(function):
        by_rows = lrjax.rowwise(
            network(lambda z, labels: function(pixels(z)).sum()),
            in_axes=(None, 1, 1),
            num_blocks=3,
        )

        def along(kernel):
            return jax.grad(by_rows)(kernel, IMAGE, LABELS)

        return along(KERNEL), jax.jvp(along, (KERNEL,), (np.ones_like(KERNEL),))[1]

    expected = jax.grad(network(lambda z, labels: -5 * jnp.cos(z).sum()))
    first, second = slope(call)
    np.testing.assert_allclose(first, expected(KERNEL, IMAGE, LABELS), rtol=1e-11)
    moved = jax.jvp(lambda k: expected(k, IMAGE, LABELS), (KERNEL,), (np.ones_like(KERNEL),))[1]
    np.testing.assert_allclose(second, moved, rtol=1e-10)


def test_a_rule_that_needs_the_merged_axis():
    """The function is row by row, its derivative is not."""
    call = jax.custom_jvp(jnp.sin)
    call.defjvp(lambda x, t: (jnp.sin(x[0]), t[0] - t[0].mean(0) + t[0][::-1] * jnp.cos(x[0])))
    for strategy in ("stream", "2ps"):
        assert_same_as_column(
            network(lambda z, labels: call(pixels(z)).sum(0) ** 2),
            (KERNEL, IMAGE, LABELS),
            (None, 1, 1),
            num_blocks=3,
            strategy=strategy,
        )


def with_rule(function, rule, **options):
    call = jax.custom_jvp(function)
    call.defjvp(functools.partial(rule, call), **options)
    return call


def zeros_told(call, primals, tangents):
    """A slope that depends on whether an operand moves."""
    (x, y), (dx, dy) = primals, tangents
    slope = 7.0 if isinstance(dy, SymbolicZero) else 1.0
    return call(x, y), slope * y * dx


# Bodies or rules that merge other axes than their operands, or lay results out otherwise.
MORE_RULES = {
    "a body that merges": with_rule(
        lambda x: jnp.sin(x).reshape(-1, CLASSES),
        lambda call, x, t: (call(*x), (t[0] * jnp.cos(x[0])).reshape(-1, CLASSES)),
    ),
    "a body that splits": with_rule(
        lambda x: jnp.sin(x).reshape(BATCH * HEIGHT, 2, -1),
        lambda call, x, t: (call(*x), (t[0] * 3).reshape(BATCH * HEIGHT, 2, -1)),
    ),
    "a transposed slope": with_rule(
        lambda x: jnp.sin(x.reshape(24, -1)[:, :12] @ SQUARE).T,
        lambda call, x, t: (call(*x), (t[0].reshape(24, -1)[:, :12] @ SQUARE).T.at[0].mul(2.0)),
    ),
    "told of zeros": lambda x: with_rule(lambda x, y: x * y, zeros_told, symbolic_zeros=True)(
        x, jnp.linspace(0.0, 1.0, x.size).reshape(x.shape)
    ),
}


@pytest.mark.parametrize("name", MORE_RULES)
def test_rules_that_merge_axes_themselves(name):
    def function(z, labels):
        return (MORE_RULES[name](z.reshape(BATCH * HEIGHT, WIDTH, CLASSES)) ** 2).sum()

    assert_same_as_column(network(function), (KERNEL, IMAGE, LABELS), (None, 1, 1), num_blocks=3)


def test_a_merge_that_gains_nothing_leaves_the_others():
    def function(z, labels):
        return (
            jnp.sin(pixels(z)).sum() + jnp.sort(pixels(z), 0)[:5].sum() + pixels(z).cumsum(0).max()
        )

    _, apart = programs(function)
    reasons = [node.reason for node in build(apart, (None, 1, 1)).nodes if node.reason]
    assert 0 < len(reasons) < 3
    assert_same_as_column(network(function), (KERNEL, IMAGE, LABELS), (None, 1, 1), num_blocks=3)


@pytest.mark.parametrize(
    ("shape", "rows", "new_sizes", "expected"),
    [
        ((2, 8, 4, 3), 1, (-1, 3), (0, (2, 8, 4), 1)),
        ((2, 8, 4, 3), 1, (2, 8, 12), None),
        ((2, 8, 4, 3), 1, (2, 96), (1, (8, 4, 3), 0)),
        ((1, 8, 4, 3), 1, (32, 3), (0, (8, 4), 0)),
        ((2, 8, 4, 3), 1, (16, 4, 3), (0, (2, 8), 1)),
        ((2, 8, 4, 3), 1, (4, 48), None),  # rows are divided
        ((2, 8, 4, 3), 2, (64, 3), (0, (2, 8, 4), 2)),
        ((2, 1, 8, 4), 2, (1, 16, 2, 2), (1, (2, 8), 1)),
        ((2, 1, 4), 1, (2, 4), None),
        ((2, 1, 4), 1, (8,), None),  # one row
        ((2, 0, 4), 1, (0,), None),
    ],
)
def test_what_a_reshape_merges(shape, rows, new_sizes, expected):
    found = merge_of(shape, rows, np.empty(shape).reshape(new_sizes).shape)
    assert expected == (found and (found.axis, found.sizes, found.rows))
