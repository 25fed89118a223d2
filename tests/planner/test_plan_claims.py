"""What plans promise for the device they promise it on; XLA compiles, nothing runs."""

import time

import jax.numpy as jnp
import pytest

import lrjax
from experiments.vgg16_stack import loss, structs
from marks import COMPILES_FOR_H200

pytestmark = [*COMPILES_FOR_H200, pytest.mark.slow]
MIB = 2**20


# Plans minimise time; operations stand for it here, as they do not depend on a model of a device.
@pytest.mark.parametrize(
    ("size", "batch", "budget_mib", "most_operations"),
    [(4096, 1, 600, 1.4), (1024, 8, 550, 1.41), (4096, 1, 11_264, 1.12), (4096, 1, 5_632, 1.35)],
)
def test_vgg16_fits_its_budget(size, batch, budget_mib, most_operations):
    args = structs(size, size, jnp.bfloat16, batch)
    start = time.process_time()
    plan = lrjax.plan(loss, *args, in_axes=(None, 1), budget=budget_mib * MIB, target="h200")
    assert plan.verified_peak_bytes <= budget_mib * MIB
    assert plan.operations <= most_operations
    assert time.process_time() - start <= 120  # two cores for a minute
