"""Whole maps, of which the backward pass finds the dear ones kept, and makes the cheap ones again.

Selective activation recomputation (Korthikanti et al., arXiv 2205.05198), for convolutional
networks. Kept is what convolutions, products, pools and reductions give; normalised and rectified
maps, and whatever else is elementwise, are computed again from that where a gradient reads them.
``selective-narrow`` keeps of those results only what is no larger than what it was made of: a wide
map behind a 1x1 convolution takes little time for its bytes. Not optimal: it is decided operation
by operation, where a minimum cut would weigh bytes against seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lrjax.program.compatibility import checkpoint
from lrjax.program.inline import FlatProgram
from lrjax.rowgraph.graph import size_bytes
from lrjax.rowgraph.segments import Segment
from lrjax.rules.base import Array, traits_of
from lrjax.rules.traits import Kind
from lrjax.strategies.base import NOTHING_HOSTED, Function, Strategy
from lrjax.strategies.column import Seen, evaluation, with_hosted_maps
from lrjax.strategies.programs import WholeMaps

KEPT = "lrjax_selective_kept"
# Their derivative compares them with their operand: made again, rounded otherwise, no element of it
# might equal the maximum. So they are made again together.
_EXTREMES = (lax.reduce_max_p, lax.reduce_min_p)


class Selective(Strategy):
    """Whole maps; what is elementwise is computed again.

    Attributes:
      keeps_wide: results that are larger than what they are made of are kept, too.
    """

    name = "selective"
    fate = "results of convolutions and sums kept, other maps computed again"
    keeps_maps_within = True
    has_every_derivative = True
    keeps_wide = True

    def function(
        self,
        segment: Segment,
        num_blocks: int,
        given: Mapping[int, int] = NOTHING_HOSTED,
        taken: Mapping[int, int] = NOTHING_HOSTED,
    ) -> Function:
        policy = jax.checkpoint_policies.save_only_these_names(KEPT)
        function = checkpoint(evaluation(segment, self._named), policy=policy)
        return with_hosted_maps(function, given, taken)

    def _named(self, program: FlatProgram) -> Seen:
        kept = self.kept_values(program)

        def named(value: int, result: Array) -> Array:
            return checkpoint_name(result, KEPT) if value in kept else result

        return named

    def execution(self, segment: Segment, num_blocks: int, wrt: Sequence[int]) -> WholeMaps:
        return WholeMaps(is_recomputed=True, kept=self.kept_values)

    def kept_values(self, program: FlatProgram) -> frozenset[int]:
        """Values of a program, or of a gradient's forward pass, that are not computed again."""
        found: set[int] = set()
        for equation in program.equations:
            if equation.primitive in _EXTREMES or traits_of(equation.primitive).kind is Kind.FUSED:
                continue
            made = [program.avals[v] for v in equation.outputs]
            read = [size_bytes(program.avals[v]) for v in equation.values]
            is_narrow = sum(map(size_bytes, made)) <= max(read, default=0)
            # ``jax.checkpoint`` rounds what it saves; see ``lrjax.program.compatibility``.
            is_real = all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in made)
            if is_real and (is_narrow or self.keeps_wide):
                found.update(equation.outputs)
        return frozenset(found)


class SelectiveNarrow(Selective):
    """Whole maps; what is elementwise, or larger than what it is made of, is computed again."""

    name = "selective-narrow"
    fate = "narrow results of convolutions and sums kept, other maps computed again"
    keeps_wide = False
