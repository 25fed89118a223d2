"""Functions with derivatives of their own, branches that hold them, callbacks, loops along rows:
what can be tiled is, and what cannot runs column-wise, exactly, under its name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.scipy.special import xlogy

import lrjax
from lrjax.program.inline import flatten
from lrjax.rowgraph.calls import watched
from lrjax.rowgraph.graph import build
from lrjax.rowgraph.proofs import assert_proofs_hold
from lrjax.rowgraph.tracing import trace
from lrjax.rules import linearity
from lrjax.rules.base import _REGISTRY, registered
from lrjax.rules.dependence import output_dependences
from lrjax.testing import assert_same_as_column, check, results

pytestmark = pytest.mark.usefixtures("x64")

STRATEGIES = ("stream", "2ps", "overl")
AXES = (None, None, None, 1)


def convolve(image, weights):
    return lax.conv_general_dilated(
        image, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def arguments(height=13):
    generator = np.random.default_rng(0)
    kernels = [0.5 * generator.standard_normal((3, 3, 2, 2)) for _ in range(2)]
    return (*kernels, np.float64(1.3), generator.standard_normal((2, height, 5, 2)))


def between_convolutions(function):
    """``function(map, scale)`` between two convolutions."""

    def network(first, second, scale, image):
        return convolve(function(convolve(image, first), scale), second)

    return network


def with_vjp(function, backward):
    """``function(x, scale)`` with ``backward(x, scale, cotangent)`` for a derivative."""
    function = jax.custom_vjp(function)
    function.defvjp(lambda x, s: (function(x, s), (x, s)), lambda saved, g: backward(*saved, g))
    return function


def centred(x):
    return x - x.mean((1, 2), keepdims=True)


def scaled(x, s):
    return x * s


TILED = {
    "scale": with_vjp(scaled, lambda x, s, g: (g * s, (g * x).sum())),
    "gradient reversal": with_vjp(lambda x, s: x, lambda x, s, g: (-s * g, jnp.zeros_like(s))),
    "no gradient for rows": with_vjp(scaled, lambda x, s, g: (jnp.zeros_like(x), (g * x).sum())),
    "straight through": with_vjp(
        lambda x, s: jnp.round(x * 4) / 4 * s,
        lambda x, s, g: (jnp.where(jnp.abs(x) < 1, g * s, 0), (g * x).sum() / 2),
    ),
    "a pole outside": with_vjp(
        lambda x, s: s * jnp.log(1 - jnp.tanh(x) / 2),
        lambda x, s, g: (g * s / (jnp.tanh(x) - 1.0), (g / jnp.log(2 - jnp.tanh(x) / 2)).sum()),
    ),
    "xlogy": lambda x, s: xlogy(s, jax.nn.softplus(x)),
    "another forward rule": None,  # see below
}


@jax.custom_vjp
def _rounded(x, s):
    return x * s


_rounded.defvjp(lambda x, s: (jnp.sin(x) * s, (x, s)), lambda saved, g: (g, (g * saved[0]).sum()))
TILED["another forward rule"] = _rounded


@jax.custom_jvp
def _log_of_difference(x, s):
    return s * jnp.log(1 - jnp.tanh(x) / 2)


@_log_of_difference.defjvp
def _(primals, tangents):
    (x, s), (dx, ds) = primals, tangents
    return _log_of_difference(x, s), ds * jnp.log(1 - jnp.tanh(x) / 2) - s * dx / (1 + x**2)


TILED["custom_jvp with a pole"] = _log_of_difference

_BY_CHANNEL = jnp.linspace(0.5, 1.5, 2)
_closing_over = jax.custom_vjp(lambda x: x * _BY_CHANNEL)
_closing_over.defvjp(lambda x: (x * _BY_CHANNEL, None), lambda _, g: (3 * g,))
TILED["custom_vjp that closes over an array"] = lambda x, s: _closing_over(jnp.sin(x * s))

WHOLE = {
    "normalisation": (
        # Its gradient alone could be tiled.
        with_vjp(lambda x, s: centred(x) * s, lambda x, s, g: (g * s, (g * x).sum())),
        "reduce_sum over rows",
    ),
    "sums of the cotangent fed back": (
        with_vjp(scaled, lambda x, s, g: (centred(g) * s, (g * x).sum())),
        "fed back to rows",
    ),
    "gradient clipping": (
        with_vjp(lambda x, s: x, lambda x, s, g: (jnp.clip(g, -0.3, 0.3), jnp.zeros_like(s))),
        "cotangent of operand 0 is not proved linear",
    ),
    "nonlinear in its sum": (
        with_vjp(scaled, lambda x, s, g: (g * s, jnp.tanh((g * x).sum()))),
        "cotangent of operand 1 is not proved linear",
    ),
    "a constant for a parameter": (
        with_vjp(scaled, lambda x, s, g: (g * s, jnp.ones_like(s))),
        "cotangent of operand 1 is not proved linear",
    ),
    "a mean over rows beside the cotangent": (
        with_vjp(scaled, lambda x, s, g: (g * s, (g * x).sum() * jnp.tanh(x.sum()))),
        "not proved linear",
    ),
    "a number beside picked cotangents": (
        with_vjp(
            lambda x, s: x,
            lambda x, s, g: (
                g.at[..., 1 + jnp.arange(g.shape[-1])].get(mode="fill", fill_value=1.0),
                jnp.zeros_like(s),
            ),
        ),
        "cotangent of operand 0 is not proved linear",
    ),
    "added to the cotangent": (
        with_vjp(scaled, lambda x, s, g: (g * s + 0.1, (g * x).sum())),
        "cotangent of operand 0 is not proved linear",
    ),
    "the norm of the cotangent": (
        with_vjp(lambda x, s: x, lambda x, s, g: (g / jnp.sqrt((g * g).sum()), jnp.zeros_like(s))),
        "not proved linear",
    ),
}


class TestRules:
    @pytest.mark.parametrize("name", TILED)
    def test_tiled(self, name):
        network, args, expected = between_convolutions(TILED[name]), arguments(), None
        for strategy in STRATEGIES:
            explained = lrjax.explain(network, *args, in_axes=AXES, num_blocks=4, strategy=strategy)
            assert not explained.fallbacks
            expected = assert_same_as_column(
                network, args, AXES, num_blocks=4, strategy=strategy, expected=expected
            )

    @pytest.mark.parametrize("name", WHOLE)
    def test_not_tiled(self, name):
        function, reason = WHOLE[name]
        network, args, expected = between_convolutions(function), arguments(), None
        for strategy in STRATEGIES:
            expected = assert_same_as_column(
                network, args, AXES, num_blocks=4, strategy=strategy, expected=expected
            )
        for strategy in STRATEGIES[1:]:
            explained = lrjax.explain(network, *args, in_axes=AXES, num_blocks=4, strategy=strategy)
            (found,) = (one for one in explained.fallbacks if "custom_vjp" in one)
            assert reason in found

    def test_without_a_gradient(self):
        """The function itself runs, not its forward rule, where nothing is differentiated."""
        network, args = between_convolutions(TILED["another forward rule"]), arguments()
        for strategy in STRATEGIES:
            found = lrjax.rowwise(network, in_axes=AXES, num_blocks=4, strategy=strategy)
            check(results(found, args, argnums=()), results(network, args, argnums=()))

    @pytest.mark.parametrize("factor", [1.0, -0.5])
    def test_one_pass_only_where_the_gradient_is_linear(self, factor):
        """Stream's single pass scales a gradient for a cotangent of one."""
        clipped = between_convolutions(WHOLE["gradient clipping"][0])

        def loss(*args):
            return factor * jnp.sin(clipped(*args)).sum()

        assert_same_as_column(loss, arguments(), AXES, num_blocks=4)

    def test_a_complex_loss(self):
        def loss(first, second, scale, image):
            return (convolve(jnp.tanh(convolve(image, first)), second) * (1 + 2j) * scale).sum()

        assert_same_as_column(loss, arguments(), AXES, num_blocks=4)

    def test_in_a_branch(self):
        functions = [WHOLE["normalisation"][0], *(TILED[n] for n in ("scale", "a pole outside"))]

        def choose(x, s):
            for function in functions:
                x = lax.cond(s > 0, function, lambda x, s: x * 2, x, s)
            return x

        network, args, expected = between_convolutions(choose), arguments(), None
        for strategy in STRATEGIES:
            expected = assert_same_as_column(
                network, args, AXES, num_blocks=4, strategy=strategy, expected=expected
            )

    def test_a_branch_that_makes_a_map_of_a_parameter(self):
        """The map has as many rows as the image, and exists whole."""

        def fun(scales, x):
            x = jnp.sin(x)
            return lax.cond(scales.sum() > 0, lambda x: x, lambda x: x * scales[None, :, None], x)

        image = np.random.default_rng(0).standard_normal((1, 4, 1))
        for scales in (np.arange(4.0), -np.arange(4.0)):
            for strategy in STRATEGIES:
                assert_same_as_column(
                    fun, (scales, image), (None, 1), num_blocks=2, strategy=strategy
                )

    def test_a_pole_in_a_branch(self):
        def choose(x, s):
            def plain(x, s):
                return s * jnp.log((x - 1) ** 2)  # rows outside the image hold 1

            return lax.cond(s > 0, plain, lambda x, s: x, x, s)

        network, args, expected = between_convolutions(choose), arguments(), None
        for strategy in STRATEGIES:
            expected = assert_same_as_column(
                network, args, AXES, num_blocks=4, strategy=strategy, expected=expected
            )


