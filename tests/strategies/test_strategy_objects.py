"""Strategies as objects: one contract, by name or as they are, and a new one in one file."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lrjax
from lrjax.plan import Choice
from lrjax.rowgraph.segments import Cuttable
from lrjax.rowgraph.tracing import trace
from lrjax.strategies import (
    Checkpoint,
    Column,
    MicroBatches,
    Overlap,
    Strategy,
    Stream,
    TwoPhase,
    base,
    named,
    register,
    registered,
)
from lrjax.testing import assert_same_as_column

PAGE = Path(__file__).parents[2] / "docs" / "add-a-strategy.md"
IN_AXES = (None, 1)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def convolve(images, kernel):
    return lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def network(kernels, images):
    images = checkpoint_name(jnp.tanh(convolve(images, kernels[0])), "middle")
    return jnp.sin(convolve(images, kernels[1]))


def normalised(kernels, images):
    images = convolve(images, kernels[0])
    return images - images.mean((0, 1, 2))


ARGS = ([normal(3, 3, 2, 4), normal(3, 3, 4, 2, seed=1)], normal(4, 16, 5, 2, seed=2))
OBJECTS = (
    *registered(),
    MicroBatches("stream", 2),
    MicroBatches(Checkpoint(), 4),
    MicroBatches(TwoPhase(), 2),
)


def gradient(**options):
    fun = lrjax.rowwise(network, in_axes=IN_AXES, **options)
    return jax.grad(lambda *args: jnp.sum(fun(*args)), argnums=(0, 1))


def lowered(**options):
    return jax.jit(gradient(**options)).lower(*ARGS).as_text()


# --- The contract --------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strategy", OBJECTS, ids=repr)
def test_gradients_are_columns(strategy):
    options = {"num_blocks": 4, "strategy": strategy}
    expected = assert_same_as_column(network, ARGS, IN_AXES, **options)
    options["strategy"] = [strategy, "stream"]
    assert_same_as_column(network, ARGS, IN_AXES, cuts=["middle"], expected=expected, **options)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strategy", OBJECTS, ids=repr)
def test_maps_may_wait_on_the_host(strategy):
    options = {"num_blocks": 4, "strategy": strategy, "cuts": ["middle"], "offload": True}
    assert_same_as_column(network, ARGS, IN_AXES, **options)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strategy", [Checkpoint(), MicroBatches(Checkpoint(), 2)], ids=repr)
def test_derivatives_of_derivatives(strategy):
    def penalty(fun):
        slopes = jax.grad(lambda *args: jnp.sum(fun(*args) ** 2), argnums=1)
        return jax.grad(lambda *args: jnp.sum(slopes(*args) ** 2))

    found = penalty(lrjax.rowwise(network, in_axes=IN_AXES, strategy=strategy))(*ARGS)
    for one, other in zip(found, penalty(network)(*ARGS), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-11 * np.abs(other).max())


@pytest.mark.parametrize("strategy", registered(), ids=repr)
def test_a_name_is_its_object(strategy):
    number = {"num_blocks": 4}
    assert lowered(strategy=strategy.name, **number) == lowered(strategy=strategy, **number)
    assert named(strategy.name) is strategy
    assert Choice(strategy.name, 4) == Choice(type(strategy)(), 4)
    found = lrjax.explain(network, *ARGS, in_axes=IN_AXES, strategy=strategy, **number)
    assert found.segments[0].strategy == strategy.name
    assert bool(found.segments[0].passes) == strategy.by_rows


def test_checkpoint_and_micro_batches_are_no_column_in_disguise():
    """They differ from column's program, and from each other's."""
    texts = {lowered(strategy=s) for s in ("column", "checkpoint", MicroBatches("column", 2))}
    assert len(texts) == 3


def test_micro_batches_are_the_plans():
    choice = Choice(MicroBatches("stream", 2), 4)
    assert choice == Choice(Stream(), 4, micro_batches=2)
    assert choice.runner == MicroBatches(Stream(), 2) == MicroBatches(MicroBatches("stream", 2), 1)
    assert repr(choice.runner) == "MicroBatches(Stream(), 2)"
    found = lrjax.explain(
        network, *ARGS, in_axes=IN_AXES, strategy=MicroBatches("stream", 2), num_blocks=4
    )
    assert found.segments[0].choice == choice
    assert "stream x 2 micro-batches" in str(found)


def test_one_part_is_the_strategy_itself():
    assert Choice(MicroBatches("overl", 1)).runner == Overlap()
    one_part = lrjax.rowwise(normalised, in_axes=IN_AXES, strategy=MicroBatches("stream", 1))
    jax.eval_shape(one_part, *ARGS)


def test_equality_is_of_classes_and_settings():
    assert Stream() == Stream() != Column()
    assert MicroBatches("stream", 2) != MicroBatches("stream", 4)
    assert len({*registered(), Column(), Overlap(), MicroBatches("stream", 2)}) == 8


class Module(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Conv(3, (3, 3))(x)


def test_facades_take_objects():
    images = normal(2, 16, 6, 3).astype(np.float32)
    model = lrjax.linen.rowwise(Module(), in_axes=1, strategy=MicroBatches("stream", 2))
    variables = model.init(jax.random.key(0), images)
    expected = Module().apply(variables, images)
    np.testing.assert_allclose(model.apply(variables, images), expected, rtol=1e-5, atol=1e-5)


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fun", "options", "message"),
    [
        (network, {"strategy": "steam"}, r"strategy='steam' is unknown; choose one of 'column'"),
        (network, {"strategy": ["stream", 3]}, r"strategy\[1\]=3 is unknown"),
        (network, {"strategy": []}, "strategy is empty"),
        (
            normalised,
            {"strategy": MicroBatches("stream", 2)},
            "strategy 'stream x 2 micro-batches': micro_batches: the examples of this segment",
        ),
        (
            network,
            {"strategy": ["stream", MicroBatches("stream", 3)], "cuts": ["middle"]},
            "in segment 1 of 0 to 1, behind the cut 'middle': micro_batches=3 does not divide",
        ),
        (network, {"strategy": MicroBatches("2ps", 2), "num_blocks": 17}, "the 16 output rows"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(fun, options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lrjax.rowwise(fun, in_axes=IN_AXES, **options), *ARGS)


@pytest.mark.parametrize("parts", [0, True, 1.0, None])
def test_bad_parts(parts):
    with pytest.raises(ValueError, match="parts="):
        MicroBatches("stream", parts)


# --- A new strategy ------------------------------------------------------------------------------


@pytest.fixture
def no_new_names(monkeypatch):
    """Names registered within a test are gone behind it."""
    monkeypatch.setattr(base, "_BY_NAME", dict(base._BY_NAME))


@pytest.fixture
def page(no_new_names, capsys):
    """What the code of docs/add-a-strategy.md defines and prints."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names, capsys.readouterr().out


