"""Maps that wait in the host's memory: the same gradients, less of the device."""

import jax.numpy as jnp
import pytest
from networks import arguments, features, plan_by_hand, structs

from lrjax.planner.choice import Choice
from lrjax.testing import assert_same_as_column


def loss(params, image):
    return jnp.mean(features(params, image) ** 2)


def offloaded(strategy, *numbers):
    return Choice(strategy, *numbers, offload=True)


CHOICES = [
    (offloaded("stream", 4), offloaded("stream", 4), Choice("stream", 2)),
    (offloaded("column"), offloaded("checkpoint"), Choice("stream", 3)),
    (offloaded("overl", 2), offloaded("2ps", 2), Choice("overl", 2)),
    (offloaded("checkpoint"), Choice("column"), Choice("2ps", 2)),
    (offloaded("stream", 4, 2), offloaded("checkpoint", 1, 2), Choice("checkpoint")),
]


@pytest.mark.parametrize(
    ("fun", "choices"),
    [
        *((f, c) for f in (features, loss) for c in CHOICES[:2]),
        *((features, c) for c in CHOICES[2:]),
    ],
)
def test_gradients_are_columns(fun, choices, x64):
    args = arguments(36, 8, batch=2)
    plan = plan_by_hand(fun, structs(36, 8, batch=2), choices, (1, 2))
    assert_same_as_column(fun, args, (None, 1), plan=plan)
