"""``rowwise`` on several devices: ``shard_map``, and meshes with Auto and Explicit axes.

Devices are counted when JAX starts, so the cases run in a process of their own, with four.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lrjax
from lrjax.testing import Results, check
from several_devices import is_process_with, run_with

IS_CHILD = is_process_with(4)
in_child = pytest.mark.skipif(not IS_CHILD, reason="runs in the process with four devices")
pytestmark = pytest.mark.usefixtures("x64")

STRATEGIES = ("stream", "2ps", "overl")


@pytest.mark.skipif(IS_CHILD, reason="starts that process")
@pytest.mark.slow
def test_on_four_devices():
    run_with(4, __file__)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def convolve(image, weights):
    return lax.conv_general_dilated(
        image, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


PARAMS = {
    "w": normal(3, 3, 1, 2),
    "b": normal(2, seed=1) / 4,
    "v": normal(3, 1, 2, 1, seed=2),
    "rows": normal(1, 7, 4, 1, seed=5),
    "layers": normal(2, 3, 3, 1, 1, seed=6),
}
IMAGE = normal(4, 7, 4, 1, seed=3)


def loss(params, image):
    image = jax.nn.relu(convolve(image, params["w"]) + params["b"])
    image = lax.reduce_window(image, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return (convolve(image, params["v"]) ** 2).mean()


def smooth(params, image):
    return (jnp.tanh(convolve(image, params["w"]) + params["b"]) ** 2).sum()


def by_rows(fun, strategy, **options):
    return lrjax.rowwise(fun, in_axes=(None, 1), num_blocks=3, strategy=strategy, **options)


def assert_same(transform, fun, strategy, args=(PARAMS, IMAGE), **options):
    """Values, structure and types (shardings, what differs between devices) are column's."""
    found, expected = transform(by_rows(fun, strategy, **options))(*args), transform(fun)(*args)
    check(Results(found), Results(expected))
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
    assert any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(found))


# --- shard_map -----------------------------------------------------------------------------------


def synchronised(params, image):
    """BatchNorm with the statistics of all devices, and a name to cut at."""
    image = checkpoint_name(convolve(image, params["w"]), "middle")
    mean = lax.pmean(image.mean((0, 1, 2)), "d")
    variance = lax.pmean((image**2).mean((0, 1, 2)), "d") - mean**2
    image = jnp.tanh((image - mean) * lax.rsqrt(variance + 1e-3))
    return lax.pmean((convolve(image, params["v"]) ** 2).mean(), "d")


def of_many_kinds(params, image):
    """What comes to differ between devices in other ways than by a parameter."""
    image = image + params["rows"]  # rows that are the same on all devices
    keep = jax.random.bernoulli(jax.random.key(3), 0.7, image.shape)
    keep &= jnp.arange(image.shape[1])[None, :, None, None] != 2
    image = jnp.where(keep, image, 0.0) + jnp.broadcast_to(params["b"][0], image.shape)
    image = jax.image.resize(image, (image.shape[0], 13, 4, 1), "bilinear")
    image, _ = lax.scan(lambda x, w: (jnp.tanh(convolve(x, w)), None), image, params["layers"])
    return lax.psum((image**2).mean() * (1.0 + lax.axis_index("d")), "d")


def decayed(params, image):
    """A sum over rows, one pass of stream, beside what is the same on all devices."""
    return (convolve(image, params["w"]) ** 2).sum() + (params["w"] ** 2).sum()


def with_regulariser(params, image):
    """Results that are the same on all devices, because of a sum over them or anyway."""
    decay = sum((p**2).sum() for p in jax.tree.leaves(params))
    return lax.pmean(loss(params, image), "d") + decay, decay


AUTO = {"axis_types": (AxisType.Auto, AxisType.Auto)}


def mapped(step, *, out_specs=None, in_specs=None, **options):
    options = {"mesh": jax.make_mesh((2, 2), ("d", "e"), **AUTO), **options}
    in_specs = (P(), P("d")) if in_specs is None else in_specs
    out_specs = P() if out_specs is None else out_specs
    return jax.jit(jax.shard_map(step, in_specs=in_specs, out_specs=out_specs, **options))


def value_and_grad_of_mean(f):
    return jax.value_and_grad(lambda p, x: lax.pmean(f(p, x), "d"))


def own_gradients(f):
    """Every device's own: its parameters differ in type."""

    def step(params, image):
        own = jax.tree.map(lambda p: lax.pcast(p, "d", to="varying"), params)
        return jax.tree.map(lambda g: g[None], jax.grad(f)(own, image))

    return mapped(step, out_specs=P("d"))


