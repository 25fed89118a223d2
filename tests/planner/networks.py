"""Small networks to plan for, and plans that need no compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.plan import Choice, Plan
from lrjax.planner.problem import problem_of
from lrjax.planner.proof import Prover
from lrjax.planner.search import Step

CHANNELS = (8, 8, 16, 16)


def convolve(image, kernel):
    return lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def features(params, image):
    """Convolutions, a pool behind every second."""
    for i, kernel in enumerate(params):
        image = jax.nn.relu(convolve(image, kernel))
        if i % 2:
            image = lax.reduce_window(image, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return image


def logits(params, image):
    return features(params, image).mean(axis=(1, 2))


def arguments(height=64, width=16, batch=1, dtype=np.float64, convolutions=4):
    generator = np.random.default_rng(0)
    sizes = list(zip((3, *CHANNELS), CHANNELS, strict=False))[:convolutions]
    params = [generator.standard_normal((3, 3, a, b)).astype(dtype) / 6 for a, b in sizes]
    return params, generator.standard_normal((batch, height, width, 3)).astype(dtype)


def structs(*shape, **options):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments(*shape, **options)
    )


def plan_by_hand(fun, args, choices, places, in_axes=(None, 1), row_mesh=None) -> Plan:
    """A plan with these choices, cut at these of the candidates' places; nothing is compiled."""
    problem = problem_of(fun, args, in_axes, "cpu", None, row_mesh)
    prover = Prover(problem)
    bounds = [0, *places, prover.model.candidates.last]
    steps = map(Step, bounds, bounds[1:], choices)
    return prover.plan(tuple(steps), 2**30)


def with_choice(plan: Plan, choice: Choice) -> Plan:
    """The same cuts, every segment under one choice."""
    segments = tuple(dataclasses.replace(s, choice=choice) for s in plan.segments)
    return dataclasses.replace(plan, segments=segments)
