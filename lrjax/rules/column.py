"""Primitives that no rule runs by rows: what is known of them on whole maps."""

from __future__ import annotations

from jax import lax

from lrjax.program.compatibility import primitives
from lrjax.rules.base import Rule
from lrjax.rules.linearity import additive_in
from lrjax.rules.traits import Kind, Traits

RULES = (
    Rule((lax.scan_p, lax.while_p, *primitives("pure_callback")), None, Traits(Kind.LIBRARY)),
    Rule((lax.sharding_constraint_p,), None, Traits(linearity=additive_in(0))),
)
