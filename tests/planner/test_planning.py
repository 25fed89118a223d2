"""Budgets in, plans out: searched, compiled for this CPU, and refused where they must be."""

import dataclasses
import itertools
import math
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import arguments, features, logits, structs

import lrjax
from lrjax import memory
from lrjax.plan import Choice
from lrjax.planner import frontier, proof
from lrjax.planner.budget import parse_budget
from lrjax.planner.candidates import COLUMN, Candidates, Kind
from lrjax.planner.places import MOST_CUTS
from lrjax.planner.problem import problem_of
from lrjax.planner.proof import Proof, Prover
from lrjax.planner.search import Limits, Step, neighbours, search
from lrjax.strategies import Checkpoint, Column
from lrjax.testing import assert_same_as_column

pytestmark = pytest.mark.users_compiler

MIB = 2**20
ARGS = structs(512, 64)


def plan_for(budget, fun=logits, args=ARGS, **options):
    return lrjax.plan(fun, *args, in_axes=(None, 1), budget=budget, target="cpu", **options)


def peak_of(fun, args):
    def loss(params, images):
        return jnp.mean(jnp.square(fun(params, images)))

    return memory.peak_bytes(memory.compile_for(jax.grad(loss), *args, target="cpu"))


@pytest.fixture(scope="module")
def column_peak():
    return peak_of(logits, ARGS)


def test_at_columns_own_peak_the_plan_is_column(column_peak):
    plan = plan_for(column_peak)
    assert plan.is_column
    assert plan.verified_peak_bytes == column_peak
    assert plan.operations == 1


def test_less_memory_takes_longer_and_fits(column_peak):
    seen = []
    plans = [plan_for(int(column_peak * part), on_progress=seen.append) for part in (0.6, 1.0)]
    for plan in plans:
        by_rows = lrjax.rowwise(logits, in_axes=(None, 1), plan=plan)
        assert peak_of(by_rows, ARGS) == plan.verified_peak_bytes <= plan.budget_bytes
    seconds = [plan.seconds for plan in plans]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[1]
    assert not plans[0].is_column
    counts = [progress.compilations for progress in seen if progress.strategies]
    assert counts == sorted(counts)
    assert [progress.doing for progress in seen[:3]] == ["tracing", "searching", "compiling"]
    assert seen[2].verified_bytes is None
    assert seen[2].predicted_bytes > 0
    assert seen[3].doing == "compiled"
    assert seen[3].verified_bytes > 0


def test_the_default_target_is_the_device_at_hand():
    own, named = (
        lrjax.plan(logits, *ARGS, in_axes=(None, 1), budget="1TiB", target=target)
        for target in (None, "cpu")
    )
    assert own.target is None
    assert own.is_column
    assert own.verified_peak_bytes == named.verified_peak_bytes


def test_a_searched_plan_computes_what_column_does(column_peak, x64):
    args = arguments(128, 32, convolutions=2)
    peak = peak_of(features, args)
    plan = plan_for(int(0.6 * peak), features, args)
    assert not plan.is_column
    assert_same_as_column(features, args, (None, 1), plan=plan)


def test_too_small_a_budget_names_the_smallest_that_works():
    floor = problem_of(logits, ARGS, (None, 1), "cpu", None).fixed_bytes
    with pytest.raises(lrjax.BudgetTooSmallError, match="arguments and gradients alone take"):
        plan_for(floor)
    with pytest.raises(lrjax.BudgetTooSmallError, match="smallest budget that works") as error:
        plan_for(floor + 4096)
    smallest = error.value.smallest_bytes
    assert plan_for(smallest).verified_peak_bytes <= smallest


# --- A compiler that finds no room, as a TPU's ----------------------------------------------------


def refuse(monkeypatch, is_refused):
    """A compiler that finds no room where ``is_refused(number of the program)``."""
    compile_for, count = memory.compile_for, itertools.count()

    def compile_some(*args, **options):
        if is_refused(next(count)):
            raise memory.DoesNotFitError("no room")
        return compile_for(*args, **options)

    monkeypatch.setattr(memory, "compile_for", compile_some)
    monkeypatch.setattr(memory, "device_memory_bytes", lambda target: 12 * MIB)
    monkeypatch.setattr(proof, "_PROVERS", OrderedDict())


def test_a_prediction_is_no_proof(monkeypatch, column_peak):
    refuse(monkeypatch, lambda number: number == 0)
    plan = plan_for(10 * column_peak)
    assert not plan.is_column
    assert plan.verified_peak_bytes <= 12 * MIB < column_peak


