"""Stages on hand-made programs: what crosses a barrier, and what is done again behind it."""

import dataclasses
import math

import pytest

from lrjax.rowgraph.stages import Operation, Problem, cut_into_stages


class Program:
    """Values are numbered as they are made; 0 is the input."""

    def __init__(self, **known):
        self.operations, self.size, self.count, self.known = [], {}, 0, known

    def rows(self, *inputs, size=100, flops=10.0):
        self.count += 1
        self.size[self.count] = size
        self.operations.append(Operation(inputs, (self.count,), True, False, flops))
        return self.count

    def reduction(self, *inputs):
        self.count += 1
        self.operations.append(Operation(inputs, (self.count,), True, True, 10.0))
        return self.count

    def column(self, *inputs):
        self.count += 1
        self.operations.append(Operation(inputs, (self.count,), False, False, 0.0))
        return self.count

    def problem(self, *outputs):
        return Problem(tuple(self.operations), frozenset(outputs), self.size, **self.known)


CONV = 1e6  # operations of a convolution that is dear at any exchange rate


def normalised(program, value, size=100):
    """BatchNorm and ReLU."""
    total = program.reduction(value)
    scaled = program.rows(value, total, size=size)
    return program.rows(scaled, size=size)


def test_a_convolution_is_held_and_the_maps_made_from_it_are_not():
    program = Program()
    convolved = program.rows(0, flops=CONV)
    rectified = normalised(program, convolved)
    again = program.rows(rectified, flops=CONV)
    out = normalised(program, again)
    stages = cut_into_stages(program.problem(out))
    assert stages.crossing == ({convolved}, {again}, frozenset())
    assert stages.made_whole == ({convolved}, {again}, {out})


def test_a_narrow_map_is_held_instead_of_the_wide_one_made_from_it():
    program = Program()
    narrow = program.rows(0, size=10, flops=CONV)
    wide = program.rows(narrow, size=100, flops=500)
    out = normalised(program, wide)
    stages = cut_into_stages(program.problem(out))
    assert stages.crossing[0] == {narrow}
    assert stages.members[1] == (1, 3, 4)  # the wide map again, scaled and rectified


def test_dear_operations_are_not_done_again_for_little():
    program = Program()
    narrow = program.rows(0, size=10, flops=CONV)
    wide = program.rows(narrow, size=100, flops=CONV)
    out = normalised(program, wide)
    assert cut_into_stages(program.problem(out)).crossing[0] == {wide}


def test_a_budget_makes_memory_dear():
    program = Program()
    narrow = program.rows(0, size=10, flops=CONV)
    wide = program.rows(narrow, size=100, flops=100 * 100.0)
    total = program.reduction(wide)
    problem = program.problem(program.reduction(program.rows(wide, total, size=0)))
    assert cut_into_stages(problem).crossing[0] == {wide}
    assert cut_into_stages(problem, budget=50).crossing[0] == {narrow}
    counted = dataclasses.replace(problem, input_size={0: 45})
    assert cut_into_stages(counted, budget=105).crossing[0] == {wide}, "the input is dead by then"


def test_a_budget_that_cannot_be_met_takes_one_cut_a_boundary():
    program = Program()
    value = 0
    for _ in range(3):
        value = normalised(program, program.rows(value, flops=CONV))
    problem = program.problem(value)
    least = cut_into_stages(problem, budget=-1)
    cuts = problem.boundaries.cuts.cheapest.cache_info().misses
    assert cuts == len(least.members) - 1 == 3
    dearest = dataclasses.replace(problem)
    assert cut_into_stages(dearest, budget=0) == least


def test_inputs_count_while_they_are_read():
    program = Program()
    narrow = program.rows(0, size=10, flops=CONV)
    wide = program.rows(narrow, size=100, flops=100 * 100.0)
    total = program.reduction(wide)
    problem = program.problem(program.reduction(program.rows(wide, total, 0, size=0)))
    counted = dataclasses.replace(problem, input_size={0: 45})
    assert cut_into_stages(counted, budget=105).crossing[0] == {narrow}


def test_what_is_needed_late_is_made_late():
    program = Program()
    first = program.rows(0)
    total = program.reduction(first)
    late = program.rows(0, size=1)
    out = program.rows(late, total)
    stages = cut_into_stages(program.problem(out))
    assert stages.home[2] == 1
    assert stages.crossing[0] == frozenset()


def test_outputs_exist_whole_at_no_cost():
    program = Program()
    wide = program.rows(0, size=1000)
    total = program.reduction(wide)
    scaled = program.rows(wide, total)
    stages = cut_into_stages(program.problem(wide, scaled))
    assert stages.crossing[0] == {wide}
    assert stages.members[1] == (2,)
    assert stages.made_whole == ({wide}, {scaled})


def test_column_operations_find_their_maps_whole():
    program = Program()
    cheap = program.rows(0)
    sorted_rows = program.column(cheap)
    out = program.rows(sorted_rows)
    stages = cut_into_stages(program.problem(out))
    assert stages.home == (0, 1, 1)
    assert stages.crossing[0] == {cheap}
    assert stages.members == ((0,), (2,))


def test_pinned_values_do_not_cross():
    program = Program()
    convolved = program.rows(0, flops=CONV)
    out = normalised(program, convolved)
    problem = dataclasses.replace(program.problem(out), pinned={0: {convolved}})
    stages = cut_into_stages(problem)
    assert stages.crossing[0] == frozenset()
    assert stages.members[1] == (0, 2, 3)


def test_an_effect_is_not_repeated():
    program = Program()
    effect = program.rows(0, size=10**9, flops=math.inf)
    out = normalised(program, effect)
    stages = cut_into_stages(program.problem(out), budget=0)
    assert stages.crossing[0] == {effect}


def test_inputs_that_come_late():
    program = Program(available={-1: 2})
    value = program.rows(0, size=1)
    out = program.rows(value, -1)
    stages = cut_into_stages(program.problem(out))
    assert stages.home == (2, 2)
    assert stages.crossing == (frozenset(),) * 3


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_every_stage_can_compute_what_it_gives(depth):
    program = Program()
    value = 0
    for width in range(depth):
        value = normalised(program, program.rows(value, size=10 * (1 + width % 3), flops=CONV))
    problem = program.problem(value)
    for budget in (math.inf, 30, 0):
        stages = cut_into_stages(problem, budget)
        whole: set[int] = set()
        last_crossing: frozenset[int] = frozenset()
        for members, made, crossing in zip(
            stages.members, stages.made_whole, stages.crossing, strict=True
        ):
            known = {v for v in whole | {0} if v not in problem.size or v in last_crossing}
            for i in members:
                operation = problem.operations[i]
                assert known.issuperset(operation.inputs)
                known.update(v for v in operation.outputs if v in problem.size)
                whole.update(v for v in operation.outputs if v not in problem.size)
            assert known.issuperset(made)
            whole |= made
            last_crossing = crossing


def test_nothing_made_by_rows_is_used():
    program = Program()
    program.column(0)
    problem = dataclasses.replace(program.problem(1), size={7: 100})  # what only dead code read
    assert cut_into_stages(problem).made_whole == (frozenset(),)
