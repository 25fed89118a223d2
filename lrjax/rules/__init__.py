"""Rules: all that is known of a primitive, one file per family.

A file lists its rules under ``RULES``; they are registered here. Rules whose bodies are row graphs
of their own (branches, custom derivatives) are those of ``rowgraph``; docs/add-a-rule.md shows how
to add one.
"""

from lrjax.rules import (
    column,
    convolution,
    elementwise,
    indexing,
    random,
    reduction,
    shape,
    windows,
)
from lrjax.rules.base import (
    Equation,
    NotRowLocal,
    Operand,
    RowOp,
    RowRead,
    Rows,
    Rule,
    register,
    registered,
    row_op,
    traits_of,
)
from lrjax.rules.geometry import IDENTITY, RowMap
from lrjax.rules.linearity import additive_in
from lrjax.rules.traits import Kind, Traits

__all__ = [
    "IDENTITY",
    "Equation",
    "Kind",
    "NotRowLocal",
    "Operand",
    "RowMap",
    "RowOp",
    "RowRead",
    "Rows",
    "Rule",
    "Traits",
    "additive_in",
    "register",
    "registered",
    "row_op",
    "traits_of",
]

FAMILIES = (column, convolution, elementwise, indexing, random, reduction, shape, windows)

register(*(rule for family in FAMILIES for rule in family.RULES))
