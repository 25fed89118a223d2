"""Rules: one file per family of primitives. Importing the package fills the registry."""

from lrjax.rules import convolution, elementwise, indexing, reduction, shape, windows
from lrjax.rules.base import Equation, NotRowLocal, Operand, RowOp, RowRead, Rows, row_op, rule

__all__ = [
    "Equation",
    "NotRowLocal",
    "Operand",
    "RowOp",
    "RowRead",
    "Rows",
    "convolution",
    "elementwise",
    "indexing",
    "reduction",
    "row_op",
    "rule",
    "shape",
    "windows",
]
