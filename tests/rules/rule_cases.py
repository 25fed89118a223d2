"""Operations for the contracts of rules: at least one for every primitive that has a rule.

A case is a function whose program has one equation of the primitive; what comes before it is
evaluated, so that the equation is seen as the row graph sees it, with literals and constants.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrjax.program.constants import Constants
from lrjax.program.inline import Literal, flatten
from lrjax.rules.base import Equation, Operand, RowOp, constant_along_rows, registered, row_op

HEIGHT = 7
# What exists within ``jax.shard_map`` alone.
WITHOUT_CASES = {"pvary"}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One equation with values for its operands.

    Attributes:
      primitive: its name.
      label: what is special about it.
      fun: the function that contains it.
      args: the function's arguments.
      axes: row axes of the equation's operands.
      axis: row axis of the output, where no operand carries rows.
      least: where no row that the rule declares could be left out: "always", "inside" (but not
        where a window with holes is cut by an edge) or "never".
      chooses: the values of its operands decide which of the declared rows are needed.
    """

    primitive: str
    label: str
    fun: Callable[..., Any]
    args: tuple[Any, ...]
    axes: tuple[int | None, ...]
    axis: int | None = None
    least: str = "always"
    chooses: bool = False

    def __str__(self) -> str:
        return f"{self.primitive}: {self.label}"

    @functools.cached_property
    def traced(self) -> tuple[Equation, list[Any]]:
        """The equation and the values of its operands."""
        program = flatten(jax.make_jaxpr(self.fun)(*self.args), keep_custom_rules=True)
        constants = Constants(program)
        values: dict[int, Any] = {**program.constants}
        values.update(zip(program.inputs, self.args, strict=True))

        def read(atom: Any) -> Any:
            if isinstance(atom, Literal):
                return np.asarray(atom.value, atom.dtype)
            return values[atom]

        for equation in program.equations:
            operands = [read(v) for v in equation.inputs]
            if equation.primitive.name == self.primitive:
                described = Equation(
                    equation.primitive,
                    equation.params,
                    tuple(
                        Operand(np.shape(x), jnp.result_type(x), axis, constants.of(v))
                        for x, v, axis in zip(operands, equation.inputs, self.axes, strict=True)
                    ),
                    tuple(program.avals[v] for v in equation.outputs),
                )
                return described, [np.asarray(x) if _is_plain(x) else x for x in operands]
            values.update(zip(equation.outputs, equation.evaluate(operands), strict=True))
        raise AssertionError(f"{self}: no {self.primitive} in the program")

    @property
    def equation(self) -> Equation:
        return self.traced[0]

    @property
    def values(self) -> list[Any]:
        return list(self.traced[1])

    @functools.cached_property
    def op(self) -> RowOp:
        if self.axis is None:
            return row_op(self.equation)
        found = constant_along_rows(self.equation, self.axis)
        assert found is not None, f"{self}: no row form"
        return found

    def whole(self, *values: Any) -> list[Any]:
        """The plain primitive."""
        return self.equation.bind(*values)

    @functools.cached_property
    def outputs(self) -> list[np.ndarray]:
        return [np.asarray(out) for out in self.whole(*self.values)]


