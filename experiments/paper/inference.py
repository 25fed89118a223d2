"""Row-wise inference: peak against image side, beside column and patches.

    python -m experiments.paper.inference --quick
    python -m experiments.paper.inference --resume

VGG-16's convolutions, forward only, bfloat16 (quick: float32), one image. Patches as two inference
systems for small devices have them. A patch has its halo from the image, and computes its maps
there again:

- ``mcunetv2``: the first stages patch by patch, in both axes, the others on whole maps
  (arXiv 2110.15352);
- ``mafat``: two groups of stages, each by patches of its own, with a whole map between them
  (arXiv 2107.06960).

Operations are multiply-accumulates of all convolutions, counted by the sizes that are computed (so
with what lies outside the image), over column's. Outputs are compared with column's on this CPU.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import lrjax
from experiments import report
from experiments.gradcheck import max_error
from experiments.paper import record
from experiments.paper.programs import MIB, measured, quick_jit
from experiments.vgg16_stack import BLOCKS, Params, convolution, init, max_pool, stack, structs

ROWS_PER_STEP = 32
FULL = {"sides": (1024, 2048, 4096, 8192), "dtype": "bfloat16"}
QUICK = {"sides": (256, 512, 1024), "dtype": "float32"}
CHECKED_SIDE = 128


@dataclass(frozen=True)
class Group:
    """Neighbouring stages (convolutions and a pool each) that run patch by patch.

    Attributes:
      stages: of VGG-16, from 0; the first and the one behind the last.
      patches: along each axis; 1: whole maps.
    """

    stages: tuple[int, int]
    patches: int

    @property
    def layers(self) -> list[tuple[bool, int]]:
        """Whether each layer is a pool, and the number of its convolution's parameters."""
        found, number = [], sum(len(block) for block in BLOCKS[: self.stages[0]])
        for block in BLOCKS[self.stages[0] : self.stages[1]]:
            for _ in block:
                found.append((False, number))
                number += 1
            found.append((True, -1))
        return found

    def ranges(self, patch: int) -> list[tuple[int, int]]:
        """Which rows, relative to a patch's first, every layer reads, and what the last gives.

        ``patch`` rows of the group's result; from the last layer back, as halos grow.
        """
        low, high = 0, patch
        found = [(low, high)]
        for is_pool, _ in reversed(self.layers):
            low, high = (2 * low, 2 * high) if is_pool else (low - 1, high + 1)
            found.append((low, high))
        return found[::-1]


WAYS: dict[str, tuple[Group, ...]] = {
    "mcunetv2": (Group((0, 3), 4), Group((3, 5), 1)),
    "mafat": (Group((0, 2), 4), Group((2, 5), 2)),
}


def by_patches(params: Params, images: jax.Array, groups: tuple[Group, ...]) -> jax.Array:
    """VGG-16's convolutions, groups of stages after each other, each by patches."""
    x = images
    for group in groups:
        x = _whole(params, x, group) if group.patches == 1 else _patches(params, x, group)
    return x


def _whole(params: Params, x: jax.Array, group: Group) -> jax.Array:
    for is_pool, number in group.layers:
        x = max_pool(x) if is_pool else convolution(*params[number], x)
    return x


