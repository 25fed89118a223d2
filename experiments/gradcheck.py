"""How far a strategy's outputs and gradients are from another's."""

from typing import Any

import jax
import numpy as np


def relative_error(values: Any, reference: Any) -> float:
    """The largest difference over the leaves, each relative to its reference's largest value."""
    errors = jax.tree.map(_leaf_error, values, reference)
    return max(jax.tree.leaves(errors), default=0.0)


def _leaf_error(value: Any, reference: Any) -> float:
    value, reference = (np.asarray(leaf, np.float64) for leaf in (value, reference))
    scale = float(np.max(np.abs(reference), initial=0.0)) or 1.0
    return float(np.max(np.abs(value - reference), initial=0.0)) / scale
