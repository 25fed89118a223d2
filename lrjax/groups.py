"""Groups of segments that run under one checkpoint, as ranges or as a tree.

The backward pass of a group first runs all its segments again, and keeps what they keep until it is
done with them; a group within it is again one segment of that kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Range = tuple[int, int]
# The number of a segment, or a group of them.
Tree = int | tuple["Tree", ...]


def tree_of(ranges: Iterable[Range], count: int) -> tuple[Tree, ...]:
    """Segments 0 to ``count`` (exclusive) and their groups.

    Args:
      ranges: first segment of every group, and the one behind its last.
      count: of the segments.

    Raises:
      ValueError: a group is no range of the segments, or two of them overlap in part.
    """
    ordered = sorted(set(ranges), key=lambda one: (one[0], -one[1]))
    found, rest = _tree((0, count), ordered)
    if rest:
        raise ValueError(f"group {rest[0]} is none of {count} segments, or overlaps another")
    return found


def _tree(around: Range, ranges: Sequence[Range]) -> tuple[tuple[Tree, ...], Sequence[Range]]:
    """The segments of a range, and the ranges that are not within it."""
    at, stop = around
    found: list[Tree] = []
    while at < stop:
        if ranges and ranges[0][0] == at and at < ranges[0][1] <= stop:
            inner = ranges[0]
            part, ranges = _tree(inner, ranges[1:])
            found.append(part)
            at = inner[1]
        else:
            found.append(at)
            at += 1
    return tuple(found), ranges


def leaves(tree: Tree) -> list[int]:
    """The segments of a tree, in order."""
    return [tree] if isinstance(tree, int) else [leaf for one in tree for leaf in leaves(one)]


def outermost(tree: Iterable[Tree]) -> list[tuple[int, ...]]:
    """Segments by the outermost group that each belongs to, alone where there is none."""
    return [tuple(leaves(one)) for one in tree]
