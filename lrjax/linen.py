"""``rowwise`` for Flax Linen modules: the same variables, run by blocks of rows."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.core import lift
from flax.linen.transforms import lift_transform

from lrjax.module_calls import call_rowwise
from lrjax.options import Cuts, MeshOption, Options, StrategyOption, checked_options


def rowwise(
    target: Any,
    *,
    in_axes: Any,
    num_blocks: int | Sequence[int] | None = None,
    strategy: StrategyOption = "stream",
    cuts: Cuts = (),
    plan: Any = None,
    offload: bool = False,
    mesh: MeshOption = None,
    row_mesh_axis: str | None = None,
    methods: Sequence[str] | None = None,
) -> Any:
    """A Linen module that runs by blocks of rows, in place of the one it is made from.

    Used as ``nn.remat`` is. The variables tree (parameters, ``batch_stats``, any other collection),
    the names in it and the use of random keys are those of ``target``: checkpoints go both ways.
    ``init`` runs the module as it is; everything else runs it row by row, and mutable collections
    are updated to the same values. Inside a larger module, wrap what should be one row loop; it may
    be there several times, and what lies between two of them exists whole.

    Args:
      target: a module class; a module that is not yet part of another one; or a function whose
        first argument is a module, such as a method in a class body.
      in_axes: row axis of the call's positional arguments after the module, as for
        :func:`lrjax.rowwise`: a pytree prefix, None for an argument without rows. Flags and other
        arguments that are no arrays stay as they are and take None.
      num_blocks, strategy, cuts, plan, offload, mesh, row_mesh_axis: as for :func:`lrjax.rowwise`.
      methods: names of the methods to run row by row, ``__call__`` by default.

    Returns:
      What ``target`` is: a class of the same name and fields, a module, or a function.

    Raises:
      ValueError: for options that do not fit; for a module that is part of another one; and, when
        it is called, for a module that has nothing to run by rows, or that writes a variable which
        carries rows (what it sows, ``capture_intermediates``, or a cache of maps).

    Example:
      >>> model = lrjax.linen.rowwise(ResNet50(), in_axes=1, num_blocks=16)
      >>> variables = model.init(key, images)
      >>> logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
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
    methods = _checked_methods(target, methods)
    if isinstance(target, nn.Module):
        return _module(target, in_axes, options, methods)
    return _class_or_function(target, in_axes, options, methods)


def _class_or_function(
    target: Any, in_axes: Any, options: Options, methods: Sequence[str] | None
) -> Any:
    transform = functools.partial(lift_transform, _lifted, target, in_axes=in_axes, options=options)
    if not _is_module_class(target):
        return transform(name=getattr(target, "__qualname__", repr(target)))
    original = target.func if isinstance(target, functools.partial) else target
    made = transform(name=original.__name__, methods=methods)
    # Flax names a submodule after its class, and variables after their module.
    made_class = made.func if isinstance(made, functools.partial) else made
    made_class.__name__, made_class.__qualname__ = original.__name__, original.__qualname__
    made_class.__module__, made_class.__doc__ = original.__module__, original.__doc__
    return made


def _is_module_class(target: Any) -> bool:
    made = target.func if isinstance(target, functools.partial) else target
    return isinstance(made, type) and issubclass(made, nn.Module)


def _checked_methods(target: Any, methods: Any) -> Sequence[str] | None:
    """Names of methods that the target has."""
    is_module = isinstance(target, nn.Module) or _is_module_class(target)
    if not is_module and not (inspect.isroutine(target) or isinstance(target, functools.partial)):
        raise ValueError(
            f"target={target!r:.80} is no Linen module, class of one or function of one; give "
            "that, or use lrjax.nnx.rowwise for NNX and lrjax.rowwise for functions of arrays."
        )
    if methods is None:
        return None
    if not is_module:
        raise ValueError(
            f"methods={methods!r:.80}: target is a function, which has none; leave methods out."
        )
    names = tuple(methods) if isinstance(methods, list | tuple) else (methods,)
    made = target.func if isinstance(target, functools.partial) else target
    for name in names:
        if not isinstance(name, str) or not callable(getattr(made, name, None)):
            owner = made.__name__ if isinstance(made, type) else type(made).__name__
            raise ValueError(
                f"methods={methods!r:.80}: {owner} has no method {name!r:.40}; give names of "
                "methods that it has, or leave methods out for __call__."
            )
    return names


def _module(
    module: nn.Module, in_axes: Any, options: Options, methods: Sequence[str] | None
) -> nn.Module:
    name = type(module).__name__
    if module.scope is not None:
        raise ValueError(
            f"target: this {name} is already part of another module (or bound), under the name "
            f"{module.name!r}; wrap its class instead: lrjax.linen.rowwise({name}, ...)(...)"
        )
    fields = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.init and field.name != "parent"
    }
    return _class_or_function(type(module), in_axes, options, methods)(**fields)


def _lifted(
    fun: Callable[..., Any], *, in_axes: Any, options: Options, name: str
) -> Callable[..., Any]:
    """The lifted transformation: ``fun(scope, *args)`` with its scope taken apart into arrays."""

    def inner(
        scope_of: Callable[..., Any],
        repack: Callable[..., Any],
        variables: Any,
        rngs: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        def pure(state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            scope = scope_of(*state)
            outputs = fun(scope, *args, **kwargs)
            return outputs, repack(scope)

        return call_rowwise(
            pure,
            (variables, rngs),
            args,
            kwargs,
            in_axes=in_axes,
            options=options,
            name=name,
        )

    packed = lift.pack(inner, (True,), (True,), (True,), name="rowwise", enable_kwargs=True)

    def call(scope: Any, *args: Any, **kwargs: Any) -> Any:
        # Initialisation makes the variables; column-wise, they are those of the module as it is.
        if any(one.get_flag("initializing", False) for one in jax.tree.leaves(scope)):
            return fun(scope, *args, **kwargs)
        return packed(scope, *args, **kwargs)

    return call
