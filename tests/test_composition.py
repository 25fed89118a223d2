"""``rowwise`` under and around JAX's other transformations: a table of cases, each against column.

A case turns a function of parameters and images into another, by whatever transformations: of the
row-wise function and of the function itself, all that they give must be equal. Devices are in
``test_meshes``.
"""

import dataclasses
import functools
import gc
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import checkify

import lrjax
from lrjax.testing import Results, check

pytestmark = pytest.mark.usefixtures("x64")

STRATEGIES = ("stream", "2ps", "overl", "column")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def convolve(image, weights):
    return lax.conv_general_dilated(
        image, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def features(params, image):
    """A map, from convolutions, a ReLU and a pool."""
    image = jax.nn.relu(convolve(image, params["w"]) + params["b"])
    image = lax.reduce_window(image, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return convolve(image, params["v"])


def loss(params, image):
    return (features(params, image) ** 2).mean()


def smooth(params, image):
    """A scalar with derivatives of every order, behind a barrier."""
    image = jnp.tanh(convolve(image, params["w"]) + params["b"])
    image = checkpoint_name(image, "middle")
    image = (image - image.mean((0, 1, 2))) * jnp.sin(params["b"])
    return (jnp.tanh(convolve(image, params["v"])) ** 2).sum()


def synchronised(params, image):
    """A loss with statistics over the mapped axis ``i``."""
    image = convolve(image, params["w"])
    mean = lax.pmean(image.mean((0, 1, 2)), "i")
    return (convolve(jnp.tanh(image - mean), params["v"]) ** 2).mean()


def spectrum(params, image):
    wave = lax.complex(convolve(image, params["w"]), convolve(image**2, params["w"]))
    return (wave * jnp.exp(1j * params["b"])).sum((1, 2)) + 1


def decisions(params, image):
    found = features(params, image)
    return found.argmax(2), found > 0, (found > 0).sum(), jnp.round(found).astype(np.int8)


def dropped(params, image, key):
    keep = jax.random.bernoulli(key, 0.7, image.shape)
    return loss(params, jnp.where(keep, image, 0.0))


PARAMS = {"w": normal(3, 3, 1, 2), "b": normal(2, seed=1) / 4, "v": normal(3, 1, 2, 1, seed=2)}
IMAGE = normal(2, 7, 4, 1, seed=3)
IMAGES = np.stack([IMAGE, 2 * IMAGE + 1, -IMAGE])
TANGENTS = jax.tree.map(lambda p: normal(*p.shape, seed=7), PARAMS)


def twice(params):
    return jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)


def of_bias(f, params, image):
    return lambda b: f({**params, "b": b}, image)


def with_own_rule(f):
    """A function of a user's whose own derivative calls ``f``."""

    @jax.custom_vjp
    def call(params, image):
        return f(params, image)

    def forward(params, image):
        value, pull = jax.vjp(f, params, image)
        return value, pull

    call.defvjp(forward, lambda pull, ct: pull(2 * ct))
    return call


def penalty(f):
    return lambda p, x: (jax.grad(f, argnums=1)(p, x) ** 2).sum()


def product(f):
    """A Hessian times a vector, forward over reverse."""
    return lambda p, x: jax.jvp(lambda p: jax.grad(f)(p, x), (p,), (TANGENTS,))


def trained(f):
    def step(params, image):
        value, grads = jax.value_and_grad(f)(params, image)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), value

    return lambda p, x: lax.scan(step, p, x)


def descended(f):
    def body(carry):
        step, params, image = carry
        grads = jax.grad(f)(params, image)
        return step + 1, jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), image

    return lambda p, x: lax.while_loop(lambda carry: carry[0] < 3, body, (0, p, x))


def solved(f):
    """Newton's step by conjugate gradients on Hessian-vector products."""

    def step(params, image):
        def gradient(w):
            return jax.grad(lambda w: f({**params, "w": w}, image) + 50 * (w**2).sum())(w)

        def curvature(v):
            return jax.jvp(gradient, (params["w"],), (v,))[1]

        return jax.scipy.sparse.linalg.cg(curvature, params["w"], maxiter=3)[0]

    return step


def nested(f, **options):
    options = {"in_axes": (None, 1), "num_blocks": 2, **options}
    return jax.grad(lrjax.rowwise(lambda p, x: f(p, jnp.sin(x)) + f(p, x[:, :5]), **options))


@dataclasses.dataclass(frozen=True)
class Case:
    """``transform`` gives a function of ``args`` from the (row-wise) function ``fun``."""

    transform: Callable[[Any], Any]
    fun: Any = loss
    args: tuple[Any, ...] = (PARAMS, IMAGE)
    strategies: tuple[str, ...] = ("stream", "2ps")  # at every change; all others are slow
    tolerance: float | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of rowwise


