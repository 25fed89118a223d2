"""Plans for devices that share rows: searched for a share, proved on the mesh, run on it alone.

Devices are counted when JAX starts, so some cases run in a process of their own, with eight.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from networks import arguments, features, logits, plan_by_hand, structs

import lrjax
from lrjax import memory
from lrjax.plan import Choice
from lrjax.planner.candidates import Candidates, Kind
from lrjax.planner.mesh import planned_row_mesh
from lrjax.planner.problem import problem_of
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.strategies import named
from lrjax.testing import assert_same_as_column
from several_devices import is_process_with, run_with

IS_CHILD = is_process_with(8)
in_child = pytest.mark.skipif(not IS_CHILD, reason="runs in the process with eight devices")
alone = pytest.mark.skipif(IS_CHILD, reason="needs one device")


@pytest.mark.skipif(IS_CHILD, reason="starts that process")
@pytest.mark.slow
def test_on_eight_devices():
    run_with(8, __file__)


def mesh_of(devices, axis="rows", kind=AxisType.Auto):
    return jax.make_mesh((devices,), (axis,), (kind,), devices=jax.devices()[:devices])


def row_mesh_of(devices, axis="rows"):
    """Of devices that need not be there."""
    return RowMesh(AbstractMesh((devices,), (axis,)), axis)


CHOICES = (Choice("stream", 2), Choice("checkpoint"), Choice("2ps", 2), Choice("column"))
PLACES = (2, 3, 4)


def normalised(params, image):
    """Batch statistics: barriers between devices."""
    for kernel in params:
        image = features([kernel], image)
        axes = (0, 1, 2)
        image = (image - image.mean(axes)) * jax.lax.rsqrt(image.var(axes) + 1e-3)
    return jnp.tanh(image)


# --- On the mesh ---------------------------------------------------------------------------------


def cases():
    for fun in (logits, features, normalised):
        for devices, height in ((3, 40), (8, 64), (2, 37)):
            for choices in (CHOICES, CHOICES[::-1], (Choice("overl", 2), *CHOICES[1:])):
                name = f"{fun.__name__}-{devices}-{height}-{choices[0].strategy.name}"
                yield pytest.param(fun, devices, height, choices, id=name)


@in_child
@pytest.mark.parametrize(("fun", "devices", "height", "choices"), [*cases()])
def test_segments_of_every_strategy_compute_what_column_does(fun, devices, height, choices, x64):
    args = arguments(height, 8)
    places = PLACES if fun is not normalised else (1, 2, 3)
    plan = plan_by_hand(fun, args, choices, places, row_mesh=row_mesh_of(devices))
    assert_same_as_column(fun, args, (None, 1), plan=plan, mesh=mesh_of(devices))


def peak_on(devices, by_rows, args):
    def step(params, image):
        return jax.grad(lambda p: jnp.mean(jnp.square(by_rows(p, image))))(params)

    specs = {"mesh_shape": {"rows": devices}, "in_specs": (jax.P(), jax.P(None, "rows"))}
    return memory.peak_bytes(memory.compile_for(step, *args, target="cpu", **specs))


@in_child
def test_a_budget_is_a_devices(tmp_path, x64):
    args = arguments(1024, 32, convolutions=2)
    column = peak_on(8, logits, args)
    call = {"in_axes": (None, 1), "target": "cpu", "mesh": {"rows": 8}}
    plan = lrjax.plan(logits, *args, budget=int(0.7 * column), **call)
    assert not plan.is_column
    assert (plan.row_mesh_axis, plan.devices) == ("rows", 8)
    by_rows = lrjax.rowwise(logits, in_axes=(None, 1), plan=plan)
    assert peak_on(8, by_rows, args) == plan.verified_peak_bytes <= plan.budget_bytes
    image, params = args[1].nbytes, sum(kernel.nbytes for kernel in args[0])
    assert plan.fixed_bytes == image // 8 + 2 * params
    plan.save(tmp_path / "plan.json")
    loaded = lrjax.Plan.load(tmp_path / "plan.json", logits, *args, in_axes=(None, 1))
    assert_same_as_column(logits, args, (None, 1), plan=loaded, mesh=mesh_of(8))


@in_child
def test_a_frontier_of_one_device_of_eight():
    args = arguments(512, 16, batch=2, convolutions=2)
    call = {"in_axes": (None, 1), "target": "cpu", "steps": 2}
    curve = lrjax.frontier(logits, *args, mesh={"rows": 8}, **call)
    (column,) = curve.of("column")
    assert curve.devices == 8
    assert "Frontier(cpu x 8, of one device" in repr(curve)
    assert column.peak_bytes == peak_on(8, logits, args)
    assert min(point.peak_bytes for point in curve.of("lrjax")) < column.peak_bytes
    assert [point.micro_batches for point in curve.of("accumulation")] == [2]
    smallest = curve.of("lrjax")[-1].plan
    assert (smallest.row_mesh_axis, smallest.devices) == ("rows", 8)
    by_rows = lrjax.rowwise(logits, in_axes=(None, 1), plan=smallest)
    assert peak_on(8, by_rows, args) == curve.of("lrjax")[-1].peak_bytes


@alone
@pytest.mark.parametrize("mesh", [{"mesh": {"rows": 8}}, {"row_mesh_axis": "rows"}])
def test_times_of_several_devices_are_refused(mesh):
    with pytest.raises(ValueError, match="on one device; leave mesh"):
        lrjax.frontier(logits, *structs(), in_axes=(None, 1), timed=True, **mesh)


@in_child
def test_another_number_of_devices_is_refused():
    args = structs(64, 8)
    plan = plan_by_hand(logits, args, CHOICES, PLACES, row_mesh=row_mesh_of(8))
    by_rows = lrjax.rowwise(logits, in_axes=(None, 1), plan=plan)
    with (
        jax.set_mesh(mesh_of(4)),
        pytest.raises(lrjax.PlanMismatchError, match=r"for 8 devices .* not for 4 devices"),
    ):
        jax.eval_shape(by_rows, *args)
    for kind in AxisType.Auto, AxisType.Explicit:
        with jax.set_mesh(mesh_of(8, kind=kind)):  # the mesh at hand
            assert jax.eval_shape(by_rows, *args).shape == (1, 16)


@in_child
def test_within_shard_map_over_the_batch():
    """A plan is for the images that a function sees, and for the axis of the rows alone."""
    mesh = jax.make_mesh((2, 4), ("data", "rows"), (AxisType.Auto,) * 2)
    params, images = arguments(64, 8, batch=4, dtype=np.float32)
    args = params, images[:2]
    row_mesh = planned_row_mesh(mesh, "rows", "cpu")
    plan = plan_by_hand(logits, args, CHOICES, PLACES, row_mesh=row_mesh)
    by_rows = lrjax.rowwise(logits, in_axes=(None, 1), plan=plan)
    specs = {"in_specs": (jax.P(), jax.P("data")), "out_specs": jax.P("data")}
    mapped = jax.shard_map(by_rows, mesh=mesh, axis_names={"data"}, **specs)
    np.testing.assert_allclose(jax.jit(mapped)(params, images), logits(params, images), rtol=2e-5)


# --- What is predicted, without devices ----------------------------------------------------------


def costs_of(choice, height, devices):
    args = structs(height, 32)
    row_mesh = None if devices == 1 else row_mesh_of(devices)
    traced = problem_of(logits, args, (None, 1), "h200", None, row_mesh).traced
    found = Candidates(traced.program, traced.axes, range(4), "h200", row_mesh)
    return found.cost(0, found.last, choice)


@alone
@pytest.mark.parametrize(
    "choice",
    [
        *map(Choice, ("column", "checkpoint", "selective", "selective-narrow")),
        *(Choice(s, 8) for s in ("stream", "2ps", "overl")),
    ],
    ids=str,
)
def test_a_device_of_eight_costs_what_one_with_its_rows_does(choice):
    own, alone = costs_of(choice, 8 * 512, 8), costs_of(choice, 512, 1)
    halos = 0.15 if choice.strategy.by_rows else 0.01
    for field in dataclasses.fields(own):
        assert getattr(own, field.name) == pytest.approx(getattr(alone, field.name), rel=halos)


@alone
def test_one_block_is_offered_for_shares():
    def counts(devices):
        row_mesh = None if devices == 1 else row_mesh_of(devices)
        traced = problem_of(logits, structs(512, 8), (None, 1), "h200", None, row_mesh).traced
        found = Candidates(traced.program, traced.axes, range(4), "h200", row_mesh)
        return {
            strategy.name: [c.num_blocks for c in found.span(0, found.last).choices(Kind(strategy))]
            for strategy in map(named, ("stream", "2ps", "overl"))
        }

    assert all(1 not in found for found in counts(1).values())
    assert all(1 in found for found in counts(8).values())
    blocks, whole = costs_of(Choice("overl", 1), 8 * 512, 8), costs_of(Choice("checkpoint"), 512, 1)
    assert blocks.operations == pytest.approx(whole.operations, rel=0.1)
    assert blocks.saved_bytes == pytest.approx(whole.saved_bytes, rel=0.1)


@alone
def test_nothing_is_offloaded_on_a_mesh():
    def offloads(row_mesh):
        traced = problem_of(logits, structs(), (None, 1), "h200", None, row_mesh).traced
        found = Candidates(traced.program, traced.axes, range(4), "h200", row_mesh)
        return any(found.offloadable_bytes(0, stop) for stop in range(1, found.last))

    assert offloads(None)
    assert not offloads(row_mesh_of(8))


# --- The plan as a value -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan():
    return plan_by_hand(logits, structs(), CHOICES, PLACES, row_mesh=row_mesh_of(8))


@pytest.fixture(scope="module")
def plan_of_one():
    return plan_by_hand(logits, structs(), CHOICES, PLACES)


@alone
def test_it_remembers_the_mesh(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    found = lrjax.Plan.load(tmp_path / "plan.json", logits, *structs(), in_axes=(None, 1))
    assert found == plan
    assert (found.row_mesh_axis, found.devices) == ("rows", 8)
    first, *lines = str(plan).splitlines()
    assert "cpu x 8 (rows along the mesh axis 'rows')" in first
    assert "MiB a device" in first
    assert "2 of 4 rows" in lines[1]  # of a share of 8


@alone
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "devices is 0"),
        ({"devices": True}, "devices is True"),
        ({"row_mesh_axis": None}, "8 devices share rows along None"),
        ({"row_mesh_axis": 3}, "share rows along 3"),
        ({"lrjax_plan": 4}, "has format 4"),
    ],
)
def test_a_damaged_mesh_is_refused(plan, changes, message):
    with pytest.raises(ValueError, match=message):
        lrjax.Plan.from_json(json.dumps(json.loads(plan.to_json()) | changes))


@alone
@pytest.mark.parametrize(
    ("is_of_one", "options", "message"),
    [
        (True, {"mesh": mesh_of(1), "row_mesh_axis": "rows"}, r"for one device.*lrjax.plan\("),
        (True, {"mesh": mesh_of(1)}, "mesh is given without row_mesh_axis"),
        (False, {"mesh": mesh_of(1)}, "for 8 devices .* not for 1 devices along it; give such"),
        (False, {"mesh": mesh_of(1, "x")}, "'rows' is no axis of the mesh"),
        (False, {"row_mesh_axis": "x"}, "along the mesh axis 'rows', not for row_mesh_axis='x'"),
        (False, {}, r"for 8 devices .* there is no mesh; give mesh=jax.make_mesh\(\(8,\)"),
    ],
)
def test_another_mesh_is_refused(plan, plan_of_one, is_of_one, options, message):
    chosen = plan_of_one if is_of_one else plan
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lrjax.rowwise(logits, in_axes=(None, 1), plan=chosen, **options), *structs())
    with pytest.raises(ValueError, match=message):
        lrjax.explain(logits, *structs(), in_axes=(None, 1), plan=chosen, **options)


@alone
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_mesh_axis": "rows"}, "there is no mesh; give mesh="),
        ({"mesh": 8}, "mesh=8 is no mesh"),
        ({"mesh": {}}, "must name one axis of the mesh"),
        ({"mesh": {"rows": 2, "data": 4}}, "must name one axis of the mesh"),
        ({"mesh": {"rows": 2}, "row_mesh_axis": "x"}, "'x' is no axis of the mesh; it has"),
        ({"mesh": {"rows": 0}}, "must name axes and sizes"),
        ({"mesh": {"rows": 1024}}, "wants 1024 devices and there are"),
        pytest.param(
            {"mesh": {"rows": 2}, "target": "tpu-v5e"},
            "is a TPU",
            marks=pytest.mark.skipif(not memory.is_installed("tpu-v5e"), reason="needs lrjax[tpu]"),
        ),
    ],
)
def test_meshes_that_no_plan_is_made_for(options, message):
    call = {"in_axes": (None, 1), "budget": "1GiB", "target": "cpu"} | options
    with pytest.raises(ValueError, match=message):
        lrjax.plan(logits, *structs(), **call)


@alone
def test_too_few_rows_are_refused():
    with pytest.raises(ValueError, match="4 rows cannot be divided among 8 devices"):
        problem_of(logits, structs(4, 8), (None, 1), "cpu", None, row_mesh_of(8))
