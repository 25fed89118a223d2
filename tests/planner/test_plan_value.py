"""Plans as values: print, save, load, refuse."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from networks import arguments, features, logits, plan_by_hand, structs

import lrjax
from lrjax.plan import FORMAT, Choice
from lrjax.rowgraph.tracing import trace
from lrjax.testing import assert_same_as_column

CHOICES = (Choice("stream", 8), Choice("checkpoint"), Choice("2ps", 4), Choice("overl", 2))


@pytest.fixture(scope="module")
def plan():
    with jax.enable_x64(True):
        return plan_by_hand(logits, structs(), CHOICES, (2, 3, 4))


def test_every_strategy_side_by_side_is_column(plan, x64):
    column = Choice("column")
    assert_same_as_column(logits, arguments(), (None, 1), plan=plan)
    mixed = plan_by_hand(features, structs(), (column, CHOICES[2], column), (1, 4))
    assert_same_as_column(features, arguments(), (None, 1), plan=mixed)


def test_it_survives_text_and_file(plan, tmp_path):
    assert lrjax.Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    assert lrjax.Plan.load(tmp_path / "plan.json") == plan
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_it_prints_every_segment(plan):
    lines = str(plan).splitlines()
    assert len(lines) == 2 + len(CHOICES)
    assert "not compiled" in lines[0]
    for line, choice in zip(lines[2:], CHOICES, strict=True):
        assert choice.strategy.name in line
    assert "8 of 8 rows" in lines[2]


def test_blocks_end_at_the_height(plan):
    segment = plan.segments[0]
    assert segment.blocks == (8, 16, 24, 32, 40, 48, 56, 64)
    assert plan.segments[1].blocks == ()


def test_the_fingerprint_is_the_same_in_every_trace(plan, x64):
    again = plan_by_hand(logits, structs(), CHOICES, (2, 3, 4))
    assert again.fingerprint.digest == plan.fingerprint.digest
    other = plan_by_hand(features, structs(), CHOICES, (2, 3, 4))
    assert other.fingerprint.digest != plan.fingerprint.digest


@pytest.mark.parametrize(
    ("fun", "args", "in_axes", "message"),
    [
        (logits, structs(height=128), (None, 1), "input 4 is float64[1, 64, 16, 3]"),
        (logits, structs(), (None, 2), "rows on axis 1 in the plan and .* rows on axis 2"),
        (features, structs(), (None, 1), "operation 1[0-9] is "),
        (lambda p, x: logits(p, x) + 1, structs(), (None, 1), "operation"),
    ],
)
def test_other_calls_are_refused_with_the_difference(
    plan, x64, tmp_path, fun, args, in_axes, message
):
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float64"), args)
    with pytest.raises(lrjax.PlanMismatchError, match=message.replace("[1, 64, 16, 3]", ".*64")):
        jax.eval_shape(lrjax.rowwise(fun, in_axes=in_axes, plan=plan), *args)
    plan.save(tmp_path / "plan.json")
    with pytest.raises(lrjax.PlanMismatchError, match="made for another"):
        lrjax.Plan.load(tmp_path / "plan.json", fun, *args, in_axes=in_axes)


def dilated(dilation):
    def fun(params, image):
        for kernel in params:
            image = lax.conv_general_dilated(
                image,
                kernel,
                (1, 1),
                "SAME",
                rhs_dilation=(dilation, dilation),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        return jnp.mean(image**2)

    return fun


def test_parameters_of_operations_are_told_apart():
    near = plan_by_hand(dilated(1), structs(), (Choice("stream", 4),), ())
    assert (
        near.fingerprint == plan_by_hand(dilated(1), structs(), (Choice("2ps", 2),), ()).fingerprint
    )
    with pytest.raises(lrjax.PlanMismatchError, match="rhs_dilation="):
        near.check(trace(dilated(16), (None, 1), structs(), {}))


def test_a_plan_of_more_operations_is_refused(plan, x64):
    last = dataclasses.replace(plan.segments[-1], stop=500)
    longer = dataclasses.replace(plan, segments=(*plan.segments[:-1], last))
    with pytest.raises(lrjax.PlanMismatchError, match="end at operation 500"):
        jax.eval_shape(lrjax.rowwise(logits, in_axes=(None, 1), plan=longer), *arguments())


def damaged(plan, **changes):
    return json.dumps(json.loads(plan.to_json()) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lambda p: p.to_json()[:-40], "truncated"),
        (lambda p: "", "truncated"),
        (lambda p: "[1, 2]", "no plan of lrjax"),
        (lambda p: damaged(p, lrjax_plan=FORMAT + 1), f"has format {FORMAT + 1}"),
        (lambda p: damaged(p, segments=[]), "damaged"),
        (lambda p: damaged(p, wrt="x"), "damaged"),
        (
            lambda p: p.to_json().replace('"checkpoint"', '"magic"'),
            "strategy='magic' is unknown; choose",
        ),
        (lambda p: p.to_json().replace('"num_blocks": 8', '"num_blocks": 0'), "damaged"),
        (lambda p: p.to_json().replace('"num_blocks": 8', '"num_blocks": true'), "damaged"),
        (lambda p: p.to_json().replace('"num_blocks": 8', '"num_blocks": 800'), "800 blocks of 64"),
        (lambda p: damaged(p, wrt="12"), "wrt is no list"),
        (lambda p: damaged(p, budget_bytes=float("inf")), "damaged"),
        (lambda p: "[" * 100_000, "is no JSON"),
        (lambda p: "\udcff", "is no JSON"),
    ],
)
def test_a_damaged_file_is_refused(plan, tmp_path, text, message):
    (tmp_path / "plan.json").write_bytes(text(plan).encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(message)):
        lrjax.Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"num_blocks": 2}, "num_blocks=2"),
        ({"strategy": "2ps"}, "strategy='2ps'"),
        ({"cuts": 2, "offload": True}, "cuts=2 and offload=True"),
    ],
)
def test_a_plan_stands_alone(plan, options, given):
    with pytest.raises(ValueError, match=f"leave {given} out, or the plan"):
        lrjax.rowwise(logits, in_axes=(None, 1), plan=plan, **options)


def test_what_is_no_plan_is_refused():
    with pytest.raises(ValueError, match="is no plan"):
        lrjax.rowwise(logits, in_axes=(None, 1), plan="8GiB")


def test_explain_describes_a_plan(plan, x64):
    told = lrjax.explain(logits, *structs(), in_axes=(None, 1), plan=plan)
    assert [segment.strategy for segment in told.segments] == [c.strategy.name for c in CHOICES]
    assert told.segments[0].passes
    assert not told.segments[1].passes
