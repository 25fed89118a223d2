"""What the planner tells while it works."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the planner tells while it works.

    Attributes:
      doing: "tracing", "searching", "compiling" or "compiled".
      compilations: programs compiled so far, this one included.
      strategies: of the plan's segments; none while there is no plan.
      operations: as a multiple of column's.
      predicted_bytes, predicted_seconds: the cost model's peak and time.
      verified_bytes: XLA's peak; None before it is compiled.
      roofline_seconds: of the compiled program; None before, and for targets other than GPUs.
    """

    doing: str
    compilations: int
    strategies: tuple[str, ...] = ()
    operations: float = 0.0
    predicted_bytes: int = 0
    predicted_seconds: float = 0.0
    verified_bytes: int | None = None
    roofline_seconds: float | None = None


OnProgress = Callable[[Progress], None]
