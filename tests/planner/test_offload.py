"""Maps that wait in the host's memory: the same gradients, less of the device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from networks import CHANNELS, arguments, features, plan_by_hand, structs

import lrjax
from lrjax import memory
from lrjax.loop.offload import SLAB_ROWS, from_host, scaled, to_host
from lrjax.memory import TARGETS
from lrjax.plan import Choice, Plan
from lrjax.planner.problem import problem_of
from lrjax.planner.proof import Prover
from lrjax.planner.search import Step
from lrjax.testing import assert_same_as_column
from marks import COMPILES_FOR_H200

pytestmark = pytest.mark.users_compiler


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
        *((f, c) for f in (features, loss) for c in CHOICES[:1]),
        *((features, c) for c in CHOICES[1:4]),
        *(pytest.param(features, c, marks=pytest.mark.slow) for c in CHOICES[4:]),
    ],
)
def test_gradients_are_columns(fun, choices, x64):
    args = arguments(36, 8, batch=2)
    plan = plan_by_hand(fun, structs(36, 8, batch=2), choices, (1, 2))
    assert_same_as_column(fun, args, (None, 1), plan=plan)


@pytest.mark.parametrize("offload", [False, True])
def test_the_map_between_segments_is_one_of_the_hosts(offload):
    by_rows = lrjax.rowwise(features, in_axes=(None, 1), num_blocks=3, cuts=2, offload=offload)
    program = str(jax.make_jaxpr(jax.grad(lambda *args: by_rows(*args).sum()))(*structs(36, 8)))
    assert ("<host>" in program) == offload


def test_float32_gradients_are_columns():
    plan = plan_by_hand(loss, structs(36, 8, batch=2, dtype=jnp.float32), CHOICES[0], (1, 2))
    args = jax.tree.map(lambda x: x.astype(jnp.float32), arguments(36, 8, batch=2))
    assert_same_as_column(loss, args, (None, 1), plan=plan)


@pytest.mark.parametrize("height", [1, SLAB_ROWS - 1, 2 * SLAB_ROWS, 2 * SLAB_ROWS + 5])
def test_whole_maps_come_and_go_by_slabs(height, x64):
    image = jax.random.normal(jax.random.key(0), (2, height, 3))

    @jax.jit
    def there_and_back(x):
        return from_host(scaled(to_host(x, 1), jnp.asarray(3.0), 1), 1)

    np.testing.assert_array_equal(there_and_back(image), 3 * image)

    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: jnp.sum(from_host(to_host(x, 1), 1) ** 2))(x)

    np.testing.assert_array_equal(gradient(image), 2 * image)


def test_a_map_that_several_segments_read_stays(x64):
    def fun(params, image):
        first = checkpoint_name(features(params[:2], image), "a")
        return first[..., :1] * checkpoint_name(jnp.tanh(first), "b")

    assert_same_as_column(
        fun, arguments(32, 8), (None, 1), num_blocks=4, cuts=["a", "b"], offload=True
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": True}, "no maps between segments without cuts"),
        ({"offload": "yes", "cuts": 2}, "offload='yes' must be True or False"),
        ({"offload": True, "cuts": [("a",)]}, "has groups"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lrjax.rowwise(loss, in_axes=(None, 1), **options)


def test_saved_plans_offload():
    plan = plan_by_hand(
        features, structs(36, 8), (offloaded("stream", 4), Choice("stream", 4)), (2,)
    )
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert [choice.offload for choice in again.choices] == [True, False]
    assert "wait on the host" in str(plan)


# --- On a device that has memory of its own -------------------------------------------------------

SIZE = 1024
LARGE = structs(SIZE, SIZE, dtype=jnp.bfloat16)
MAP_BYTES = SIZE // 2 * SIZE // 2 * CHANNELS[1] * 2  # behind the first pool


def for_an_h200(test):
    for mark in COMPILES_FOR_H200:
        test = mark(test)
    return test


def named(params, image):
    first = checkpoint_name(features(params[:2], image), "first pool")
    return jnp.mean(features(params[2:], first).astype(jnp.float32) ** 2)


def compiled(**options):
    by_rows = lrjax.rowwise(named, in_axes=(None, 1), num_blocks=32, cuts=["first pool"], **options)
    return memory.compile_for(jax.grad(by_rows), *LARGE, target="h200")


@for_an_h200
def test_the_devices_peak_falls_by_the_map():
    kept, waiting = compiled(), compiled(offload=True)
    # At the peak the device held the map or its gradient, and a part of the other.
    assert memory.peak_bytes(kept) - memory.peak_bytes(waiting) > 0.9 * MAP_BYTES
    assert memory.host_bytes(kept) == 0
    # The map, its gradient, and that times the loss's cotangent: value and gradient are one pass.
    assert memory.host_bytes(waiting) == 3 * MAP_BYTES


@pytest.mark.parametrize("target", ["h200", "tpu-v5e"])
def test_costs_are_bytes_of_the_device_and_time_of_the_link(target):
    model = Prover(problem_of(named, LARGE, (None, 1), target, None)).model
    candidates = model.candidates
    stop = next(
        k for k in range(1, candidates.last) if candidates.offloadable_bytes(0, k) == MAP_BYTES
    )
    kept, waiting = (candidates.cost(0, stop, Choice("stream", 32, 1, x)) for x in (False, True))
    assert kept.saved_bytes - waiting.saved_bytes == MAP_BYTES == waiting.offloaded_bytes
    moved = 10 * MAP_BYTES / TARGETS[target].host_bytes_per_s
    assert waiting.seconds - kept.seconds == pytest.approx(moved)
    # By whole maps, what waits comes back for either pass.
    behind = Step(stop, candidates.last, Choice("checkpoint"))
    arrived = dataclasses.replace(behind, arriving_bytes=float(MAP_BYTES))
    both = zip(model.own_bytes(behind), model.own_bytes(arrived), strict=True)
    assert [after - before for before, after in both] == [MAP_BYTES, MAP_BYTES]


def test_nothing_is_offloaded_on_a_cpu():
    candidates = Prover(problem_of(named, LARGE, (None, 1), "cpu", None)).model.candidates
    assert not any(candidates.offloadable_bytes(0, k) for k in range(1, candidates.last))