def met(network):
    """Calls whose derivatives are proved."""
    with watched() as calls:
        traced = trace(network, AXES, arguments(), {})
        build(traced.program, traced.axes)
    return calls.values()


class TestProofs:
    def test_hold_on_random_numbers(self):
        for name, function in TILED.items():
            tried = assert_proofs_hold(met(between_convolutions(function)))
            assert bool(tried) == (name not in ("xlogy", "custom_jvp with a pole"))

    def test_a_wrong_proof_shows(self, monkeypatch):
        for primitive, operands in ((lax.clamp_p, (1,)), (lax.min_p, (0, 1)), (lax.max_p, (0, 1))):
            rule = registered()[primitive]
            wrong = dataclasses.replace(rule.traits, linearity=linearity.additive_in(*operands))
            monkeypatch.setitem(_REGISTRY, primitive, dataclasses.replace(rule, traits=wrong))
        clip = with_vjp(scaled, lambda x, s, g: (lax.clamp(-0.3, g, 0.3), jnp.zeros_like(s)))
        network = between_convolutions(clip)
        with pytest.raises(AssertionError, match="additive cotangents differ"):
            assert_proofs_hold(met(network))
        with pytest.raises(AssertionError, match="additive cotangents differ"):
            assert_same_as_column(network, arguments(), AXES, num_blocks=4)

    @pytest.mark.parametrize(
        ("function", "expected"),
        [
            (lambda g, x: g * x + g.sum(), "ADDITIVE"),
            (lambda g, x: jnp.where(x > 0, g, 0.0) @ x, "ADDITIVE"),
            (lambda g, x: jnp.pad(jnp.concatenate([g, -g]), 1), "ADDITIVE"),
            (lambda g, x: lax.cond(x.sum() > 0, lambda g: 2 * g, lambda g: 0 * g, g), "ADDITIVE"),
            (lambda g, x: 0.0 * x.sum(), "FIXED"),
            (lambda g, x: jnp.zeros(3), "ZERO"),
            (lambda g, x: g + 1, "UNKNOWN"),
            (lambda g, x: g * g, "UNKNOWN"),
            (lambda g, x: jnp.where(g > 0, g, 0.0), "UNKNOWN"),
            (lambda g, x: jnp.where(x > 0, g, 1.0), "UNKNOWN"),
            (lambda g, x: x / g, "UNKNOWN"),
            (lambda g, x: g.astype(int), "UNKNOWN"),
            (lambda g, x: g.at[:, x[0].astype(int)].get(mode="fill"), "ADDITIVE"),
            (lambda g, x: g.at[:, x[0].astype(int)].get(mode="clip"), "ADDITIVE"),
            (lambda g, x: g.at[:, 2 + jnp.arange(3)].get(mode="fill", fill_value=1.0), "UNKNOWN"),
            (lambda g, x: lax.cond(g.sum() > 0, lambda g: g, lambda g: -g, g), "UNKNOWN"),
            (lambda g, x: lax.cond(x.sum() > 0, lambda g: g, lambda g: g + 1, g), "UNKNOWN"),
            (lambda g, x: jnp.sort(g), "UNKNOWN"),
            (lambda g, x: x[g.astype(int)], "UNKNOWN"),
        ],
    )
    def test_table(self, function, expected):
        program = flatten(jax.make_jaxpr(function)(np.ones((3, 3)), np.ones((3, 3))))
        found = output_dependences(program, program.inputs[:1])
        assert [one.name for one in found] == [expected] or (expected, found) == (
            "FIXED",
            [linearity.ZERO],
        )


