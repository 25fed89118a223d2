"""What a model is made of, without running it."""

import jax
import jax.numpy as jnp
import numpy as np


def count_parameters(model, shape, dtype=jnp.float32):
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, dtype))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables))


def named_values(jaxpr):
    """The checkpoint names in a jaxpr, in order, with the shape of the value each one names."""
    named = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "name"]
    return [(eqn.params["name"], eqn.outvars[0].aval.shape) for eqn in named]
