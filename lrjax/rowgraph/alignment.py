"""How the rows of different values lie beside each other: their rates and offsets.

Union-find over values. Values that meet in an operation form a component; each has a rate (its rows
per row of the component's root) and an offset.
"""

from __future__ import annotations

from fractions import Fraction

from lrjax.rules.geometry import IDENTITY, AnyMap

# Rows that meet may be this far apart, or half the map; a line buffer must hold what is between.
NEAR = 16
_ONE, _ZERO = Fraction(1), Fraction(0)


class Alignment:
    """The components of a program's row values."""

    def __init__(self) -> None:
        # value -> parent, rows per row of the parent, the parent's row beside row 0
        self.parent: dict[int, tuple[int, Fraction, Fraction]] = {}

    def rate(self, value: int) -> tuple[int, Fraction]:
        """The root of a value's component, and rows of the value per row of the root."""
        root, rate, _ = self._find(value)
        return root, rate

    def _find(self, value: int) -> tuple[int, Fraction, Fraction]:
        known = self.parent.get(value)
        if known is None:
            return value, _ONE, _ZERO
        parent, rate, offset = known
        root, parent_rate, parent_offset = self._find(parent)
        if root == parent:
            return known
        found = root, rate * parent_rate, offset / parent_rate + parent_offset
        self.parent[value] = found
        return found

    def join(self, value: int, operand: int, row_map: AnyMap, height: int) -> str | None:
        """``value`` reads ``operand``, of that ``height``, by a row map.

        Returns:
          Why that contradicts what is known of the two, if it does.
        """
        other_root, other_rate, other_offset = self._find(operand)
        rate, offset = other_rate, other_offset
        if row_map != IDENTITY:
            rate = other_rate / row_map.rate
            offset += Fraction(row_map.first(0) + row_map.end(1) - 1, 2) / other_rate
        root, known_rate, known_offset = self._find(value)
        if root == other_root:
            apart = abs(offset - known_offset) * other_rate
            if known_rate != rate:
                return "operands advance at different rates along rows"
            if apart > max(height / 2, NEAR):
                return f"rows that are {int(apart)} rows apart meet"
            return None
        relative = rate / known_rate
        self.parent[root] = (other_root, relative, offset - known_offset / relative)
        return None
