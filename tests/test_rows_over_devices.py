"""Rows of one image over the devices of a mesh axis: exact, and with few collectives.

Devices are counted when JAX starts, so the cases run in a process of their own, with eight.
"""

import re
from collections import Counter

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lrjax
from lrjax.strategies import MicroBatches
from lrjax.testing import Results, assert_same_as_column, check
from marks import slow
from several_devices import is_process_with, run_with

IS_CHILD = is_process_with(8)
in_child = pytest.mark.skipif(not IS_CHILD, reason="runs in the process with eight devices")
pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.skipif(IS_CHILD, reason="starts that process")
@pytest.mark.parametrize("marks", ["not slow", *slow("slow")])
def test_on_eight_devices(marks):
    run_with(8, __file__, marks)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def convolve(image, kernel, stride=1, padding="SAME"):
    return lax.conv_general_dilated(
        image, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def pooled(image, padding="VALID"):
    return lax.reduce_window(image, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), padding)


def normalised(image, axes):
    mean, variance = image.mean(axes, keepdims=True), image.var(axes, keepdims=True)
    return (image - mean) * lax.rsqrt(variance + 1e-3)


def image_of(height, batch=1):
    return normal(batch, height, 6, 1, seed=3)


PARAMS = {
    "w": normal(3, 3, 1, 2),
    "b": normal(2, seed=1) / 4,
    "v": normal(3, 3, 2, 1, seed=2),
    "u": normal(3, 3, 2, 2, seed=4) / 3,
    "mix": normal(2, 2, seed=5),
}


def chain(params, image):
    image = jax.nn.relu(convolve(image, params["w"]) + params["b"])
    return (convolve(pooled(image), params["v"]) ** 2).mean()


def batch_norm(params, image):
    image = checkpoint_name(normalised(convolve(image, params["w"]), (0, 1, 2)), "middle")
    return jnp.tanh(convolve(image, params["v"], 2))


def group_norm(params, image):
    image = normalised(convolve(image, params["w"]), (1, 2, 3))
    return jnp.tanh(convolve(image, params["v"], 1, "VALID"))


def squeeze_and_excite(params, image):
    image = convolve(image, params["w"])
    scale = jax.nn.sigmoid(jnp.tanh(image.mean((1, 2))) @ params["mix"])
    return convolve(image * scale[:, None, None, :], params["v"], 2)


def unet(params, image):
    fine = jnp.tanh(convolve(image, params["w"]))
    coarse = jnp.tanh(convolve(pooled(fine, "SAME"), params["u"]))
    shape = (1, 2 * coarse.shape[1], 2 * coarse.shape[2], 2)
    raised = jax.image.resize(coarse, shape, "nearest")[:, : fine.shape[1], : fine.shape[2]]
    return convolve(fine + raised, params["v"])


def transposed(params, image):
    image = jnp.tanh(convolve(image, params["w"], 2))
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_transpose(image, params["v"], (2, 2), "SAME", dimension_numbers=numbers)


def dense_head(params, image):
    image = jnp.tanh(convolve(image, params["w"], 2))
    weights = jnp.sin(jnp.arange(image[0].size * 3.0).reshape(-1, 3))
    return image.reshape(image.shape[0], -1) @ weights


def dropout(params, image):
    image = convolve(image, params["w"])
    keep = jax.random.bernoulli(jax.random.key(1), 0.6, image.shape)
    return convolve(image * keep, params["v"])


