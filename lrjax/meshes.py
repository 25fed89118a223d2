"""``rowwise`` on a mesh with Explicit axes, where shardings are part of types.

Blocks of rows, masks and line buffers are made by operations that the sharding rules of such types
do not cover, and need not: XLA divides them as it divides the arrays they are made from. So the
rows run where all axes are Auto; what comes out has the types that the function itself gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding

from lrjax.rowgraph.tracing import arrays_in, flat_axes, full_trace, is_array

Call = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def on_auto_axes(
    call: Call, fun: Callable[..., Any], in_axes: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``call(args, kwargs)``, a way to run ``fun(*args, **kwargs)``, where no axis is Explicit.

    Raises:
      ValueError: rows are divided among devices, or ``fun`` closes over an array on the mesh.
    """
    arrays, arguments_of = arrays_in((args, kwargs))
    explicit = _explicit_axes(arrays)
    if not explicit:
        return call(args, kwargs)
    _check_rows(in_axes, args)

    def column(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return fun(*args, **kwargs)

    closed, struct = full_trace(lambda *xs: column(*arguments_of(xs)), arrays)
    _check_closure(closed.consts)
    shardings = jax.tree.map(lambda out: out.sharding, struct)

    @jax.jit
    def in_auto_mode(*arrays: Any) -> Any:
        run = jax.sharding.auto_axes(
            lambda *xs: call(*arguments_of(xs)), axes=explicit, out_sharding=shardings
        )
        return run(*arrays)

    return in_auto_mode(*arrays)


@contextlib.contextmanager
def without_explicit_axes(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A context, with arguments for it, in which a function may be traced but not run.

    Where axes are Explicit, no mesh is at hand in it, and the arguments are types without one.
    """
    typed = [leaf for leaf in jax.tree.leaves((args, kwargs)) if _has_type(leaf)]
    if not _explicit_axes(typed):
        yield args, kwargs
        return

    def struct(leaf: Any) -> Any:
        if not _has_type(leaf):
            return leaf
        aval = jax.typeof(leaf)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        yield jax.tree.map(struct, (args, kwargs))


def _has_type(leaf: Any) -> bool:
    return is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _mesh_of(array: Any) -> Any:
    sharding = getattr(jax.typeof(array), "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) else None


def _explicit_axes(arrays: Sequence[Any]) -> tuple[str, ...]:
    """Names of the Explicit axes of the mesh at hand, or of the one that arrays are on."""
    meshes = [jax.sharding.get_abstract_mesh(), *map(_mesh_of, arrays)]
    found: dict[str, None] = {}
    for mesh in meshes:
        if mesh is not None and not mesh.empty:
            kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
            found.update((name, None) for name, kind in kinds if kind == AxisType.Explicit)
    return tuple(found)


def _check_rows(in_axes: Any, args: tuple[Any, ...]) -> None:
    """Refuse rows that are divided among devices: every step would fetch its block from others."""
    axes = flat_axes(in_axes, args)
    for (path, leaf), axis in zip(jax.tree_util.tree_leaves_with_path(args), axes, strict=True):
        mesh = None if axis is None or not is_array(leaf) else _mesh_of(leaf)
        if mesh is None:
            continue
        over = jax.typeof(leaf).sharding.spec[axis]
        if over:
            raise ValueError(
                f"args{jax.tree_util.keystr(path)}: its row axis {axis} is divided over the mesh "
                f"axis {over!r}, and a step of a row loop needs whole rows on every device. Divide "
                "the batch or the width instead, with jax.sharding.reshard, or leave rowwise out."
            )


def _check_closure(consts: Sequence[Any]) -> None:
    for const in consts:
        mesh = _mesh_of(const)
        if mesh is not None and not mesh.empty:
            raise ValueError(
                f"fun closes over an array of type {jax.typeof(const)}, which is on a mesh with "
                "Explicit axes; give it to fun as an argument."
            )