ONE = ("stream",)
CASES = {
    # Derivatives
    "value_and_grad": Case(lambda f: jax.value_and_grad(f, argnums=(0, 1)), strategies=STRATEGIES),
    "has_aux": Case(
        lambda f: jax.value_and_grad(f, has_aux=True),
        lambda p, x: (loss(p, x), {"map": features(p, x), "none": None}),
        strategies=ONE,
    ),
    "complex": Case(
        lambda f: jax.grad(lambda p, x: jnp.abs(f(p, x)).sum(), argnums=(0, 1)), spectrum
    ),
    "jacrev": Case(lambda f: lambda p, x: jax.jacrev(of_bias(f, p, x))(p["b"]), features),
    "grad of grad": Case(
        lambda f: jax.grad(lambda p, x: jnp.tanh(jax.grad(f)(p, x)["w"]).sum(), argnums=(0, 1)),
        smooth,
    ),
    "gradient penalty": Case(lambda f: jax.value_and_grad(penalty(f)), smooth),
    "gradient penalty of a ReLU": Case(lambda f: jax.grad(penalty(f)), strategies=ONE),
    "jvp": Case(lambda f: lambda p, x: jax.jvp(f, (p, x), (TANGENTS, 2 * x)), features),
    "linearize": Case(
        lambda f: lambda p, x: jax.linearize(lambda p: f(p, x), p)[1](TANGENTS), strategies=ONE
    ),
    "transposed": Case(
        lambda f: lambda p, x: jax.linear_transpose(jax.linearize(f, p, x)[1], p, x)(1.0),
        strategies=ONE,
    ),
    "jacfwd": Case(lambda f: lambda p, x: jax.jacfwd(of_bias(f, p, x))(p["b"]), features),
    "hessian": Case(lambda f: lambda p, x: jax.hessian(of_bias(f, p, x))(p["b"]), smooth),
    "Hessian-vector product": Case(product, smooth),
    "grad of jvp": Case(
        lambda f: jax.grad(lambda p, x: jax.jvp(lambda x: f(p, x), (x,), (x,))[1]), smooth
    ),
    "jvp of jvp": Case(
        lambda f: (
            lambda p, x: jax.jvp(
                lambda x: jax.jvp(lambda p: f(p, x), (p,), (TANGENTS,)), (x,), (2 * x,)
            )
        ),
        smooth,
        strategies=ONE,
    ),
    "third derivative": Case(
        lambda f: jax.grad(lambda p, x: product(f)(p, x)[1]["w"].sum()), smooth, strategies=()
    ),
    "conjugate gradients": Case(solved, smooth, strategies=(), tolerance=1e-9),
    "Hessian-vector product of a group": Case(
        product, smooth, strategies=ONE, options={"cuts": [("middle",)]}
    ),
    "gradient penalty with a map on the host": Case(
        lambda f: jax.grad(penalty(f)),
        smooth,
        strategies=ONE,
        options={"cuts": "middle", "offload": True},
    ),
    "tangents beside integers": Case(
        lambda f: lambda p, x: jax.jvp(lambda p: f(p, x), (p,), (TANGENTS,))[1][0],
        lambda p, x: (features(p, x), x.argmax(2), jnp.arange(3)),
        strategies=ONE,
    ),
    "gradient of a jvp within": Case(
        lambda f: jax.grad(f, argnums=(0, 1)),
        lambda p, x: jax.jvp(lambda x: jnp.tanh(convolve(x, p["w"])), (x,), (x**2,))[1].sum(),
    ),
    # Batches
    "vmap over images": Case(lambda f: jax.vmap(f, (None, 0)), features, (PARAMS, IMAGES)),
    "vmap over parameters": Case(lambda f: lambda p, x: jax.vmap(f, (0, None))(twice(p), x)),
    "gradients of examples": Case(
        lambda f: jax.vmap(jax.grad(f), (None, 0)), args=(PARAMS, IMAGES)
    ),
    "vmap along the row axis": Case(
        lambda f: jax.vmap(jax.grad(f), (None, 1)), args=(PARAMS, np.moveaxis(IMAGES, 0, 1))
    ),
    "vmap of vmap": Case(
        lambda f: lambda p, x: jax.vmap(jax.vmap(jax.grad(f), (None, 0)), (0, None))(twice(p), x),
        args=(PARAMS, IMAGES),
        strategies=(),
    ),
    "vmap with statistics of the batch": Case(
        lambda f: jax.vmap(jax.grad(f), (None, 0), axis_name="i"), synchronised, (PARAMS, IMAGES)
    ),
    "gradient of vmap": Case(
        lambda f: jax.grad(lambda p, x: jax.vmap(f, (None, 0))(p, x).sum(), argnums=(0, 1)),
        args=(PARAMS, IMAGES),
    ),
    "vmap of a gradient penalty": Case(
        lambda f: jax.vmap(jax.grad(penalty(f)), (None, 0)), smooth, (PARAMS, IMAGES[:2])
    ),
    # Control
    "training in scan": Case(trained, args=(PARAMS, IMAGES)),
    "gradient through scan": Case(
        lambda f: jax.grad(
            lambda p, x: lax.scan(lambda c, x: (c + f(p, x * c), None), 1.0, x)[0], argnums=(0, 1)
        ),
        args=(PARAMS, IMAGES),
    ),
    "cond": Case(
        lambda f: jax.grad(
            lambda p, x: lax.cond(x.sum() > 0, f, lambda p, x: 2 * f(p, x * x), p, x)
        )
    ),
    "vmap of cond": Case(
        lambda f: jax.vmap(
            lambda p, x: lax.cond(x.sum() > 0, f, lambda p, x: 2 * f(p, x), p, x), (None, 0)
        ),
        args=(PARAMS, IMAGES),
        strategies=ONE,
    ),
    "while_loop": Case(descended, strategies=ONE),
    "map": Case(
        lambda f: lambda p, x: lax.map(lambda x: jax.grad(f)(p, x), x),
        args=(PARAMS, IMAGES),
        strategies=ONE,
    ),
    # Calls
    "checkpoint": Case(lambda f: jax.grad(jax.checkpoint(f), argnums=(0, 1))),
    "checkpoint with a policy": Case(
        lambda f: jax.grad(
            jax.checkpoint(f, policy=jax.checkpoint_policies.everything_saveable), argnums=(0, 1)
        ),
        strategies=ONE,
    ),
    "jit and named_scope": Case(
        lambda f: jax.grad(jax.jit(jax.named_scope("part")(f)), argnums=(0, 1)), strategies=ONE
    ),
    "in a function with its own derivative": Case(lambda f: jax.grad(with_own_rule(f))),
    "nested": Case(nested),
    "nested in 2PS": Case(functools.partial(nested, strategy="2ps"), smooth, strategies=ONE),
    # Arguments and results
    "typed key": Case(
        lambda f: jax.grad(f), dropped, (PARAMS, IMAGE, jax.random.key(3)), strategies=ONE
    ),
    "raw key": Case(
        lambda f: jax.grad(f), dropped, (PARAMS, IMAGE, jax.random.PRNGKey(3)), strategies=ONE
    ),
    "integers and decisions": Case(lambda f: f, decisions),
    "no float": Case(
        lambda f: f,
        lambda p, x: (jnp.cumsum(x, 2) * p, x[:, 1:] ^ x[:, :-1]),
        (3, np.arange(56).reshape(2, 7, 4, 1)),
    ),
    "gradient past integers": Case(
        lambda f: lambda p, x: jax.grad(f, allow_int=True)((p, np.arange(3)), x)[0],
        lambda p, x: loss(p[0], x) + p[1].sum() * x.sum(),
        strategies=ONE,
    ),
    "what does not depend on rows": Case(
        lambda f: jax.grad(lambda p, x: sum(map(jnp.sum, jax.tree.leaves(f(p, x))))),
        lambda p, x: (features(p, x), jnp.ones(3), p["b"] ** 2, x, 1.5),
    ),
}


