"""What XLA makes of whole maps that should wait in the host's memory between the passes.

    python -m experiments.offload_copies

Eight convolutions in bfloat16, 1024 x 1024 x 64 each, under ``jax.checkpoint``; the map before each
is kept on the device, put in the host's memory by ``jax.device_put``, or that with
``optimization_barrier`` where the copies should begin and end. Compiled for an H200 that need not
be there; XLA's peak on the device and what it sets aside on the host, in MiB.
"""

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no device is wanted

import jax
import jax.numpy as jnp
from jax import lax

from lrjax import memory

MIB = 2**20
LAYERS = 8
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
IMAGE = jax.ShapeDtypeStruct((1, 1024, 1024, 3), jnp.bfloat16)
KERNELS = [
    jax.ShapeDtypeStruct((3, 3, 64 if i else 3, 64), jnp.bfloat16) for i in range(LAYERS + 1)
]


def convolution(image: jax.Array, kernel: jax.Array) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers)
    return jax.nn.relu(y)


def layer(way: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A layer whose input waits on the ``"device"``, by ``"copies"`` or by ``"barriers"``."""
    function = jax.checkpoint(convolution)
    if way == "device":
        return function

    @jax.custom_vjp
    def call(image: jax.Array, kernel: jax.Array) -> jax.Array:
        return function(image, kernel)

    def forward(image: jax.Array, kernel: jax.Array) -> Any:
        waiting, result = jax.device_put(image, HOST), function(image, kernel)
        if way == "barriers":
            result, waiting = lax.optimization_barrier((result, waiting))
        return result, (waiting, kernel)

    def backward(residuals: Any, cotangent: jax.Array) -> Any:
        waiting, kernel = residuals
        if way == "barriers":
            waiting, cotangent = lax.optimization_barrier((waiting, cotangent))
        return jax.vjp(function, jax.device_put(waiting, DEVICE), kernel)[1](cotangent)

    call.defvjp(forward, backward)
    return call


def loss(kernels: list[jax.Array], image: jax.Array, way: str) -> jax.Array:
    x = convolution(image, kernels[0])
    for kernel in kernels[1:]:
        x = layer(way)(x, kernel)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))


def main() -> None:
    print(f"jax {jax.__version__}")
    for way in ("device", "copies", "barriers"):
        compiled = memory.compile_for(
            jax.grad(loss), KERNELS, IMAGE, way, target="h200", static_argnums=2
        )
        peak, host = memory.peak_bytes(compiled) / MIB, memory.host_bytes(compiled) / MIB
        print(f"{way:>8}: {peak:7,.0f} MiB, host {host:7,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