class TestCallbacks:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_run_once_on_whole_values(self, strategy):
        seen = []

        def note(*values):
            seen.append(tuple(np.shape(v) for v in values))

        def network(first, second, scale, image):
            y = convolve(image, first)
            jax.debug.callback(note, y, y.mean())
            jax.debug.callback(note, scale, ordered=True)
            io_callback(note, None, lax.stop_gradient(y.max((1, 2))))
            jax.debug.print("{} {}", second.sum(), 1, ordered=True)
            return convolve(jnp.tanh(y), second) * scale

        args = arguments()
        found = results(lrjax.rowwise(network, in_axes=AXES, num_blocks=4, strategy=strategy), args)
        jax.effects_barrier()
        assert sorted(seen) == sorted([((2, 13, 5, 2), ()), ((),), ((2, 2),)])
        check(found, results(network, args))

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_with_a_result_happen_once(self, strategy):
        """What they give is saved, also where only the parameters are read."""
        seen = []

        def double(v):
            seen.append(v)
            return np.asarray(v * 2)

        def network(first, second, scale, image):
            y = convolve(image, first)
            mean, fixed = lax.stop_gradient((y.mean(), scale.sum()))
            shape = jax.ShapeDtypeStruct((), mean.dtype)
            factor = io_callback(double, shape, mean) + io_callback(double, shape, fixed)
            return convolve(y * factor, second) * scale

        args = arguments()
        assert_same_as_column(network, args, AXES, num_blocks=4, strategy=strategy)
        seen.clear()
        by_rows = lrjax.rowwise(network, in_axes=AXES, num_blocks=4, strategy=strategy)
        jax.jit(jax.grad(lambda *args: by_rows(*args).sum(), (0, 1)))(*args)
        jax.effects_barrier()
        assert len(seen) == 2