def cotangents_of_their_own(f):
    """A loss that is one sum over rows, with another cotangent on every device."""
    return mapped(jax.grad(lambda p, x: lax.psum(f(p, x) * (1.0 + lax.axis_index("d")), "d")))


def penalty(f):
    def total(params, image):
        return lax.psum((jax.grad(f, argnums=1)(params, image) ** 2).sum(), "d")

    return mapped(jax.value_and_grad(total))


def pushed(f):
    return mapped(lambda p, x: lax.psum(jax.jvp(lambda p: f(p, x), (p,), (p,))[1], "d"))


def of_examples(f):
    return mapped(lambda p, x: lax.psum(jax.vmap(f, (None, 0))(p, x[:, None]).sum(), "d"))


def over_width(f):
    def step(params, image):
        return jax.grad(lambda p, x: lax.pmean(f(p, x), ("d", "e")))(params, image)

    return mapped(step, in_specs=(P(), P("d", None, "e")))


def with_integers(params, image):
    """Differentiated beside results that are integers."""
    return lax.pmean(loss(params, image), "d"), image.argmax(1)


SHARD_MAPPED = {
    "mean": (lambda f: mapped(value_and_grad_of_mean(f)), loss, {}),
    "unchecked": (
        lambda f: mapped(value_and_grad_of_mean(f), check_vma=False),
        synchronised,
        {},
    ),
    "barriers": (lambda f: mapped(jax.value_and_grad(f)), synchronised, {}),
    "cut": (lambda f: mapped(jax.grad(f)), synchronised, {"cuts": "middle"}),
    "group": (lambda f: mapped(jax.grad(f)), synchronised, {"cuts": [("middle",)]}),
    "many kinds": (lambda f: mapped(jax.grad(f)), of_many_kinds, {}),
    "regulariser": (lambda f: mapped(jax.grad(f, has_aux=True)), with_regulariser, {}),
    "integers": (
        lambda f: mapped(jax.grad(f, has_aux=True), out_specs=(P(), P("d"))),
        with_integers,
        {},
    ),
    "some axes": (
        lambda f: mapped(value_and_grad_of_mean(f), axis_names={"d"}, check_vma=True),
        loss,
        {},
    ),
    "width": (over_width, loss, {}),
    "own gradients": (own_gradients, loss, {}),
    "own cotangents": (cotangents_of_their_own, decayed, {}),
    "gradient penalty": (penalty, smooth, {}),
    "jvp": (pushed, loss, {}),
    "vmap": (of_examples, loss, {}),
}


@in_child
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SHARD_MAPPED)
def test_within_shard_map(strategy, name):
    transform, fun, options = SHARD_MAPPED[name]
    assert_same(transform, fun, strategy, **options)


@in_child
def test_a_parameter_is_summed_over_devices_once_behind_the_loops():
    """In no step, and not as a map that it was broadcast to."""
    step = mapped(jax.grad(lambda p, x: lax.pmean(by_rows(loss, "stream")(p, x), "d")))
    jaxpr = str(jax.make_jaxpr(step)({k: PARAMS[k] for k in "wbv"}, IMAGE))
    assert jaxpr.count("= scan[") == 1  # value and gradient in one pass, as without shard_map
    sums = [line for line in jaxpr.splitlines() if "= psum_invariant" in line]
    assert len(sums) == 4  # the loss, and each of its three parameters
    assert all("f64[3," in line or "f64[2]" in line or "f64[]" in line for line in sums)


@in_child
def test_pmap():
    def transform(f):
        step = jax.grad(lambda p, x: lax.pmean(f(p, x), "i"))
        return jax.pmap(step, axis_name="i", in_axes=(None, 0))

    assert_same(transform, loss, "stream", (PARAMS, IMAGE[:, None]))


