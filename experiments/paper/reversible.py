"""A reversible network as a peer: what it keeps, beside column, checkpoint and stream.

    python -m experiments.paper.reversible --quick
    python -m experiments.paper.reversible --resume

RevNet's idea (arXiv 1707.04585): in a block ``y1 = x1 + f(x2), y2 = x2 + g(y1)`` the input follows
from the output, so that the backward pass keeps no maps within a stage. It asks for another
network, and it still needs every map whole. Three stages of such blocks; ``f`` and ``g`` are ReLU
and a 3x3 convolution. Between stages maps are pooled, and channels doubled by a 1x1 convolution.
All ways run the same network: its gradient by column, with ``jax.checkpoint`` around every block,
by the inverse (a ``custom_vjp`` around every stage), and by stream.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import lrjax
from experiments import report
from experiments.gradcheck import max_error
from experiments.paper import record
from experiments.paper.programs import MIB, measured, quick_jit

STAGES = 3
FULL = {"side": 2048, "channels": 64, "blocks": 4, "rows": 32}
QUICK = {"side": 512, "channels": 16, "blocks": 4, "rows": 32}
CHECKED = {"side": 32, "channels": 4, "blocks": 2, "rows": 8}
WAYS = ("column", "checkpoint", "reversible", "stream")
Params = dict[str, Any]
Pair = tuple[jax.Array, jax.Array]


def init(key: jax.Array, channels: int, blocks: int, dtype: Any = jnp.float32) -> Params:
    """Kernels of the stem, of the blocks (two each, half of the channels), and between stages."""
    keys = iter(jax.random.split(key, 2 * STAGES * blocks + STAGES + 1))

    def kernel(size: int, own: int, out: int) -> jax.Array:
        scale = math.sqrt(1 / (size * size * own))
        return scale * jax.random.normal(next(keys), (size, size, own, out), dtype)

    stages, widths = [], [channels * 2**stage for stage in range(STAGES)]
    for width in widths:
        half = width // 2
        stages.append([(kernel(3, half, half), kernel(3, half, half)) for _ in range(blocks)])
    between = [kernel(1, width, 2 * width) for width in widths[:-1]]
    return {"stem": kernel(3, 3, channels), "stages": stages, "between": between}


def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def residual(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return convolution(jax.nn.relu(x), kernel)


def block(kernels: Pair, pair: Pair) -> Pair:
    """A reversible block."""
    first = pair[0] + residual(kernels[0], pair[1])
    return first, pair[1] + residual(kernels[1], first)


def stage(params: list[Pair], pair: Pair) -> Pair:
    for kernels in params:
        pair = block(kernels, pair)
    return pair


@jax.custom_vjp
def reversible_stage(params: list[Pair], pair: Pair) -> Pair:
    """``stage``, whose backward pass makes its maps again from its output, last block first."""
    return stage(params, pair)


def _forward(params: list[Pair], pair: Pair) -> tuple[Pair, Any]:
    pair = stage(params, pair)
    return pair, (params, pair)


def _backward(residuals: Any, cotangents: Pair) -> tuple[list[Pair], Pair]:
    params, (first, second) = residuals
    gradients = []
    for kernels in reversed(params):
        # The inverse waits for what comes before it, or XLA makes all inputs at once.
        (first, second), cotangents = lax.optimization_barrier(((first, second), cotangents))
        second = second - residual(kernels[1], first)
        first = first - residual(kernels[0], second)
        own, cotangents = jax.vjp(block, kernels, (first, second))[1](cotangents)
        gradients.append(own)
    return gradients[::-1], cotangents


reversible_stage.defvjp(_forward, _backward)


def loss(params: Params, images: jax.Array, way: str = "column") -> jax.Array:
    """The mean square of the last maps."""
    run = reversible_stage if way == "reversible" else stage
    if way == "checkpoint":
        run = _checkpointed
    x = convolution(images, params["stem"])
    for number, own in enumerate(params["stages"]):
        half = x.shape[-1] // 2
        x = jnp.concatenate(run(own, (x[..., :half], x[..., half:])), axis=-1)
        if number < STAGES - 1:
            x = lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
            x = convolution(x, params["between"][number])
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def _checkpointed(params: list[Pair], pair: Pair) -> Pair:
    for kernels in params:
        pair = jax.checkpoint(block)(kernels, pair)
    return pair


def by_way(way: str, num_blocks: int) -> Callable[..., jax.Array]:
    if way == "stream":
        return lrjax.rowwise(loss, in_axes=(None, 1), num_blocks=num_blocks)
    return functools.partial(loss, way=way)


def differences() -> dict[str, float]:
    """Of each way's gradients from column's in float64; in float32, on this CPU."""
    size = CHECKED
    with jax.enable_x64(True):
        params = init(jax.random.key(0), size["channels"], size["blocks"], jnp.float64)
        shape = (1, size["side"], size["side"], 3)
        images = jax.random.normal(jax.random.key(1), shape, jnp.float64)
        truth = quick_jit(jax.grad(loss))(params, images)
        half = jax.tree.map(lambda x: x.astype(jnp.float32), (params, images))
        blocks = size["side"] // size["rows"]
        return {
            way: max_error(quick_jit(jax.grad(by_way(way, blocks)))(*half), truth) for way in WAYS
        }


def measure(settings: record.Settings, known: record.Results, save: record.Save) -> record.Results:
    size = QUICK if settings.quick else FULL
    results = {"ways": {}, **known, "size": size}
    for way in WAYS:
        if way not in results["ways"]:
            params = jax.eval_shape(
                lambda: init(jax.random.key(0), size["channels"], size["blocks"])
            )
            images = jax.ShapeDtypeStruct((1, size["side"], size["side"], 3), jnp.float32)
            step = jax.value_and_grad(by_way(way, size["side"] // size["rows"]))
            results["ways"][way] = measured(step, (params, images), settings.target)
            print(way, f"{results['ways'][way]['peak_bytes'] / MIB:,.0f} MiB", flush=True)
            save(results)
    results.setdefault("differences", differences())
    return results


def table(found: record.Record) -> str:
    results = found["results"]
    size, column = results["size"], results["ways"]["column"]
    rows = []
    for way, own in results["ways"].items():
        time = f"{own['seconds'] / column['seconds']:.2f}" if "seconds" in own else ""
        ratio = report.ratio(own["peak_bytes"] / column["peak_bytes"])
        apart = results.get("differences", {}).get(way)
        rows.append(
            [way, report.mib(own["peak_bytes"]), ratio, time, f"{apart:.1e}" if apart else ""]
        )
    return "\n\n".join(
        [
            "# A reversible network, and other ways to train it",
            f"{STAGES} stages of {size['blocks']} reversible blocks, {size['channels']} channels "
            "in the first; loss and gradient in float32, one image of "
            f"{size['side']}x{size['side']}; stream by {size['rows']} rows. Ratios are to column; "
            "time by the roofline of the compiled program, where the target is a GPU. "
            "Difference: of the gradients in float32 from column's in float64, a small network.",
            report.markdown_table(["way", "peak MiB", "ratio", "time", "difference"], rows),
        ]
    )


EXPERIMENT = record.Experiment("reversible", measure, table)

if __name__ == "__main__":
    record.main(EXPERIMENT, __doc__)
