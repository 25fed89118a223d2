"""``rowwise`` for Flax NNX: functions and methods that take modules, run by blocks of rows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from lrjax.module_calls import call_rowwise
from lrjax.options import Cuts, MeshOption, StrategyOption, check_callable, checked_options

_GRAPH_NODES = (nnx.Module, nnx.Rngs, nnx.RngStream, nnx.Variable)


def rowwise(
    fun: Callable[..., Any],
    *,
    in_axes: Any,
    num_blocks: int | Sequence[int] | None = None,
    strategy: StrategyOption = "stream",
    cuts: Cuts = (),
    plan: Any = None,
    offload: bool = False,
    mesh: MeshOption = None,
    row_mesh_axis: str | None = None,
) -> Callable[..., Any]:
    """A function of NNX modules and arrays, run by blocks of rows.

    Used as ``nnx.remat`` is. The modules are not changed and keep their state: checkpoints of one
    are checkpoints of the other. Variables that the call updates (running statistics, the counters
    of random streams) are updated to the same values.

    Args:
      fun: a function whose arguments may hold modules and ``nnx.Rngs``, such as a method in a class
        body; or a module, or a method of one, which then is no argument any more.
      in_axes: row axis of the positional arguments, as for :func:`lrjax.rowwise`; None for modules.
        Flags and other arguments that are no arrays stay as they are and take None.
      num_blocks, strategy, cuts, plan, offload, mesh, row_mesh_axis: as for :func:`lrjax.rowwise`.

    Returns:
      A function with ``fun``'s signature.

    Raises:
      ValueError: for options that do not fit; and, when it is called, for a function that has
        nothing to run by rows, that adds or removes variables (``sow``), or that writes a variable
        which carries rows.

    Example:
      >>> run = lrjax.nnx.rowwise(lambda model, images: model(images), in_axes=(None, 1))
      >>> logits = run(model, images)
    """
    options = checked_options(
        num_blocks=num_blocks,
        strategy=strategy,
        cuts=cuts,
        plan=plan,
        offload=offload,
        mesh=mesh,
        row_mesh_axis=row_mesh_axis,
    )
    _check_function(fun)
    call, owner = _unbound(fun)
    name = getattr(call, "__qualname__", repr(call)).removesuffix(".__call__")

    @functools.wraps(call)
    def rowwise_call(*args: Any, **kwargs: Any) -> Any:
        nodes = _nodes(args, kwargs, owner)
        positional = [None if i in nodes["args"] else arg for i, arg in enumerate(args)]
        keyword = {key: arg for key, arg in kwargs.items() if key not in nodes["kwargs"]}
        graph, state = nnx.split(nodes)

        def pure(state: Any, *arrays: Any, **keywords: Any) -> tuple[Any, dict[str, Any]]:
            before = _by_path(state)
            merged = nnx.merge(graph, state)
            full = [merged["args"].get(i, array) for i, array in enumerate(arrays)]
            first = [] if owner is None else [merged["self"]]
            outputs = call(*first, *full, **keywords, **merged["kwargs"])
            graph_after, state_after = nnx.split(merged)
            if graph_after != graph:
                raise ValueError(
                    f"{name} adds, removes or replaces variables or attributes of its modules "
                    "(sow does), which a row loop cannot carry out of itself; return the value "
                    "instead, or create the variable beforehand and assign to it."
                )
            return outputs, _changed(before, _by_path(state_after))

        outputs, changed = call_rowwise(
            pure,
            state,
            tuple(positional),
            keyword,
            in_axes=_axes(in_axes, positional),
            options=options,
            name=name,
        )
        _update(nodes, state, changed)
        return outputs

    return rowwise_call


def _check_function(fun: Any) -> None:
    """Refuse what is neither a module nor a function."""
    check_callable(fun)
    if isinstance(fun, type):
        raise ValueError(
            f"fun={fun.__name__} is a class; give a module (an instance of it), one of its "
            "methods, or a function of modules."
        )
    if any(base.__module__.startswith("flax.linen") for base in type(fun).__mro__):
        name = type(fun).__name__
        raise ValueError(f"fun={name}(...) is a Linen module; use lrjax.linen.rowwise for it.")


def _unbound(fun: Any) -> tuple[Callable[..., Any], nnx.Module | None]:
    """A method as a function, and the module it belongs to."""
    if isinstance(fun, nnx.Module):
        return type(fun).__call__, fun
    if inspect.ismethod(fun) and isinstance(fun.__self__, nnx.Module):
        return fun.__func__, fun.__self__
    return fun, None


def _nodes(args: Sequence[Any], kwargs: dict[str, Any], owner: Any) -> dict[str, Any]:
    """What holds modules among the arguments, and the module whose method is called."""
    return {
        "args": {i: arg for i, arg in enumerate(args) if _holds_nodes(arg)},
        "kwargs": {key: arg for key, arg in kwargs.items() if _holds_nodes(arg)},
        "self": owner,
    }


def _changed(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Variables that were assigned to, by path."""
    return {
        path: leaves
        for path, leaves in after.items()
        if any(new is not old for new, old in zip(leaves, before[path], strict=True))
    }


def _holds_nodes(arg: Any) -> bool:
    leaves = jax.tree.leaves(arg, is_leaf=lambda x: isinstance(x, _GRAPH_NODES))
    return any(isinstance(leaf, _GRAPH_NODES) for leaf in leaves)


def _axes(in_axes: Any, positional: Sequence[Any]) -> Any:
    """One axis for all arguments holds for those that are no modules."""
    if isinstance(in_axes, int):
        return tuple(None if arg is None else in_axes for arg in positional)
    return in_axes


def _by_path(state: Any) -> dict[str, list[Any]]:
    return {
        "/".join(map(str, path)): jax.tree.leaves(variable)
        for path, variable in nnx.to_flat_state(state)
    }


def _update(nodes: Any, state: Any, changed: dict[str, Any]) -> None:
    """Assign what changed, and nothing else: other variables may belong to an outer trace."""
    if not changed:
        return
    updates = {}
    for path, variable in nnx.to_flat_state(state):
        leaves = changed.get("/".join(map(str, path)))
        if leaves is not None:
            updates[path] = jax.tree.unflatten(jax.tree.structure(variable), leaves)
    nnx.update(nodes, nnx.from_flat_state(updates))