def test_the_search_ends_where_the_devices_memory_is_unknown(monkeypatch, column_peak):
    """A refused plan's peak is then its prediction, which may be within the budget."""
    refuse(monkeypatch, lambda number: True)
    monkeypatch.setattr(memory, "device_memory_bytes", lambda target: None)
    with pytest.raises(lrjax.BudgetTooSmallError, match="no room for any plan on cpu"):
        plan_for(10 * column_peak)


def test_no_room_for_any_plan_is_said(monkeypatch, column_peak):
    refuse(monkeypatch, lambda number: True)
    with pytest.raises(lrjax.BudgetTooSmallError, match="no room for any plan on cpu") as error:
        plan_for(10 * column_peak)
    assert error.value.smallest_bytes is None
    with pytest.raises(lrjax.BudgetTooSmallError, match="no room for any plan on cpu"):
        lrjax.frontier(logits, *ARGS, in_axes=(None, 1), target="cpu", steps=2)


@pytest.mark.slow
def test_the_curve_says_that_columns_peak_is_a_prediction(monkeypatch):
    refuse(monkeypatch, lambda number: number == 0)
    curve = lrjax.frontier(logits, *ARGS, in_axes=(None, 1), target="cpu", steps=2)
    column, *others = curve.points
    assert column.detail == "no room; predicted"
    assert column.plan.verified_peak_bytes is None
    assert all(point.detail != column.detail for point in others)
    assert all(not point.plan.is_column for point in curve.of("lrjax"))


@pytest.mark.slow
def test_a_curve_from_less_than_any_plan_takes():
    """So low may column's peak be predicted, where it does not compile."""
    prover = Prover(problem_of(logits, ARGS, (None, 1), "cpu", None))
    points = frontier._curve(prover, Limits(math.inf), 1000, 3, "lrjax", lambda progress: None)
    assert [point.peak_bytes <= point.budget_bytes for point in points] == [True] * 3


# --- How long it tries, with proofs made up -------------------------------------------------------


def prover_with(monkeypatch, proof_of):
    """A prover whose compiler answers with a peak and seconds over the predicted ones."""
    prover = Prover(problem_of(logits, ARGS, (None, 1), "h200", None))
    model = prover.model

    def compiled(steps):
        peak, seconds = proof_of(steps)
        predicted, time = int(model.peak_bytes(steps)), model.seconds(*steps)
        return Proof(int(peak * predicted), predicted, time, seconds * time)

    monkeypatch.setattr(prover, "compiled", compiled)
    budget = int(0.6 * model.peak_bytes(model.column))
    return prover, Limits(budget)


def fastest(prover, limits):
    return prover.fastest(limits, 8, lambda progress: None)


@pytest.mark.parametrize("error", [0.7, 1.0, 1.3, 2.0])
def test_few_compilations_whatever_the_predictions_error(monkeypatch, error):
    prover, limits = prover_with(monkeypatch, lambda steps: (error, 1.0))
    found = fastest(prover, limits)
    assert prover.proofs[found].peak <= limits.budget
    assert prover.compilations <= 4 + (error == 2.0)  # column too, which everybody knows


def test_simple_plans_stand_in_where_searched_ones_do_not_fit(monkeypatch):
    def proof_of(steps):
        return (1.0 if steps in prover.model.simple_plans else 9.0), 1.0

    prover, limits = prover_with(monkeypatch, proof_of)
    found = fastest(prover, limits)
    fitting = [s for s in prover.model.simple_plans if prover.model.peak_bytes(s) <= limits.budget]
    assert found in fitting
    assert prover.compilations <= 9


def is_hard_to_predict(steps):
    return any(step.kind.is_group or step.kind.offload for step in steps)


def test_plans_that_are_easy_to_predict_are_tried_too_where_others_fit_only_if_slow(monkeypatch):
    prover, _ = prover_with(
        monkeypatch, lambda steps: (3.0 if is_hard_to_predict(steps) else 1.0, 1.0)
    )
    limits = Limits(0.4 * prover.model.peak_bytes(prover.model.column))
    hoped = search(prover.model, limits)
    assert is_hard_to_predict(hoped)
    found = fastest(prover, limits)
    easy = search(prover.model, limits.plain)
    assert prover.fits(found, limits.budget)
    assert prover.proofs[found].seconds <= 1.02 * prover.model.seconds(*easy)


@pytest.mark.parametrize(("used", "is_roomy"), [(0.95, False), (0.8, True)])
def test_where_much_of_the_budget_is_left_others_are_tried_too(monkeypatch, used, is_roomy):
    prover, _ = prover_with(monkeypatch, lambda steps: (1.0, 1.0))
    known = prover.model.simple_plans[-1]
    peak = prover.verify(known, lambda progress: None).peak
    limits = Limits(peak / used)
    assert prover.best_known(limits) == known
    assert prover.has_more_to_hope_for(limits) == is_roomy


