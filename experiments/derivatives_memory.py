"""Memory of derivatives of every kind, by rows and column-wise.

    python -m experiments.derivatives_memory

Eight 3x3 convolutions of 16 channels with tanh on one image of 1024 x 256 x 3 in float32, a mean of
squares. Compiled for this CPU; XLA's temporaries in MiB, arguments and results not counted.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax import lax

import lrjax

RESULTS = Path(__file__).parent / "results" / "derivatives_memory.md"
IMAGE = jax.ShapeDtypeStruct((1, 1024, 256, 3), jnp.float32)
KERNELS = [jax.ShapeDtypeStruct((3, 3, 16 if i else 3, 16), jnp.float32) for i in range(8)]
WAYS: dict[str, dict[str, Any]] = {
    "column": {"strategy": "column"},
    "2PS, 32 blocks": {"strategy": "2ps", "num_blocks": 32},
    "stream, 32 blocks": {"strategy": "stream", "num_blocks": 32},
    "stream, 128 blocks": {"strategy": "stream", "num_blocks": 128},
}


def loss(kernels: list[jax.Array], image: jax.Array) -> jax.Array:
    for kernel in kernels:
        numbers = ("NHWC", "HWIO", "NHWC")
        image = lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        image = jnp.tanh(image)
    return (image**2).mean()


Function = Callable[..., Any]


def gradient(f: Function) -> Function:
    return jax.value_and_grad(f)


def tangent(f: Function) -> Function:
    return lambda kernels, image: jax.jvp(lambda k: f(k, image), (kernels,), (kernels,))


def hessian_vector(f: Function) -> Function:
    return lambda k, image: jax.jvp(lambda k: jax.grad(f)(k, image), (k,), (k,))


def gradient_penalty(f: Function) -> Function:
    return jax.grad(lambda k, image: (jax.grad(f, argnums=1)(k, image) ** 2).sum())


KINDS = {
    "gradient": gradient,
    "`jvp`": tangent,
    "Hessian times a vector": hessian_vector,
    "gradient of a gradient penalty": gradient_penalty,
}


def temporaries(function: Function) -> float:
    compiled = jax.jit(function).lower(KERNELS, IMAGE).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
    lines = [
        f"jax {jax.__version__}, CPU; `python -m experiments.derivatives_memory`; MiB.",
        "",
        f"| | {' | '.join(KINDS)} |",
        f"|---|{'---|' * len(KINDS)}",
    ]
    for name, options in WAYS.items():
        by_rows = lrjax.rowwise(loss, in_axes=(None, 1), **options)
        found = [f"{temporaries(kind(by_rows)):,.1f}" for kind in KINDS.values()]
        lines.append(f"| {name} | {' | '.join(found)} |")
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()
