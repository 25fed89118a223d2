"""Curves of memory against operations."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from networks import arguments, logits, structs

import lrjax
from lrjax import memory
from lrjax.planner import frontier
from lrjax.planner.frontier import accumulated, budgets
from lrjax.planner.problem import problem_of

pytestmark = pytest.mark.users_compiler


@pytest.fixture(scope="module")
def curve():
    args = structs(128, 32, batch=2, dtype=np.float32, convolutions=2)
    return lrjax.frontier(logits, *args, in_axes=(None, 1), target="cpu", steps=3)


def test_every_method_is_on_the_curve(curve):
    methods = list(dict.fromkeys(point.method for point in curve.points))
    assert methods == ["column", "checkpoint", "accumulation", "lrjax"]
    own = curve.of("lrjax")
    assert len(own) == 3
    assert own[0].plan.is_column
    assert own[0].peak_bytes == curve.points[0].peak_bytes
    assert [p.peak_bytes for p in own] == sorted((p.peak_bytes for p in own), reverse=True)
    assert [p.plan.seconds for p in own] == sorted(p.plan.seconds for p in own)
    assert all(p.peak_bytes <= p.budget_bytes for p in own)
    assert own[-1].peak_bytes < own[0].peak_bytes


def test_it_prints_and_draws(curve, tmp_path):
    lines = str(curve).splitlines()
    assert len(lines) == 1 + len(curve.points)
    assert lines[1].startswith("column")
    told = json.loads(curve.to_json())
    assert [p["peak_bytes"] for p in told["points"]] == [p.peak_bytes for p in curve.points]
    curve.save_png(tmp_path / "curve.png", "a network")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_times_are_measured_side_by_side(tmp_path):
    args = structs(64, 16, batch=2, dtype=np.float32, convolutions=2)
    curve = lrjax.frontier(logits, *args, in_axes=(None, 1), steps=2, timed=True)
    assert all(0 < point.seconds < 60 for point in curve.points)
    assert curve.time_of(curve.points[0]) == 1
    ratio = curve.time_of(curve.points[-1])
    assert ratio == curve.points[-1].seconds / curve.points[0].seconds
    assert f"{ratio:.2f}" in str(curve).splitlines()[-1].split()
    curve.save_png(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_times_of_an_absent_gpu_are_those_of_rooflines(curve):
    def at(point, seconds):
        return dataclasses.replace(
            point, plan=dataclasses.replace(point.plan, roofline_seconds=seconds)
        )

    column, last = curve.points[0], curve.points[-1]
    assert curve.time_of(last) is None  # compiled for a CPU
    priced = dataclasses.replace(curve, points=(at(column, 0.2), at(last, 0.3)))
    assert [priced.time_of(point) for point in priced.points] == pytest.approx([1, 1.5])
    assert "1.50" in str(priced).splitlines()[-1].split()
    measured = dataclasses.replace(priced.points[1], seconds=4.0)
    assert priced.time_of(measured) == pytest.approx(1.5)  # column was not measured


def test_times_of_an_absent_device_are_refused():
    with pytest.raises(ValueError, match="leave target out"):
        lrjax.frontier(logits, *structs(), in_axes=(None, 1), target="h200", timed=True)


def test_accumulated_gradients_are_the_gradients(x64):
    args = arguments(16, 8, batch=4, convolutions=2)
    problem = problem_of(lambda p, x: jnp.mean(logits(p, x) ** 2), args, (None, 1), "cpu", None)
    found = accumulated(problem, 4, 2)(*args)
    expected, _ = problem.gradient(problem.fun)(*args)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)


def test_parts_that_do_not_fit_leave_the_others(monkeypatch):
    """As where a TPU's compiler finds no room for two parts, but for four."""
    compile_for, tried = memory.compile_for, []

    def compile_small(*args, **options):
        tried.append(args)
        if len(tried) == 1:
            raise memory.DoesNotFitError("no room")
        return compile_for(*args, **options)

    monkeypatch.setattr(memory, "compile_for", compile_small)
    args = structs(16, 8, batch=4, dtype=np.float32)
    points = frontier._accumulation(problem_of(logits, args, (None, 1), "cpu", None))
    assert [point.micro_batches for point in points] == [4]


def test_budgets_fall_in_equal_ratios():
    assert budgets(800, 100, 4) == [800, 400, 200, 100]


@pytest.mark.parametrize("steps", [1, 0, 2.5, True])
def test_a_curve_needs_two_points(steps):
    with pytest.raises(ValueError, match="at least 2 points"):
        lrjax.frontier(logits, *structs(), in_axes=(None, 1), target="cpu", steps=steps)