def by_rows(fun, strategy, args, **options):
    in_axes = (None, 1, *(None for _ in args[2:]))
    options = {"in_axes": in_axes, "num_blocks": 3, "strategy": strategy, **options}
    return lrjax.rowwise(fun, **options)


@functools.cache
def column(name):
    case = CASES[name]
    return Results(jax.jit(case.transform(case.fun))(*case.args))


PAIRS = [
    pytest.param(name, strategy, marks=[] if strategy in case.strategies else pytest.mark.slow)
    for name, case in CASES.items()
    for strategy in STRATEGIES
]


@pytest.mark.parametrize(("name", "strategy"), PAIRS)
def test_a_transformation_gives_the_same(name, strategy):
    case = CASES[name]
    row_fun = by_rows(case.fun, strategy, case.args, **case.options)
    found = jax.jit(case.transform(row_fun))(*case.args)
    check(Results(found), column(name), tolerance=case.tolerance)
    assert any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(found))


# --- What runs, or is asked, without a jit around it ---------------------------------------------


def exported(f):
    step = jax.jit(jax.value_and_grad(f))
    return lambda *args: jax.export.deserialize(jax.export.export(step)(*args).serialize()).call(
        *args
    )


def exported_with_gradient(f):
    def call(*args):
        text = jax.export.export(jax.jit(f))(*args).serialize(vjp_order=1)
        return jax.grad(jax.export.deserialize(text).call)(*args)

    return call


