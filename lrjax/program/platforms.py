"""Functions that differ between platforms, chosen when a program is lowered.

``lax.platform_dependent`` traces what every platform would run into a conditional: of the row
loops of a ResNet-50, a quarter of all equations. Here a function is one equation, and is traced for
the platform that it is lowered for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from lrjax.program.varying import varying_axes

Array = jax.Array
# (*operands, platform=, **settings) -> one array; platform is None where it is not known.
Function = Callable[..., Array]

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def per_platform(function: Function, *operands: Array, **settings: Any) -> Array:
    """``function(*operands, platform=platform, **settings)``, for the platform it is lowered for.

    The derivatives are those for an unknown platform.

    Args:
      function: of a module, so that equal calls are lowered once; its result has one type on all
        platforms.
      operands: arrays.
      settings: hashable.
    """
    found: Array = per_platform_p.bind(
        *operands, function=function, settings=tuple(sorted(settings.items()))
    )
    return found


per_platform_p = Primitive("per_platform")


def _run(*operands: Array, function: Function, settings: Any, platform: str | None = None) -> Array:
    return function(*operands, platform=platform, **dict(settings))


@per_platform_p.def_abstract_eval
def _type(*operands: Any, function: Function, settings: Any) -> Any:
    if any(map(varying_axes, operands)):
        run = functools.partial(_run, function=function, settings=settings)
        return jax.make_jaxpr(run)(*operands).out_avals[0]
    return _known_type(function, settings, *((x.shape, x.dtype) for x in operands))


@functools.lru_cache(maxsize=4096)
def _known_type(function: Function, settings: Any, *types: Any) -> Any:
    run = functools.partial(_run, function=function, settings=settings)
    structs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in types]
    return jax.make_jaxpr(run)(*structs).out_avals[0]


@per_platform_p.def_impl
def _evaluated(*operands: Array, **params: Any) -> Array:
    with jax.disable_jit(False):  # it is the lowering that knows the platform
        return jax.jit(functools.partial(per_platform_p.bind, **params))(*operands)


def _jvp(
    primals: Sequence[Array], tangents: Sequence[Any], *, function: Function, settings: Any
) -> tuple[Array, Array]:
    run = functools.partial(_run, function=function, settings=settings)
    _, tangent = jax.jvp(run, tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))
    return per_platform_p.bind(*primals, function=function, settings=settings), tangent


def _batched(*operands: Array, platform: str | None, one: Function, axes: Any, own: Any) -> Array:
    run = functools.partial(_run, function=one, settings=own, platform=platform)
    return jax.vmap(run, axes)(*operands)


def _batch(
    operands: Sequence[Array], axes: Sequence[Any], *, function: Function, settings: Any
) -> tuple[Array, int]:
    found = per_platform(_batched, *operands, one=function, axes=tuple(axes), own=settings)
    return found, 0


ad.primitive_jvps[per_platform_p] = _jvp
batching.primitive_batchers[per_platform_p] = _batch
for _platform in (None, *PLATFORMS):
    mlir.register_lowering(
        per_platform_p,
        mlir.lower_fun(functools.partial(_run, platform=_platform), multiple_results=False),
        platform=_platform,
    )
