"""Groups of segments under one checkpoint, within each other: searched, saved, run."""

import dataclasses
import json

import jax
import pytest
from networks import arguments, logits, structs

import lrjax
from lrjax.groups import leaves, outermost, tree_of
from lrjax.plan import Choice
from lrjax.planner.candidates import CHECKPOINT, COLUMN, GROUP, Kind
from lrjax.planner.groups import groups
from lrjax.planner.model import Step
from lrjax.planner.problem import problem_of
from lrjax.planner.proof import Prover
from lrjax.planner.search import Limits, search
from lrjax.testing import assert_same_as_column

KINDS = (Kind.of(COLUMN), Kind.of(CHECKPOINT), GROUP)


@pytest.mark.parametrize(
    ("ranges", "tree"),
    [
        ([], (0, 1, 2, 3)),
        ([(0, 2)], ((0, 1), 2, 3)),
        ([(0, 3), (1, 3)], ((0, (1, 2)), 3)),
        ([(1, 2), (0, 2), (2, 4)], ((0, (1,)), (2, 3))),
    ],
)
def test_trees(ranges, tree):
    assert tree_of(ranges, 4) == tree
    assert leaves(tree) == [0, 1, 2, 3]
    assert [leaf for group in outermost(tree) for leaf in group] == [0, 1, 2, 3]


@pytest.mark.parametrize("ranges", [[(0, 5)], [(0, 2), (1, 3)], [(2, 2)], [(3, 1)], [(-1, 2)]])
def test_groups_that_are_none_are_refused(ranges):
    with pytest.raises(ValueError, match="none of 4 segments, or overlaps"):
        tree_of(ranges, 4)


@pytest.fixture(scope="module")
def model():
    args = structs(1024, 64, convolutions=3)
    return Prover(problem_of(logits, args, (None, 1), "h200", None)).model


def every_chain(start, stop, depth):
    """All ways to run a span by whole maps, in groups of so many within each other."""
    if start == stop:
        return [()]
    found = []
    for middle in range(start + 1, stop + 1):
        first = [Step(start, middle, choice) for choice in (COLUMN, CHECKPOINT)]
        if depth:
            inner = every_chain(start, middle, depth - 1)
            first += [Step(start, middle, CHECKPOINT, inner=s) for s in inner if len(s) > 1]
        found += [(f, *rest) for f in first for rest in every_chain(middle, stop, depth)]
    return found


def test_the_search_is_near_every_way_to_nest(model):
    last = model.candidates.last
    assert last == 5
    every = [(model.peak_bytes(s), model.seconds(*s)) for s in every_chain(0, last, 2)]
    plain = [(model.peak_bytes(s), model.seconds(*s)) for s in every_chain(0, last, 0)]
    peak = model.peak_bytes(model.column)
    faster = 0
    for part in (0.55, 0.65, 0.75, 0.85):
        found = search(model, Limits(part * peak, kinds=KINDS))
        best, alone = (
            min((seconds for own, seconds in ways if own <= part * peak), default=None)
            for ways in (every, plain)
        )
        assert (found is None) == (best is None)
        if found is not None:
            assert model.peak_bytes(found) <= part * peak
            # Chains that need less than a twentieth more than another are not kept.
            assert best <= model.seconds(*found) * (1 + 1e-9)
            assert model.seconds(*found) <= 1.1 * best
            faster += alone is None or best < alone
    assert faster


def test_a_group_costs_another_forward_pass(model):
    last = model.candidates.last
    inner = (Step(0, 2, CHECKPOINT), Step(2, 4, CHECKPOINT))
    flat, nested = (*inner, Step(4, last, COLUMN)), Step(0, 4, CHECKPOINT, inner=inner)
    forward = model.operations(Step(0, 4, CHECKPOINT)) - model.operations(Step(0, 4, COLUMN))
    steps = (nested, flat[-1])
    assert model.operations(*steps) == pytest.approx(model.operations(*flat) + forward)
    assert model.saved_bytes(nested) < sum(map(model.saved_bytes, inner))
    assert model.seconds(*steps) > model.seconds(*flat)
    model.learn_seconds(steps, 2 * model.seconds(*steps))
    assert nested.kind == GROUP
    assert str(nested.kind) == "checkpoint (group)"


def test_no_groups_where_the_compiler_keeps_what_is_done_again(model):
    assert groups(model, KINDS[:2], 1e12) == []
    on_cpu = Prover(problem_of(logits, structs(), (None, 1), "cpu", None)).model
    assert groups(on_cpu, KINDS, 1e12) == []


# --- As plans ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nested():
    """A group within a group, around segments by rows and by whole maps."""
    with jax.enable_x64(True):
        prover = Prover(problem_of(logits, structs(), (None, 1), "cpu", None))
        inner = (Step(0, 1, Choice("column")), Step(1, 2, Choice("stream", 4)))
        outer = (Step(0, 2, CHECKPOINT, inner=inner), Step(2, 3, Choice("selective")))
        last = Step(3, prover.model.candidates.last, Choice("selective-narrow"))
        steps = (Step(0, 3, CHECKPOINT, inner=outer), last)
        return prover.plan(steps, 2**30)


def test_a_plan_of_groups_is_column(nested, x64):
    assert nested.groups == ((0, 3), (0, 2))
    assert [s.choice.strategy.name for s in nested.segments] == [
        *("column", "stream", "selective", "selective-narrow")
    ]
    assert_same_as_column(logits, arguments(), (None, 1), plan=nested)


def test_maps_within_a_group_are_not_kept(nested, x64):
    def saved_bytes(plan):
        fun = lrjax.rowwise(logits, in_axes=(None, 1), plan=plan)
        _, pull = jax.eval_shape(lambda *args: jax.vjp(fun, *args), *arguments())
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    inner = dataclasses.replace(nested, groups=nested.groups[1:])
    alone = dataclasses.replace(nested, groups=())
    assert saved_bytes(nested) < saved_bytes(inner) < saved_bytes(alone)


def test_it_survives_text_and_is_printed(nested, x64):
    assert lrjax.Plan.from_json(nested.to_json()) == nested
    assert "segments 0 to 2: a group, run again before its backward pass" in str(nested)
    told = lrjax.explain(logits, *structs(), in_axes=(None, 1), plan=nested)
    assert [segment.group for segment in told.segments] == [(0, 1, 2)] * 3 + [(3,)]


@pytest.mark.parametrize("groups", [[[0, 5]], [[0, 2], [1, 3]], [["a", 2]], "03", [[1]], [3]])
def test_damaged_groups_are_refused(nested, groups):
    text = json.dumps(json.loads(nested.to_json()) | {"groups": groups})
    with pytest.raises(ValueError, match="is damaged"):
        lrjax.Plan.from_json(text)
