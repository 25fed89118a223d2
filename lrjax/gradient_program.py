"""A function with its gradients as one compiled program, and how far rounding alone takes it.

The checker's yardstick. What a result may be off by is not a fraction of the largest gradient, nor
of its own size alone: where terms cancel (the gradient of a bias in front of BatchNorm), all of it
is rounding. So the same program is run again, in float64 and on arguments that are moved by one
rounding, and how far its results move is measured array by array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.program.compatibility import open_jaxpr
from lrjax.program.inline import replaced_at

HALF_PRECISION = ("bfloat16", "float16")
# Programs that are run on moved arguments, of which the median counts: in a single one an element
# may fall on the other side of a ReLU or of a maximum.
_MOVES = 3
# A check runs a small program once; without LLVM's optimisations it compiles in half the time.
_QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# XLA computes operations that it fuses in float32 and skips the roundings between them, as many as
# it happens to fuse. On a CPU, which has no bfloat16, that is nearly all of column and little of a
# loop that keeps rows in bfloat16: of one and the same function, their errors differed twofold.
_ROUND_AS_WRITTEN = {"xla_allow_excess_precision": False}


class GradientProgram:
    """Outputs of a function and the gradients of their contraction with fixed cotangents.

    Args:
      fun: the function.
      args: its positional arguments.
      kwargs: its keyword arguments.
      argnums: arguments to differentiate; all by default. Integer arrays are left out.
      cotangents: of the outputs' leaves, None where they are integers; a number seeds random ones.

    Attributes:
      names: paths of the arrays that it is differentiated with respect to.
      arrays: the leaves of ``args``.
      cotangents: what the outputs are contracted with.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        argnums: Sequence[int] | None = None,
        cotangents: Sequence[Any] | int = 0,
    ):
        self._fun, self._kwargs, self._argnums = fun, dict(kwargs or {}), argnums
        paths, arrays = zip(*jax.tree_util.tree_leaves_with_path(tuple(args)), strict=True)
        self.arrays: list[Any] = list(arrays)
        self._tree = jax.tree.structure(tuple(args))
        self._wrt = [
            i
            for i, (path, array) in enumerate(zip(paths, arrays, strict=True))
            if (argnums is None or path[0].idx in argnums) and is_inexact(array)
        ]
        self.names = [f"args{jax.tree_util.keystr(paths[i])}" for i in self._wrt]
        if isinstance(cotangents, int):
            struct = jax.eval_shape(lambda *xs: fun(*xs, **self._kwargs), *args)
            cotangents = _random_cotangents(jax.tree.leaves(struct), cotangents)
        self.cotangents = cotangents
        self._traced = jax.jit(self._outputs_and_gradients).trace(self.arrays, self.cotangents)

    def _outputs_and_gradients(self, arrays: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        outputs, pull = jax.vjp(self._function(arrays), *(arrays[i] for i in self._wrt))
        return outputs, pull(_fitting(cotangents, outputs))

    def _function(self, arrays: Sequence[Any]) -> Callable[..., Any]:
        def function(*moving: Any) -> Any:
            full = replaced_at(arrays, self._wrt, moving)
            return self._fun(*jax.tree.unflatten(self._tree, full), **self._kwargs)

        return function

    def __call__(self, arrays: Sequence[Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Outputs and gradients, for these ``args`` or others in their place."""
        outputs, gradients = self._compiled(arrays or self.arrays, self.cotangents)
        return outputs, dict(zip(self.names, gradients, strict=True))

    @functools.cached_property
    def _compiled(self) -> Any:
        options = dict(_QUICK_COMPILE) if jax.default_backend() == "cpu" else {}
        if self._has_half_precision:
            options.update(_ROUND_AS_WRITTEN)
        return self._traced.lower().compile(compiler_options=options)

    @functools.cached_property
    def _has_half_precision(self) -> bool:
        return any(d.name in HALF_PRECISION for d in _inexact_dtypes(self._traced.jaxpr))

    @property
    def is_in_half_precision(self) -> bool:
        """Whether a derivative passes through bfloat16 or float16."""
        return self._has_half_precision and self.precision.name in HALF_PRECISION

    @functools.cached_property
    def precision(self) -> np.dtype:
        """The coarsest dtype that a derivative passes through; random masks have none."""
        return max(self._dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps))

    @functools.cached_property
    def _dtypes(self) -> set[np.dtype]:
        linear: list[Any] = []

        def trace_the_linear_part(arrays: Sequence[Any], cotangents: Sequence[Any]) -> Any:
            outputs, pull = jax.vjp(self._function(arrays), *(arrays[i] for i in self._wrt))
            linear.append(jax.make_jaxpr(pull)(_fitting(cotangents, outputs)))
            linear.extend(jax.tree.leaves(outputs))

        jax.eval_shape(trace_the_linear_part, self.arrays, self.cotangents)
        body, *outputs = linear
        dtypes = {*_inexact_dtypes(body), *(x.dtype for x in outputs if is_inexact(x))}
        dtypes.update(jnp.result_type(self.arrays[i]) for i in self._wrt)
        return dtypes or {np.dtype(np.float32)}

    # --- The yardstick ---------------------------------------------------------------------------

    @functools.cached_property
    def truth(self) -> list[np.ndarray] | None:
        """Outputs and gradients in float64 for the same arguments, leaf by leaf.

        None where they cannot be had: the function is in float64 already, it casts to something
        narrower itself, or it fails on float64 arguments.
        """
        if jnp.finfo(self.precision).eps <= jnp.finfo(np.float64).eps:
            return None
        with jax.enable_x64(True):
            args = jax.tree.unflatten(self._tree, [_widened(a) for a in self.arrays])
            kwargs = jax.tree.map(_widened, self._kwargs)
            cotangents = [None if ct is None else _widened(ct) for ct in self.cotangents]
            try:
                wide = GradientProgram(self._fun, args, kwargs, self._argnums, cotangents)
            except Exception:  # code of other people, on dtypes that it was not written for
                return None
            if any(jnp.finfo(dtype).bits < 64 for dtype in wide._dtypes):
                return None
            return leaves_of(*wide())

    @functools.cached_property
    def moved(self) -> list[list[np.ndarray]]:
        """Outputs and gradients where every argument is moved by one rounding, at random."""
        eps = float(jnp.finfo(self.precision).eps)
        generators = [np.random.default_rng(seed) for seed in range(_MOVES)]
        return [leaves_of(*self([_moved(a, eps, g) for a in self.arrays])) for g in generators]


def is_inexact(array: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(array), jnp.inexact)


def wide(array: Any) -> np.ndarray:
    """As float64 or complex128, for arithmetic that adds nothing to what is measured."""
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def leaves_of(outputs: Any, gradients: Mapping[str, Any]) -> list[np.ndarray]:
    """All arrays, wide; of integers only their places."""
    leaves = [*jax.tree.leaves(outputs), *gradients.values()]
    return [wide(leaf) if is_inexact(leaf) else np.zeros(()) for leaf in leaves]


def _random_cotangents(structs: Sequence[Any], seed: int) -> list[Any]:
    generator = np.random.default_rng(seed)

    def cotangent(out: Any) -> Any:
        if not is_inexact(out):
            return None
        values = generator.standard_normal(out.shape)
        if jnp.issubdtype(out.dtype, jnp.complexfloating):
            values = values + 1j * generator.standard_normal(out.shape)
        return jnp.asarray(values, out.dtype)

    return [cotangent(out) for out in structs]


def _fitting(cotangents: Sequence[Any], outputs: Any) -> Any:
    """Cotangents in the structure and of the dtypes of outputs; integers have none.

    Outputs that they do not fit, being those of another function, get zeros.
    """
    leaves, tree = jax.tree.flatten(outputs)
    given = cotangents if len(cotangents) == len(leaves) else [None] * len(leaves)

    def fitting(ct: Any, out: Any) -> Any:
        if not is_inexact(out):
            return np.zeros(np.shape(out), jax.dtypes.float0)
        if ct is None or np.shape(ct) != np.shape(out):
            return jnp.zeros_like(out)
        return ct.astype(jnp.result_type(out))

    return jax.tree.unflatten(tree, list(map(fitting, given, leaves)))


def _widened(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype") or not is_inexact(leaf):
        return leaf
    return jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float64))


def _moved(leaf: Any, eps: float, generator: np.random.Generator) -> Any:
    """Every number larger or smaller by one rounding; zeros, which are often exact, stay."""
    if not is_inexact(leaf):
        return leaf
    dtype = jnp.result_type(leaf)
    step = max(eps, float(jnp.finfo(dtype).eps))
    signs = generator.choice([-1.0, 1.0], np.shape(leaf))
    return jnp.asarray(wide(leaf) * (1 + step * signs), dtype)


def _inexact_dtypes(jaxpr: Any) -> Iterator[np.dtype]:
    """Of every value in a jaxpr and in those within."""
    body, _ = open_jaxpr(jaxpr)
    for eqn in body.eqns:
        for v in eqn.outvars:
            dtype = getattr(v.aval, "dtype", None)
            if dtype is not None and jnp.issubdtype(dtype, jnp.inexact):
                yield dtype
        for param in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(param):
                yield from _inexact_dtypes(param)


def _is_jaxpr(param: Any) -> bool:
    return hasattr(param, "eqns") or hasattr(param, "jaxpr")
