"""Small networks by every strategy against column on the device at hand, for ``device_jobs``."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

import lrjax
from experiments import vgg16_stack
from experiments.small_models import TrainingCall
from lrjax import models, testing
from lrjax.gradient_program import GradientProgram, leaves_of
from lrjax.options import checked_options
from lrjax.rowgraph.tracing import trace
from lrjax.strategies import MicroBatches
from lrjax.transform import run


def vgg(params: vgg16_stack.Params, images: jax.Array) -> jax.Array:
    """VGG's layers: two 3x3 convolutions with bias and ReLU and a 2x2 max pool, twice."""
    x = images
    for stage, convolutions in enumerate((params[:2], params[2:]), start=1):
        for kernel, bias in convolutions:
            x = vgg16_stack.convolution(kernel, bias, x)
        x = checkpoint_name(vgg16_stack.max_pool(x), f"pool{stage}")
    return x


def vgg_params(dtype: Any) -> vgg16_stack.Params:
    params, channels = [], (3, 16, 16, 32, 32)
    for layer, key in enumerate(jax.random.split(jax.random.key(0), 4)):
        own = channels[layer : layer + 2]
        kernel = jax.random.normal(key, (3, 3, *own), dtype) / (3 * own[0] ** 0.5)
        params.append((kernel, 0.1 * jnp.ones(own[1:], dtype)))
    return params


def small_network(name: str, dtype: Any) -> tuple[Callable[..., Any], tuple[Any, ...], str]:
    """A function of parameters, images and more, its arguments, and where it may be cut."""
    if name == "vgg":
        images = jax.random.normal(jax.random.key(1), (2, 45, 24, 3), dtype)
        return vgg, (vgg_params(dtype), images), "pool1"
    dtypes = {"dtype": dtype, "param_dtype": dtype}
    if name == "resnet":
        model = models.ResNet((1,), bottleneck=True, width=1 / 8, num_classes=5, **dtypes)
        cut = "stem"
    else:
        model = models.UNet(channels=(8, 16), norm="none", num_classes=3, **dtypes)
        cut = "bottom"
    # Few pixels: on a CPU column adds up a bias's gradient in bfloat16, 24% off for 6,000 of them.
    call = TrainingCall(model, (2, 29, 16, 3))
    return call, call.arguments(), cut


def ways(network: str, cut: str) -> dict[str, dict[str, Any]]:
    """Options of ``rowwise``; batch statistics make images depend on each other."""
    found: dict[str, dict[str, Any]] = {
        "stream": {"num_blocks": 5},
        "2ps": {"num_blocks": 3, "strategy": "2ps"},
        "overl": {"num_blocks": 2, "strategy": "overl"},
        "checkpoint": {"strategy": "checkpoint"},
        "2ps+column": {"num_blocks": [3, 1], "strategy": ["2ps", "column"], "cuts": [cut]},
        "stream, offloaded": {"num_blocks": 4, "cuts": [cut], "offload": True},
        "stream, images on the host": {"num_blocks": 5, "hosted": True},
        "2ps, images on the host": {"num_blocks": 3, "strategy": "2ps", "hosted": True},
    }
    if network != "resnet":
        found["micro-batches of stream"] = {"num_blocks": 3, "strategy": MicroBatches("stream", 2)}
    return found


def by_rows(fun: Callable[..., Any], in_axes: Any, hosted: bool, **options: Any) -> Any:
    """``fun`` by rows; with ``hosted``, of images that are in the host's memory.

    A function cannot be traced for such images, so they take the place of those on the device in
    what was traced.
    """
    if not hosted:
        return lrjax.rowwise(fun, in_axes=in_axes, **options)
    checked = checked_options(cuts=(), plan=None, offload=False, **{"strategy": "stream"} | options)

    def call(params: Any, images: jax.Array, *others: Any) -> Any:
        traced = trace(fun, in_axes, (params, images, *others), {})
        there = jax.device_put(images, jax.memory.Space.Host)
        inputs = tuple(there if value is images else value for value in traced.inputs)
        return run(dataclasses.replace(traced, inputs=inputs), checked)

    return call


def checked(name: str, dtype_name: str) -> Iterator[dict[str, Any]]:
    """Every way to run a network, judged by the one checker; float64 says how far off column is."""
    dtype = jnp.dtype(dtype_name)
    with jax.default_matmul_precision("highest"):
        fun, args, cut = small_network(name, dtype)
        column = GradientProgram(fun, args)
        expected = testing.Results(*column(), column)
        truth = true_results(name, column)
        for way, options in ways(name, cut).items():
            record = {"network": name, "dtype": dtype_name, "way": way}
            record["has_truth"] = truth is not None
            start = time.monotonic()
            try:
                record |= judged(fun, args, options, column, expected, truth)
            except Exception as error:
                record |= {"passed": False, "error": f"{type(error).__name__}: {error}"[:1500]}
            yield record | {"seconds": time.monotonic() - start}


def true_results(name: str, column: GradientProgram) -> testing.Results | None:
    """Column's results in float64; None where the device does not give them."""
    try:
        with jax.enable_x64(True):
            fun = small_network(name, jnp.float64)[0]
            wide = [jnp.asarray(array, jnp.float64) for array in column.arrays]
            args = jax.tree.unflatten(column._tree, wide)
            program = GradientProgram(fun, args, None, None, column.cotangents)
            return testing.Results(*jax.device_get(program()))
    except jax.errors.JaxRuntimeError:
        return None


def judged(
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    options: dict[str, Any],
    column: GradientProgram,
    expected: testing.Results,
    truth: testing.Results | None,
) -> dict[str, Any]:
    """How far a way is from column, and whether the checker accepts it."""
    hosted = options.get("hosted", False)
    in_axes = (None, 1, None)[: len(args)]
    function = by_rows(fun, in_axes, **{"hosted": False} | options)
    # Images that wait on the host are not differentiated.
    argnums = (0,) if hosted else None
    program = GradientProgram(function, args, None, argnums, column.cotangents)
    found = testing.Results(*program(), program)
    expected, truth = (
        only and dataclasses.replace(only, gradients={n: only.gradients[n] for n in program.names})
        for only in (expected, truth)
    )
    pairs = zip(*(leaves_of(r.outputs, r.gradients) for r in (found, expected)), strict=True)
    largest = max(testing.norm_error(value, reference) for value, reference in pairs)
    try:
        testing.check(found, expected, truth=truth)
    except AssertionError as error:
        return {"passed": False, "norm_error": largest, "error": str(error)[:1500]}
    return {"passed": True, "norm_error": largest}
