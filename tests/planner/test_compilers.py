"""What XLA makes of operations on its targets, as rules on bytes; nothing is compiled."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from experiments.plans import parse
from lrjax.planner.adjoint import Adjoint
from lrjax.planner.compilers import WINDOW, compiled, convolution_scratch
from lrjax.planner.liveness import Kind, Operation
from lrjax.planner.reverse import with_residuals
from lrjax.planner.steps import Step
from lrjax.planner.whole import joint_program
from lrjax.rowgraph.segments import split
from lrjax.rowgraph.tracing import trace
from lrjax.strategies import TwoPhase

MAP, HALF = (1, 8, 8, 128), (1, 4, 8, 128)


@pytest.mark.parametrize(("target", "places"), [("h200", 5), ("tpu-v5e", 0)])
def test_gpu_finds_the_places_of_a_pools_gradient_and_scatters_into_zeros(target, places):
    """A ReLU before the pool compares with the zeros that are scattered into."""
    like = jax.ShapeDtypeStruct(MAP, jnp.float32)
    pooled = jax.ShapeDtypeStruct(HALF, jnp.float32)
    operations = (
        Operation(lax.conv_general_dilated_p, (), (0,), Kind.LIBRARY, like),
        Operation(lax.max_p, (0,), (1,), Kind.FUSED, like),
        Operation(lax.reduce_window_max_p, (1,), (2,), Kind.ROOT, pooled),
        Operation(lax.conv_general_dilated_p, (2,), (3,), Kind.LIBRARY, pooled, True),
        Operation(lax.select_and_scatter_add_p, (3, 1), (4,), Kind.ROOT, like, True),
    )
    size = {v: 4.0 * (256 if v in (0, 1, 4) else 128) for v in range(5)}
    found = compiled(operations, size, 5, target)
    gradient = next(o for o in found if 4 in o.outputs)
    assert gradient.scratch == 128 * 4 * places
    zeros = [v for o in found for v in o.outputs if v > 4]
    assert [size[v] for v in zeros] == [4.0 * 256] * (2 if places else 0)
    assert bool(places) == (gradient.overwrites in zeros)


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


@pytest.mark.parametrize(
    ("what", "readers", "target", "kind"),
    [
        (lax.tanh_p, 1, "h200", Kind.FUSED),
        (lax.tanh_p, 2, "h200", Kind.ROOT),
        (lax.tanh_p, 2, "tpu-v5e", Kind.FUSED),
        (lax.erfc_p, 2, "h200", Kind.ROOT),
        (lax.erf_p, 2, "h200", Kind.FUSED),
        (lax.logistic_p, 2, "h200", Kind.FUSED),
    ],
)
def test_what_takes_long_is_kept_within_a_gpus_step_for_a_second_kernel(
    what, readers, target, kind
):
    """As in a GELU: a product reads x * tanh(x), and later another its slope."""
    like = jax.ShapeDtypeStruct(MAP, jnp.float32)
    operations = (
        Operation(WINDOW, (), (0,), Kind.ROOT, like),
        Operation(what, (0,), (1,), Kind.FUSED, like),
        Operation(lax.mul_p, (0, 1), (2,), Kind.FUSED, like),
        Operation(lax.dot_general_p, (2,), (3,), Kind.LIBRARY, like),
        Operation(lax.square_p, (1 if readers > 1 else 0,), (4,), Kind.FUSED, like),
        Operation(lax.mul_p, (3, 4), (5,), Kind.FUSED, like),
        Operation(lax.dot_general_p, (5,), (6,), Kind.LIBRARY, like),
    )
    found = compiled(operations, dict.fromkeys(range(7), 1.0), 7, target)
    assert [o.kind for o in found if 1 in o.outputs] == [kind]
    rest = [o for o in found if 1 not in o.outputs]
    assert rest == [o for o in operations if 1 not in o.outputs]
