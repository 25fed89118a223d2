"""Two convolutions, followed from the call to the row loop: the numbers of docs/architecture.md.

python scripts/worked_example.py
"""

import jax.numpy as jnp
from jax import lax

from lrjax.loop.rowloop import row_loop
from lrjax.rowgraph.graph import build
from lrjax.rowgraph.segments import split
from lrjax.rowgraph.tracing import trace
from lrjax.strategies.base import TOP_DOWN

NUM_BLOCKS = 4


def conv(image, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def network(params, image):
    return conv(jnp.tanh(conv(image, params["a"])), params["b"])


def main() -> None:
    params = {"a": jnp.ones((3, 3, 3, 8)), "b": jnp.ones((3, 3, 8, 4))}
    traced = trace(network, (None, 1), (params, jnp.ones((1, 16, 16, 3))), {})
    print(
        "inputs, with their row axes:", dict(zip(traced.program.inputs, traced.axes, strict=True))
    )
    for equation in traced.program.equations:
        shapes = [traced.program.avals[v].shape for v in equation.outputs]
        print(f"  {equation.outputs} = {equation.primitive} {equation.inputs}: {shapes}")
    (segment,) = split(traced.program, traced.axes, ())
    graph = build(segment.program, segment.axes)
    (stage,) = graph.loops
    loop = row_loop(graph, stage, order=TOP_DOWN, num_blocks=NUM_BLOCKS, is_differentiated=False)
    print(f"{NUM_BLOCKS} blocks: {loop.steps} steps, line buffers of {loop.line_bytes:,} bytes")
    for i, node in enumerate(loop.nodes):
        value = node.equation.outputs[0]
        stops = [loop.track(value).stop(step) for step in range(loop.steps)]
        print(f"  value {value}, {node.equation.primitive}: rows exist up to {stops}")
        for source in loop.sources_of(i):
            windows = [loop.window(source, step) for step in range(loop.steps)]
            print(f"    reads rows of value {source.value}: {windows}")
        print(f"    keeps {loop.line_rows(value)} rows between steps")


if __name__ == "__main__":
    main()
