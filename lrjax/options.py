"""What ``rowwise`` was asked for, checked before anything is traced or compiled."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lrjax.groups import Tree, tree_of
from lrjax.plan import Choice, Plan
from lrjax.program.compatibility import tag_of
from lrjax.rowgraph.fallbacks import counted, fallbacks_of
from lrjax.rowgraph.graph import RowGraph, build
from lrjax.rowgraph.segments import Segment
from lrjax.strategies import Strategy, Stream, named

StrategyOption = str | Strategy | Sequence[str | Strategy]
Cuts = Sequence[str | Sequence[str]] | int
MeshOption = jax.sharding.Mesh | jax.sharding.AbstractMesh | None


@dataclasses.dataclass(frozen=True)
class Options:
    """``cuts`` as given: names, groups of names (tuples), or a number of segments.

    With ``offload``, the maps between segments wait in the host's memory. With ``row_mesh_axis``,
    the devices along that axis of ``mesh``, or of the mesh at hand, share the rows.
    """

    num_blocks: int | tuple[int | None, ...] | None
    strategy: Strategy | tuple[Strategy, ...]
    cuts: tuple[str | tuple[str, ...], ...] | int
    plan: Plan | None = None
    offload: bool = False
    mesh: MeshOption = None
    row_mesh_axis: str | None = None

    @property
    def has_groups(self) -> bool:
        return not isinstance(self.cuts, int) and not all(isinstance(c, str) for c in self.cuts)

    @property
    def flat_cuts(self) -> tuple[str, ...] | int:
        """Names of all cuts, in and between groups."""
        if isinstance(self.cuts, int):
            return self.cuts
        return tuple(name for cut in self.cuts for name in _names(cut))

    def groups(self, segments: int) -> tuple[Tree, ...]:
        """Segments by group: what runs under one checkpoint, alone or with others."""
        if self.plan is not None:
            return tree_of(self.plan.groups, segments)
        kept = list(range(segments - 1))  # segments behind which a map is kept
        if self.has_groups:
            assert not isinstance(self.cuts, int)
            is_kept = [isinstance(cut, str) for cut in self.cuts for _ in _names(cut)]
            kept = [i for i in kept if is_kept[i]]
        starts = [0, *(i + 1 for i in kept), segments]
        pairs = itertools.pairwise(starts)
        return tree_of([pair for pair in pairs if pair[1] - pair[0] > 1], segments)


def _names(cut: str | tuple[str, ...]) -> tuple[str, ...]:
    return (cut,) if isinstance(cut, str) else cut


def checked_options(
    *,
    num_blocks: Any,
    strategy: Any,
    cuts: Any,
    plan: Any,
    offload: Any,
    mesh: Any,
    row_mesh_axis: Any,
) -> Options:
    """Everything that can be judged without arguments.

    No option has a default here, so that whoever takes options cannot leave one out.
    """
    if not isinstance(offload, bool):
        raise ValueError(f"offload={offload!r:.80} must be True or False.")
    if plan is not None:
        if not isinstance(plan, Plan):
            raise ValueError(
                f"plan={plan!r:.80} is no plan; give what lrjax.plan or lrjax.Plan.load returned."
            )
        _check_alone(num_blocks=num_blocks, strategy=strategy, cuts=cuts, offload=offload)
        row_mesh_axis = plan.row_mesh_axis if row_mesh_axis is None else row_mesh_axis
    _check_mesh(mesh, row_mesh_axis)
    if plan is not None:
        plan.check_mesh(row_mesh_axis, None if mesh is None else mesh.shape[row_mesh_axis])
        return Options(None, Stream(), (), plan, mesh=mesh, row_mesh_axis=row_mesh_axis)
    cuts = _checked_cuts(cuts)
    if offload:
        _check_offload(cuts)
    if offload and row_mesh_axis is not None:
        raise ValueError(
            f"offload=True: maps whose rows are divided along the mesh axis {row_mesh_axis!r} stay "
            "on the devices; divide the rows among more devices, or leave row_mesh_axis out."
        )
    return Options(
        num_blocks=_checked_num_blocks(num_blocks),
        strategy=_checked_strategy(strategy),
        cuts=cuts,
        offload=offload,
        mesh=mesh,
        row_mesh_axis=row_mesh_axis,
    )


def _check_mesh(mesh: Any, row_mesh_axis: Any) -> None:
    if mesh is not None and not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        raise ValueError(
            f"mesh={mesh!r:.80} is no mesh; give what jax.make_mesh returned, or None for the one "
            "of jax.set_mesh."
        )
    if row_mesh_axis is None:
        if mesh is not None:
            raise ValueError(
                "mesh is given without row_mesh_axis; name the axis along which rows are divided, "
                "or leave mesh out: arrays that are divided along other axes need neither."
            )
        return
    if not isinstance(row_mesh_axis, str):
        raise ValueError(f"row_mesh_axis={row_mesh_axis!r:.80} must be the name of one mesh axis.")
    if mesh is not None and row_mesh_axis not in mesh.axis_names:
        raise ValueError(
            f"row_mesh_axis={row_mesh_axis!r} is no axis of the mesh; it has {mesh.axis_names}."
        )


def check_callable(fun: Any) -> None:
    """Refuse what is no function."""
    if not callable(fun):
        raise ValueError(f"fun={fun!r:.80} cannot be called; give a function of arrays.")


_DEFAULTS: dict[str, Any] = {"num_blocks": None, "strategy": "stream", "offload": False}


def _check_alone(**options: Any) -> None:
    """Refuse what is given beside a plan."""
    given = [
        f"{name}={value!r:.40}"
        for name, value in options.items()
        if not (_is_list(value) and len(value) == 0 if name == "cuts" else value is _DEFAULTS[name])
    ]
    if given:
        raise ValueError(
            f"plan: it says how every segment runs; leave {' and '.join(given)} out, or the plan."
        )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _checked_num_blocks(value: Any) -> int | tuple[int | None, ...] | None:
    if not _is_list(value):
        return _checked_number("num_blocks", value)
    if len(value) == 0:
        raise ValueError("num_blocks is empty; give one number, or one per segment.")
    return tuple(_checked_number(f"num_blocks[{i}]", count) for i, count in enumerate(value))


def _checked_number(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if not _is_int(value):
        raise ValueError(f"{name}={value!r:.80} must be an int; give at least 1.")
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1 (1 runs all rows at once).")
    return int(value)


def _checked_strategy(value: Any) -> Strategy | tuple[Strategy, ...]:
    if not _is_list(value):
        return named(value)
    if len(value) == 0:
        raise ValueError("strategy is empty; give one, or one per segment.")
    return tuple(named(chosen, f"strategy[{i}]") for i, chosen in enumerate(value))


def _checked_cuts(cuts: Any) -> tuple[str | tuple[str, ...], ...] | int:
    if isinstance(cuts, str):
        return (cuts,)
    if _is_int(cuts):
        if cuts < 1:
            raise ValueError(f"cuts={cuts} must be at least 1, the number of segments.")
        return int(cuts)
    if not _is_list(cuts):
        raise ValueError(
            f"cuts={cuts!r:.80} must be a list of names and groups of names (tuples), or one "
            "number of segments."
        )
    return _checked_groups(cuts)


def _check_offload(cuts: tuple[str | tuple[str, ...], ...] | int) -> None:
    if cuts in ((), 1):
        raise ValueError(
            "offload=True: there are no maps between segments without cuts; name some in cuts, or "
            "give a number of segments."
        )
    if not isinstance(cuts, int) and not all(isinstance(cut, str) for cut in cuts):
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
    _check_rows(graphs)
    places = _places(segments, options.flat_cuts)
    choices = []
    for segment, strategy, number, graph, place in zip(
        segments, strategies, numbers, graphs, places, strict=True
    ):
        choice = Choice(strategy, offload=options.offload)
        refusal = choice.runner.refusal(segment)
        if refusal is not None:
            raise ValueError(f"strategy {choice.runner.name!r}{place}: {refusal}")
        count = choice.runner.block_count(number, graph, place, segment.devices)
        choices.append(dataclasses.replace(choice, num_blocks=count))
    return choices


def _check_rows(graphs: Sequence[RowGraph]) -> None:
    if any(graph.row_nodes for graph in graphs):
        return
    reasons = counted(fallback for graph in graphs for fallback in fallbacks_of(graph))
    if reasons:
        raise ValueError(
            f"fun has no operation that is local in rows: {'; '.join(reasons)}. So there is "
            "nothing to run row by row; call fun directly, or begin it with an operation that "
            "keeps rows apart."
        )
    raise ValueError(
        "fun has no operation on an argument that carries rows, so there is nothing to run row by "
        "row; check in_axes, which says what does, or call fun directly."
    )


def _places(segments: Sequence[Segment], cuts: tuple[str, ...] | int) -> list[str]:
    """Which segment each is, in words; nothing where there is one."""
    last = len(segments) - 1
    if last == 0:
        return [""]
    names = [_cuts_in(segment, () if isinstance(cuts, int) else cuts) for segment in segments]
    found = []
    for i in range(len(segments)):
        before, after = names[i - 1] if i > 0 else "", names[i] if i < last else ""
        between = f"between the cuts {before} and {after}" if before and after else ""
        where = between or (f"behind the cut {before}" if before else "")
        where = where or (f"up to the cut {after}" if after else "")
        found.append(f" in segment {i} of 0 to {last}" + (f", {where}" if where else ""))
    return found


def _cuts_in(segment: Segment, cuts: Sequence[str]) -> str:
    """Names of the cuts that a segment ends with."""
    found = [tag for tag in map(tag_of, segment.program.equations) if tag in cuts]
    return ", ".join(map(repr, dict.fromkeys(found)))


def _per_segment(name: str, value: Any, count: int) -> tuple[Any, ...]:
    if not isinstance(value, tuple):
        return (value,) * count
    if len(value) != count:
        raise ValueError(
            f"{name} has {len(value)} entries for {count} segments; give one value, or one entry "
            "per segment."
        )
    return value
