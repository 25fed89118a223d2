"""Random bits by rows: the same values as column's.

With partitionable threefry (JAX's default) an element's bits are a function of the key and of the
element's index alone, so a block of rows counts from its own first index and dropout masks never
exist whole. Bits of any other generator are made whole before the loop, as column makes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as public
from jax.extend.random import threefry2x32_p

from lrjax.program.compatibility import primitives
from lrjax.rules.base import Array, Equation, RowOp, Rows, Rule, with_at
from lrjax.rules.traits import Kind, Traits

# Twenty rounds of about five operations.
_FLOPS_PER_ELEMENT = 100.0


def random_rows(equation: Equation, axis: int) -> RowOp | None:
    """The row form of ``random_bits``, None where its bits depend on more than an index."""
    shape, width = equation.params["shape"], equation.params["bit_width"]
    key = equation.operands[0]
    is_partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
    is_threefry = str(key.dtype) == "key<fry>" and is_partitionable
    # Indices of more than 32 bits would need the generator's upper counter.
    if not is_threefry or key.shape or math.prod(shape) > 2**32:
        return None
    dtype = equation.outputs[0].dtype

    def evaluate(windows: Sequence[Array], rows: Rows) -> Sequence[Array]:
        first, second = jax.random.key_data(windows[0])
        block = with_at(shape, axis, rows.count)
        index = jnp.zeros(block, np.uint32)
        for a in range(len(shape)):
            coordinate = lax.broadcasted_iota(np.uint32, block, a)
            if a == axis:
                coordinate = coordinate + jnp.asarray(rows.start).astype(np.uint32)
            index = index + coordinate * np.uint32(math.prod(shape[a + 1 :]))
        upper, lower = threefry2x32_p.bind(first, second, jnp.zeros_like(index), index)
        if width == 64:
            return [lax.shift_left(upper.astype(dtype), dtype.type(32)) | lower.astype(dtype)]
        return [(upper ^ lower).astype(dtype)]

    return RowOp(
        reads=(None,),
        out_axes=(axis,),
        height=shape[axis],
        evaluate=evaluate,
        flops=_FLOPS_PER_ELEMENT * math.prod(shape) / max(shape[axis], 1),
        is_positional=True,
    )


RULES = (
    Rule(
        (public.random_bits_p,),
        None,
        Traits(Kind.FUSED, preserves_finiteness=True),
        without_rows=random_rows,
    ),
    Rule(
        (
            public.random_fold_in_p,
            public.random_seed_p,
            threefry2x32_p,
            *primitives("random_wrap", "random_unwrap"),
        ),
        None,
        Traits(Kind.FUSED),
    ),
)