@pytest.mark.parametrize(
    ("predicted", "read", "is_disappointed"),
    [
        (0.5, 0.5, True),
        (0.5, 0.98, False),
        (0.5, None, True),
        (0.98, 0.5, True),
        (0.98, 0.98, False),
    ],
)
def test_what_missed_is_mourned_where_it_was_much_faster(
    monkeypatch, predicted, read, is_disappointed
):
    """As its program says, where that was read; as was predicted where it was not."""
    prover, _ = prover_with(monkeypatch, lambda steps: (1.0, 1.0))
    fits, missed = prover.model.column, prover.model.simple_plans[-1]
    prover.proofs[fits] = Proof(90, 90, 1.0, 1.0)
    prover.proofs[missed] = Proof(110, 90, predicted, read)
    assert prover.is_disappointed(Limits(100)) == is_disappointed


def test_plans_that_are_easy_to_predict_are_tried_too_where_others_leave_memory(monkeypatch):
    prover, _ = prover_with(
        monkeypatch, lambda steps: (3.0 if is_hard_to_predict(steps) else 1.0, 1.0)
    )
    monkeypatch.setattr(Prover, "is_disappointed", lambda self, limits: False)
    limits = Limits(0.4 * prover.model.peak_bytes(prover.model.column))
    found = fastest(prover, limits)
    easy = search(prover.model, limits.plain)
    assert prover.fits(found, limits.budget)
    assert prover.proofs[found].seconds <= 1.02 * prover.model.seconds(*easy)


@pytest.mark.parametrize("part", [0.22, 0.4])
def test_plans_that_are_easy_to_predict_stand_in_for_those_that_are_not(monkeypatch, part):
    """Neither the smallest one nor a simple one: the fastest of those that are predicted well."""

    def proof_of(steps):
        is_far_off = is_hard_to_predict(steps) or steps in prover.model.simple_plans
        return (9.0 if is_far_off else 1.0), 1.0

    prover, _ = prover_with(monkeypatch, proof_of)
    limits = Limits(part * prover.model.peak_bytes(prover.model.column))
    assert is_hard_to_predict(search(prover.model, limits))
    found = fastest(prover, limits)
    assert found == search(prover.model, limits.plain)
    assert prover.proofs[found].peak <= limits.budget


@pytest.mark.parametrize(("used", "is_tried"), [(0.5, True), (0.95, False)])
def test_what_seems_slightly_slower_than_an_earlier_budgets_plan_is_tried(
    monkeypatch, used, is_tried
):
    """Where that one leaves much memory: a plan by itself would be found, and be faster."""
    prover, limits = prover_with(monkeypatch, lambda steps: (1.0, 1.0))
    found, column = search(prover.model, limits), prover.model.column
    earlier = next(s for s in prover.model.simple_plans if s not in (found, column))
    seconds = prover.model.seconds(*found)
    at = Proof(int(used * limits.budget), 1, seconds, seconds / 1.03)
    prover.proofs[earlier] = at
    learn = dataclasses.replace(at, peak=int(limits.budget), roofline_seconds=seconds / 1.1)
    monkeypatch.setattr(
        prover,
        "compiled",
        lambda steps: (
            learn if steps == found else dataclasses.replace(learn, peak=2 * int(limits.budget))
        ),
    )
    assert (fastest(prover, limits) == found) == is_tried


def test_what_is_next_to_the_best_plan_is_tried(monkeypatch):
    """A stream's peak is predicted too high: fewer blocks, with more rows each, fit as well."""
    prover, _ = prover_with(monkeypatch, lambda steps: (0.6, 1.0))
    counts = (16, 8)
    slow, fast = (
        next(
            steps
            for steps in prover.model.simple_plans
            if steps[0].choice.strategy.name == "stream" and steps[0].choice.num_blocks == count
        )
        for count in counts
    )
    assert fast in neighbours(prover.model, slow)
    prover.verify(slow, lambda progress: None)
    limits = Limits(0.61 * prover.model.peak_bytes(fast))
    prover.polish(limits, lambda progress: None)
    found = prover.best_known(limits)
    assert found != slow
    assert prover.proofs[found].seconds < 0.98 * prover.proofs[slow].seconds


