"""Functions that differ between platforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax.program.platforms import per_platform


def scaled(x, y, *, platform, factor):
    return x * y * (factor if platform == "cpu" else 1)


def call(x, y):
    return per_platform(scaled, x, y, factor=3)


X, Y = np.float32([1, 2, 3]), np.float32([4, 5, 6])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit])
def test_runs_for_its_platform(transform):
    np.testing.assert_array_equal(transform(call)(X, Y), 3 * X * Y)


def test_is_lowered_for_its_platform_alone():
    text = {
        name: jax.export.export(jax.jit(call), platforms=[name])(X, Y).mlir_module()
        for name in ("cpu", "cuda", "tpu")
    }
    assert text["cpu"].count("stablehlo.multiply") == 2
    assert text["cuda"].count("stablehlo.multiply") == text["tpu"].count("stablehlo.multiply") == 2
    assert "3.0" in text["cpu"]
    assert "3.0" not in text["cuda"]
    assert "case" not in text["cpu"]


def test_is_one_equation():
    assert [e.primitive.name for e in jax.make_jaxpr(call)(X, Y).eqns] == ["per_platform"]


def test_examples_at_a_time():
    many = np.stack([X, 2 * X]), Y
    np.testing.assert_array_equal(jax.vmap(call, (0, None))(*many), 3 * many[0] * Y)
    np.testing.assert_array_equal(jax.vmap(call, (None, 0))(Y, many[0]), 3 * many[0] * Y)


def test_derivatives_are_those_of_an_unknown_platform():
    bars = jax.grad(lambda x, y: call(x, y).sum(), (0, 1))(X, Y)
    np.testing.assert_array_equal(bars[0], Y)
    np.testing.assert_array_equal(bars[1], X)
    assert jax.jvp(call, (X, Y), (jnp.ones(3), jnp.zeros(3)))[1].tolist() == Y.tolist()
