"""What is planned: a call, what it is differentiated by, and the program that proves the plan."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrjax import memory
from lrjax.fingerprint import Fingerprint, fingerprint
from lrjax.meshes import check_heights
from lrjax.planner.mesh import compile_options, is_divided
from lrjax.rowgraph.graph import size_bytes
from lrjax.rowgraph.row_mesh import RowMesh
from lrjax.rowgraph.segments import Cuttable
from lrjax.rowgraph.tracing import Traced, differentiated_leaves, flat_axes, trace


@dataclasses.dataclass(frozen=True)
class Problem:
    """A traced call and how it is differentiated.

    Attributes:
      fun, args, in_axes: the call.
      target: what it is compiled for.
      row_mesh: the devices that share the rows; None for one.
      traced: its flat program.
      wrt: numbers of the flat inputs that are differentiated.
      leaves: numbers of the same among the leaves of the arguments.
      scalar: how the result becomes a number: "itself", "first" (of a tuple, the others are
        auxiliary) or "squares" (the mean squares of all floating-point outputs, added).
    """

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    in_axes: Any
    target: str | None
    traced: Traced
    wrt: tuple[int, ...]
    leaves: tuple[int, ...]
    scalar: str
    row_mesh: RowMesh | None = None

    @functools.cached_property
    def fingerprint(self) -> Fingerprint:
        return fingerprint(self.traced)

    @property
    def fixed_bytes(self) -> int:
        """Arguments and gradients, on a device."""
        pairs = zip(self.traced.program.structs, self.traced.axes, strict=True)
        own = [
            size_bytes(struct) // self.devices
            if self._is_divided(struct, axis)
            else size_bytes(struct)
            for struct, axis in pairs
        ]
        return sum(own) + sum(own[i] for i in self.wrt)

    @property
    def devices(self) -> int:
        """How many share the rows."""
        return 1 if self.row_mesh is None else self.row_mesh.count

    def _is_divided(self, struct: Any, axis: int | None) -> bool:
        return self.row_mesh is not None and is_divided(struct, axis, self.row_mesh)

    def compiled(self, fun: Callable[..., Any]) -> jax.stages.Compiled:
        """A function of the arguments, compiled for the target, or for a mesh of such."""
        options = compile_options(self.args, self.in_axes, self.row_mesh)
        return memory.compile_for(fun, *self.args, target=self.target, **options)

    def gradient(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """The program that is planned: gradient and value of ``fun`` (``self.fun`` by rows).

        A training step has both: what computes a value in a pass of its own takes that time too.
        """

        def gradient(*args: Any) -> Any:
            leaves, tree = jax.tree.flatten(args)

            def loss(moving: list[Any]) -> Any:
                full = list(leaves)
                for i, value in zip(self.leaves, moving, strict=True):
                    full[i] = value
                return self.number_of(fun(*jax.tree.unflatten(tree, full)))

            run = jax.value_and_grad(loss, has_aux=True)
            value, gradients = run([leaves[i] for i in self.leaves])
            # Mean squares stand for a loss that is not known, and need all outputs as that does.
            return gradients, None if self.scalar == "squares" else value

        return gradient

    def number_of(self, result: Any) -> tuple[Any, Any]:
        """A scalar to differentiate, and what is returned beside it."""
        if self.scalar == "itself":
            return jax.tree.leaves(result)[0], None
        if self.scalar == "first":
            return result[0], result[1:]
        return sum(_mean_square(y) for y in jax.tree.leaves(result) if _is_inexact(y)), None


def problem_of(
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    in_axes: Any,
    target: str | None,
    wrt: int | Sequence[int] | None,
    row_mesh: RowMesh | None = None,
) -> Problem:
    """The problem of a call.

    Raises:
      ValueError: ``in_axes`` or ``wrt`` do not fit the arguments, nothing in ``fun`` is done on
        rows, or there are fewer rows than devices.
    """
    args = jax.tree.map(_struct, tuple(args))
    traced = trace(fun, in_axes, args, {})
    if not Cuttable.of(traced.program, traced.axes).operations:
        raise ValueError(
            "fun has no operation on rows, so there is nothing to plan; check in_axes, or call fun "
            "directly."
        )
    if row_mesh is not None:
        check_heights(traced.program.structs, traced.axes, row_mesh)
    axes = flat_axes(in_axes, args)
    leaves = jax.tree.leaves(args)
    chosen = _chosen(args, axes, leaves, wrt)
    first = len(traced.program.inputs) - len(leaves)
    return Problem(
        fun=fun,
        args=args,
        in_axes=in_axes,
        target=target,
        traced=traced,
        wrt=tuple(first + i for i in chosen),
        leaves=chosen,
        scalar=_scalar(traced),
        row_mesh=row_mesh,
    )


def _struct(leaf: Any) -> Any:
    shaped = jax.eval_shape(lambda x: x, leaf)
    return jax.ShapeDtypeStruct(shaped.shape, shaped.dtype, weak_type=shaped.weak_type)


def _chosen(
    args: tuple[Any, ...],
    axes: Sequence[int | None],
    leaves: Sequence[Any],
    wrt: int | Sequence[int] | None,
) -> tuple[int, ...]:
    if wrt is not None:
        return differentiated_leaves(args, wrt)
    chosen = tuple(i for i, axis in enumerate(axes) if axis is None and _is_inexact(leaves[i]))
    if not chosen:
        raise ValueError(
            "wrt=None: there is no floating-point array to differentiate by; name the arguments "
            "that hold the parameters."
        )
    return chosen


def _scalar(traced: Traced) -> str:
    program = traced.program
    avals = [program.aval(v) for v in traced.outputs]
    if len(avals) == 1 and _is_number(avals[0]):
        return "itself"
    tree = traced.out_tree
    if len(avals) > 1 and _is_number(avals[0]):
        result = jax.tree.unflatten(tree, list(range(len(avals))))
        if isinstance(result, tuple) and result[0] == 0:
            return "first"
    if not any(map(_is_inexact, avals)):
        raise ValueError("fun has no floating-point output, so there is no gradient to plan for.")
    return "squares"


def _is_number(aval: Any) -> bool:
    return aval.shape == () and _is_inexact(aval)


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _mean_square(y: Any) -> Any:
    wide = jnp.promote_types(jnp.float32, jnp.abs(y).dtype)
    return jnp.mean(jnp.square(jnp.abs(y).astype(wide)))
