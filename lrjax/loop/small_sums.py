"""Small arrays that are added up in every step, as parts of one vector.

A step of a ResNet-50 adds up 107 gradients of scales and biases, each in a kernel of its own that
does next to nothing; as one vector they are added up in one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax

from lrjax.program.varying import varying_axes
from lrjax.rules.base import Array

Values = dict[int, Array]

# Elements of the largest array that is packed.
MOST_ELEMENTS = 2**16


@dataclasses.dataclass(frozen=True)
class _Vector:
    """Arrays of one type, one after the other.

    Attributes:
      number: under which the vector is found; no value has it.
      shapes: of the arrays.
    """

    number: int
    shapes: dict[int, tuple[int, ...]]

    def parts(self, vector: Array) -> Values:
        stops = itertools.accumulate(map(math.prod, self.shapes.values()))
        return {
            v: lax.slice(vector, (stop - math.prod(shape),), (stop,)).reshape(shape)
            for (v, shape), stop in zip(self.shapes.items(), stops, strict=True)
        }


class SmallSums:
    """Which of some arrays are parts of vectors.

    Args:
      types: of the arrays: ``(value, shape, dtype)``, and what they are like on a mesh.
    """

    def __init__(self, types: Iterable[tuple[int, Any, Any]]):
        groups: dict[Any, dict[int, tuple[int, ...]]] = {}
        for v, like, dtype in types:
            if math.prod(like.shape) <= MOST_ELEMENTS:
                key = jnp.dtype(dtype), varying_axes(like)
                groups.setdefault(key, {})[v] = tuple(like.shape)
        several = (shapes for shapes in groups.values() if len(shapes) > 1)
        self.vectors = [_Vector(-1 - i, shapes) for i, shapes in enumerate(several)]

    def packed(self, arrays: Mapping[int, Array]) -> Values:
        """The vectors, and the arrays that are in none."""
        found = dict(arrays)
        for vector in self.vectors:
            pieces = [found.pop(v).reshape(-1) for v in vector.shapes]
            found[vector.number] = lax.concatenate(pieces, 0)
        return found

    def unpacked(self, arrays: Mapping[int, Array]) -> Values:
        """All arrays by their own numbers."""
        found = dict(arrays)
        for vector in self.vectors:
            found.update(vector.parts(found.pop(vector.number)))
        return found