def resized(params, image):
    image = convolve(image, params["w"])
    shape = (1, image.shape[1] * 3 // 2, image.shape[2], 2)
    return convolve(jax.image.resize(image, shape, "bilinear"), params["v"])


def of_bytes(params, image):
    pixels = jnp.clip(image * 40 + 128, 0, 255).astype(jnp.uint8)
    return convolve(pixels.astype(image.dtype) / 255, params["w"])


def deep(params, image):
    """Strides of 16 rows in all: shares of 16 rows, or more."""
    image = convolve(image, params["w"], 2)
    for _ in range(3):
        image = convolve(image, params["u"], 2)
    return jnp.tanh(image) + image.mean()


def mirrored(params, image):
    edges = ((0, 0), (2, 2), (1, 1), (0, 0))
    image = jnp.pad(convolve(image, params["w"]), edges, mode="reflect")
    return convolve(image, params["v"], 1, "VALID")


def far_reaching(params, image):
    """A halo of 24 rows, which several devices own."""
    rows = lax.conv_general_dilated(
        image, params["w"], (1, 1), ((24, 24), (1, 1)), rhs_dilation=(24, 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    return convolve(jnp.tanh(rows), params["v"])


def extremes(params, image):
    image = convolve(image, params["w"])
    peaks = image.max((1, 2)), image.min(1), jax.nn.logsumexp(image, axis=(1, 2))
    return *peaks, jnp.any(image > 1, axis=(1, 2)), jnp.all(image > -9, (1, 2)), image.argmax(2)


def two_rates(params, image):
    """Rows of one argument that are read at two rates, and a parameter with rows."""
    rows = jnp.sin(jnp.arange(image.shape[1] * 1.0))[None, :, None, None] * params["b"][0]
    half = convolve(image, params["w"], 2)
    return convolve(image + rows, params["w"]), half + image[:, : half.shape[1], :3]


def product(params, image):
    return convolve(1 + image / 100, params["w"] / 9).prod((1, 2))


NETWORKS = (
    chain, batch_norm, group_norm, squeeze_and_excite, unet, transposed, dense_head, dropout,
    resized, of_bytes, deep, mirrored, far_reaching, extremes, two_rates, product,
)  # fmt: skip
FAST = {
    ("stream", 8, batch_norm, 64),
    ("stream", 8, unet, 19),
    ("stream", 8, far_reaching, 27),
    ("stream", 3, two_rates, 25),
    ("stream", 2, extremes, 33),
    ("2ps", 8, batch_norm, 19),
    ("2ps", 3, far_reaching, 33),
    ("overl", 8, far_reaching, 19),
    ("overl", 2, squeeze_and_excite, 33),
}
# Devices and rows: shares of several blocks, of two or three rows, and all rows on one device.
SHARES = ((3, 9), (8, 19), (8, 64))
SLOW = {
    (strategy, devices, network, height)
    for strategy, shares in {
        "stream": (*SHARES, (1, 8)), "2ps": SHARES, "overl": SHARES,
    }.items()
    for network in NETWORKS
    for devices, height in shares
}  # fmt: skip


def mesh_of(devices, kind=AxisType.Auto):
    return jax.make_mesh((devices,), ("rows",), (kind,), devices=jax.devices()[:devices])


def over_devices(devices=8, **options):
    return {"mesh": mesh_of(devices), "row_mesh_axis": "rows", **options}


def cases():
    return [*_cases()]


def _cases():
    for case in sorted(FAST | SLOW, key=lambda c: (c[0], c[1], c[2].__name__, c[3])):
        strategy, devices, network, height = case
        name = f"{strategy}-{devices}-{network.__name__}-{height}"
        yield pytest.param(*case, id=name, marks=[] if case in FAST else pytest.mark.slow)


@in_child
@pytest.mark.parametrize(("strategy", "devices", "network", "height"), cases())
def test_same_as_column(strategy, devices, network, height):
    if strategy != "stream" and network is product:
        pytest.skip("one operation, whose product over rows has no gradient block by block")
    most = 1 if height < 24 or network is deep else 3
    expected = None
    for num_blocks in {1, most}:
        expected = assert_same_as_column(
            network, (PARAMS, image_of(height)), (None, 1), num_blocks=num_blocks,
            strategy=strategy, expected=expected, **over_devices(devices),
        )  # fmt: skip


# --- What is compiled ----------------------------------------------------------------------------

COLLECTIVE = re.compile(
    r"= .* (all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter)(-start)?\("
)
CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|(?:true|false)_computation|branch_computations)=\{?%?([\w.-]+)"
)


def collectives(text):
    """How many collectives a program has of each kind, those in loops by themselves."""
    computations, lines = {}, []
    for line in text.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            lines = computations[found[1]] = []
        lines.append(line)
    waiting = re.findall(r"body=%?([\w.-]+)", text)
    in_loops = set()
    while waiting:
        name = waiting.pop()
        if name not in in_loops:
            in_loops.add(name)
            waiting += CALLED.findall("\n".join(computations[name]))
    return Counter(
        f"{found[1]}{' in a loop' * (name in in_loops)}"
        for name, lines in computations.items()
        for line in lines
        if (found := COLLECTIVE.search(line))
    )


def compiled(fun, height, argnums=0, **options):
    mesh = mesh_of(8)
    row_fun = lrjax.rowwise(fun, in_axes=(None, 1), **over_devices(), **options)
    spec = P(None, "rows") if height % 8 == 0 else P()
    image = jax.ShapeDtypeStruct((1, height, 6, 1), np.float64, sharding=NamedSharding(mesh, spec))

    def total(params, image):
        return sum((x**2).sum() for x in jax.tree.leaves(row_fun(params, image)))

    return jax.jit(jax.grad(total, argnums)).lower(PARAMS, image).compile().as_text()


@in_child
@pytest.mark.parametrize(
    ("fun", "height", "options", "permutes"),
    [
        (chain, 128, {}, 2),  # one pass that reads the image, above and below
        (chain, 131, {}, 2),
        (far_reaching, 64, {}, 2 * 4 + 2),  # the image's 25 rows, 8 of a device; a cotangent's
        (chain, 128, {"strategy": "2ps"}, 2),
        (chain, 128, {"strategy": "overl", "argnums": (0, 1)}, 4),  # cotangents go back
    ],
)
def test_halos_are_fetched_before_the_loops_and_sums_added_up_behind_them(
    fun, height, options, permutes
):
    found = collectives(compiled(fun, height, num_blocks=3, **options))
    assert found["collective-permute"] == permutes
    assert found["all-reduce"] >= 1
    assert set(found) == {"collective-permute", "all-reduce"}  # none in a loop, no all-gather


@in_child
def test_a_program_with_a_collective_in_a_loop_is_noticed():
    def step(x):
        return lax.fori_loop(0, 3, lambda _, y: lax.psum(jnp.sin(y), "rows") / 8, x)

    mapped = jax.shard_map(
        step, mesh=mesh_of(8), in_specs=P("rows"), out_specs=P("rows"), check_vma=False
    )
    text = jax.jit(mapped).lower(jnp.ones(16)).compile().as_text()
    assert collectives(text)["all-reduce in a loop"] == 1


# --- Together with all else ----------------------------------------------------------------------


def of_segments(params, image):
    image = checkpoint_name(jnp.tanh(convolve(image, params["w"])), "first")
    image = checkpoint_name(jnp.tanh(convolve(image, params["u"], 2)), "second")
    image = checkpoint_name(jnp.tanh(convolve(image, params["u"])), "third")
    return convolve(image, params["v"])


SEGMENTED = {
    "kept": {"cuts": ("first", "second")},
    "group": {"cuts": [("first", "second"), "third"]},
    "mixed": {
        "cuts": ("first", "second", "third"),
        "strategy": ("2ps", "checkpoint", "stream", "column"),
        "num_blocks": (2, None, 2, None),
    },
    "selective": {
        "cuts": ("first", "second", "third"),
        "strategy": ("selective", "stream", "selective-narrow", "column"),
        "num_blocks": (None, 2, None, None),
    },
    "micro-batches": {"strategy": MicroBatches("stream", 2)},
    "micro-batches of 2ps": {"strategy": MicroBatches("2ps", 2)},
}


@in_child
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("mixed", "selective") else pytest.mark.slow)
        for name in SEGMENTED
    ],
)
def test_with_cuts_groups_and_micro_batches(name):
    options = {"num_blocks": 2, **SEGMENTED[name]}
    args = PARAMS, image_of(37, batch=2)
    assert_same_as_column(of_segments, args, (None, 1), **over_devices(3, **options))


