"""Ways to run a segment, and to differentiate it: each an object with one contract."""

from lrjax.strategies.base import Strategy, named, register, registered
from lrjax.strategies.column import Checkpoint, Column
from lrjax.strategies.micro_batches import MicroBatches
from lrjax.strategies.stream import Stream
from lrjax.strategies.tiled import Overlap, TwoPhase

__all__ = [
    "Checkpoint",
    "Column",
    "MicroBatches",
    "Overlap",
    "Strategy",
    "Stream",
    "TwoPhase",
    "named",
    "register",
    "registered",
]

for _strategy in (Column(), Checkpoint(), Stream(), TwoPhase(), Overlap()):
    register(_strategy)
