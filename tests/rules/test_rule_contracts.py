"""What every rule declares, measured on the plain primitive.

The cases of ``rule_cases`` cover the registry; a rule without a case fails. For each: the rows that
the rule declares are those that the output depends on, blocks are slices of the whole output
whatever rows outside the image hold, the gradients of blocks add up to the whole gradient, and what
is declared to preserve finiteness does.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rule_cases import WITHOUT_CASES, cases

from lrjax.loop.sums import _COMBINE
from lrjax.rules.base import Rows, highest, lowest, registered
from lrjax.rules.geometry import IDENTITY
from lrjax.rules.reduction import identity_of
from marks import slow

pytestmark = pytest.mark.usefixtures("x64")

BY_ROWS = {p.name for p, rule in registered().items() if rule.on_rows or rule.without_rows}
NAMES = sorted(BY_ROWS - WITHOUT_CASES)
# A quarter of the elementwise ones at every change: they share one rule.
ELEMENTWISE = sorted(p.name for p, rule in registered().items() if rule.traits.is_elementwise)
SOMETIMES = set(ELEMENTWISE) - set(ELEMENTWISE[::4])
SAMPLED_NAMES = [*sorted({*NAMES} - SOMETIMES), *slow(*sorted({*NAMES} & SOMETIMES))]
TOLERANCE = 1e-12
EVERY_ROW = (0, 10**9)


def cases_of(name):
    assert name in cases(), f"{name} has a rule but no case in rule_cases.py"
    return cases()[name]


def is_inexact(value):
    return jnp.issubdtype(value.dtype, jnp.inexact)


def along(axis, ndim, values):
    return np.reshape(values, [-1 if a == axis else 1 for a in range(ndim)])


def is_finite(value):
    return not is_inexact(value) or bool(np.all(np.isfinite(value)))


def rows_of(value, axis, first, count, outside):
    """Rows ``first`` to ``first + count`` of an array; those outside it hold ``outside``."""
    rows = np.arange(first, first + count)
    if value.shape[axis] == 0:
        return np.full(
            [count if a == axis else s for a, s in enumerate(value.shape)], outside, value.dtype
        )
    inside = (rows >= 0) & (rows < value.shape[axis])
    taken = np.take(value, np.clip(rows, 0, value.shape[axis] - 1), axis)
    return np.where(along(axis, value.ndim, inside), taken, np.asarray(outside, value.dtype))


def garbage(value):
    """The worst that rows outside the image can hold."""
    if is_inexact(value):
        return np.nan
    return True if value.dtype == bool else np.iinfo(value.dtype).max


def quantum(op):
    return math.lcm(*(read.row_map.quantum for read in op.reads if read is not None))


def windows_of(case, start, count, outside, own=EVERY_ROW):
    """The operands of a block: windows of those that are read by rows, the others whole.

    Rows of a reduction's drivers that the block does not own hold the fill.
    """
    windows = []
    for i, (value, read) in enumerate(zip(case.values, case.op.reads, strict=True)):
        if read is None:
            windows.append(value)
            continue
        first, size = read.row_map.first(start), read.row_map.size(count)
        fill = outside(value) if read.fill is None else read.fill
        window = rows_of(value, read.axis, first, size, fill)
        if i in case.op.drivers:
            rows = np.arange(first, first + size)
            kept = (rows >= own[0]) & (rows < own[1])
            window = np.where(
                along(read.axis, value.ndim, kept), window, np.asarray(fill, value.dtype)
            )
        windows.append(window)
    return windows


def assert_close(found, expected, message):
    __tracebackhide__ = True
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype, f"{message}: {found.dtype} is not {expected.dtype}"
    if not is_inexact(expected):
        np.testing.assert_array_equal(found, expected, message)
        return
    scale = np.max(np.abs(expected[np.isfinite(expected)]), initial=1e-300)
    tolerance = TOLERANCE if expected.dtype.itemsize >= 8 else 1e-5
    np.testing.assert_allclose(found, expected, 0, tolerance * scale, err_msg=message)


# --- The receptive field -------------------------------------------------------------------------


def disturbances(value, generator, *, not_finite):
    """Other values for an operand: near, far, and not finite."""
    shape, dtype = value.shape, value.dtype
    if dtype == np.bool_:
        return [~value]
    if not is_inexact(value):
        drawn = [generator.integers(0, high, shape).astype(dtype) for high in (6, 50, 100)]
        return [*drawn, *(np.full(shape, end(dtype)) for end in (lowest, highest))]
    noise = generator.standard_normal(shape)
    values = [-value, value + noise, np.full(shape, 1e3) + noise, np.full(shape, -1e3) + noise]
    values += [np.full(shape, np.nan)] * not_finite
    return [v.astype(dtype) for v in values]


def changed_rows(found, expected, axis):
    """Which rows of an output differ."""
    same = found == expected
    if is_inexact(found):  # loops until all elements converge give neighbours another rounding
        same = np.isclose(found, expected, 1e-9, 0, equal_nan=True)
    return ~np.all(same, axis=tuple(a for a in range(found.ndim) if a != axis))


def measured(case, operand):
    """[output rows, rows of the operand]: which rows change when one of the operand does."""
    op, values = case.op, case.values
    value, axis = values[operand], op.reads[operand].axis
    generator = np.random.default_rng(0)
    depends = np.zeros((op.height, value.shape[axis]), bool)
    for draw in range(8 if case.chooses else 1):
        values = case.values
        if draw:
            values = [generator.standard_normal(v.shape).astype(v.dtype) for v in values]
            value = values[operand]
        before = [np.asarray(out) for out in case.whole(*values)]
        # NaN times the zeros of a banded matrix is NaN in column.
        others = disturbances(value, generator, not_finite=case.primitive != "dot_general")
        for row in range(value.shape[axis]):
            chosen = along(axis, value.ndim, np.arange(value.shape[axis]) == row)
            for other in others:
                values[operand] = np.where(chosen, other, value)
                after = case.whole(*values)
                for a, b, out_axis in zip(after, before, op.out_axes, strict=True):
                    depends[:, row] |= changed_rows(np.asarray(a), b, out_axis)
    return depends


@pytest.mark.parametrize("name", SAMPLED_NAMES)
def test_declared_rows_are_the_receptive_field(name):
    """Never more is needed than declared, and nothing is declared in vain (but for bands and for
    windows that are dilated on both sides, where the rows of an interval are too many)."""
    for case in cases_of(name):
        op = case.op
        if op.reduction is not None:
            continue
        for out, axis in zip(case.outputs, op.out_axes, strict=True):
            assert out.shape[axis] == op.height, case
        for i, read in enumerate(op.reads):
            if read is None:
                continue
            depends, height = measured(case, i), case.values[i].shape[read.axis]
            for row in range(op.height):
                first, end = read.row_map.first(row), read.row_map.end(row + 1)
                low, high = max(first, 0), min(end, height)
                (needed,) = np.nonzero(depends[row])
                message = f"{case}: output row {row} declares [{low}, {high}) of operand {i}"
                assert set(needed) <= set(range(low, high)), f"{message}, depends on {needed}"
                is_cut = (first, end) != (low, high)
                # A window of one row leaves no choice.
                is_least = case.least == "always" or (case.least == "inside" and not is_cut)
                if is_least and high - low > case.chooses:
                    assert needed.size, f"{message}, depends on none"
                    assert (needed[0], needed[-1] + 1) == (low, high), f"{message}, needs {needed}"


# --- Blocks --------------------------------------------------------------------------------------


def block_size(case):
    """Rows of a block: as many as there are, where one compiled operation then serves for both."""
    step = quantum(case.op)
    if all(read is None or read.row_map == IDENTITY for read in case.op.reads):
        return case.op.height
    return step * -(-3 // step)


def owned_blocks(case):
    """Blocks that share out the rows of a reduction; most compute rows that others own too."""
    step, height = quantum(case.op), case.op.height
    size = block_size(case)
    own = max(size // 2 // step, 1) * step
    for low in range(0, height, own):
        yield low + own - size, size, (low, low + own)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_slices(name):
    """Whatever rows outside the image hold, NaN included, rows inside are column's.

    Blocks begin below zero and end beyond the height; in one all rows are outside.
    """
    for case in cases_of(name):
        op, step, count = case.op, quantum(case.op), block_size(case)
        if op.reduction is not None:
            assert_partial_results_combine(case)
            continue
        last = op.height // step * step
        for start in dict.fromkeys((-2 * count, step - count, 0, step, last - step, last)):
            found = op.evaluate(windows_of(case, start, count, garbage), Rows(start, count))
            assert_rows(found, case, start, count, range(len(found)))


def assert_partial_results_combine(case):
    combine, op = _COMBINE[case.op.reduction], case.op
    totals = [np.asarray(identity_of(op.reduction, o.dtype), o.dtype) for o in case.outputs]
    for start, size, own in owned_blocks(case):
        partial = op.evaluate(windows_of(case, start, size, garbage, own), Rows(start, size))
        totals = [combine(total, part) for total, part in zip(totals, partial, strict=True)]
    for total, out in zip(totals, case.outputs, strict=True):
        assert_close(total, out, str(case))


def assert_rows(found, case, start, count, numbers):
    """Rows of some of the outputs; those outside the image may be anything."""
    low, high = max(start, 0), min(start + count, case.op.height)
    for block, j in zip(found, numbers, strict=True):
        out, axis = case.outputs[j], case.op.out_axes[j]
        shape = tuple(count if a == axis else s for a, s in enumerate(out.shape))
        assert block.shape == shape, f"{case}: a block of shape {block.shape}, not {shape}"
        if low < high:
            cut = (slice(None),) * axis
            rows = np.asarray(block)[(*cut, slice(low - start, high - start))]
            assert_close(rows, out[(*cut, slice(low, high))], f"{case}: rows {low} to {high}")


# --- Gradients -----------------------------------------------------------------------------------


def pull_back(function, values, moving, cotangents, wanted):
    """Some outputs, and their gradients with respect to some operands."""

    def of_moving(*xs):
        full = list(values)
        for i, x in zip(moving, xs, strict=True):
            full[i] = x
        found = function(*full)
        return [found[j] for j in wanted]

    outputs, pull = jax.vjp(of_moving, *(values[i] for i in moving))
    return outputs, [np.asarray(bar) for bar in pull(list(cotangents))]


def moving_and_wanted(case):
    """Numbers of the operands and outputs that a gradient may be taken of."""
    operands = case.equation.operands
    moving = [i for i, x in enumerate(operands) if is_inexact(x) and x.constant is None]
    wanted = [j for j, out in enumerate(case.outputs) if is_inexact(out)]
    return moving, wanted


@functools.cache
def whole_gradient(case):
    """Cotangents and gradients of the plain primitive, None where it has no gradient."""
    moving, wanted = moving_and_wanted(case)
    generator = np.random.default_rng(7)
    cts = []
    for j in wanted:
        out = case.outputs[j]
        ct = generator.standard_normal(out.shape)
        ct = ct + 1j * generator.standard_normal(out.shape) if np.iscomplexobj(out) else ct
        cts.append(ct.astype(out.dtype))
    if not moving or not wanted:
        return None
    try:
        return cts, pull_back(case.whole, case.values, moving, cts, wanted)[1]
    except (NotImplementedError, ValueError, TypeError):
        return None


def is_sampled_out(case, number):
    """A third of all windows is enough, whose many geometries differ in their row maps alone."""
    name = case.primitive
    is_window = "conv" in name or "window" in name or name.startswith("select_and")
    return is_window and number % 3 > 0


def finite_outside(case):
    """What rows outside the image hold in a step that is differentiated."""
    number = 3.5 if case.op.preserves_finiteness else 1
    return lambda value: number if is_inexact(value) else 0


@pytest.mark.parametrize("name", SAMPLED_NAMES)
def test_gradients_of_blocks_add_up(name):
    """Also those of what has no rows, which are sums over rows outside the image too.

    Such rows hold 1 where finiteness is not preserved, as they do in a step that is differentiated,
    and another number where it is.
    """
    for number, case in enumerate(cases_of(name)):
        if is_sampled_out(case, number) or case.op.reduction not in (None, "sum"):
            continue
        if whole_gradient(case) is not None:
            assert_gradients_add_up(case)


def assert_gradients_add_up(case):
    op, (moving, wanted) = case.op, moving_and_wanted(case)
    cts, expected = whole_gradient(case)
    step, size = quantum(op), block_size(case)
    tiles = [(start, size, None) for start in range(step - size, op.height, size)]
    sums = [np.zeros(value.shape, value.dtype) for value in expected]
    for start, count, own in tiles if op.reduction is None else owned_blocks(case):
        windows = windows_of(case, start, count, finite_outside(case), own or EVERY_ROW)
        evaluate = functools.partial(evaluate_block, op, Rows(start, count, True))
        block_cts = cts
        if own is None:
            axes = [op.out_axes[j] for j in wanted]
            block_cts = [rows_of(ct, a, start, count, 0) for ct, a in zip(cts, axes, strict=True)]
        found, bars = pull_back(evaluate, windows, moving, block_cts, wanted)
        if own is None:
            assert_rows(found, case, start, count, wanted)
        for total, bar, i in zip(sums, bars, moving, strict=True):
            add_rows(total, bar, op.reads[i], start, own if i in op.drivers else None)
    for total, bar, i in zip(sums, expected, moving, strict=True):
        assert_close(total, bar, f"{case}: gradient of operand {i}")


def evaluate_block(op, rows, *windows):
    return op.evaluate(windows, rows)


def add_rows(total, bar, read, start, own):
    """Add a window's gradient to its rows of the whole; rows outside are dropped, as are those of
    a reduction's driver that another block owns."""
    if read is None:
        total += bar
        return
    first, cut = read.row_map.first(start), (slice(None),) * read.axis
    low, high = own or EVERY_ROW
    low, high = max(first, low), min(first + bar.shape[read.axis], total.shape[read.axis], high)
    if low < high:
        total[(*cut, slice(low, high))] += bar[(*cut, slice(low - first, high - first))]


