"""VGG-16 at 4096x4096 with its last three convolutions trained: operations, memory and time.

    python -m experiments.fine_tuning

bfloat16, one image, compiled for an H200 that need not be there; operations and time by the
roofline of the compiled program. Layers that are not trained run once under every strategy.
"""

import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no device is wanted

import jax
import jax.numpy as jnp

import lrjax
from experiments import report
from lrjax import memory, models
from lrjax.roofline import rates_of, roofline_of

SIZE, TARGET = 4096, "h200"
TRAINED = ("conv5_1", "conv5_2", "conv5_3")
METHODS = ("column", "2ps/16", "stream/16")
MODEL = models.VGG16(num_classes=1000, head="gap", dtype=jnp.bfloat16)


def arguments() -> tuple[Any, Any, jax.ShapeDtypeStruct]:
    """Parameters that are trained, those that are not, and the image."""
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.bfloat16)
    params = jax.eval_shape(MODEL.init, jax.random.key(0), image)["params"]
    features = params["features"]
    trained = {name: features[name] for name in TRAINED}
    frozen = {name: own for name, own in features.items() if name not in TRAINED}
    return {"features": trained, "classifier": params["classifier"]}, frozen, image


def loss(trained: Any, frozen: Any, image: jax.Array) -> jax.Array:
    params = {**trained, "features": {**frozen, **trained["features"]}}
    logits = MODEL.apply({"params": params}, image, train=True)
    return -jnp.mean(jax.nn.log_softmax(logits.astype(jnp.float32))[:, 0])


def main() -> None:
    rows: list[list[Any]] = []
    for method in METHODS:
        name, _, blocks = method.partition("/")
        fun = loss
        if blocks:
            fun = lrjax.rowwise(
                loss, in_axes=(None, None, 1), strategy=name, num_blocks=int(blocks)
            )
        compiled = memory.compile_for(jax.value_and_grad(fun), *arguments(), target=TARGET)
        time = roofline_of(str(compiled.as_text()), rates_of(TARGET))
        mib, tflop = memory.peak_bytes(compiled) / 2**20, time.operations / 1e12
        column = rows[0][2] if rows else tflop
        rows.append([method, round(mib), round(tflop, 2), round(tflop / column, 3)])
    print(report.markdown_table(["method", "peak MiB", "TFLOP", "of column's"], rows))


if __name__ == "__main__":
    main()