def test_the_smallest_plan_is_no_misprediction(monkeypatch):
    prover, limits = prover_with(
        monkeypatch, lambda steps: (4.0 if is_hard_to_predict(steps) else 1.0, 1.0)
    )
    assert is_hard_to_predict(prover.smallest_predicted(limits))
    found = prover.smallest(limits, lambda progress: None)
    least = prover.model.peak_bytes(prover.smallest_predicted(limits.plain))
    assert prover.proofs[found].peak <= least
    assert prover.compilations == 2


def test_the_smallest_plan_may_be_a_simple_one(monkeypatch):
    prover, limits = prover_with(
        monkeypatch, lambda steps: (0.5 if steps in prover.model.simple_plans else 4.0, 1.0)
    )
    searched = prover.smallest_predicted(limits), prover.smallest_predicted(limits.plain)
    smallest = min(prover.model.simple_plans, key=prover.model.peak_bytes)
    found = prover.smallest(limits, lambda progress: None)
    assert found == smallest
    assert prover.compilations <= len({*searched, smallest})


def test_column_that_fits_is_found_though_it_is_predicted_not_to(monkeypatch):
    prover, limits = prover_with(
        monkeypatch,
        lambda steps: (0.59 if len(steps) == 1 and steps[0].choice == COLUMN else 3.0, 1),
    )
    assert fastest(prover, limits) == prover.model.column


@pytest.mark.parametrize("fitting", ["stream", "checkpoint"])
def test_before_a_budget_is_refused_a_simple_plan_of_every_strategy_is_tried(monkeypatch, fitting):
    def peak(steps):
        return 0.4 if {step.choice.strategy.name for step in steps} == {fitting} else 9.0

    prover, limits = prover_with(monkeypatch, lambda steps: (peak(steps), 1.0))
    limits = Limits(0.3 * limits.budget)
    found = prover.smallest(limits, lambda progress: None)
    assert {step.choice.strategy.name for step in found} == {fitting}
    assert prover.proofs[found].peak == min(proof.peak for proof in prover.proofs.values())


def test_a_simple_plan_that_is_faster_is_found(monkeypatch):
    """Row loops take six times as long as predicted."""

    def proof_of(steps):
        return 1.0, (6.0 if any(step.choice.strategy.by_rows for step in steps) else 1.0)

    prover, limits = prover_with(monkeypatch, proof_of)
    found = fastest(prover, limits)
    assert not any(step.choice.strategy.by_rows for step in found)
    model = prover.model
    fitting = [s for s in model.simple_plans if model.peak_bytes(s) <= limits.budget]
    cost = model.candidates.cost
    times = [sum(cost(x.start, x.stop, x.choice).seconds for x in steps) for steps in fitting]
    assert prover.proofs[found].seconds <= 1.02 * min(times)


def test_time_falls_as_the_budget_grows(monkeypatch):
    prover, limits = prover_with(monkeypatch, lambda steps: (1.1, 1.0))
    seconds = []
    for factor in (0.7, 0.8, 1.0, 1.3):
        own = Limits(factor * limits.budget)
        seconds.append(prover.proofs[fastest(prover, own)].seconds)
    assert seconds == sorted(seconds, reverse=True)


# --- The search alone ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prover():
    return Prover(problem_of(logits, ARGS, (None, 1), "cpu", None))


def found_by(prover, budget, **options):
    return search(prover.model, Limits(budget, **options))


def test_predicted_peaks_keep_the_limit_and_times_fall(prover):
    column = prover.model.peak_bytes(prover.model.column)
    seconds = []
    for part in (0.35, 0.5, 0.7, 0.9, 1.0):
        found = found_by(prover, part * column)
        assert prover.model.peak_bytes(found) <= part * column
        seconds.append(prover.model.seconds(*found))
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] <= prover.model.seconds(*prover.model.column)


def test_the_search_is_exact_for_two_strategies():
    """Against every way to cut and choose: by whole maps, kept or computed again.

    Nothing is compiled. On a CPU checkpoints save nothing, so that nothing would fit.
    """
    prover = Prover(problem_of(logits, ARGS, (None, 1), "h200", None))
    model, last = prover.model, prover.model.candidates.last
    strategies = (Column(), Checkpoint())
    every = [()]
    complete = []
    while every:
        steps = every.pop()
        at = steps[-1].stop if steps else 0
        if at == last:
            complete.append(steps)
            continue
        for stop in range(at + 1, last + 1):
            for strategy in strategies:
                if not (steps and strategy == steps[-1].choice.strategy == Column()):
                    every.append((*steps, Step(at, stop, Choice(strategy))))
    column = model.peak_bytes(model.column)
    for part in (0.6, 0.75, 0.9):
        fitting = [s for s in complete if model.peak_bytes(s) <= part * column]
        found = found_by(prover, part * column, kinds=tuple(map(Kind, strategies)))
        best = min((model.seconds(*steps) for steps in fitting), default=None)
        assert (found and model.seconds(*found)) == (best and pytest.approx(best, rel=2e-3))
    assert fitting