@in_child
def test_shard_map_within():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

    def fun(params, image):
        mapped = jax.shard_map(jnp.tanh, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
        return (convolve(mapped(convolve(image, params["w"])), params["v"]) ** 2).sum()

    for strategy in ("stream", "2ps"):
        assert_same(lambda f: jax.jit(jax.grad(f)), fun, strategy)


# --- Meshes --------------------------------------------------------------------------------------

SPECS = {
    "batch": P("d"),
    "width": P(None, None, "e"),
    "both": P("d", None, "e"),
    "batch on all": P(("d", "e")),
}


def placed(kind, image_spec):
    mesh = jax.make_mesh((2, 2), ("d", "e"), axis_types=(kind, kind))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    return mesh, params, jax.device_put(IMAGE, NamedSharding(mesh, image_spec))


@in_child
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_arrays_on_a_mesh(kind, strategy, name):
    mesh, params, image = placed(kind, SPECS[name])
    with jax.set_mesh(mesh):
        assert_same(lambda f: jax.jit(jax.value_and_grad(f, argnums=(0, 1))), loss, strategy,
                    (params, image))  # fmt: skip


EXPLICIT = {
    "without set_mesh": (lambda f: jax.jit(jax.value_and_grad(f)), loss),
    "maps": (lambda f: jax.jit(f), lambda p, x: jax.nn.relu(convolve(x, p["w"]))),
    "gradient penalty": (
        lambda f: jax.jit(
            jax.grad(lambda p, x: (jax.grad(f, argnums=1)(p, x) ** 2).sum(), argnums=(0, 1))
        ),
        smooth,
    ),
    "jvp": (lambda f: jax.jit(lambda p, x: jax.jvp(f, (p, x), (p, x))), smooth),
    "scan": (
        lambda f: jax.jit(
            lambda p, x: lax.scan(
                lambda p, _: (jax.tree.map(lambda a, g: a - g, p, jax.grad(f)(p, x)), None),
                p,
                length=2,
            )[0]
        ),
        loss,
    ),
    "keyword array": (
        lambda f: jax.jit(jax.grad(lambda p, x: f({}, x, params=p))),
        lambda _, x, params: loss(params, x),
    ),
}


@in_child
@pytest.mark.parametrize("name", EXPLICIT)
def test_under_transformations_on_explicit_axes(name):
    _, params, image = placed(AxisType.Explicit, P("d"))
    transform, fun = EXPLICIT[name]
    assert_same(transform, fun, "stream", (params, image))


@in_child
def test_rows_divided_among_devices_are_refused():
    mesh, params, _ = placed(AxisType.Explicit, P())
    image = jax.device_put(IMAGE[:, :6], NamedSharding(mesh, P(None, "d")))
    with pytest.raises(ValueError, match=r"args\[1\]: its row axis 1 is divided .* 'd'.*reshard"):
        jax.eval_shape(by_rows(loss, "stream"), params, image)


@in_child
def test_closures_over_explicit_arrays_are_refused():
    _, params, image = placed(AxisType.Explicit, P("d"))
    row_fun = lrjax.rowwise(lambda x: loss(params, x), in_axes=1)
    with pytest.raises(ValueError, match="Explicit axes; give it to fun as an argument"):
        jax.eval_shape(row_fun, image)


# --- What is said of them ------------------------------------------------------------------------


@in_child
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_plan_of_one_device_runs_on_all(check_vma):
    params, structs = {k: PARAMS[k] for k in "wbv"}, jax.ShapeDtypeStruct((1, 7, 4, 1), np.float64)
    plan = lrjax.plan(loss, params, structs, in_axes=(None, 1), budget="1GiB")
    row_fun = lrjax.rowwise(loss, in_axes=(None, 1), plan=plan)

    def step(f):
        mean = jax.grad(lambda p, x: lax.pmean(f(p, x), ("d", "e")))
        return mapped(mean, in_specs=(P(), P(("d", "e"))), check_vma=check_vma)

    found, expected = (step(f)(params, IMAGE) for f in (row_fun, loss))
    check(Results(found), Results(expected))


@in_child
def test_explain_where_axes_are_explicit():
    mesh, params, image = placed(AxisType.Explicit, P("d"))
    plain = str(lrjax.explain(loss, PARAMS, IMAGE, in_axes=(None, 1), num_blocks=3))
    assert str(lrjax.explain(loss, params, image, in_axes=(None, 1), num_blocks=3)) == plain
    with jax.set_mesh(mesh):
        assert str(lrjax.explain(loss, params, image, in_axes=(None, 1), num_blocks=3)) == plain


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(2, (3, 3), use_bias=False, dtype=x.dtype, param_dtype=x.dtype)(x)
        x = nn.BatchNorm(False, dtype=x.dtype, param_dtype=x.dtype)(x)
        return nn.Conv(1, (3, 3), dtype=x.dtype, param_dtype=x.dtype)(nn.relu(x))


@in_child
def test_a_module_on_explicit_axes():
    mesh, _, image = placed(AxisType.Explicit, P("d"))
    model = Network()
    variables = jax.device_put(model.init(jax.random.key(0), IMAGE), NamedSharding(mesh, P()))

    def step(model):
        def total(variables, image):
            out, updated = model.apply(variables, image, mutable=["batch_stats"])
            return (out**2).sum(), updated

        return jax.jit(jax.grad(total, has_aux=True))

    row_model = lrjax.linen.rowwise(model, in_axes=1, num_blocks=3)
    with jax.set_mesh(mesh):
        found, expected = (step(m)(variables, image) for m in (row_model, model))
    check(Results(found), Results(expected))
