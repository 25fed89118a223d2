"""Rules: one file per family of primitives. Importing the package fills the registry."""

from lrjax.rules import convolution, elementwise, reduction, shape, windows
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
    "reduction",
    "row_op",
    "rule",
    "shape",
    "windows",
]
