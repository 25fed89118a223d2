"""``rowwise`` on a mesh: which devices share rows, and Explicit axes.

On Explicit axes shardings are part of types. Blocks of rows, masks and line buffers are made by
operations that the sharding rules of such types do not cover, and need not: XLA divides them as it
divides the arrays they are made from. So the rows run where all axes are Auto; what comes out has
the types that the function itself gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding

from lrjax.program.compatibility import is_ordered
from lrjax.rowgraph.graph import build
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rowgraph.tracing import Traced, arrays_in, flat_axes, full_trace, is_array, trace

Call = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def on_auto_axes(
    call: Call,
    fun: Callable[..., Any],
    in_axes: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    row_mesh_axis: str | None,
) -> Any:
    """``call(args, kwargs)``, a way to run ``fun(*args, **kwargs)``, where no axis is Explicit.

    Args:
      call: how to run it.
      fun: the function.
      in_axes: row axes of ``args``.
      args, kwargs: its arguments.
      row_mesh_axis: the axis along which the rows may be divided.

    Raises:
      ValueError: rows are divided along another axis, or ``fun`` closes over an array on the mesh.
    """
    arrays, arguments_of = arrays_in((args, kwargs))
    explicit = _explicit_axes(arrays)
    if explicit or row_mesh_axis is not None:
        _check_rows(in_axes, args, row_mesh_axis)
    if not explicit:
        return call(args, kwargs)

    def column(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return fun(*args, **kwargs)

    if row_mesh_axis in explicit:
        shardings = _shardings_with_rows(column, in_axes, args, kwargs, row_mesh_axis)
    else:
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


def _check_rows(in_axes: Any, args: tuple[Any, ...], row_mesh_axis: str | None) -> None:
    """Refuse rows that are divided along another axis: every step would fetch rows from others."""
    axes = flat_axes(in_axes, args)
    for (path, leaf), axis in zip(jax.tree_util.tree_leaves_with_path(args), axes, strict=True):
        over = None if axis is None or not is_array(leaf) else _divided_over(leaf, axis)
        if over is None or over == row_mesh_axis:
            continue
        raise ValueError(
            f"args{jax.tree_util.keystr(path)}: its row axis {axis} is divided over the mesh "
            f"axis {over!r}, and a step of a row loop needs whole rows on every device. "
            + (
                f"Give row_mesh_axis={over!r}, if that is one axis; or divide the batch or the "
                "width instead, with jax.sharding.reshard, or leave rowwise out."
                if row_mesh_axis is None
                else f"row_mesh_axis={row_mesh_axis!r} says that its rows are divided along that "
                "axis; give the axis that they are divided along, or use jax.sharding.reshard "
                "(jax.device_put where axes are Auto) first."
            )
        )


def _divided_over(array: Any, axis: int) -> Any:
    """The mesh axis, or axes, over which an array is divided along one of its axes, if known."""
    kind = array.sharding if _is_concrete(array) else getattr(jax.typeof(array), "sharding", None)
    spec = kind.spec if isinstance(kind, NamedSharding) else ()
    over = spec[axis] if axis < len(spec) else None
    return over or None


def _names(over: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a partition names."""
    return over if isinstance(over, tuple) else () if over is None else (over,)


def _is_concrete(array: Any) -> bool:
    """An array of numbers on devices, whose sharding is known though its axes be Auto."""
    return isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)


def _check_closure(consts: Sequence[Any]) -> None:
    for const in consts:
        mesh = _mesh_of(const)
        if mesh is not None and not mesh.empty:
            raise ValueError(
                f"fun closes over an array of type {jax.typeof(const)}, which is on a mesh with "
                "Explicit axes; give it to fun as an argument."
            )


# --- Rows over devices ---------------------------------------------------------------------------


