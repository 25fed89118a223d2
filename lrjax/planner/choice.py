"""How one segment runs."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Choice:
    """How one segment runs.

    Attributes:
      strategy: "column", "checkpoint" (whole maps, the forward pass done again), "stream", "2ps"
        or "overl".
      num_blocks: steps of its row loops, for the last three.
      micro_batches: parts of the batch that run one after the other.
      offload: the maps that the segment gives wait for their reader's backward pass in the host's
        memory, where they are written and read by blocks of rows, and so do their gradients.
        Maps that several segments read, or the caller gets, stay on the device.
    """

    strategy: str
    num_blocks: int = 1
    micro_batches: int = 1
    offload: bool = False