def _is_plain(value: Any) -> bool:
    return not jnp.issubdtype(value.dtype, jax.dtypes.extended)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def uniform(*shape: int, low: float = 0.2, high: float = 0.7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(low, high, shape)


def integers(*shape: int, low: int = 0, high: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape)


# --- Operations on every element alone -----------------------------------------------------------

IMAGE = (2, HEIGHT, 3)
# What is not a function of floating-point arrays in ``jax.lax`` under the primitive's name.
_PARAMETERS: dict[str, dict[str, Any]] = {
    "integer_pow": {"y": 3},
    "reduce_precision": {"exponent_bits": 5, "mantissa_bits": 3},
    "name": {"name": "here"},
    "convert_element_type": {
        "new_dtype": np.dtype(np.float32),
        "weak_type": False,
        "sharding": None,
    },
    "bitcast_convert_type": {"new_dtype": np.dtype(np.int64)},
    "round": {"rounding_method": lax.RoundingMethod.TO_NEAREST_EVEN},
}
_INTEGER = (
    "and",
    "clz",
    "mulhi",
    "not",
    "or",
    "population_count",
    "shift_left",
    "shift_right_arithmetic",
    "shift_right_logical",
    "xor",
)
_COMPLEX = ("conj", "imag", "real")
_BINARY = (
    "add",
    "add_any",
    "and",
    "atan2",
    "complex",
    "div",
    "eq",
    "eq_to",
    "ge",
    "gt",
    "igamma",
    "igamma_grad_a",
    "igammac",
    "le",
    "le_to",
    "lt",
    "lt_to",
    "max",
    "min",
    "mul",
    "mulhi",
    "ne",
    "nextafter",
    "or",
    "polygamma",
    "pow",
    "rem",
    "shift_left",
    "shift_right_arithmetic",
    "shift_right_logical",
    "sub",
    "xor",
    "zeta",
)
_TERNARY = ("clamp", "regularized_incomplete_beta", "select_n")
# Where the function is defined, if not on (0.2, 0.7).
_DOMAINS = {"acosh": (1.2, 3.0), "zeta": (1.5, 3.0), "polygamma": (1.5, 3.0)}
# Operands that must all be arrays.
_NO_SCALARS = ("add_any", "complex", "select_n", "polygamma", "regularized_incomplete_beta")


@functools.cache
def primitives() -> dict[str, Any]:
    """Every primitive of the installed JAX."""
    found = (o for o in gc.get_objects() if isinstance(o, jax.extend.core.Primitive))
    return {primitive.name: primitive for primitive in found}


def _function(name: str) -> Callable[..., Any]:
    if name in _PARAMETERS or not hasattr(lax, name):
        return lambda *xs: primitives()[name].bind(*xs, **_PARAMETERS.get(name, {}))
    return getattr(lax, name)


def _operands(name: str) -> list[np.ndarray]:
    count = 3 if name in _TERNARY else 2 if name in _BINARY else 1
    low, high = _DOMAINS.get(name, (0.2, 0.7))
    made: list[np.ndarray]
    if name in _INTEGER:
        made = [integers(*IMAGE, high=9, seed=i) for i in range(count)]
    else:
        made = [uniform(*IMAGE, low=low, high=high, seed=i) for i in range(count)]
    if name in _COMPLEX:
        made = [lax.complex(made[0], normal(*IMAGE, seed=9))]
    if name == "select_n":
        made[0] = integers(*IMAGE, high=2).astype(bool)
    if name == "clamp":
        made = [made[0] - 0.3, made[1], made[2] + 0.1]
    if name in ("eq", "eq_to", "ne"):
        made = [np.full(IMAGE, 0.5)] * 2
    if name == "polygamma":
        made[0] = np.floor(made[0])
    return [np.asarray(x) for x in made]


def elementwise_cases(name: str) -> list[Case]:
    """Rows of every operand, and rows beside a scalar or a whole map."""
    if name == "polynomial":
        args, axes = (uniform(*IMAGE), *uniform(3)), (1, None, None, None)
        return [Case(name, "coefficients", lambda x, *of: lax.polynomial(x, of), args, axes)]
    function, operands = _function(name), _operands(name)
    everywhere = (1,) * len(operands)
    cases = [Case(name, "rows", function, tuple(operands), everywhere)]
    if len(operands) == 1:
        return cases
    for i in range(len(operands)):
        axes = tuple(None if k == i else 1 for k in range(len(operands)))
        cases.append(Case(name, f"operand {i} is whole", function, tuple(operands), axes))
        is_bound = name == "clamp" and i == 1
        if name not in _NO_SCALARS and not is_bound:
            one = [x[0, 0, 0] if k == i else x for k, x in enumerate(operands)]
            if name == "clamp":  # bounds are both scalars or both arrays
                one, axes = (
                    [x[0, 0, 0] if k != 1 else x for k, x in enumerate(operands)],
                    (None, 1, None),
                )
            cases.append(Case(name, f"operand {i} is a scalar", function, tuple(one), axes))
    if name == "select_n":
        one = (operands[0][0, 0, 0], *operands[1:])
        cases.append(Case(name, "a scalar predicate", function, one, (None, 1, 1), least="never"))
    return cases


def _complex_cases() -> list[Case]:
    image = normal(*IMAGE) + 1j * normal(*IMAGE, seed=1)
    names = (
        "abs",
        "add",
        "cos",
        "div",
        "exp",
        "integer_pow",
        "log",
        "logistic",
        "mul",
        "neg",
        "pow",
        "sign",
        "sin",
        "sqrt",
        "square",
        "tanh",
    )
    cases = []
    for name in names:
        operands = (image, image + 1) if name in _BINARY else (image,)
        cases.append(Case(name, "complex", _function(name), operands, (1,) * len(operands)))
    return cases


# --- Windows -------------------------------------------------------------------------------------

_SPEC = ("NHC", "HIO", "NHC")


def convolved(
    kernel: int,
    stride: int = 1,
    dilation: int = 1,
    base: int = 1,
    padding: tuple[int, int] = (0, 0),
    height: int = HEIGHT,
) -> Case | None:
    """A convolution along rows; None where it would have no output."""
    dilated, extent = (height - 1) * base + 1, (kernel - 1) * dilation + 1
    if sum(padding) + dilated < extent:
        return None

    def fun(image: Any, weights: Any) -> Any:
        return lax.conv_general_dilated(
            image, weights, (stride,), [padding], (base,), (dilation,), dimension_numbers=_SPEC
        )

    label = f"kernel {kernel} stride {stride} dilation {dilation} base {base} {padding} of {height}"
    args = normal(1, height, 2), normal(kernel, 2, 1, seed=1)
    least = "always" if dilation == 1 else "inside" if base == 1 else "never"
    return Case("conv_general_dilated", label, fun, args, (1, None), least=least)


def _sampled(make: Callable[..., Case | None], count: int, **choices: Sequence[Any]) -> list[Case]:
    """Cases of random geometries, each drawn from the choices of its parameters."""
    generator = np.random.default_rng(0)
    cases: list[Case] = []
    while len(cases) < count:
        drawn = {k: v[generator.integers(len(v))] for k, v in choices.items()}
        found = make(**drawn)
        cases += [] if found is None else [found]
    return cases


PADDINGS = ((0, 0), (1, 1), (2, 2), (3, 0), (0, 2), (-1, 0), (0, -2), (-1, 2), (4, -1))
HEIGHTS = (1, 2, 5, 7, 8, 11)


def _convolution_cases() -> list[Case]:
    cases = _sampled(
        convolved,
        30,
        kernel=range(1, 8),
        stride=range(1, 5),
        dilation=range(1, 4),
        base=(1, 1, 2, 3),
        padding=PADDINGS,
        height=HEIGHTS,
    )
    cases += [c for k in range(1, 8) if (c := convolved(k, padding=(k // 2, (k - 1) // 2)))]
    specs = {
        "NHWC": (("NHWC", "HWIO", "NHWC"), (1, 7, 4, 2), (3, 2, 2, 1), 1),
        "NCHW": (("NCHW", "OIHW", "NCHW"), (1, 2, 7, 4), (1, 2, 3, 2), 2),
        "rows along the width": (("NHWC", "HWIO", "NHWC"), (1, 4, 7, 2), (2, 3, 2, 1), 2),
    }
    for label, (spec, image, weights, axis) in specs.items():
        fun = functools.partial(
            lax.conv_general_dilated,
            window_strides=(2, 1) if axis != 2 or label == "NCHW" else (1, 2),
            padding=[(1, 1), (0, 1)] if axis != 2 or label == "NCHW" else [(0, 1), (1, 1)],
            dimension_numbers=spec,
        )
        args = normal(*image), normal(*weights, seed=1)
        cases.append(Case("conv_general_dilated", label, fun, args, (axis, None)))
    grouped = functools.partial(
        lax.conv_general_dilated,
        window_strides=(1,),
        padding=[(1, 1)],
        dimension_numbers=_SPEC,
    )
    args = normal(2, 7, 4), normal(3, 2, 4, seed=1)
    depthwise = functools.partial(grouped, feature_group_count=2)
    cases.append(Case("conv_general_dilated", "feature groups", depthwise, args, (1, None)))
    args = normal(2, 7, 4), normal(3, 4, 2, seed=1)
    batches = functools.partial(grouped, batch_group_count=2)
    cases.append(Case("conv_general_dilated", "batch groups", batches, args, (1, None)))
    return [*cases, *_convolutions_of_other_rows()]


# Kernel, stride, dilation, dilation of the image, padding above.
_WEIGHT_GRADIENTS = (
    (3, 1, 1, 1, 1),
    (3, 2, 1, 1, 0),
    (2, 1, 2, 1, 1),
    (3, 1, 1, 2, 2),
    (4, 3, 1, 1, 2),
)


def _convolutions_of_other_rows() -> list[Case]:
    def plain(image: Any, weights: Any, padding: Any = ((0, 0),)) -> Any:
        return lax.conv_general_dilated(image, weights, (1,), padding, dimension_numbers=_SPEC)

    image, weights = normal(7, 5, 4), normal(3, 4, 7, seed=1)
    channels = normal(2, 5, 7), normal(3, 7, 2, seed=1)
    cases = [
        Case("conv_general_dilated", "rows are examples", plain, (image, weights), (0, None)),
        Case("conv_general_dilated", "rows are filters", plain, (image, weights), (None, 2)),
        Case("conv_general_dilated", "rows are channels", plain, channels, (2, 1)),
        Case("conv_general_dilated", "rows are whole channels", plain, channels, (None, 1)),
    ]
    for kernel, stride, dilation, base, low in _WEIGHT_GRADIENTS:

        def forward(image: Any, weights: Any, stride=stride, dilation=dilation, base=base, low=low):
            return lax.conv_general_dilated(
                image, weights, (stride,), [(low, 1)], (base,), (dilation,), dimension_numbers=_SPEC
            )

        def gradient(image: Any, cotangent: Any, forward=forward, kernel=kernel) -> Any:
            return jax.vjp(lambda w: forward(image, w), jnp.zeros((kernel, 2, 1)))[1](cotangent)

        image = normal(1, 11, 2)
        shape = jax.eval_shape(forward, image, np.zeros((kernel, 2, 1))).shape
        label = f"weight gradient, kernel {kernel} stride {stride} dilation {dilation} base {base}"
        args = image, normal(*shape, seed=2)
        cases.append(Case("conv_general_dilated", label, gradient, args, (1, 1)))
    return cases


_KINDS = {
    "reduce_window_max": (-np.inf, lax.max),
    "reduce_window_min": (np.inf, lax.min),
    "reduce_window_sum": (0.0, lax.add),
}


def pooled(
    kind: str,
    size: int,
    stride: int = 1,
    dilation: int = 1,
    base: int = 1,
    padding: tuple[int, int] = (0, 0),
    height: int = HEIGHT,
) -> Case | None:
    dilated, extent = (height - 1) * base + 1, (size - 1) * dilation + 1
    if sum(padding) + dilated < extent or min(padding) < 0:
        return None

    def fun(image: Any) -> Any:
        return _pool(kind, image, size, stride, padding, dilation, base)

    label = f"size {size} stride {stride} dilation {dilation} base {base} {padding} of {height}"
    least = "always" if dilation == 1 else "inside" if base == 1 else "never"
    return Case(kind, label, fun, (normal(1, height, 2),), (1,), least=least)


def _pool(
    kind: str,
    image: Any,
    size: int,
    stride: int,
    padding: tuple[int, int],
    dilation: int = 1,
    base: int = 1,
) -> Any:
    start, combine = _KINDS[kind]
    return lax.reduce_window(
        image,
        start,
        combine,
        (1, size, 1),
        (1, stride, 1),
        [(0, 0), padding, (0, 0)],
        (1, base, 1),
        (1, dilation, 1),
    )


def _pool_cases(kind: str) -> list[Case]:
    cases = _sampled(
        functools.partial(pooled, kind),
        12,
        size=range(1, 6),
        stride=range(1, 5),
        dilation=range(1, 4),
        base=(1, 1, 2, 3),
        padding=PADDINGS[:5],
        height=HEIGHTS,
    )
    image = integers(1, 9, 2, high=50).astype(np.int32)
    low = {"reduce_window_max": np.iinfo(np.int32).min, "reduce_window_min": np.iinfo(np.int32).max}

    def whole_numbers(image: Any) -> Any:
        start = np.int32(low.get(kind, 0))
        window = (1, 3, 1)
        return lax.reduce_window(image, start, _KINDS[kind][1], window, (1, 2, 1), "SAME")

    return [*cases, Case(kind, "integers", whole_numbers, (image,), (1,))]


_PAIRS = {"both": (1, 1), "first": (1, None), "second": (None, 1)}


def _pool_gradient_cases(name: str) -> list[Case]:
    """Gradients and tangents of extremes; rows in either operand or both."""
    cases = []
    geometries = itertools.product(
        ((2, 2, (0, 0)), (3, 2, (1, 1)), (3, 1, (1, 1)), (2, 3, (0, 1)), (3, 2, (0, 2))), (7, 8)
    )
    for number, ((size, stride, padding), height) in enumerate(geometries):
        kind = ("reduce_window_max", "reduce_window_min")[number % 2]

        def pool(image: Any, kind=kind, size=size, stride=stride, padding=padding) -> Any:
            return _pool(kind, image, size, stride, padding)

        image = normal(1, height, 2)
        shape = jax.eval_shape(pool, image).shape
        if name == "select_and_scatter_add":
            args = normal(*shape, seed=1), image

            def fun(cotangent: Any, image: Any, pool=pool) -> Any:
                return jax.vjp(pool, image)[1](cotangent)

        else:
            args = normal(1, height, 2, seed=1), image

            def fun(tangent: Any, image: Any, pool=pool) -> Any:
                return jax.jvp(pool, (image,), (tangent,))[1]

        label = f"{kind} size {size} stride {stride} {padding} of {height}"
        rows = tuple(_PAIRS)[number % 3]
        axes = _PAIRS[rows]
        least = "always" if size >= stride else "never"
        label = f"{label}, rows in {rows}"
        cases.append(Case(name, label, fun, args, axes, least=least, chooses=True))
    return cases


# --- Operations that move elements ---------------------------------------------------------------


def _one(name: str, label: str, fun: Any, *args: Any, axes: Any = 1, **options: Any) -> Case:
    axes = axes if isinstance(axes, tuple) else (axes,) * len(args)
    return Case(name, label, fun, args, axes, **options)


def _picked(rows: Sequence[int]) -> Callable[[Any], Any]:
    indices = np.asarray(rows)
    return lambda x: jnp.take(x, indices, axis=1, mode="clip")


# Rows above, below and between.
_EDGES = ((2, 1, 0), (0, 0, 0), (-1, -2, 0), (0, 0, 2), (1, -2, 1), (-3, 2, 2), (3, 0, 1))


def _shape_cases() -> list[Case]:
    x = normal(*IMAGE)
    y = normal(*IMAGE, seed=1)
    one = _one
    edge = (0, 0, 0)
    cases = [
        one("broadcast_in_dim", "one axis more", lambda x: jnp.broadcast_to(x, (4, *IMAGE)), x),
        one(
            "broadcast_in_dim",
            "along the width",
            lambda x: lax.broadcast_in_dim(x[:, :, :1], (2, HEIGHT, 5), (0, 1, 2)),
            x[:, :, :1],
        ),
        one("squeeze", "in front", lambda x: lax.squeeze(x, (0,)), x[:1]),
        one("squeeze", "behind", lambda x: lax.squeeze(x, (2,)), x[..., :1]),
        one("transpose", "rows last", lambda x: x.transpose(2, 0, 1), x),
        one("transpose", "rows first", lambda x: x.transpose(1, 2, 0), x),
        one("rev", "other axes", lambda x: lax.rev(x, (0, 2)), x),
        one("rev", "a few rows", lambda x: lax.rev(x, (1, 2)), x, least="never"),
        one("tile", "another axis", lambda x: lax.tile(x, (1, 1, 3)), x),
        one("concatenate", "another axis", lambda x, y: lax.concatenate([x, y], 2), x, y),
        one(
            "concatenate",
            "beside a whole map",
            lambda x, y: lax.concatenate([x, y], 2),
            x,
            y,
            axes=(1, None),
        ),
        one("concatenate", "rows after rows", lambda *xs: lax.concatenate(xs, 1), x, y[:, :2], x),
        one(
            "concatenate",
            "whole rows first",
            lambda x, y: lax.concatenate([x, y], 1),
            x[:, :3],
            y,
            axes=(None, 1),
        ),
    ]
    if "stack" in primitives():
        cases += [
            one("stack", f"axis {axis}", lambda x, y, axis=axis: jnp.stack([x, y], axis), x, y)
            for axis in (0, 1, 3)
        ]
        cases += [
            one("unstack", "axis 0", lambda x: jnp.unstack(x, axis=0), x),
            one("unstack", "axis 2", lambda x: jnp.unstack(x, axis=2), x),
        ]
    reshapes = {
        "other axes": ((2, HEIGHT, 6), (1, 2, HEIGHT, 2, 3)),
        "one row of two": ((2, 8, 3), (2, 4, 6)),
        "one row of three": ((1, 9, 2), (1, 3, 3, 2)),
        "two rows of one": ((2, HEIGHT, 6), (2, 14, 3)),
        "four rows of one": ((1, HEIGHT, 4), (1, 28, 1)),
        "rows last": ((2, HEIGHT), (1, 2, HEIGHT)),
    }
    for label, (shape, new) in reshapes.items():
        value = normal(*shape)
        cases.append(one("reshape", label, lambda x, new=new: lax.reshape(x, new), value))
    slices = ((2, 7, 1), (0, 4, 1), (1, 6, 2), (0, 7, 3), (6, 7, 1), (2, 7, 4))
    for start, stop, stride in slices:

        def sliced(x: Any, start=start, stop=stop, stride=stride) -> Any:
            return lax.slice(x, (0, start, 1), (2, stop, 3), (1, stride, 1))

        cases.append(one("slice", f"{start}:{stop}:{stride}", sliced, x))
    for low, high, interior in _EDGES:
        config = ((0, 0, 0), (low, high, interior), (1, 0, 0))
        for value in (0.0, 2.5, -np.inf):

            def padded(x: Any, value=value, config=config) -> Any:
                return lax.pad(x, np.float64(value), config)

            cases.append(
                one("pad", f"{(low, high, interior)} with {value}", padded, x, axes=(1, None))
            )

    def computed(x: Any) -> Any:
        return lax.pad(x, jnp.asarray(3, np.int32).astype(x.dtype) * 2, (edge, (1, 2, 0), edge))

    cases.append(one("pad", "with a value that is computed", computed, x, axes=(1, None)))

    def beside(x: Any, value: Any) -> Any:
        return lax.pad(x, value, (edge, edge, (1, 1, 0)))

    cases.append(
        one("pad", "with a parameter beside rows", beside, x, np.float64(2), axes=(1, None))
    )
    starts = (np.int64(0), np.int64(0), np.int64(1))
    cases.append(
        Case(
            "dynamic_slice",
            "another axis",
            lambda x, a, b, c: lax.dynamic_slice(x, (a, b, c), (2, HEIGHT, 2)),
            (x, *starts),
            (1, None, None, None),
        )
    )
    for axes in ((1, 1), (1, None), (None, 1)):
        cases.append(
            Case(
                "dynamic_update_slice",
                f"rows {axes}",
                lambda x, y, a, b, c: lax.dynamic_update_slice(x, y, (a, b, c)),
                (x, y[:, :, :2], *starts),
                (*axes, None, None, None),
            )
        )
    return cases


def _indexing_cases() -> list[Case]:
    x, labels = normal(2, HEIGHT, 4), integers(2, HEIGHT, 3, high=4)
    per_row = jax.vmap(
        jax.vmap(lambda x, i: x.at[i].get(mode="promise_in_bounds", wrap_negative_indices=False))
    )
    filled = jax.vmap(jax.vmap(lambda x, i: x.at[i].get(mode="fill", wrap_negative_indices=False)))
    fixed = np.array([3, 0, 0, 2])

    def looked_up(table: Any, i: Any) -> Any:
        return table.at[i].get(mode="promise_in_bounds", wrap_negative_indices=False)

    def counted(i: Any, values: Any) -> Any:
        return jnp.zeros(4).at[i].add(values, wrap_negative_indices=False)

    cases = [
        _one("gather", "indices of every row", per_row, x, labels, axes=(1, 1)),
        _one("gather", "indices of every row, filled", filled, x, labels, axes=(1, 1)),
        _one("gather", "labels that exist whole", per_row, x, labels, axes=(1, None)),
        _one("gather", "labels of a whole map", per_row, x, labels, axes=(None, 1)),
        _one("gather", "a table", looked_up, normal(5, 4), labels, axes=(None, 1)),
        _one("scatter-add", "a table", counted, labels, normal(2, HEIGHT, 3), axes=(None, 1, 1)),
        _one(
            "gather",
            "one set of indices",
            lambda x: x.at[:, :, fixed].get(mode="clip"),
            x,
            axes=(1, None),
        ),
    ]
    picked = {
        "mirrored edge": [2, 1, 0, 1, 2, 3, 4, 5, 6, 5],
        "every second": [0, 2, 4, 6],
        "twice each": np.repeat(np.arange(HEIGHT), 2),
        "nearest of three halves": np.arange(10) * 2 // 3,
        "beyond the edge": [0, 0, 1, 2, 3, 4, 5, 6, 6, 6],
    }
    for label, rows in picked.items():
        cases.append(
            _one("gather", f"rows: {label}", _picked(rows), x, axes=(1, None), least="never")
        )

        def gradient(cotangent: Any, rows=rows) -> Any:
            return jax.vjp(_picked(rows), x)[1](cotangent)

        cotangent = normal(2, len(rows), 4, seed=3)
        axes = (None, None, 1)
        cases.append(
            _one("scatter-add", f"rows: {label}", gradient, cotangent, axes=axes, least="never")
        )
    updates = normal(2, HEIGHT, 3, seed=1)
    methods = {
        "add": "scatter-add",
        "set": "scatter",
        "multiply": "scatter-mul",
        "min": "scatter-min",
        "max": "scatter-max",
        "subtract": "scatter-sub",
    }
    for method, name in methods.items():

        def at_rows(x: Any, i: Any, u: Any, method=method) -> Any:
            def row(x: Any, i: Any, u: Any) -> Any:
                target = x.at[i]
                options = {"wrap_negative_indices": False}
                if method == "multiply":
                    options["unique_indices"] = True
                return getattr(target, method)(u, **options)

            return jax.vmap(jax.vmap(row))(x, i, u)

        def at_columns(x: Any, u: Any, method=method) -> Any:
            return getattr(x.at[:, :, np.array([0, 2])], method)(u, unique_indices=True)

        for axes in ((1, 1, 1), (1, None, None), (None, 1, 1)):
            unique = np.tile(np.array([2, 0, 3]), (2, HEIGHT, 1))
            cases.append(
                _one(name, f"indices of every row {axes}", at_rows, x, unique, updates, axes=axes)
            )
        for axes in ((1, None, 1), (1, None, None), (None, None, 1)):
            cases.append(
                _one(
                    name, f"one set of indices {axes}", at_columns, x, updates[:, :, :2], axes=axes
                )
            )
    return cases


# --- Reductions and products ---------------------------------------------------------------------


def _reduction_cases() -> list[Case]:
    cases = []
    values = {
        "reduce_sum": normal(2, HEIGHT, 4),
        "reduce_max": normal(2, HEIGHT, 4),
        "reduce_min": normal(2, HEIGHT, 4),
        "reduce_prod": normal(2, HEIGHT, 4),
        "reduce_and": integers(2, HEIGHT, 4, high=64),
        "reduce_or": integers(2, HEIGHT, 4, high=64),
    }
    functions = {
        "reduce_sum": lax.reduce_sum,
        "reduce_max": lax.reduce_max,
        "reduce_min": lax.reduce_min,
        "reduce_prod": lax.reduce_prod,
        "reduce_and": lax.reduce_and,
        "reduce_or": lax.reduce_or,
    }
    dtypes = {
        "reduce_sum": (np.int32, np.complex128),
        "reduce_max": (np.int8, np.uint8, np.complex128),
        "reduce_min": (np.int8, np.uint8, np.complex128),
        "reduce_prod": (np.complex128,),
        "reduce_and": (bool, np.uint32),
        "reduce_or": (bool, np.uint8),
    }
    for name, value in values.items():
        for axes in ((1,), (0, 1), (0, 1, 2), (0,), (2,), (0, 2)):

            def reduce(x: Any, name=name, axes=axes) -> Any:
                return functions[name](x, axes)

            cases.append(_one(name, f"over {axes}", reduce, value))
            if axes in ((0, 1), (2,)):
                for dtype in dtypes[name]:
                    other = (np.abs(value) * 20).astype(dtype)
                    if dtype is np.complex128:
                        other = value + 1j * normal(2, HEIGHT, 4, seed=1)
                    cases.append(_one(name, f"over {axes} of {np.dtype(dtype)}", reduce, other))
    for name, function in (("argmax", lax.argmax), ("argmin", lax.argmin)):
        for axis in (0, 2):

            def position(x: Any, function=function, axis=axis) -> Any:
                return function(x, axis, np.int32)

            cases.append(_one(name, f"over {axis}", position, normal(2, HEIGHT, 4)))
    return [*cases, *_product_cases()]


def _product_cases() -> list[Case]:
    x, w = normal(2, HEIGHT, 4), normal(4, 5, seed=1)
    y = normal(2, HEIGHT, 5, seed=2)
    matrix = np.asarray(jax.image.resize(np.eye(HEIGHT), (13, HEIGHT), "linear"))

    def dot(lhs: Any, rhs: Any, contract: Any, batch: Any = ((), ())) -> Any:
        return lax.dot_general(lhs, rhs, (contract, batch))

    return [
        _one("dot_general", "features", lambda x, w: dot(x, w, ((2,), (0,))), x, w, axes=(1, None)),
        _one(
            "dot_general",
            "rows on the right",
            lambda w, x: dot(w, x, ((0,), (2,))),
            w,
            x,
            axes=(None, 1),
        ),
        _one(
            "dot_general",
            "a batch of rows",
            lambda x, y: dot(x, y, ((), ()), ((0, 1), (0, 1))),
            x,
            y,
            axes=(1, 1),
        ),
        _one(
            "dot_general",
            "a batch of rows, one whole",
            lambda x, y: dot(x, y, ((), ()), ((0, 1), (0, 1))),
            x,
            y,
            axes=(1, None),
        ),
        _one(
            "dot_general", "over rows", lambda x, y: dot(x, y, ((0, 1), (0, 1))), x, y, axes=(1, 1)
        ),
        _one(
            "dot_general",
            "over rows, one whole",
            lambda x, y: dot(x, y, ((1,), (1,)), ((0,), (0,))),
            x,
            y,
            axes=(1, None),
        ),
        _one(
            "dot_general",
            "a band of rows",
            lambda x: dot(x, matrix, ((1,), (1,))),
            x,
            axes=(1, None),
            least="never",
        ),
        _one(
            "dot_general",
            "a band before rows",
            lambda x: dot(matrix, x, ((1,), (1,))),
            x,
            axes=(None, 1),
            least="never",
        ),
    ]


# --- Along other axes, calls, branches -----------------------------------------------------------


@jax.custom_jvp
def _cubed(x: Any, factor: Any) -> Any:
    return factor * x**3


@_cubed.defjvp
def _cubed_jvp(primals: Any, tangents: Any) -> Any:
    (x, factor), (dx, df) = primals, tangents
    return _cubed(x, factor), 3 * factor * x**2 * dx + x**3 * df


@jax.custom_vjp
def _clipped(x: Any, factor: Any) -> Any:
    return jnp.minimum(x, factor)


_clipped.defvjp(
    lambda x, factor: (_clipped(x, factor), (x, factor)),
    lambda saved, ct: (
        jnp.where(saved[0] < saved[1], ct, 0.0),
        jnp.sum(jnp.where(saved[0] < saved[1], 0.0, ct)),
    ),
)


def _other_cases() -> list[Case]:
    x = normal(*IMAGE)
    z = x + 1j * normal(*IMAGE, seed=1)
    cases = []
    scans = {
        "cumsum": lax.cumsum,
        "cumprod": lax.cumprod,
        "cummax": lax.cummax,
        "cummin": lax.cummin,
        "cumlogsumexp": lax.cumlogsumexp,
    }
    for name, scan in scans.items():
        for axis, reverse in ((0, False), (2, True)):
            label = f"along {axis}, reverse {reverse}"
            cases.append(
                _one(name, label, lambda x, s=scan, a=axis, r=reverse: s(x, a, reverse=r), x)
            )
    fft = jnp.fft
    cases += [
        _one("sort", "along 2", lambda x: lax.sort(x, dimension=2), x),
        _one(
            "sort",
            "keys and values",
            lambda x, y: lax.sort((x, y), dimension=0, num_keys=1),
            x,
            x[::-1] * 2,
        ),
        _one(
            "sort",
            "keys and whole values",
            lambda x, y: lax.sort((x, y), dimension=2, num_keys=1),
            x,
            x[::-1] * 2,
            axes=(1, None),
        ),
        _one("top_k", "along 2", lambda x: lax.top_k(x, 2), x),
        _one("fft", "fft", lambda z: fft.fft(z, axis=2), z),
        _one("fft", "ifft", lambda z: fft.ifft(z, axis=2), z),
        _one("fft", "rfft", lambda x: fft.rfft(x, axis=2), x),
        _one("fft", "irfft", lambda z: fft.irfft(z, n=5, axis=2), z),
        _one("fft", "two axes", fft.fft2, z.transpose(1, 0, 2), axes=0),
        _one("custom_jvp_call", "with a parameter", _cubed, x, np.float64(1.3), axes=(1, None)),
        _one("custom_jvp_call", "relu", jax.nn.relu, x),
        _one("custom_vjp_call", "with a parameter", _clipped, x, np.float64(0.3), axes=(1, None)),
    ]
    for flag in (0, 1):
        cases.append(
            _one(
                "cond",
                f"branch {flag}",
                lambda i, x, p: lax.cond(i, lambda x, p: x * p, lambda x, p: jnp.sin(x) + p, x, p),
                np.int32(flag),
                x,
                np.float64(1.5),
                axes=(None, 1, None),
            )
        )
    return cases


def _rowless_cases() -> list[Case]:
    """What has no row operand but is made by rows all the same."""
    key = jax.random.key(3)
    row, channels = normal(2, 1, 3), normal(3)

    def bits(shape: Any, width: Any) -> Any:
        return lambda key: jax.random.bits(key, shape, width)

    return [
        Case("iota", "row numbers", lambda: lax.broadcasted_iota(np.int32, IMAGE, 1), (), (), 1),
        Case("iota", "columns", lambda: lax.broadcasted_iota(np.int32, IMAGE, 2), (), (), 1),
        Case(
            "broadcast_in_dim",
            "one row for all",
            lambda x: lax.broadcast_in_dim(x, IMAGE, (0, 1, 2)),
            (row,),
            (None,),
            1,
        ),
        Case(
            "broadcast_in_dim",
            "channels",
            lambda x: lax.broadcast_in_dim(x, IMAGE, (2,)),
            (channels,),
            (None,),
            1,
        ),
        Case("broadcast_in_dim", "infinity", lambda: lax.full(IMAGE, -np.inf), (), (None,), 1),
        Case(
            "broadcast_in_dim",
            "a computed infinity",
            lambda: lax.broadcast_in_dim(jnp.log(0.0 * jnp.ones(())), IMAGE, ()),
            (),
            (None,),
            1,
        ),
        *(
            Case("random_bits", f"{width} bits", bits(IMAGE, dtype), (key,), (None,), 1)
            for width, dtype in ((8, np.uint8), (32, np.uint32), (64, np.uint64))
        ),
    ]


@functools.cache
def cases() -> dict[str, list[Case]]:
    """All cases by primitive; made under 64-bit types."""
    found = [
        *(
            case
            for primitive, rule in registered().items()
            if rule.traits.is_elementwise and primitive.name not in WITHOUT_CASES
            for case in elementwise_cases(primitive.name)
        ),
        *_complex_cases(),
        *_convolution_cases(),
        *(c for kind in _KINDS for c in _pool_cases(kind)),
        *_pool_gradient_cases("select_and_scatter_add"),
        *_pool_gradient_cases("select_and_gather_add"),
        *_shape_cases(),
        *_indexing_cases(),
        *_reduction_cases(),
        *_other_cases(),
        *_rowless_cases(),
    ]
    by_name: dict[str, list[Case]] = {}
    for case in found:
        by_name.setdefault(case.primitive, []).append(case)
    return by_name