class TestLoopsAlongRows:
    def test_stay_loops(self):
        def scanned(x, s):
            def step(carry, row):
                carry = jnp.tanh(carry * s / 2 + row)
                return carry, carry

            rows = jnp.moveaxis(x, 1, 0)
            return jnp.moveaxis(lax.scan(step, jnp.zeros(rows.shape[1:]), rows)[1], 0, 1)

        def updated(x, s):
            def body(i, x):
                row = lax.dynamic_slice_in_dim(x, i, 1, 1)
                return lax.dynamic_update_slice_in_dim(x, jnp.tanh(row) * s, i, 1)

            return lax.fori_loop(0, x.shape[1], body, x)

        def both(x, s):
            return updated(scanned(x, s), s)

        network, args, expected = between_convolutions(both), arguments(48), None
        traced = trace(network, AXES, args, {})
        assert sum(e.primitive.name == "scan" for e in traced.program.equations) == 2
        for strategy in STRATEGIES:
            expected = assert_same_as_column(
                network, args, AXES, num_blocks=4, strategy=strategy, expected=expected
            )

    def test_over_layers_are_unrolled(self):
        def layers(x, s):
            kernels = jnp.ones((3, 3, 3, 2, 2)) * s / 20
            x = lax.fori_loop(0, 2, lambda i, x: jnp.tanh(convolve(x, kernels[i])), x)
            return lax.scan(lambda x, k: (jnp.tanh(convolve(x, k)), None), x, kernels)[0]

        def frames(x, s):
            return lax.map(lambda one: layers(one[None], s)[0], x)

        for function in (layers, frames):
            explained = lrjax.explain(
                between_convolutions(function), *arguments(), in_axes=AXES, num_blocks=4
            )
            assert not explained.fallbacks
