"""The public functions that take options: the same names, checks and plans through each of them."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import lrjax
from lrjax.fingerprint import fingerprint
from lrjax.options import Options, checked_options
from lrjax.plan import Choice, Plan, SegmentPlan
from lrjax.rowgraph.segments import Cuttable
from lrjax.rowgraph.tracing import trace
from lrjax.testing import assert_same_as_column

ROOT = Path(__file__).parents[1]
FACADES = (
    lrjax.rowwise,
    lrjax.explain,
    lrjax.linen.rowwise,
    lrjax.nnx.rowwise,
    lrjax.testing.assert_same_as_column,
)
IMAGES = np.random.default_rng(0).standard_normal((2, 16, 6, 3)).astype(np.float32)


def normal(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape)


def convolve(image, kernel, padding="SAME", strides=(1, 1)):
    return lax.conv_general_dilated(
        image, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


class Net(nn.Module):
    """Two convolutions and a named map between them."""

    channels: int = 4

    @nn.compact
    def __call__(self, x):
        x = checkpoint_name(nn.relu(nn.Conv(self.channels, (3, 3))(x)), "middle")
        return nn.Conv(3, (3, 3))(x)


def variables(channels=4, images=IMAGES):
    shapes = jax.eval_shape(Net(channels).init, jax.random.key(0), images)
    return jax.tree.map(lambda x: np.full(x.shape, 0.1, x.dtype), shapes)


class NNXNet(nnx.Module):
    def __init__(self, channels=4):
        self.first = nnx.Conv(3, channels, (3, 3), rngs=nnx.Rngs(0))
        self.second = nnx.Conv(channels, 3, (3, 3), rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.second(checkpoint_name(nnx.relu(self.first(x)), "middle"))


def nnx_function(channels):
    graph, state = nnx.split(NNXNet(channels))
    return lambda state, x: nnx.merge(graph, state)(x), state


class Method(nn.Module):
    """A Linen module whose method is made row-wise."""

    options: dict
    channels: int = 4

    @nn.compact
    def __call__(self, x):
        net = Net(self.channels, name="net")
        return lrjax.linen.rowwise(lambda net, x: net(x), in_axes=1, **self.options)(net, x)


# How each façade is called: with the channels of its network, images and options.
CALLS = {
    "rowwise": lambda n, x, **o: lrjax.rowwise(Net(n).apply, in_axes=(None, 1), **o)(
        variables(n, x), x
    ),
    "explain": lambda n, x, **o: lrjax.explain(
        Net(n).apply, variables(n, x), x, in_axes=(None, 1), **o
    ),
    "testing": lambda n, x, **o: assert_same_as_column(
        Net(n).apply, (variables(n, x), x), (None, 1), **o
    ),
    "linen module": lambda n, x, **o: lrjax.linen.rowwise(Net(n), in_axes=1, **o).apply(
        variables(n, x), x
    ),
    "linen class": lambda n, x, **o: lrjax.linen.rowwise(Net, in_axes=1, **o)(n).apply(
        variables(n, x), x
    ),
    "linen function": lambda n, x, **o: Method(o, n).apply(
        {"params": {"net": variables(n, x)["params"]}}, x
    ),
    "nnx module": lambda n, x, **o: lrjax.nnx.rowwise(NNXNet(n), in_axes=1, **o)(x),
    "nnx function": lambda n, x, **o: lrjax.nnx.rowwise(
        lambda model, x: model(x), in_axes=(None, 1), **o
    )(NNXNet(n), x),
}


def plan_for(fun, *args, choice=Choice("stream", 4), in_axes=(None, 1)):  # noqa: B008
    """A plan of one segment, made without a planner."""
    traced = trace(fun, in_axes, args, {})
    operations = len(Cuttable.of(traced.program, traced.axes).operations)
    segment = SegmentPlan(0, operations, choice, (), 16, 1.0, 0.0, 0.0, 0.0)
    return Plan(fingerprint(traced), (), (segment,), None, "", 1, 1, 1, None, 1.0, 0)


def plan_of(facade):
    if facade.startswith("nnx"):
        return plan_for(*nnx_function(4), IMAGES)
    return plan_for(Net().apply, variables(), IMAGES)


# --- One value for all options -------------------------------------------------------------------


OPTIONS = [field.name for field in dataclasses.fields(Options)]


def facades():
    """All public functions that take any of the options, but those that make a plan of them."""
    for module in (lrjax, lrjax.linen, lrjax.nnx, lrjax.testing):
        for name, function in vars(module).items():
            if inspect.isfunction(function) and not name.startswith("_"):
                is_own = module is lrjax or function.__module__ == module.__name__
                takes = {*OPTIONS}.intersection(inspect.signature(function).parameters)
                if is_own and takes and function not in (lrjax.plan, lrjax.frontier):
                    yield function


def test_the_facades_are_known():
    assert set(facades()) == set(FACADES)
    assert list(inspect.signature(checked_options).parameters) == OPTIONS


@pytest.mark.parametrize("facade", FACADES, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_every_facade_takes_every_option_with_the_same_type_and_default(facade):
    parameters = inspect.signature(facade).parameters
    assert [name for name in parameters if name in OPTIONS] == OPTIONS
    for name in OPTIONS:
        expected = inspect.signature(lrjax.rowwise).parameters[name]
        assert parameters[name] == expected
        assert expected.kind is inspect.Parameter.KEYWORD_ONLY


class GivenError(Exception):
    """Carries the options that a façade has handed on."""


@pytest.mark.parametrize("facade", FACADES, ids=lambda f: f"{f.__module__}.{f.__name__}")
def test_every_facade_hands_every_option_on_as_it_is(facade, monkeypatch):
    def refuse(**options):
        raise GivenError(options)

    options = {name: object() for name in OPTIONS}
    monkeypatch.setattr(sys.modules[facade.__module__], "checked_options", refuse)
    args = [(variables(), IMAGES)] if facade is lrjax.testing.assert_same_as_column else []
    with pytest.raises(GivenError) as found:
        facade(Net().apply, *args, in_axes=(None, 1), **options)
    assert found.value.args == (options,)


@pytest.mark.parametrize("facade", CALLS)
def test_a_plan_runs_what_it_was_made_for_and_nothing_else(facade):
    call, plan = CALLS[facade], plan_of(facade)
    if facade in ("explain", "testing"):
        call(4, IMAGES, plan=plan)
    else:
        jax.eval_shape(lambda x: call(4, x, plan=plan), IMAGES)
    for channels, images, difference in (
        (5, IMAGES, "float32[4] in the plan and float32[5]"),
        (4, IMAGES[:, :12], "float32[2, 16, 6, 3] rows on axis 1 in the plan and float32[2, 12"),
    ):
        with pytest.raises(lrjax.PlanMismatchError, match=re.escape(difference)):
            call(channels, images, plan=plan)


@pytest.mark.parametrize("facade", ["linen module", "nnx function"])
def test_offload_reaches_the_row_loops_of_a_module(facade):
    def types(**options):
        return str(jax.make_jaxpr(lambda x: CALLS[facade](4, x, **options))(IMAGES))

    options = {"num_blocks": 4, "cuts": ["middle"]}
    assert "host" not in types(**options)
    assert "host" in types(**options, offload=True)


BAD_OPTIONS = [
    ({"num_blocks": "4"}, "num_blocks='4' must be an int"),
    ({"num_blocks": []}, "num_blocks is empty; give one number"),
    ({"num_blocks": (2, True)}, "num_blocks[1]=True must be an int"),
    ({"num_blocks": 17}, "num_blocks=17 is more than the 16 input rows"),
    (
        {"strategy": None},
        "strategy=None is unknown; choose one of 'column', 'checkpoint', 'stream'",
    ),
    ({"cuts": None}, "cuts=None must be a list of names"),
    ({"cuts": ["end"]}, "no value is named 'end'; names in fun are ['middle']"),
    ({"plan": "plan.json"}, "plan='plan.json' is no plan; give what lrjax.plan or lrjax.Plan.load"),
    ({"offload": 1, "cuts": 2}, "offload=1 must be True or False"),
    ({"offload": True}, "offload=True: there are no maps between segments without cuts"),
]


@pytest.mark.parametrize("facade", CALLS)
def test_bad_options_are_refused_before_anything_is_compiled(facade, monkeypatch):
    # The checker traces column first, by ``jax.jit``; it compiles what that was lowered to.
    owner, name = (jax.stages.Lowered, "compile") if facade == "testing" else (jax, "jit")
    monkeypatch.setattr(owner, name, lambda *args, **options: pytest.fail("something is compiled"))
    for options, message in BAD_OPTIONS:
        with pytest.raises(ValueError, match=re.escape(message)):
            CALLS[facade](4, IMAGES, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lrjax.rowwise(None, in_axes=1), "fun=None cannot be called"),
        (lambda: lrjax.explain(3, IMAGES, in_axes=1), "fun=3 cannot be called"),
        (lambda: lrjax.nnx.rowwise(NNXNet, in_axes=1), "fun=NNXNet is a class; give a module"),
        (lambda: lrjax.nnx.rowwise(Net(), in_axes=1), "is a Linen module; use lrjax.linen.rowwise"),
        (lambda: lrjax.linen.rowwise(3, in_axes=1), "target=3 is no Linen module"),
        (
            lambda: lrjax.linen.rowwise(Net, in_axes=1, methods=["run"]),
            "Net has no method 'run'; give names of methods that it has",
        ),
        (
            lambda: lrjax.linen.rowwise(Net(), in_axes=1).apply(variables(), x=IMAGES),
            "keyword arguments carry no rows; pass what carries rows by position",
        ),
        (
            lambda: lrjax.rowwise(lambda x, mode: x, in_axes=(1, None))(IMAGES, "train"),
            "args[1]='train' is no array; pass it as a keyword",
        ),
    ],
)
def test_what_is_no_function_module_or_array_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# --- num_blocks ----------------------------------------------------------------------------------


def pieces(kernels, image):
    """Wrap padding copies single rows of a map; a second output is two of its 19 rows."""
    image = convolve(image, kernels[0])
    wrapped = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
    return convolve(wrapped, kernels[1], "VALID"), image[:, 3:5]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    # By 2PS the convolution lags by two rows behind what the wrapped map is made of, so that the
    # loop makes 21 rows, as many at a time as in a loop of 19.
    ("strategy", "steps_of"),
    [("2ps", {2: 3, 7: 7, 19: 21}), ("overl", {2: 2, 7: 7, 19: 19})],
)
def test_pieces_of_maps_do_not_limit_the_blocks(strategy, steps_of):
    args = ([normal(3, 3, 2, 2), normal(3, 3, 2, 2)], normal(1, 19, 5, 2))
    assert_same_as_column(pieces, args, (None, 1), num_blocks=7, strategy=strategy)
    options = {"in_axes": (None, 1), "strategy": strategy}
    # One block more than the rows is one too many; in between, a step is ceil(rows / blocks) rows.
    for blocks, steps in steps_of.items():
        found = lrjax.explain(pieces, *args, num_blocks=blocks, **options)
        assert max(found.segments[0].passes[-1].steps) == steps
    with pytest.raises(ValueError, match="num_blocks=20 is more than the 19 output rows"):
        lrjax.explain(pieces, *args, num_blocks=20, **options)


def strided(kernels, image):
    for kernel, name in zip(kernels, "abc", strict=True):
        image = checkpoint_name(convolve(image, kernel, "SAME", (2, 1)), name)
    return image


@pytest.mark.parametrize(
    ("cuts", "where"),
    [
        (
            ["a", "b"],
            "in segment 1 of 0 to 2, between the cuts 'a' and 'b'; the largest allowed is 5",
        ),
        (["a"], "in segment 1 of 0 to 1, behind the cut 'a'; the largest allowed is 3 there"),
        (["b"], "in segment 0 of 0 to 1, up to the cut 'b'; the largest allowed is 5 there"),
        (3, "in segment 1 of 0 to 2; the largest allowed is 5 there: give one number per segment"),
        ((), "strategy '2ps' divides; the largest allowed is 3."),
    ],
)
def test_the_segment_that_limits_the_blocks_is_named(cuts, where):
    args = ([normal(3, 3, 1, 1)] * 3, normal(1, 20, 5, 1))
    for call in (
        lrjax.rowwise(strided, in_axes=(None, 1), num_blocks=8, strategy="2ps", cuts=cuts),
    ):
        with pytest.raises(ValueError, match=re.escape(where)):
            jax.eval_shape(call, *args)


# --- What is printed -----------------------------------------------------------------------------


def deep(kernels, image):
    for i, kernel in enumerate(kernels):
        image = checkpoint_name(jnp.sin(convolve(image, kernel)), f"map{i}")
        image = jnp.roll(image, i, 1)
    return image


def test_an_explanation_fits_a_screen_and_counts_what_fell_back():
    args = ([normal(3, 3, 1, 1)] * 20, normal(1, 40, 4, 1))
    names = [f"map{i}" for i in range(20)]
    found = lrjax.explain(deep, *args, in_axes=(None, 1), num_blocks=4, cuts=names)
    assert len(found.segments) == 21
    lines = str(found).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 120
    assert "operations by rows" in lines[0]
    assert "more: tables() has all of them" in str(found)
    assert re.search(
        r"\d\d x concatenate, as float\d\d\[1, 40, 4, 1\]: rows that are 40 rows", str(found)
    )
    assert found.tables().count("conv_general_dilated") > 20
    assert len(repr(found)) < 100


@pytest.mark.usefixtures("x64")
def test_what_is_computed_again_is_counted():
    def recomputed(fun, **options):
        args = ([normal(3, 3, 2, 2)] * 3, normal(1, 32, 5, 2))
        found = lrjax.explain(fun, *args, in_axes=(None, 1), num_blocks=4, **options)
        return found.segments[0].recomputed

    def maps(kernels, image):
        for kernel in kernels:
            image = jnp.sin(convolve(image, kernel))
        return image

    assert recomputed(maps) == pytest.approx(1, abs=0.15)  # some copies run late
    assert recomputed(maps, strategy="2ps") == 1
    assert recomputed(maps, strategy="overl") > 1.15  # the halos, in the backward pass
    assert recomputed(maps, strategy="column") == 0
    assert recomputed(lambda kernels, x: (maps(kernels, x) ** 2).sum()) < 0.3  # one pass


def test_an_explanation_counts_rows():
    """Two convolutions of three rows, in steps of eight or fewer."""

    def counted(strategy):
        found = lrjax.explain(
            lambda kernels, image: convolve(convolve(image, kernels[0]), kernels[1]),
            *([normal(3, 3, 2, 2)] * 2, normal(1, 32, 5, 2)),
            in_axes=(None, 1),
            num_blocks=4,
            strategy=strategy,
        )
        names = ("receptive_field", "halo", "rows_per_step", "line_buffer_rows", "recomputed_rows")
        return [
            [tuple(getattr(operation, name) for name in names) for operation in one.operations]
            for one in found.segments[0].passes
        ]

    # A row of lag is a step more: five steps of seven rows.
    once, again = [(3, 2, 7, 2, 0), (5, 2, 7, 0, 0)], [(3, 2, 7, 2, 32), (5, 2, 7, 0, 32)]
    assert counted("stream")[0] == once
    assert counted("2ps") == [once, again]
    assert counted("overl") == [once, [(3, 2, 10, 0, 38), (5, 2, 8, 0, 32)]]  # six rows of halos


def test_explain_shows_micro_batches_and_what_waits_on_the_host():
    choice = Choice("stream", 4, micro_batches=2)
    plan = plan_for(Net().apply, variables(), IMAGES, choice=choice)
    found = lrjax.explain(Net().apply, variables(), IMAGES, in_axes=(None, 1), plan=plan)
    assert found.segments[0].choice == choice
    assert "stream x 2 micro-batches" in str(found)
    assert "float32[1, 16, 6, 4]" in found.tables()  # one image of two
    found = CALLS["explain"](4, IMAGES, num_blocks=4, cuts=["middle"], offload=True)
    assert found.segments[0].hosted_bytes == 2 * 16 * 6 * 4 * 4
    assert "offload: 3.0 KiB given by 1 segment wait in the host's memory" in str(found)


def test_values_print_one_line_or_a_screen():
    plan = plan_of("rowwise")
    curve = lrjax.Frontier("cpu", ())
    found = CALLS["explain"](4, IMAGES, num_blocks=4)
    for value in (
        plan,
        plan.fingerprint,
        curve,
        found,
        found.segments[0],
        found.segments[0].passes,
    ):
        assert len(repr(value)) < 250, value
        assert "\n" not in repr(value)
    assert len(str(plan).splitlines()) == 3


# --- Refusals ------------------------------------------------------------------------------------


def test_a_refusal_blames_the_operation_and_not_the_axes():
    images = normal(1, 40, 4, 1)
    with pytest.raises(ValueError, match=r"local in rows: 2 x rev, as .*: rows are rev") as error:
        lrjax.rowwise(lambda x: (jnp.flip(x, 1), jnp.flip(x, (1, 2))), in_axes=1)(images)
    assert "in_axes" not in str(error.value)


# --- Imports -------------------------------------------------------------------------------------


def test_everything_the_documents_name_is_there_after_import_lrjax():
    """In a fresh process, without the libraries that only some of it needs."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(path.read_text() for path in documents)
    names = sorted(set(re.findall(r"(?<![\w/.])(?<!from )lrjax(?:\.[A-Za-z]\w*)+", text)))
    assert {"lrjax.linen.rowwise", "lrjax.memory.pictures.save_comparison_png"} <= set(names)
    script = f"""
import functools, sys, lrjax
assert not {{"flax", "matplotlib", "rich"}} & set(sys.modules), sorted(sys.modules)
assert {{"linen", "memory", "models", "nnx", "testing"}} <= set(dir(lrjax))
for name in {names}:
    functools.reduce(getattr, name.split(".")[1:], lrjax)
assert "matplotlib" not in sys.modules
assert not hasattr(lrjax, "nothing")
"""
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr


def test_an_explanation_is_of_the_gradient_that_is_asked_for():
    """A callback's argument has no gradient, the image may have one."""

    def called(kernel, scale, image):
        rate = jax.pure_callback(lambda s: np.float32(2) * s, scale, scale)
        return convolve(jnp.tanh(convolve(image, kernel)) * rate, kernel)

    args = normal(3, 3, 2, 2), jnp.float32(1), normal(1, 16, 5, 2)

    def backward_operations(wrt):
        options = {"in_axes": (None, None, 1), "num_blocks": 4}
        found = lrjax.explain(called, *args, wrt=wrt, **options).segments[0]
        return [operation.name for operation in found.passes[-1].operations]

    by_kernel, by_both = backward_operations(0), backward_operations([0, -1])
    assert len(by_both) == len(by_kernel) + 1  # the cotangents of the image
    with pytest.raises(ValueError, match="no argument 3 among 3; count from 0"):
        backward_operations(3)
    with pytest.raises(ValueError, match=r"[Pp]ure callbacks do not support"):
        backward_operations(1)
