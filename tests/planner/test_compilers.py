"""What XLA makes of operations on its targets, as rules on bytes; nothing is compiled."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from experiments.plans import parse
from lrjax.planner.adjoint import Adjoint
from lrjax.planner.compilers import WINDOW, compiled, convolution_scratch
from lrjax.planner.liveness import Kind, Liveness, Operation
from lrjax.planner.reverse import with_residuals
from lrjax.planner.steps import Step
from lrjax.planner.whole import joint_program
from lrjax.rowgraph.segments import split
from lrjax.rowgraph.tracing import trace
from lrjax.rules import traits_of
from lrjax.strategies import TwoPhase

MAP, KERNEL, VECTOR = (1, 8, 8, 128), (3, 3, 128, 128), (128,)


def backward(primitive, inputs, output, shape):
    kind = traits_of(primitive).kind
    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Operation(primitive, inputs, (output,), kind, like, is_backward=True)


# Two layers of maps of one shape: a bias gradient, a kernel gradient and an input gradient each.
LAYERS = (
    backward(lax.conv_general_dilated_p, (), 0, MAP),
    backward(lax.reduce_sum_p, (0,), 1, VECTOR),
    backward(lax.conv_general_dilated_p, (0,), 2, KERNEL),
    backward(lax.conv_general_dilated_p, (0,), 3, MAP),
    backward(lax.reduce_sum_p, (3,), 4, VECTOR),
    backward(lax.conv_general_dilated_p, (3,), 5, KERNEL),
)
SIZE = dict.fromkeys(range(6), 1.0)
RESULTS = frozenset({1, 2, 4, 5})


def order(target, layers=LAYERS):
    """The values in the order in which they are made, and when the first is last used."""
    size = dict(SIZE)
    operations = compiled(layers, size, len(SIZE), target)
    lives = Liveness(operations, size, after=RESULTS)
    made = [v for o in operations for v in o.outputs if v in SIZE]
    return made, operations[lives.last_use[0]].outputs[0]


def test_tpu_sums_maps_of_one_shape_together_and_kernel_gradients_wait():
    made, last_reader = order("tpu-v5e")
    assert last_reader == 2  # its kernel gradient waits for the other, after both sums
    assert made == [0, 1, 3, 4, 2, 5]


def test_tpu_sums_over_other_shapes_hold_nothing():
    other = backward(lax.conv_general_dilated_p, (0,), 3, (1, 4, 4, 128))
    made, last_reader = order("tpu-v5e", (*LAYERS[:3], other, *LAYERS[4:]))
    assert (made, last_reader) == ([0, 1, 2, 3, 4, 5], 3)


def test_tpu_sums_that_maps_are_made_from_do_not_wait():
    normalised = backward(lax.conv_general_dilated_p, (0, 1), 3, MAP)
    made, last_reader = order("tpu-v5e", (*LAYERS[:3], normalised, *LAYERS[4:]))
    assert (made, last_reader) == ([0, 1, 2, 3, 4, 5], 3)


@pytest.mark.parametrize("target", ["cpu", "h200"])
def test_others_do_not(target):
    assert order(target) == ([0, 1, 2, 3, 4, 5], 3)


HALF = (1, 4, 8, 128)
# A step of a row loop: rows, pooled twice; then both gradients of the pools.
POOLS = (
    Operation(WINDOW, (), (0,), Kind.ROOT, jax.ShapeDtypeStruct(MAP, jnp.float32)),
    backward(lax.conv_general_dilated_p, (0,), 1, MAP),
    backward(lax.conv_general_dilated_p, (1,), 2, HALF),
    backward(lax.conv_general_dilated_p, (2,), 3, HALF),
    backward(lax.select_and_scatter_add_p, (3, 2), 4, HALF),
    backward(lax.conv_general_dilated_p, (4,), 5, HALF),
    backward(lax.select_and_scatter_add_p, (5, 1), 6, MAP),
)


def test_gpu_finds_places_when_what_makes_the_map_exists():
    """Another operation between the convolution and the pool is fused into the pool."""
    like = jax.ShapeDtypeStruct(MAP, jnp.float32)
    relu = Operation(lax.max_p, (1,), (8,), Kind.FUSED, like)
    operations = (*POOLS[:6], relu, backward(lax.select_and_scatter_add_p, (5, 8), 6, MAP))
    size = {v: 4.0 * (256 if v in (0, 1, 6, 8) else 128) for v in range(9)}
    found = compiled(operations, size, 9, "h200")
    values = [o.outputs[0] for o in found]
    places = next(v for v in values if v > 8 and size[v] == 128 * 4 * 4)
    assert values.index(1) < values.index(places) < values.index(2)


@pytest.mark.parametrize(("in_step", "found_at"), [(True, 2), (False, None)])
def test_gpu_finds_places_in_the_largest_map_of_a_step_when_it_has_the_map(in_step, found_at):
    operations = POOLS if in_step else POOLS[1:]
    size = {v: 4.0 * (256 if v in (0, 1, 6) else 128) for v in range(7)}
    found = compiled(operations, size, 7, "h200")
    values = [o.outputs[0] for o in found]
    last, inner = (next(o for o in found if v in o.outputs) for v in (6, 4))
    places = [v for v in last.inputs if v > 6 and size[v] == 128 * 4 * 4]
    assert [values.index(v) for v in places] == ([found_at] if in_step else [])
    assert last.scratch == 128 * 4 * (1 if in_step else 5)
    assert inner.scratch == 128 * 4 * 5


def chain(params, images):
    """3x3 convolutions and scales: more rows of round trip than a low image has."""
    for kernel, scale in params:
        images = lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        images = jax.nn.relu(images * scale)
    return jnp.mean(jnp.square(images))


def segment_of(convolutions, height, width=32, channels=16):
    params = [
        (jnp.zeros((3, 3, 3 if i == 0 else channels, channels)), jnp.zeros(channels))
        for i in range(convolutions)
    ]
    traced = trace(chain, (None, 1), (params, jnp.zeros((1, height, width, 3))), {})
    return split(traced.program, traced.axes, ())[0]


@pytest.mark.parametrize(("height", "has_branches"), [(32, True), (256, False)])
def test_what_the_reverse_of_a_branch_reads_exists(height, has_branches):
    (loop,) = filter(None, TwoPhase().execution(segment_of(12, height), 8, ()).rows.loops)
    step = Step(loop)
    adjoint = Adjoint(step.size, {*loop.wholes, *step.older.values()}, step.next)
    for node in loop.nodes:
        if node.is_reduction:
            adjoint.seed(node.equation.outputs[0])
    adjoint.reverse(step.operations)
    read = {v for operation in adjoint.operations for v in operation.inputs}
    fused = [o for o in step.operations if o.kind is Kind.FUSED and read.intersection(o.outputs)]
    still = [o for o in with_residuals(step, adjoint.operations) if o in fused]
    assert fused
    assert bool(step.conditional) == has_branches
    assert len(still) < len(fused) if has_branches else still == fused


def test_tpu_copies_for_a_kernel_gradient_fit_its_vector_memory_or_exist():
    def most(height):
        segment = segment_of(2, height, 512, 64)
        joint = joint_program(segment.program, [0, 2])
        scratch = (
            convolution_scratch(joint.program, e, "tpu-v5e") for e in joint.program.equations
        )
        return max(scratch)

    assert most(64) == 0
    assert most(512) == 5.5 * 512 * 512 * 128 * 4


def test_neighbours_that_xla_keeps_no_border_between_are_one_segment():
    plan = "vgg16/64/checkpoint+checkpoint+column+stream-2"
    joined = [choice.strategy.name for _, choice in parse(plan, "cpu").as_compiled()]
    apart = [choice.strategy.name for _, choice in parse(plan, "h200").as_compiled()]
    assert joined == ["column", "stream"]
    assert apart == ["checkpoint", "checkpoint", "column", "stream"]
    whole = parse("vgg16/64/column", "cpu").segments()[0]
    ((segment, _),) = parse("vgg16/64/column+column", "cpu").as_compiled()
    assert len(segment.program.equations) == len(whole.program.equations)