TRANSFORMATIONS = {
    "vmap": lambda f: lambda p, x: jax.vmap(f, (None, 0))(p, x[:, None]),
    "jvp": lambda f: lambda p, x: jax.jvp(f, (p, x), (p, x))[1],
    "gradient penalty": lambda f: jax.grad(
        lambda p, x: (jax.grad(lambda x: (f(p, x) ** 2).sum())(x) ** 2).sum()
    ),
    "checkpoint": jax.checkpoint,
}


FAST_TRANSFORMATIONS = ("stream", "vmap"), ("2ps", "jvp")


@in_child
@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        pytest.param(
            strategy,
            name,
            marks=[]
            if (strategy, name) in {("stream", "vmap"), ("2ps", "jvp")}
            else pytest.mark.slow,
        )
        for strategy in ("stream", "2ps", "overl")
        for name in TRANSFORMATIONS
    ],
)
def test_under_transformations(name, strategy):
    transform = TRANSFORMATIONS[name]
    options = over_devices(2, strategy=strategy, num_blocks=2)
    row_fun = lrjax.rowwise(batch_norm, in_axes=(None, 1), **options)
    args = PARAMS, image_of(13, batch=2)
    found, expected = (jax.jit(transform(f))(*args) for f in (row_fun, batch_norm))
    check(Results(found), Results(expected))


