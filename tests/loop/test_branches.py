"""Operations without rows in many steps sit behind branches; no line buffer passes through one."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lrjax
from lrjax.program.compatibility import open_jaxpr, scan_arity
from lrjax.testing import assert_same_as_column

BLOCKS = 16


def loss(weights, image):
    for kernel in weights:
        image = lax.conv_general_dilated(
            image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        image = jnp.tanh(image)
    return (image**2).mean()


def arguments():
    generator = np.random.default_rng(0)
    weights = [0.3 * generator.standard_normal((3, 3, 2, 2)) for _ in range(16)]
    return weights, generator.standard_normal((1, 64, 8, 2))


def branches(jaxpr, carried=frozenset()):
    """Of every ``cond`` in a ``scan``: its results' shapes, and those of what the loop carries."""
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "cond" and carried:
            yield {v.aval.shape for v in equation.outvars}, carried
        if equation.primitive.name == "scan":
            first, carries = scan_arity(equation)
            body, _ = open_jaxpr(params["jaxpr"])
            inputs = body.invars[first : first + carries]
            yield from branches(body, frozenset(v.aval.shape for v in inputs))
            continue
        for one in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(one, "jaxpr", one)
            if hasattr(inner, "eqns"):
                yield from branches(inner, carried)


def height(shape):
    """Of a map's rows; 0 for what is none."""
    return shape[1] if len(shape) == 4 and shape[2:] == (8, 2) else 0


def test_line_buffers_do_not_pass_through_branches():
    by_rows = lrjax.rowwise(loss, in_axes=(None, 1), num_blocks=BLOCKS)
    found = [*branches(jax.make_jaxpr(jax.grad(by_rows))(*arguments()).jaxpr)]
    assert len(found) > 4
    for made, carried in found:
        assert max(map(height, carried)) > 16
        assert max(map(height, made)) <= 64 // BLOCKS


def test_branches_make_what_column_makes(x64):
    args = arguments()
    column = assert_same_as_column(loss, args, (None, 1), num_blocks=BLOCKS, strategy="stream")
    for strategy in ("2ps", "overl"):
        assert_same_as_column(
            loss, args, (None, 1), num_blocks=BLOCKS, strategy=strategy, expected=column
        )