def test_seconds_are_corrected_by_what_was_compiled():
    prover = Prover(problem_of(logits, ARGS, (None, 1), "h200", None))
    model = prover.model
    found = found_by(prover, 0.5 * model.peak_bytes(model.column))
    predicted, column = model.seconds(*found), model.seconds(*model.column)
    model.learn_seconds(found, 2 * predicted)
    assert model.seconds(*found) == pytest.approx(2 * predicted)
    # Of what was not compiled yet, half of that on the scale of logarithms.
    assert model.seconds(*model.column) == pytest.approx(2**0.5 * column)
    model.learn_seconds(model.column, column)
    assert model.seconds(*found) == pytest.approx(2 * predicted)
    assert model.seconds(*model.column) == pytest.approx(column)


def test_cuts_are_few_and_where_one_map_crosses():
    def residual(params, image):
        for _ in range(40):
            image = image + jnp.tanh(jnp.tanh(image @ params) @ params.T)
        return image

    args = jax.ShapeDtypeStruct((4, 64), "float32"), jax.ShapeDtypeStruct((1, 32, 4), "float32")
    traced = problem_of(residual, args, (None, 1), "cpu", None).traced
    candidates = Candidates(traced.program, traced.axes, [0], "cpu")
    assert len(candidates.bounds) - 2 == MOST_CUTS
    _, crossing = candidates.places.crossing
    assert {crossing[bound] for bound in candidates.bounds[2:-1]} == {1}


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("8GiB", 8 * 2**30),
        ("500MB", 500_000_000),
        (" 1.5 KiB", 1536),
        (12345, 12345),
        (np.int64(7), 7),
    ],
)
def test_budgets(budget, expected):
    assert parse_budget(budget, "cpu") == expected


def test_a_fraction_is_of_the_targets_memory():
    assert parse_budget(0.5, "h200") == memory.TARGETS["h200"].memory_bytes // 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "8GB/s"}, "no number with a unit"),
        ({"budget": "8 gigs"}, "no unit 'gigs'; units are B, KiB"),
        ({"budget": "8"}, "no number with a unit"),
        ({"budget": 0}, "more than nothing"),
        ({"budget": -1.0}, "more than nothing"),
        ({"budget": "0GiB"}, "more than nothing"),
        ({"budget": 1.5}, "fraction above 1"),
        ({"budget": 8e9}, r"give bytes as an int, 8000000000, or as text, \"8000000000B\""),
        ({"budget": "8 gib"}, "no unit 'gib'; did you mean '8GiB'"),
        ({"budget": True}, "no amount of memory"),
        ({"budget": None}, "no amount of memory"),
        ({"wrt": 2}, "no argument 2 among 2"),
        ({"wrt": "params"}, "must be numbers"),
        ({"wrt": 1.5}, "must be numbers"),
        ({"wrt": np.int64(2)}, "no argument 2 among 2"),
        ({"objective": "beauty"}, "objective='beauty'"),
        ({"target": "h2000"}, "Did you mean"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(options, message):
    call = {"in_axes": (None, 1), "budget": "1GiB", "target": "cpu"} | options
    with pytest.raises(ValueError, match=message):
        lrjax.plan(
            logits, *ARGS, **call, on_progress=lambda progress: pytest.fail("it was compiled")
        )


def test_a_function_without_rows_is_refused():
    def fun(params, image):
        return image, sum((kernel**2).sum() for kernel in params)

    with pytest.raises(ValueError, match="no operation on rows"):
        lrjax.plan(fun, *ARGS, in_axes=(None, 1), budget="1GiB", target="cpu")


def test_a_python_number_among_the_arguments_stays_weak():
    """In bfloat16 a number that is taken for a float32 would make everything float32."""

    def fun(params, image, scale):
        return logits(params, image * scale)

    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16"), ARGS)
    plan = lrjax.plan(fun, *args, 0.5, in_axes=(None, 1, None), budget="1GiB", target="cpu")
    by_rows = lrjax.rowwise(fun, in_axes=(None, 1, None), plan=plan)
    assert jax.eval_shape(lambda *args: by_rows(*args, 0.5), *args).dtype == "bfloat16"


def test_arguments_without_parameters_are_refused():
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), "uint8")
    with pytest.raises(ValueError, match="no floating-point array to differentiate by"):
        lrjax.plan(lambda x: x * 1.0, images, in_axes=1, budget="1GiB", target="cpu")