def fine_tuned(trained, frozen, image):
    for kernel in (*frozen, *trained):
        image = jnp.tanh(convolve(image, kernel))
    return image


@in_child
@pytest.mark.parametrize(
    ("strategy", "height"),
    [("2ps", 19), *(pytest.param(one, 24, marks=pytest.mark.slow) for one in ("overl", "stream"))],
)
def test_layers_that_are_not_trained(strategy, height):
    kernels = [normal(3, 3, 4, 4, seed=i) / 6 for i in range(7)]
    args = kernels[6:], kernels[:6], normal(2, height, 5, 4)
    options = over_devices(3, strategy=strategy, num_blocks=2)
    for argnums in [(0,), (0, 2)]:
        assert_same_as_column(fine_tuned, args, (None, None, 1), argnums=argnums, **options)


@in_child
@pytest.mark.slow
def test_outside_of_jit():
    row_fun = lrjax.rowwise(chain, in_axes=(None, 1), num_blocks=2, **over_devices(2))
    args = PARAMS, image_of(12)
    found, expected = (jax.value_and_grad(f)(*args) for f in (row_fun, chain))
    check(Results(found), Results(expected))


def pole_at_one(params, image):
    """Rows that a device does not fetch hold ones."""
    return (params["w"][0, 0, 0, 0] * jnp.log(jnp.abs(image - 1))).mean()


def not_a_number_in_an_unread_row(params, image):
    is_last = jnp.arange(image.shape[1])[:, None, None] == image.shape[1] - 1
    image = jnp.where(is_last, jnp.nan, image)[:, :-1]
    return (pooled(jnp.tanh(convolve(image, params["w"], 1, "VALID"))) ** 2).mean()


@in_child
@pytest.mark.parametrize("fun", [pole_at_one, not_a_number_in_an_unread_row])
@pytest.mark.parametrize("strategy", ["2ps", pytest.param("overl", marks=pytest.mark.slow)])
def test_gradients_are_finite_where_columns_are(strategy, fun):
    for devices, height in ((2, 9), (3, 33)):
        options = over_devices(devices, strategy=strategy, num_blocks=2)
        assert_same_as_column(fun, (PARAMS, image_of(height) / 4), (None, 1), **options)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(2, (3, 3), use_bias=False, dtype=x.dtype, param_dtype=x.dtype)(x)
        x = nn.BatchNorm(False, dtype=x.dtype, param_dtype=x.dtype)(x)
        return nn.Conv(1, (3, 3), dtype=x.dtype, param_dtype=x.dtype)(nn.relu(x))


@in_child
def test_a_linen_module_and_its_statistics():
    model, image = Network(), image_of(21)
    variables = model.init(jax.random.key(0), image)

    def results(model):
        def total(variables, image):
            out, updated = model.apply(variables, image, mutable=["batch_stats"])
            return (out**2).sum(), updated

        return Results(jax.jit(jax.grad(total, has_aux=True))(variables, image))

    row_model = lrjax.linen.rowwise(model, in_axes=1, num_blocks=2, **over_devices(3))
    check(results(row_model), results(model))


@in_child
def test_an_nnx_module():
    model = nnx.Conv(1, 2, (3, 3), rngs=nnx.Rngs(0), dtype=np.float64, param_dtype=np.float64)
    run = lrjax.nnx.rowwise(model, in_axes=1, num_blocks=2, **over_devices(3))
    check(Results(run(image_of(21))), Results(model(image_of(21))))


# --- Data and rows -------------------------------------------------------------------------------


def both(kind):
    return jax.make_mesh((2, 4), ("data", "rows"), (kind, kind))


SPECS = {
    "both": P("data", "rows"),
    "data": P("data"),
    "rows": P(None, "rows"),
    "batch on all": P(("data", "rows")),
}


DIVIDED = [
    *((kind, "stream", name) for kind in (AxisType.Auto, AxisType.Explicit) for name in SPECS),
    *((AxisType.Auto, strategy, "rows") for strategy in ("2ps", "overl")),
    *((AxisType.Explicit, strategy, "batch on all") for strategy in ("2ps", "overl")),
]
FAST_DIVIDED = (AxisType.Auto, "stream", "both"), (AxisType.Explicit, "stream", "both")


