"""Rows of one image over eight H200s that need not be there: memory, collectives, time.

    JAX_PLATFORMS=cpu python scripts/bench_rows_over_devices.py                # needs lrjax[cuda]
    JAX_PLATFORMS=cpu python scripts/bench_rows_over_devices.py --target cpu --size 256 --width 0.25

The gradient of the mean square of VGG-16's last map, bfloat16, batch 1, with respect to the
parameters, compiled for one device and for eight. Prints a table in Markdown: XLA's peak of one
device in MiB, and collectives of a step (in loops: none is the aim). ``column`` is the function as
it is, divided by XLA alone; an image as high on one device as a share on eight tells what dividing
rows costs. In the last line the width is divided instead, by XLA, and rows run as on one device.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

import lrjax
from lrjax.memory import MemoryProfile, profile
from lrjax.models.vgg import VGGFeatures

DEVICES = 8
MIB = 2**20
AXIS = "rows"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", default="h200")
    parser.add_argument("--size", type=int, default=4096, help="width, and rows of a device")
    parser.add_argument("--width", type=float, default=1.0, help="multiplier of the channels")
    parser.add_argument("--blocks", type=int, default=16, help="of a device")
    return parser.parse_args()


def main() -> None:
    own = arguments()
    size, tall = own.size, own.size * DEVICES
    cases: list[tuple[str, int, int, dict[str, Any] | None]] = [
        ("stream", size, 1, {"strategy": "stream"}),
        ("stream", tall, DEVICES, {"strategy": "stream"}),
        ("2ps", tall, DEVICES, {"strategy": "2ps"}),
        ("overl", tall, DEVICES, {"strategy": "overl"}),
        ("column", size, 1, None),
        ("column", tall, DEVICES, None),
    ]
    print("| strategy | image | devices | MiB a device | collectives, MiB | in loops |")
    print("|---|---|---|---|---|---|")
    for name, height, devices, options in cases:
        found = measured(own, (height, size), devices, options)
        print(f"| {name} | {height}x{size} | {devices} | {cells(found)} |", flush=True)
    found = measured(own, (size, tall), DEVICES, {"strategy": "stream"}, divides_width=True)
    print(f"| stream, width divided | {size}x{tall} | {DEVICES} | {cells(found)} |", flush=True)


def measured(
    own: argparse.Namespace,
    shape: tuple[int, int],
    devices: int,
    options: dict[str, Any] | None,
    *,
    divides_width: bool = False,
) -> MemoryProfile:
    model = VGGFeatures(own.width, jnp.bfloat16, jnp.bfloat16)
    image = jax.ShapeDtypeStruct((1, *shape, 3), jnp.bfloat16)
    params = jax.eval_shape(model.init, jax.random.key(0), image)

    def loss(params: Any, image: jax.Array) -> jax.Array:
        return jnp.square(model.apply(params, image).astype(jnp.float32)).mean()

    by_rows: Callable[..., Any] = loss
    over = {} if devices == 1 or divides_width else {"row_mesh_axis": AXIS}
    if options is not None:
        blocks = {"num_blocks": own.blocks}
        by_rows = lrjax.rowwise(loss, in_axes=(None, 1), **options, **blocks, **over)
    specs: dict[str, Any] = {}
    if devices > 1:
        of_image = jax.P(None, None, AXIS) if divides_width else jax.P(None, AXIS)
        specs = {"mesh_shape": {AXIS: devices}, "in_specs": (jax.P(), of_image)}
    return profile(jax.grad(by_rows), params, image, target=own.target, **specs)


def cells(found: MemoryProfile) -> str:
    kinds = Counter(one.kind for one in found.collectives)
    exchanged = sum(one.bytes for one in found.collectives) / MIB
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
    in_loops = sum(one.is_in_loop for one in found.collectives)
    return f"{found.peak_bytes / MIB:,.0f} | {listed}: {exchanged:,.1f} | {in_loops}"


if __name__ == "__main__":
    main()
