"""What ``rowwise`` was asked for, checked before anything is traced or compiled."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from lrjax.graph import RowGraph, build
from lrjax.planner.choice import Choice
from lrjax.planner.plan import Plan
from lrjax.rowloop import reference_height
from lrjax.segments import Segment

STRATEGIES = ("stream", "2ps", "overl", "column")
DEFAULT_ROWS_PER_STEP = 64


Cuts = Sequence[str | Sequence[str]] | int


@dataclasses.dataclass(frozen=True)
class Options:
    """``cuts`` as given: names, groups of names (tuples), or a number of segments.

    With ``offload``, the maps between segments wait in the host's memory.
    """

    num_blocks: int | tuple[int, ...] | None
    strategy: str | tuple[str, ...]
    cuts: tuple[str | tuple[str, ...], ...] | int
    plan: Plan | None = None
    offload: bool = False

    @property
    def has_groups(self) -> bool:
        return not isinstance(self.cuts, int) and not all(isinstance(c, str) for c in self.cuts)

    @property
    def flat_cuts(self) -> tuple[str, ...] | int:
        """Names of all cuts, in and between groups."""
        if isinstance(self.cuts, int):
            return self.cuts
        return tuple(name for cut in self.cuts for name in _names(cut))

    def groups(self, segments: int) -> list[range]:
        """Segments by group: what runs under one checkpoint, alone or with others."""
        kept = list(range(segments - 1))  # segments behind which a map is kept
        if self.has_groups:
            assert not isinstance(self.cuts, int)
            is_kept = [isinstance(cut, str) for cut in self.cuts for _ in _names(cut)]
            kept = [i for i in kept if is_kept[i]]
        starts = [0, *(i + 1 for i in kept), segments]
        return [range(*pair) for pair in itertools.pairwise(starts)]


def _names(cut: str | tuple[str, ...]) -> tuple[str, ...]:
    return (cut,) if isinstance(cut, str) else cut


def checked_options(
    num_blocks: Any, strategy: Any, cuts: Any, plan: Any, offload: Any = False
) -> Options:
    """Everything that can be judged without arguments."""
    if plan is not None:
        if not isinstance(plan, Plan):
            raise ValueError(f"plan={plan!r:.80} is no plan; give what lrjax.plan returned.")
        if num_blocks is not None or strategy != "stream" or cuts not in ((), []) or offload:
            raise ValueError(
                "plan: it says how every segment runs; leave num_blocks, strategy, cuts and "
                "offload out."
            )
        return Options(None, "stream", (), plan)
    chosen = (strategy,) if isinstance(strategy, str) else tuple(strategy)
    for name in chosen:
        if name not in STRATEGIES:
            raise ValueError(
                f"strategy={name!r} is unknown; choose one of {', '.join(map(repr, STRATEGIES))}."
            )
    counts = num_blocks if isinstance(num_blocks, Sequence) else (num_blocks,)
    for count in counts:
        if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
            raise ValueError(f"num_blocks={count!r} must be an int; give at least 1.")
        if count is not None and count < 1:
            raise ValueError(f"num_blocks={count} must be at least 1 (1 runs all rows at once).")
    if isinstance(cuts, str):
        cuts = (cuts,)
    if isinstance(cuts, int):
        if isinstance(cuts, bool) or cuts < 1:
            raise ValueError(f"cuts={cuts} must be at least 1, the number of segments.")
    else:
        cuts = _checked_groups(cuts)
    _check_offload(offload, cuts)
    return Options(
        tuple(num_blocks) if isinstance(num_blocks, Sequence) else num_blocks,
        strategy if isinstance(strategy, str) else chosen,
        cuts,
        offload=offload,
    )


def _check_offload(offload: Any, cuts: Any) -> None:
    if not isinstance(offload, bool):
        raise ValueError(f"offload={offload!r} must be True or False.")
    if offload and cuts in ((), 1):
        raise ValueError(
            "offload=True: there are no maps between segments without cuts; name some in cuts, or "
            "give a number of segments."
        )
    if offload and not isinstance(cuts, int) and not all(isinstance(cut, str) for cut in cuts):
        raise ValueError(
            f"offload=True: cuts={cuts!r} has groups, whose maps do not wait; give names alone."
        )


def _checked_groups(cuts: Sequence[Any]) -> tuple[str | tuple[str, ...], ...]:
    found = tuple(cut if isinstance(cut, str) else _as_group(cut, cuts) for cut in cuts)
    for first, second in itertools.pairwise(found):
        if not isinstance(first, str) and not isinstance(second, str):
            raise ValueError(
                f"cuts={cuts!r}: the groups {first!r} and {second!r} have no kept map between "
                'them; put its name there, as in [("a", "b"), "c", ("d",)], or make them one group.'
            )
    return found


def _as_group(cut: Any, cuts: Any) -> tuple[str, ...]:
    names = tuple(cut) if isinstance(cut, Sequence) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"cuts={cuts!r} must be names, groups of names (tuples), or one number of segments; "
            f"{cut!r} is neither a name nor a group."
        )
    return names


def checked_segments(options: Options, segments: Sequence[Segment]) -> list[Choice]:
    """Strategy and number of blocks per segment, checked against its rows."""
    count = len(segments)
    strategies = _per_segment("strategy", options.strategy, count)
    numbers = _per_segment("num_blocks", options.num_blocks, count)
    graphs = [build(segment.program, segment.axes) for segment in segments]
    if not any(node.op is not None for graph in graphs for node in graph.nodes):
        reasons = sorted({n.reason for g in graphs for n in g.nodes if n.reason is not None})
        raise ValueError(
            "fun has no operation that is local in rows, so there is nothing to run row by row"
            + (f" ({'; '.join(reasons)})" if reasons else "")
            + "; check in_axes, or call fun directly."
        )
    return [
        Choice(strategy, _checked_count(strategy, number, graph), offload=options.offload)
        for strategy, number, graph in zip(strategies, numbers, graphs, strict=True)
    ]


def _per_segment(name: str, value: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        return (value,) * count
    if len(value) != count:
        raise ValueError(
            f"{name} has {len(value)} entries for {count} segments; give one value, or one entry "
            "per segment."
        )
    return value


def _checked_count(strategy: str, number: int | None, graph: RowGraph) -> int:
    order = strategy if strategy in ("2ps", "overl") else "stream"
    if not graph.loops:
        return 1
    most = most_blocks(order, graph)
    if number is None:
        tallest = max((graph.height(v) for v in graph.row_axis), default=most)
        return max(1, min(most, tallest // DEFAULT_ROWS_PER_STEP))
    if number > most and strategy != "column":
        where = "input" if order == "stream" else "output"
        raise ValueError(
            f"num_blocks={number} is more than the {most} {where} rows that strategy "
            f"{strategy!r} divides; the largest allowed is {most}."
        )
    return min(number, most)


def most_blocks(order: str, graph: RowGraph) -> int:
    """Rows that ``num_blocks`` divides: the tallest input's, or for 2PS and OverL the output's."""
    heights = [reference_height(graph, stage, order) for stage in graph.loops]
    if order != "stream":
        return max(heights, default=1)
    inputs = [graph.height(v) for v in graph.program.inputs if v in graph.row_axis]
    return max(inputs, default=max(heights, default=1))