def watched_for_nans(f):
    def call(*args):
        with jax.debug_nans(True):
            return jax.jit(jax.grad(f))(*args)

    return call


def not_compiled(f):
    def call(*args):
        with jax.disable_jit():
            return jax.grad(f)(*args)

    return call


def compiled_ahead(f):
    def call(*args):
        structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        return jax.jit(jax.grad(f)).lower(*structs).compile()(*args)

    return call


def donated(f):
    def call(params, image):
        step = jax.jit(jax.value_and_grad(f, argnums=1), donate_argnums=1)
        return step(params, jnp.array(image))

    return call


def checked(f):
    def call(*args):
        errors = checkify.float_checks | checkify.index_checks
        error, found = checkify.checkify(jax.jit(jax.grad(f)), errors=errors)(*args)
        error.throw()
        return found

    return call


def in_threads(f):
    def call(params, image):
        found = [None] * 3

        def work(i):
            with jax.enable_x64(True):
                found[i] = jax.jit(jax.grad(f))(params, image * (i + 1))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found

    return call


def in_both_precisions(f):
    def call(*args):
        step = jax.jit(jax.grad(f))
        with jax.enable_x64(False):
            step(*args)
        return step(*args)

    return call


def in_and_out_of_another(f):
    """The same jitted function inside a row-wise one and outside, before and after."""
    f = jax.jit(f)
    outer = lrjax.rowwise(lambda p, x: f(p, jnp.sin(x)), in_axes=(None, 1), num_blocks=2)
    return lambda *args: [jax.jit(jax.grad(g))(*args) for g in (f, outer, f)]


def with_host(params, image):
    struct = jax.ShapeDtypeStruct(image.shape, image.dtype)
    return convolve(jax.pure_callback(np.sin, struct, image), params["w"])


def with_reference(params, image):
    ref = jax.new_ref(params["b"][0])
    ref[...] = ref[...] + 1
    return features(params, image) + ref[...]


EAGER = {
    "eager": Case(lambda f: jax.grad(f)),
    "disable_jit": Case(not_compiled, args=(PARAMS, IMAGE[:, :, :2]), strategies=ONE),
    "debug_nans": Case(watched_for_nans),
    "export": Case(exported),
    "export with its gradient": Case(exported_with_gradient, strategies=ONE),
    "lower and compile": Case(compiled_ahead, strategies=ONE),
    "donate": Case(donated),
    "threads": Case(in_threads, strategies=ONE),
    "enable_x64": Case(in_both_precisions, strategies=ONE),
    "one function inside and outside": Case(in_and_out_of_another, strategies=ONE),
    "pure_callback": Case(lambda f: jax.jit(f), with_host, strategies=ONE),
    "a reference within": Case(
        lambda f: jax.jit(jax.value_and_grad(lambda p, x: f(p, x).sum())),
        with_reference,
        strategies=ONE,
    ),
    "checkify": Case(checked, strategies=()),
}
EAGER_PAIRS = [
    pytest.param(name, strategy, marks=[] if strategy in case.strategies else pytest.mark.slow)
    for name, case in EAGER.items()
    for strategy in STRATEGIES
]


@pytest.mark.parametrize(("name", "strategy"), EAGER_PAIRS)
def test_a_way_to_run_gives_the_same(name, strategy):
    case = EAGER[name]
    found = case.transform(by_rows(case.fun, strategy, case.args))(*case.args)
    expected = case.transform(case.fun)(*case.args)
    check(Results(found), Results(expected))
    assert any(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(found))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["stream", "2ps"])
def test_no_tracer_outlives_its_trace(strategy):
    jax.clear_caches()
    gc.collect()
    gc.freeze()  # every trace looks through all objects: through those of this test
    try:
        with jax.checking_leaks():
            jax.eval_shape(jax.grad(by_rows(smooth, strategy, (PARAMS, IMAGE))), PARAMS, IMAGE)
    finally:
        gc.unfreeze()


# --- Types ---------------------------------------------------------------------------------------