@in_child
@pytest.mark.parametrize(
    ("kind", "strategy", "name"),
    [pytest.param(*one, marks=[] if one in FAST_DIVIDED else pytest.mark.slow) for one in DIVIDED],
)
def test_batch_and_rows_divided_by_jit_alone(kind, strategy, name):
    mesh = both(kind)
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    image = jax.device_put(image_of(32, batch=8), NamedSharding(mesh, SPECS[name]))
    options = {"num_blocks": 2, "row_mesh_axis": "rows"}
    row_fun = lrjax.rowwise(batch_norm, in_axes=(None, 1), strategy=strategy, **options)

    def step(f):
        def total(params, image):
            out = f(params, image)
            return (out**2).sum(), out

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))

    with jax.set_mesh(mesh):
        found = step(row_fun)(params, image)
    check(Results(found), Results(step(batch_norm)(PARAMS, image_of(32, batch=8))))
    if kind == AxisType.Explicit:  # the types that column would have, and rows divided
        (param_bars, image_bars), out = found
        assert jax.typeof(image_bars) == jax.typeof(image)
        assert jax.tree.map(jax.typeof, param_bars) == jax.tree.map(jax.typeof, params)
        assert jax.typeof(out).sharding.spec[1] == "rows"


@in_child
@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "strategy",
    ["stream", *(pytest.param(one, marks=pytest.mark.slow) for one in ("2ps", "overl"))],
)
def test_rows_divided_within_shard_map_over_the_batch(strategy, check_vma):
    options = {"num_blocks": 2, "row_mesh_axis": "rows", "strategy": strategy}
    row_fun = lrjax.rowwise(group_norm, in_axes=(None, 1), **options)

    def step(f):
        def total(params, image):
            return lax.pmean((f(params, image) ** 2).sum(), "data")

        return jax.jit(
            jax.shard_map(
                jax.value_and_grad(total),
                mesh=both(AxisType.Auto),
                in_specs=(P(), P("data")),
                out_specs=P(),
                axis_names={"data"},
                check_vma=check_vma,
            )
        )

    args = PARAMS, image_of(22, batch=4)
    check(Results(step(row_fun)(*args)), Results(step(group_norm)(*args)))


@in_child
def test_parameters_divided_by_their_own_sharding():
    mesh = both(AxisType.Auto)
    spread = {k: P(*[None] * (v.ndim - 1), "data") for k, v in PARAMS.items() if v.shape[-1] == 2}
    params = {
        k: jax.device_put(v, NamedSharding(mesh, spread.get(k, P()))) for k, v in PARAMS.items()
    }
    row_fun = lrjax.rowwise(chain, in_axes=(None, 1), num_blocks=2, mesh=mesh, row_mesh_axis="rows")
    found, expected = (
        jax.jit(jax.grad(f))(p, image_of(32)) for f, p in ((row_fun, params), (chain, PARAMS))
    )
    check(Results(found), Results(expected))


# --- Bad input -----------------------------------------------------------------------------------

TALL = jax.ShapeDtypeStruct((1, 64, 6, 1), np.float64)


def of_other_axes():
    return jax.make_mesh((4, 2), ("data", "rows"), (AxisType.Auto,) * 2)


