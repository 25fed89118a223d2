"""Write the samples that the tests of the dump reader read: one small gradient, three compilers.

    python tests/memory/data/make_dumps.py  # jax[cuda13] and libtpu, under every version of JAX

A sample is XLA's ``HloProto`` after optimisation, gzipped: ``<target>-jax<version>.hlo.pb.gz``.
"""

import gzip
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

HERE = Path(__file__).parent
TARGETS = ("cpu", "h200", "tpu-v5e")


def convolution(kernel, images):
    return lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def loss(params, images):
    """A convolution, then three rounds of the same dense layer: a map that waits for backward."""
    with jax.named_scope("conv"):
        y = jnp.sin(convolution(params["kernel"], images))
    with jax.named_scope("rounds"):

        def body(carry, _):
            return jnp.tanh(carry @ params["dense"]), None

        y, _ = lax.scan(body, y, None, length=3)
    with jax.named_scope("loss"):
        return jnp.mean(jnp.square(y))


ARGUMENTS = (
    {
        "kernel": jax.ShapeDtypeStruct((3, 3, 8, 64), jnp.float32),
        "dense": jax.ShapeDtypeStruct((64, 64), jnp.float32),
    },
    jax.ShapeDtypeStruct((1, 128, 128, 8), jnp.float32),
)


def main() -> None:
    from lrjax.memory import compile_for, peak_bytes

    # No directories of the machine the samples are made on.
    jax.config.update("jax_hlo_source_file_canonicalization_regex", ".*/")
    jax.config.update("jax_traceback_in_locations_limit", 1)
    for target in TARGETS:
        with tempfile.TemporaryDirectory() as directory:
            compiled = compile_for(
                jax.grad(loss),
                *ARGUMENTS,
                target=target,
                compiler_options={"xla_dump_to": directory, "xla_dump_hlo_as_proto": True},
            )
            (dump,) = Path(directory).rglob("*after_optimizations.hlo.pb")
            content = dump.read_bytes()
        assert not re.search(rb"/(home|tmp|usr|root)/", content)
        name = f"{target}-jax{jax.__version__}.hlo.pb.gz"
        (HERE / name).write_bytes(gzip.compress(content, mtime=0))
        print(name, len(content), peak_bytes(compiled))


if __name__ == "__main__":
    main()
