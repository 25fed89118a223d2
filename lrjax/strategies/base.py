"""What a strategy is: one way to run a segment and its gradient, as an object.

``rowwise``, ``explain``, plans, the planner and the command line take every strategy alike, by
its name or as an object. A new one is a subclass of ``Strategy`` in a file of its own, and a call
of ``register`` where names shall find it; docs/add-a-strategy.md has one.
"""

from __future__ import annotations

import abc
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lrjax.loop.heights import Order, reference_height
from lrjax.rowgraph.graph import RowGraph
from lrjax.rowgraph.segments import Segment
from lrjax.rules.base import Array
from lrjax.rules.geometry import ceil_div
from lrjax.strategies.programs import Execution

Function = Callable[..., Sequence[Array]]
NOTHING_HOSTED: Mapping[int, int] = types.MappingProxyType({})
DEFAULT_ROWS_PER_STEP = 64

# The tallest map comes in from the top, block by block; rows are kept until their last reader.
TOP_DOWN = Order(divides_output=False)


class Strategy(abc.ABC):
    """One way to run a segment, and to differentiate it.

    It holds settings alone, and two of one class with equal settings are equal.

    Attributes:
      name: by which ``rowwise``, plans and the command line know it.
      label: its name in tables and pictures, where that is another.
      fate: what becomes of a segment's maps between its passes, for tables of plans.
      order: how its row loops divide rows; None where it runs whole maps, and takes no
        ``num_blocks``.
      recomputes: the backward pass does the forward pass's operations again.
      starts_from_inputs: the backward pass needs nothing but the segment's inputs, and reads them
        where they are. So they may wait in the host's memory without a copy on the device, and it
        is worth running on one part of the batch after the other.
      keeps_maps_within: what it ``recomputes`` starts from maps within the segment too, so that
        two segments keep no more than one, and less is alive in their backward passes.
      has_every_derivative: JAX differentiates its function any number of times, forwards too. Of
        others the first gradient is their own, and all other derivatives are streamed.
    """

    name: str
    label: str = ""
    fate: str
    order: Order | None = None
    recomputes: bool = True
    starts_from_inputs: bool = False
    keeps_maps_within: bool = False
    has_every_derivative: bool = False

    @abc.abstractmethod
    def function(
        self,
        segment: Segment,
        num_blocks: int,
        given: Mapping[int, int] = NOTHING_HOSTED,
        taken: Mapping[int, int] = NOTHING_HOSTED,
    ) -> Function:
        """The segment as a function of its inputs, differentiable once in reverse mode.

        Args:
          segment: its program, the row axes of its inputs, and the devices that share its rows, if
            several do (``segment.row_mesh``); where a strategy ignores these, XLA divides the work.
          num_blocks: steps of its row loops, on every device.
          given: numbers of the outputs to put in the host's memory, with their row axes.
          taken: numbers of the inputs that come in the host's memory, with their row axes.
        """

    @abc.abstractmethod
    def execution(self, segment: Segment, num_blocks: int, wrt: Sequence[int]) -> Execution:
        """What will run, forward and backward, for gradients of the inputs ``wrt``.

        ``lrjax.explain`` prints it, and the planner predicts its cost from it.
        """

    def refusal(self, segment: Segment) -> str | None:
        """Why the segment cannot run so, with what to do; None where it can."""
        del segment
        return None

    @property
    def by_rows(self) -> bool:
        """It runs row loops, of ``num_blocks`` steps."""
        return self.order is not None

    @property
    def streams(self) -> bool:
        """Its passes are row loops that start from the segment's inputs."""
        return self.by_rows and self.starts_from_inputs

    def most_blocks(self, graph: RowGraph) -> int:
        """Rows that ``num_blocks`` divides: the tallest input's, or the main output's."""
        order = self.order or TOP_DOWN
        heights = [reference_height(graph, stage, order) for stage in graph.loops]
        if order.divides_output:
            return max(heights, default=1)
        inputs = [graph.height(v) for v in graph.program.inputs if v in graph.row_axis]
        return max(inputs, default=max(heights, default=1))

    def block_count(
        self, number: int | None, graph: RowGraph, place: str = "", devices: int = 1
    ) -> int:
        """The number of blocks for a segment: as given, or for steps of about 64 rows.

        Args:
          number: what the user gave.
          graph: of the segment.
          place: which segment it is, in words, for the message.
          devices: how many share the rows; the blocks are those of each.

        Raises:
          ValueError: there are fewer rows than that.
        """
        if not graph.loops:
            return 1
        most = ceil_div(self.most_blocks(graph), devices)
        if number is None:
            tallest = max((graph.height(v) for v in graph.row_axis), default=most)
            return max(1, min(most, tallest // devices // DEFAULT_ROWS_PER_STEP))
        if number > most and self.order is not None:
            where = "output" if self.order.divides_output else "input"
            each = f" on each of {devices} devices" if devices > 1 else ""
            raise ValueError(
                f"num_blocks={number} is more than the {most} {where} rows that strategy "
                f"{self.name!r} divides{each}{place}; the largest allowed is {most}"
                + (" there: give one number per segment, or at most that." if place else ".")
            )
        return min(number, most)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"


# --- By name -------------------------------------------------------------------------------------

_BY_NAME: dict[str, Strategy] = {}


def register(strategy: Strategy) -> Strategy:
    """Let ``rowwise``, plans, the planner and the command line know a strategy by its name.

    Raises:
      ValueError: another one has that name.
    """
    if _BY_NAME.setdefault(strategy.name, strategy) != strategy:
        raise ValueError(
            f"strategy {strategy.name!r} is {_BY_NAME[strategy.name]!r} already; give "
            f"{type(strategy).__name__} another name."
        )
    return strategy


def registered() -> tuple[Strategy, ...]:
    """All strategies that have a name, in the order in which they were registered."""
    return tuple(_BY_NAME.values())


def named(strategy: Any, argument: str = "strategy") -> Strategy:
    """A strategy by its name; an object is itself.

    Raises:
      ValueError: there is none of that name; lists those that there are.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, str) and strategy in _BY_NAME:
        return _BY_NAME[strategy]
    raise ValueError(
        f"{argument}={strategy!r:.80} is unknown; choose one of "
        f"{', '.join(map(repr, _BY_NAME))}, or give an object of lrjax.strategies."
    )