REFUSED = {
    "no mesh": ({"row_mesh_axis": "rows"}, "there is no mesh; give mesh="),
    "no such axis": ({**over_devices(1), "row_mesh_axis": "columns"}, r"it has \('rows',\)"),
    "no axis": ({"mesh": mesh_of(1)}, "name the axis along which rows are divided"),
    "no mesh at all": ({**over_devices(1), "mesh": "rows"}, "is no mesh; give what jax.make_mesh"),
    "two axes": ({**over_devices(1), "row_mesh_axis": ("rows", "data")}, "the name of one mesh"),
    "offload": ({**over_devices(1), "offload": True, "cuts": 2}, "stay on the devices"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_fit(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lrjax.rowwise(chain, in_axes=(None, 1), **options), PARAMS, TALL)


@in_child
@pytest.mark.parametrize(
    ("height", "options", "message"),
    [
        (7, {}, "7 rows cannot be divided among 8 devices; use a mesh with at most 7"),
        (64, {"num_blocks": 9}, "num_blocks=9 is more than the 8 input rows .* each of 8 devices"),
    ],
)
def test_too_few_rows(height, options, message):
    row_fun = lrjax.rowwise(chain, in_axes=(None, 1), **over_devices(**options))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(row_fun, PARAMS, jax.ShapeDtypeStruct((1, height, 6, 1), np.float64))


@in_child
def test_another_mesh_than_the_one_at_hand():
    row_fun = lrjax.rowwise(chain, in_axes=(None, 1), **over_devices())
    with jax.set_mesh(of_other_axes()), pytest.raises(ValueError, match="leave mesh out"):
        jax.eval_shape(row_fun, PARAMS, TALL)


@in_child
def test_rows_that_shard_map_divides_already():
    row_fun = lrjax.rowwise(chain, in_axes=(None, 1), **over_devices())
    specs = {"in_specs": (P(), P(None, "rows")), "out_specs": P()}
    mapped = jax.shard_map(row_fun, mesh=mesh_of(8), **specs)
    with pytest.raises(ValueError, match="leave the axis out of axis_names"):
        jax.eval_shape(mapped, PARAMS, TALL)


@in_child
def test_rows_divided_along_another_axis():
    mesh = of_other_axes()
    image = jax.device_put(image_of(64), NamedSharding(mesh, P(None, "data")))
    options = {"mesh": mesh, "row_mesh_axis": "rows"}
    with pytest.raises(ValueError, match=r"args\[1\]: its row axis 1 is divided .* 'data'"):
        lrjax.rowwise(chain, in_axes=(None, 1), **options)(PARAMS, image)


# --- What is said of them ------------------------------------------------------------------------


@in_child
def test_explain_tells_of_the_devices():
    options = {"in_axes": (None, 1), "num_blocks": 4}
    found = lrjax.explain(far_reaching, PARAMS, TALL, **options, **over_devices())
    plain = lrjax.explain(far_reaching, PARAMS, TALL, **options)
    assert "among 8 devices, along the mesh axis 'rows'" in str(found)
    assert "at most 25 rows fetched of each neighbour" in str(found)
    assert "devices" not in str(plain)
    again = [sum(o.recomputed_rows for o in e.segments[0].passes[0].operations)
             for e in (plain, found)]  # fmt: skip
    assert again == [0, 7 * 2 * 2]  # a convolution and tanh, on both sides of seven boundaries


@in_child
def test_a_profile_for_several_devices():
    def step(params, image):
        row_fun = lrjax.rowwise(chain, in_axes=(None, 1), num_blocks=2, row_mesh_axis="rows")
        return jax.grad(row_fun)(params, image)

    specs = {"mesh_shape": {"rows": 8}, "in_specs": (P(), P(None, "rows"))}
    args = PARAMS, jax.ShapeDtypeStruct((1, 512, 64, 1), np.float64)
    found = lrjax.memory.profile(step, *args, target="cpu", **specs)
    alone = lrjax.memory.profile(jax.grad(chain), *args, target="cpu")
    assert found.devices == 8
    assert found.argument_bytes < alone.argument_bytes / 4
    kinds = Counter(one.kind for one in found.collectives)
    assert kinds == {"collective-permute": 2, "all-reduce": kinds["all-reduce"]}
    assert not any(one.is_in_loop for one in found.collectives)
    halo = next(one for one in found.collectives if one.kind == "collective-permute")
    assert halo.bytes == 5 * 64 * 8  # five rows, of a width of 64, in float64
    assert "collective-permute: 2" in str(found)
    assert lrjax.memory.MemoryProfile.from_json(found.to_json()) == found


@in_child
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh_shape": {"rows": 9}}, "wants 9 devices and there are 8"),
        ({"mesh_shape": {}}, "must name axes and sizes"),
        ({"in_specs": (P(), P())}, "without mesh_shape"),
        ({"mesh_shape": {"rows": 8}, "in_specs": (P(),)}, "one entry for each of 2 arguments"),
        ({"mesh_shape": {"rows": 8}, "in_specs": (P(), P("columns"))}, "does not fit the mesh"),
        ({"mesh_shape": {"rows": 2}, "target": "tpu-v5e"}, "is a TPU, .*choose a GPU"),
    ],
)
def test_profiles_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        lrjax.memory.profile(chain, PARAMS, TALL, **{"target": "cpu", **options})