def test_the_page_adds_a_strategy_that_is_exact(page):
    names, printed = page
    assert "keep-convolutions" in printed
    assert registered()[-1] == names["KeepConvolutions"]()


@pytest.mark.usefixtures("x64")
def test_a_new_strategy_runs_everywhere(page):
    strategy = page[0]["KeepConvolutions"]()
    expected = assert_same_as_column(network, ARGS, IN_AXES, strategy=strategy.name)
    for options in (
        {"strategy": MicroBatches(strategy, 2)},
        {"strategy": [strategy.name, "stream"], "cuts": ["middle"], "num_blocks": 4},
        {"strategy": strategy.name, "cuts": ["middle"], "offload": True},
    ):
        assert_same_as_column(network, ARGS, IN_AXES, expected=expected, **options)
    texts = {lowered(strategy=s) for s in ("column", "checkpoint", strategy)}
    assert len(texts) == 3


def test_plans_know_a_new_strategy(page):
    from lrjax.planner.problem import problem_of
    from lrjax.planner.proof import Prover
    from lrjax.planner.search import Kind, Limits, every_kind, search

    strategy = page[0]["KeepConvolutions"]()
    kind = Kind(strategy)
    assert kind in every_kind()
    prover = Prover(problem_of(network, ARGS, IN_AXES, "h200", None))
    found = search(prover.model, Limits(1e12, kinds=(kind,)))
    plan = prover.plan(found, 10**12)
    assert strategy.fate in str(plan)
    assert '"strategy": "keep-convolutions"' in plan.to_json()
    assert lrjax.Plan.from_json(plan.to_json()) == plan
    jax.eval_shape(lrjax.rowwise(network, in_axes=IN_AXES, plan=plan), *ARGS)


def test_an_object_without_a_name_runs_all_the_same(page):
    class Nameless(page[0]["KeepConvolutions"]):
        name = "nameless"

    found = lrjax.explain(network, *ARGS, in_axes=IN_AXES, strategy=Nameless())
    assert found.segments[0].strategy == "nameless"
    with pytest.raises(ValueError, match="strategy='nameless' is unknown"):
        lrjax.rowwise(network, in_axes=IN_AXES, strategy="nameless")


def test_a_name_is_given_once(no_new_names):
    class Other(Column):
        pass

    assert register(Column()) == Column()
    with pytest.raises(ValueError, match=r"strategy 'column' is Column\(\) already; give Other"):
        register(Other())


def test_halos_are_computed_where_rows_are_computed_again():
    """Nothing is saved of OverL's forward pass, so that it needs none of its own."""
    traced = trace(network, IN_AXES, ARGS, {})
    whole = Cuttable.of(traced.program, traced.axes)
    segment = whole.between(0, len(whole.operations))
    forward, backward = Overlap().execution(segment, 4, (0, 1)).passes
    rows = [
        [loop.schedule.tracks[0].rows for loop in one.rows.loops if loop is not None]
        for one in (forward, backward)
    ]
    assert rows == [[4], [6]]
    assert forward.saved_bytes == 0


def test_an_execution_is_all_that_explain_needs():
    """Steps and saved bytes come from the execution's passes, whatever the strategy is."""

    class Renamed(Stream):
        name = "renamed"

    traced = trace(network, IN_AXES, ARGS, {})
    whole = Cuttable.of(traced.program, traced.axes)
    segment = whole.between(0, len(whole.operations))
    assert isinstance(Renamed(), Strategy)
    steps = [
        [len(one.rows.loops) for one in s.execution(segment, 4, (0, 1)).passes]
        for s in (Stream(), Renamed())
    ]
    assert steps[0] == steps[1]
    tables = [
        lrjax.explain(network, *ARGS, in_axes=IN_AXES, strategy=s, num_blocks=4).tables()
        for s in (Stream(), Renamed())
    ]
    assert tables[0].replace("stream", "renamed") == tables[1]