def promoted(p, x):
    """Weak and strong results, and numbers that meet arrays of another precision."""
    x = x.astype(np.float32)
    return x * p, x.mean() * p, jnp.asarray(2.0), p, p * 2, x.shape[1], x > p, jnp.sum(p)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("number", [2, 2.5, np.float32(2.5), np.float64(2.5), True])
def test_types_are_those_of_the_function(number, strategy):
    row_fun = by_rows(promoted, strategy, (number, IMAGE))
    kinds = [
        [(out.shape, out.dtype, out.weak_type) for out in jax.eval_shape(f, number, IMAGE)]
        for f in (row_fun, promoted)
    ]
    assert kinds[0] == kinds[1]
    found = jax.tree.map(jnp.asarray, row_fun(number, IMAGE))
    expected = jax.tree.map(jnp.asarray, promoted(number, IMAGE))
    assert [out.weak_type for out in found] == [out.weak_type for out in expected]
    if isinstance(number, float | np.floating):
        pairs = [jax.grad(lambda p, f=f: f(p, IMAGE)[1])(number) for f in (row_fun, promoted)]
        assert jax.typeof(pairs[0]) == jax.typeof(pairs[1])


def straight_through(forward):
    """A function whose slope is not its own; ``forward`` computes it where it is differentiated."""
    call = jax.custom_vjp(lambda x: jnp.round(x))
    call.defvjp(lambda x: (forward(call, x), x), lambda x, g: (g * 2 * x,))
    return call


def with_tangents(primal):
    call = jax.custom_jvp(jax.nn.softplus)
    call.defjvp(lambda x, t: (primal(call, *x), t[0] * x[0]))
    return call


RULES = {
    "rounded": straight_through(lambda call, x: jnp.round(x)),
    "rounded by itself": straight_through(lambda call, x: call(x)),
    "rounded by another rule": straight_through(lambda call, x: jax.nn.softplus(x)),
    "sloped": with_tangents(lambda call, x: jnp.cos(x)),
    "sloped by itself": with_tangents(lambda call, x: call(x)),
    "sloped by what it calls": with_tangents(lambda call, x: jax.nn.softplus(x)),
}


@pytest.mark.parametrize("name", RULES)
def test_second_derivatives_through_rules_of_ones_own(name):
    """A forward pass runs a rule's own code: how its results move is that code's derivative."""
    weights, image = normal(3, 3, 3, 3) / 3, normal(1, 8, 4, 3, seed=1)

    def function(weights, image):
        return RULES[name](convolve(RULES[name](convolve(image, weights)), weights)).mean((1, 2))

    def second(function):
        def first(weights):
            outputs, pull = jax.vjp(function, weights, image)
            return sum(jnp.sin(bar).sum() for bar in pull(jnp.cos(outputs)))

        return jax.jit(jax.grad(first))(weights)

    by_rows = lrjax.rowwise(function, in_axes=(None, 1), num_blocks=3)
    np.testing.assert_allclose(second(by_rows), second(function), rtol=1e-10, atol=1e-12)


def test_second_derivatives_need_the_memory_of_first_ones():
    """They are row programs too, not derivatives of row loops, whose every step would be saved."""
    struct = jax.ShapeDtypeStruct((1, 256, 16, 2), np.float32)
    params = [jax.ShapeDtypeStruct((3, 3, 2, 2), np.float32) for _ in range(6)]

    def deep(params, image):
        for weights in params:
            image = jnp.tanh(convolve(image, weights))
        return (image**2).mean()

    def peak(f):
        compiled = jax.jit(jax.grad(penalty(f))).lower(params, struct).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for strategy in ("stream", "2ps"):
        row_fun = by_rows(deep, strategy, (params, struct), num_blocks=32)
        assert peak(row_fun) < peak(deep) / 3


# --- What has no row-wise form -------------------------------------------------------------------


def test_a_linear_function_is_transposed_through_its_vjp():
    """``linear_transpose`` has no rule for functions with derivatives of their own."""
    row_fun = by_rows(lambda p, x: convolve(x, p), "stream", (PARAMS["w"], IMAGE))
    with pytest.raises(NotImplementedError, match="Transpose rule"):
        jax.linear_transpose(lambda x: row_fun(PARAMS["w"], x), IMAGE)(normal(2, 7, 4, 2))
    _, pull = jax.vjp(lambda x: row_fun(PARAMS["w"], x), IMAGE)
    _, pull_column = jax.vjp(lambda x: convolve(x, PARAMS["w"]), IMAGE)
    cotangent = normal(2, 7, 4, 2)
    check(Results(pull(cotangent)), Results(pull_column(cotangent)))
