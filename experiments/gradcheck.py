"""How far a strategy's outputs and gradients are from another's, over whole trees.

The distances are those of ``lrjax.testing``, which asserts what is only reported here.
"""

from typing import Any

import jax
import numpy as np

from lrjax import testing

BFLOAT16_ROUNDING = 2.0**-8


def max_error(values: Any, reference: Any) -> float:
    """The largest difference in any leaf, relative to the largest value of that reference leaf."""
    return _largest(jax.tree.map(testing.max_error, values, reference))


def excess_error(values: Any, columns: Any, truth: Any) -> float:
    """How much further from ``truth`` ``values`` are than ``columns``: 1 is just as far.

    The largest ratio of Euclidean distances over the leaves. For low precision, where column
    itself is off by percents (values near a ReLU's or a pooling's tie jump either way) and no
    fixed tolerance says anything. A leaf column has exact counts as off by one rounding.
    """

    def excess(value: Any, column: Any, true: Any) -> float:
        own, columns_own = testing.norm_error(value, true), testing.norm_error(column, true)
        return own / max(columns_own, BFLOAT16_ROUNDING)

    return _largest(jax.tree.map(excess, values, columns, truth))


def _largest(errors: Any) -> float:
    """The largest leaf; NaN if any is NaN, which Python's ``max`` may lose."""
    return float(np.max(jax.tree.leaves(errors), initial=0.0))