def _patches(params: Params, x: jax.Array, group: Group) -> jax.Array:
    """One patch after the other; what lies outside the image is zero in every layer's input."""
    stride = 2 ** (group.stages[1] - group.stages[0])
    side, out = x.shape[1], x.shape[1] // stride
    if side % (stride * group.patches):
        raise ValueError(
            f"images: a side of {side} at stages {group.stages}; use a multiple of "
            f"{stride * group.patches}"
        )
    patch = out // group.patches
    ranges = group.ranges(patch)
    (low, high), channels = ranges[0], BLOCKS[group.stages[1] - 1][-1]
    padded = jnp.pad(
        x, ((0, 0), (-low, high - patch * stride), (-low, high - patch * stride), (0, 0))
    )

    def place(result: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        row, column = number // group.patches * patch, number % group.patches * patch
        start = (0, row * stride, column * stride, 0)
        y = lax.dynamic_slice(padded, start, (x.shape[0], high - low, high - low, x.shape[-1]))
        y = _patch(params, y, group, ranges, (row, column), out)
        return lax.dynamic_update_slice(result, y, (0, row, column, 0)), None

    empty = jnp.zeros((x.shape[0], out, out, channels), x.dtype)
    return lax.scan(place, empty, jnp.arange(group.patches**2))[0]


def _patch(
    params: Params,
    y: jax.Array,
    group: Group,
    ranges: list[tuple[int, int]],
    place: tuple[jax.Array, jax.Array],
    out: int,
) -> jax.Array:
    scale = 2 ** (group.stages[1] - group.stages[0])
    for (is_pool, number), (low, _) in zip(group.layers, ranges[1:], strict=True):
        if is_pool:
            y, scale = max_pool(y), scale // 2
        else:
            kernel, bias = params[number]
            y = lax.conv_general_dilated(
                y, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            y = jax.nn.relu(y + bias)
        for axis, start in zip((1, 2), place, strict=True):
            y = inside(y, axis, start * scale + low, out * scale)
    return y


def inside(y: jax.Array, axis: int, start: jax.Array, size: int) -> jax.Array:
    """A patch that begins at ``start``, zero where it lies outside the map's ``size``."""
    places = start + lax.broadcasted_iota(jnp.int32, y.shape, axis)
    return jnp.where((places >= 0) & (places < size), y, jnp.zeros((), y.dtype))


def operations(side: int, groups: tuple[Group, ...]) -> float:
    """Multiply-accumulates of all convolutions, halos included, over column's."""
    own, whole, at = 0.0, 0.0, side
    channels = [3, *(c for block in BLOCKS for c in block)]
    for group in groups:
        stride = 2 ** (group.stages[1] - group.stages[0])
        ranges = group.ranges(at // stride // group.patches)
        for (is_pool, number), (low, high) in zip(group.layers, ranges[1:], strict=True):
            if is_pool:
                at //= 2
                continue
            weights = 9 * channels[number] * channels[number + 1]
            whole += weights * at**2
            own += weights * (at**2 if group.patches == 1 else (high - low) ** 2 * group.patches**2)
    return own / whole


def methods(side: int) -> dict[str, Callable[..., jax.Array]]:
    """All ways to infer, as functions of parameters and images."""
    blocks = max(1, side // ROWS_PER_STEP)
    stream = lrjax.rowwise(stack, in_axes=(None, 1), num_blocks=blocks)
    ways = {name: functools.partial(by_patches, groups=groups) for name, groups in WAYS.items()}
    return {"column": stack, **ways, "stream": stream}


def differences() -> dict[str, float]:
    """Each method's largest difference from column, relative, in float32 on this CPU."""
    params = init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (1, CHECKED_SIDE, CHECKED_SIDE, 3))
    ways = methods(CHECKED_SIDE)
    column = quick_jit(ways.pop("column"))(params, images)
    return {name: max_error(quick_jit(way)(params, images), column) for name, way in ways.items()}


def measure(settings: record.Settings, known: record.Results, save: record.Save) -> record.Results:
    chosen = QUICK if settings.quick else FULL
    results = {"sides": {}, **known, "dtype": chosen["dtype"]}
    results.setdefault("differences", differences())
    print(results["differences"], flush=True)
    for side in chosen["sides"]:
        own = results["sides"].setdefault(str(side), {})
        for name, way in methods(side).items():
            if name in own:
                continue
            own[name] = measured(way, structs(side, side, chosen["dtype"]), settings.target)
            groups = WAYS.get(name, (Group((0, len(BLOCKS)), 1),))
            own[name]["operations"] = (
                stream_operations(side) if name == "stream" else operations(side, groups)
            )
            print(side, name, f"{own[name]['peak_bytes'] / MIB:,.0f} MiB", flush=True)
            save(results)
    return results


def stream_operations(side: int) -> float:
    """Of the convolutions under stream, rows of all steps over rows of the maps.

    No row is computed twice; but a step's rows may lie outside the image, in the last steps.
    """
    blocks = max(1, side // ROWS_PER_STEP)
    args = structs(side, side, jnp.float32)
    told = lrjax.explain(stack, *args, in_axes=(None, 1), num_blocks=blocks)
    forward = told.segments[0].passes[0]
    own = [o for o in forward.operations if o.name.startswith("conv")]
    done = sum(o.operations / o.rows * o.rows_per_step * forward.steps[o.loop] for o in own)
    return done / sum(o.operations for o in own)


def table(found: record.Record) -> str:
    results = found["results"]
    names = ["column", *WAYS, "stream"]
    rows = [
        [f"{int(side):,}", *(_cell(own.get(name)) for name in names)]
        for side, own in results["sides"].items()
    ]
    apart = ", ".join(f"{name} {value:.1e}" for name, value in results["differences"].items())
    return "\n\n".join(
        [
            "# Inference: peak memory and operations",
            f"VGG-16's convolutions, forward, {results['dtype']}, one image. XLA's peak in MiB "
            "(image and parameters included), and operations over column's. `mcunetv2`: stages 1 "
            "to 3 in 4x4 patches, the others whole; `mafat`: stages 1 and 2 in 4x4 patches, 3 to 5 "
            f"in 2x2; stream: {ROWS_PER_STEP} rows a step.",
            report.markdown_table(["side", *names], rows),
            f"Largest relative difference from column at {CHECKED_SIDE}x{CHECKED_SIDE}, float32: "
            f"{apart}.",
        ]
    )


def _cell(own: dict[str, Any] | None) -> str:
    return "" if own is None else f"{report.mib(own['peak_bytes'])} : {own['operations']:.3f}"


def draw(found: record.Record, figure: Any) -> None:
    figure.set_size_inches(9, 4)
    peaks, work = figure.subplots(1, 2)
    sides = found["results"]["sides"]
    for name in ("column", *WAYS, "stream"):
        points = [(int(side), own[name]) for side, own in sides.items() if name in own]
        xs = [side for side, _ in points]
        peaks.loglog(xs, [own["peak_bytes"] / MIB for _, own in points], marker=".", label=name)
        work.semilogx(xs, [own["operations"] for _, own in points], marker=".", label=name)
    for axes in (peaks, work):
        axes.set_xticks([int(side) for side in sides], [f"{int(side):,}" for side in sides])
        axes.xaxis.minorticks_off()
    peaks.set(title="VGG-16, inference", xlabel="side, pixels", ylabel="peak, MiB")
    work.set(title="operations over column's", xlabel="side, pixels")
    peaks.legend()


EXPERIMENT = record.Experiment("inference", measure, table, draw)

if __name__ == "__main__":
    record.main(EXPERIMENT, __doc__)