def row_mesh_at_hand(mesh: Any, axis: str | None) -> RowMesh | None:
    """The devices that share rows, None where ``axis`` is.

    Args:
      mesh: as given; None for the mesh at hand.
      axis: the axis along which rows are divided.

    Raises:
      ValueError: there is no such mesh or axis, or ``jax.shard_map`` divides it already.
    """
    if axis is None:
        return None
    at_hand = jax.sharding.get_abstract_mesh()
    if at_hand.empty and mesh is None:
        raise ValueError(
            f"row_mesh_axis={axis!r}: there is no mesh; give mesh=jax.make_mesh(...), or call the "
            "function under jax.set_mesh."
        )
    found = mesh if at_hand.empty else at_hand
    if axis not in found.axis_names:
        raise ValueError(
            f"row_mesh_axis={axis!r} is no axis of the mesh at hand; it has {found.axis_names}."
        )
    if mesh is not None and mesh.shape != found.shape:
        raise ValueError(
            f"mesh: it has the axes {dict(mesh.shape)}, and the mesh at hand, of jax.set_mesh or "
            f"jax.shard_map, has {dict(found.shape)}; leave mesh out, or give that one."
        )
    if axis in found.manual_axes:
        raise ValueError(
            f"row_mesh_axis={axis!r}: the function is called within a jax.shard_map over that "
            "axis, which gives it parts of the rows; leave the axis out of axis_names, in_specs "
            "and out_specs of that shard_map, so that images come with all their rows."
        )
    return RowMesh(found if not at_hand.empty else _with_auto_axes(found), axis)


def _with_auto_axes(mesh: Any) -> Any:
    """A mesh like it, for functions whose arguments have no types on it."""
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return mesh.update_axis_types(dict.fromkeys(mesh.axis_names, AxisType.Auto))
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def check_heights(inputs: Sequence[Any], axes: Sequence[int | None], row_mesh: RowMesh) -> None:
    """Refuse images that have fewer rows than there are devices to share them.

    Raises:
      ValueError: naming both.
    """
    heights = [x.shape[axis] for x, axis in zip(inputs, axes, strict=True) if axis is not None]
    if max(heights) < row_mesh.count:
        raise ValueError(
            f"row_mesh_axis={row_mesh.axis!r}: {max(heights)} rows cannot be divided among "
            f"{row_mesh.count} devices; use a mesh with at most {max(heights)} along that axis, or "
            "divide the batch instead and leave row_mesh_axis out."
        )


def check_callbacks(traced: Traced, row_mesh: RowMesh) -> None:
    """Refuse callbacks in the order of the program, which JAX runs on one device alone.

    Raises:
      ValueError: there is one.
    """
    if any(is_ordered(e.params) for e in (*traced.program.equations, *traced.effects)):
        raise ValueError(
            f"row_mesh_axis={row_mesh.axis!r}: fun has a callback with ordered=True, and JAX keeps "
            "no order on several devices; give ordered=False, or leave row_mesh_axis out."
        )


def _shardings_with_rows(
    column: Call, in_axes: Any, args: tuple[Any, ...], kwargs: dict[str, Any], row_mesh_axis: str
) -> Any:
    """Shardings of the results of ``column(args, kwargs)`` on Explicit axes.

    JAX has no types for windows over divided rows. So the function is traced where the rows' axis
    is Auto, and what carries rows in the end is divided along it if that goes evenly.
    """
    arrays, arguments_of = arrays_in((args, kwargs))
    meshes = (jax.sharding.get_abstract_mesh(), *map(_mesh_of, arrays))
    mesh = next(m for m in meshes if m is not None and row_mesh_axis in m.axis_names)
    mesh = getattr(mesh, "abstract_mesh", mesh)
    partly = mesh.update_axis_types({row_mesh_axis: AxisType.Auto})

    def struct(array: Any) -> Any:
        aval, kind = jax.typeof(array), getattr(jax.typeof(array), "sharding", None)
        spec = kind.spec if isinstance(kind, NamedSharding) else ()
        kept = (tuple(n for n in _names(over) if n != row_mesh_axis) or None for over in spec)
        sharding = NamedSharding(partly, jax.P(*kept))
        return jax.ShapeDtypeStruct(
            aval.shape, aval.dtype, weak_type=aval.weak_type, sharding=sharding
        )

    with jax.sharding.use_abstract_mesh(partly):
        closed, out = full_trace(lambda *xs: column(*arguments_of(xs)), list(map(struct, arrays)))
    _check_closure(closed.consts)
    with without_explicit_axes(args, kwargs) as (own_args, own_kwargs):
        traced = trace(lambda *a, **k: column(a, k), in_axes, own_args, own_kwargs)
    graph = build(traced.program, traced.axes)
    count, results = mesh.shape[row_mesh_axis], graph.program.outputs
    shardings = []
    for one, v in zip(closed.out_avals, results, strict=False):
        spec, axis = [*one.sharding.spec], graph.axis_of(v)
        spec += [None] * (len(one.shape) - len(spec))
        if axis is not None and spec[axis] is None and one.shape[axis] % count == 0:
            spec[axis] = row_mesh_axis
        shardings.append(NamedSharding(mesh, jax.P(*spec)))
    return jax.tree.unflatten(jax.tree.structure(out), shardings)