# --- Declarations --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_finiteness_is_preserved(name):
    """Large, small and equal operands give finite values and derivatives, whatever indices are."""
    for number, case in enumerate(cases_of(name)):
        moving, wanted = moving_and_wanted(case)
        if not case.op.preserves_finiteness or not moving or not all(map(is_finite, case.outputs)):
            continue
        if is_sampled_out(case, number):
            continue
        noise = np.random.default_rng(3)
        for scale, shift in ((100.0, 0.0), (0.0, 0.0), (0.0, 1.0), (1.0, -3.0)):
            values = case.values
            for i, read in enumerate(case.op.reads):
                if read is not None and not is_inexact(values[i]):
                    values[i] = np.full_like(values[i], garbage(values[i]))
            for i in moving:
                drawn = scale * noise.standard_normal(values[i].shape) + shift
                values[i] = np.asarray(drawn, values[i].dtype)
            outputs = [np.asarray(out) for out in case.whole(*values)]
            assert all(map(is_finite, outputs)), f"{case}: {scale}, {shift}"
            if not wanted or whole_gradient(case) is None:
                continue
            cts = [np.ones(outputs[j].shape, outputs[j].dtype) for j in wanted]
            _, bars = pull_back(case.whole, values, moving, cts, wanted)
            assert all(map(is_finite, bars)), f"{case}: derivative at {scale}, {shift}"


@pytest.mark.parametrize("name", NAMES)
def test_rows_depend_on_their_numbers_only_where_declared(name):
    """The same windows give the same rows anywhere, unless the rule is positional."""
    for case in cases_of(name):
        op = case.op
        if op.reduction is not None:
            continue
        count, step = block_size(case), quantum(op)
        last = (op.height - 1) // step * step
        windows = windows_of(case, 0, count, garbage)
        here, there = (op.evaluate(windows, Rows(start, count)) for start in (0, last))
        same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(here, there, strict=True))
        assert same or op.is_positional, f"{case}: depends on row numbers"
        # Rows that a constant picks at even distances are summed alike.
        assert not (same and op.is_positional) or case.least == "never", f"{case}: does not"
