"""Ways to run a segment, and to differentiate it: each an object with one contract."""

from lrjax.strategies.base import Strategy, named, register, registered
from lrjax.strategies.column import Checkpoint, Column
from lrjax.strategies.micro_batches import MicroBatches
from lrjax.strategies.selective import Selective, SelectiveNarrow
from lrjax.strategies.stream import Stream
from lrjax.strategies.tiled import Overlap, TwoPhase

__all__ = [
    "Checkpoint",
    "Column",
    "MicroBatches",
    "Overlap",
    "Selective",
    "SelectiveNarrow",
    "Strategy",
    "Stream",
    "TwoPhase",
    "named",
    "register",
    "registered",
]

_NAMED = (Column(), Checkpoint(), Stream(), TwoPhase(), Overlap(), Selective(), SelectiveNarrow())
for _strategy in _NAMED:
    register(_strategy)
