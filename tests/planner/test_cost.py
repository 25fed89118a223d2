"""The cost model: against XLA:CPU's peaks, and in what must hold whatever the constants are."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lrjax import memory
from lrjax.plan import Choice
from lrjax.planner.cost import SegmentCost, peak_bytes, segment_cost
from lrjax.planner.liveness import Kind, Liveness, Operation, bytes_beside
from lrjax.rowgraph.graph import size_bytes
from lrjax.rowgraph.segments import Segment, split
from lrjax.rowgraph.tracing import trace
from lrjax.transform import rowwise
from marks import COMPILES_FOR_H200

pytestmark = pytest.mark.users_compiler

CHANNELS = (3, 16, 16, 32, 32)
POOLED = (2, 4)  # after which convolutions


def loss(params, images):
    x = images
    for i, kernel in enumerate(params, 1):
        x = lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
        if i in POOLED:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jnp.mean(jnp.square(x))


def arguments(height, width=128):
    pairs = itertools.pairwise(CHANNELS)
    params = [jax.ShapeDtypeStruct((3, 3, a, b), jnp.float32) for a, b in pairs]
    return params, jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)


def segments_of(height: int, count: int = 1) -> list[Segment]:
    traced = trace(loss, (None, 1), arguments(height), {})
    return split(traced.program, traced.axes, count if count > 1 else ())


def wrt_of(segment: Segment) -> list[int]:
    """All inputs but the image, value 4 of the program."""
    return [i for i, v in enumerate(segment.program.inputs) if v != 4]


@functools.cache
def cost_of(height: int, choice: Choice, target: str = "cpu") -> SegmentCost:
    (segment,) = segments_of(height)
    return segment_cost(segment, choice, wrt_of(segment), target)


def predicted(height: int, choices: Sequence[Choice]) -> float:
    args = arguments(height)
    fixed = sum(size_bytes(leaf) for leaf in jax.tree.leaves((args, args[0])))
    segments = segments_of(height, len(choices))
    costs = [segment_cost(s, c, wrt_of(s), "cpu") for s, c in zip(segments, choices, strict=True)]
    return peak_bytes(costs, fixed)


def compiled(height: int, choices: Sequence[Choice]) -> int:
    segments = segments_of(height, len(choices))

    def planned(params, images):
        values = dict(enumerate([*params, images]))
        for segment, choice in zip(segments, choices, strict=True):
            call = choice.strategy.function(segment, choice.num_blocks)
            outputs = call(*(values[v] for v in segment.program.inputs))
            values.update(zip(segment.made, outputs, strict=True))
        (out,) = outputs
        return out

    return memory.peak_bytes(
        memory.compile_for(jax.grad(planned), *arguments(height), target="cpu")
    )


@pytest.mark.parametrize(
    "choices",
    [
        (Choice("column"),),
        (Choice("stream", 16),),
        (Choice("2ps", 4),),
        (Choice("overl", 4),),
        (Choice("stream", 16), Choice("column")),
    ],
    ids=lambda choices: "+".join(choice.strategy.name for choice in choices),
)
def test_prediction_is_near_xla(choices):
    ratio = predicted(512, choices) / compiled(512, choices)
    assert 0.75 < ratio < 1.25


class TestNarrowSums:
    """bfloat16's copies of float32 kernels: their gradients are summed in float32 alone."""

    KERNELS = [jax.ShapeDtypeStruct((1, 1, 512, 512), jnp.float32)] * 4
    IMAGES = jax.ShapeDtypeStruct((1, 64, 4, 512), jnp.bfloat16)
    pytestmark = COMPILES_FOR_H200

    @staticmethod
    def loss(params, images):
        for kernel in params:
            kernel = kernel.astype(jnp.bfloat16)
            images = lax.conv_general_dilated(
                images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return jnp.mean(jnp.square(images))

    def test_prediction_is_near_xla(self):
        args = self.KERNELS, self.IMAGES
        traced = trace(self.loss, (None, 1), args, {})
        (segment,) = split(traced.program, traced.axes, ())
        cost = segment_cost(segment, Choice("stream", 8), range(4), "h200")
        fixed = sum(size_bytes(leaf) for leaf in (*self.KERNELS, *self.KERNELS, self.IMAGES))
        gradient = jax.grad(rowwise(self.loss, in_axes=(None, 1), num_blocks=8))
        peak = memory.peak_bytes(memory.compile_for(gradient, *args, target="h200"))
        assert peak_bytes([cost], fixed) == pytest.approx(peak, rel=0.1)


def bottlenecks(params, images):
    """What crosses from one to the next is read as it is, by a 1x1 convolution and a shortcut."""
    x = images
    for kernels in params:
        y = x
        for kernel, scale, bias in kernels:
            y = lax.conv_general_dilated(
                y, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            y = y * scale + bias
            y = jax.nn.relu(y) if kernel.shape[-1] < x.shape[-1] else y
        x = jax.nn.relu(x + y)
    return x


class TestSegmentsByRows:
    """In the middle of a plan: maps come in, and cotangents."""

    pytestmark = COMPILES_FOR_H200

    @pytest.mark.parametrize("num_blocks", [4, 16])
    def test_backward_pass_is_near_xla(self, num_blocks):
        wide, narrow, side = 128, 32, 512
        shapes = ((1, wide, narrow), (3, narrow, narrow), (1, narrow, wide))
        params = [
            [
                (
                    jax.ShapeDtypeStruct((k, k, a, b), jnp.bfloat16),
                    *[jax.ShapeDtypeStruct((b,), jnp.bfloat16)] * 2,
                )
                for k, a, b in shapes
            ]
            for _ in range(3)
        ]
        images = jax.ShapeDtypeStruct((1, side, side, wide), jnp.bfloat16)
        traced = trace(bottlenecks, (None, 1), (params, images), {})
        (segment,) = split(traced.program, traced.axes, ())
        wrt = [*range(len(segment.program.inputs))]
        choice = Choice("stream", num_blocks)
        expected = segment_cost(segment, choice, wrt, "h200").backward_bytes
        rows = choice.strategy.execution(segment, num_blocks, wrt).backward
        run = memory.compile_for(
            lambda *xs: rows.run(xs), *rows.graph.program.structs, target="h200"
        )
        found = memory.peak_bytes(run) - size_bytes(images)  # arguments take nothing in costs
        assert abs(expected / found - 1) < 0.1, (expected, found)


def test_streams_memory_does_not_depend_on_the_height():
    low, high = cost_of(512, Choice("stream", 16)), cost_of(2048, Choice("stream", 64))
    assert low.forward_bytes == pytest.approx(high.forward_bytes, rel=0.02)


def test_columns_memory_grows_with_the_height():
    low, high = cost_of(512, Choice("column")), cost_of(2048, Choice("column"))
    assert high.saved_bytes == pytest.approx(4 * low.saved_bytes, rel=0.01)
    assert high.backward_bytes > 3.9 * low.backward_bytes


@pytest.mark.parametrize("target", ["cpu", "h200", "tpu-v5e"])
def test_stream_saves_less_than_column(target):
    column = cost_of(512, Choice("column"), target)
    stream = cost_of(512, Choice("stream", 16), target)
    assert stream.saved_bytes < column.saved_bytes / 10
    assert max(stream.forward_bytes, stream.backward_bytes) < column.backward_bytes / 2
    assert 0.999 < stream.operations / column.operations < 1.5


def test_checkpoint_saves_its_outputs_and_does_the_forward_pass_again():
    column = cost_of(512, Choice("column"), "h200")
    checkpoint = cost_of(512, Choice("checkpoint"), "h200")
    assert checkpoint.saved_bytes == 4  # the loss
    # The first layer's image has no gradient, so a forward pass is a little over a third.
    assert 1.3 < checkpoint.operations / column.operations < 1.45


def test_xla_cpu_undoes_checkpoints():
    column, checkpoint = cost_of(512, Choice("column")), cost_of(512, Choice("checkpoint"))
    assert checkpoint.saved_bytes == column.saved_bytes


def test_smaller_steps_need_less_and_overlap_costs_operations():
    few, many = cost_of(512, Choice("overl", 4)), cost_of(512, Choice("overl", 16))
    assert many.backward_bytes < few.backward_bytes
    assert many.operations > few.operations


def test_lines_of_every_step_are_saved_by_2ps_alone():
    assert cost_of(512, Choice("2ps", 8)).saved_bytes > cost_of(512, Choice("2ps", 4)).saved_bytes
    assert cost_of(512, Choice("overl", 8)).saved_bytes < 100


def test_unknown_strategy_is_named():
    (segment,) = segments_of(512)
    with pytest.raises(ValueError, match="strategy='rows' is unknown; choose one of 'column'"):
        segment_cost(segment, Choice("rows"), [], "cpu")


def test_peak_is_over_segments_and_passes():
    costs = [SegmentCost(1, 10, 20, 50), SegmentCost(1, 5, 45, 30)]
    assert peak_bytes(costs, 100) == 100 + 10 + 45
    assert peak_bytes([costs[0]], 100) == 150


# --- Liveness ------------------------------------------------------------------------------------


def chain(*kinds: Kind, **fields) -> Liveness:
    """Value ``i + 1`` is made from value ``i``; every value is of 10 bytes."""
    operations = tuple(Operation("", (i,), (i + 1,), kind) for i, kind in enumerate(kinds))
    size = dict.fromkeys(range(len(kinds) + 1), 10.0)
    return Liveness(operations, size, before=frozenset({0}), **fields)


def test_what_is_fused_does_not_exist():
    assert chain(Kind.FUSED, Kind.FUSED, Kind.ROOT).timeline == [10, 10, 20]
    assert chain(Kind.LIBRARY, Kind.FUSED, Kind.LIBRARY).timeline == [20, 10, 20]


def test_a_fused_result_takes_the_place_of_what_it_reads():
    assert chain(Kind.FUSED, after=frozenset({1})).timeline == [10]
    assert chain(Kind.FUSED, after=frozenset({0, 1})).timeline == [20]


def test_results_lend_their_places_until_they_are_made():
    operations = (
        Operation("", (), (0,), Kind.LIBRARY),
        Operation("", (0,), (1,), Kind.LIBRARY),
        Operation("", (1,), (2,), Kind.LIBRARY),
    )
    size = {0: 8.0, 1: 8.0, 2: 0.0}
    lives = Liveness(operations, size, after=frozenset({2}), hosts={2: 9.0})
    assert lives.timeline == [0, 8, 8]  # value 0 is hosted; value 1 is read while 2 is made
    assert bytes_beside([9, 4, 3], [5, 4]) == 9
