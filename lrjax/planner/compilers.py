"""What XLA makes of operations on its targets: what it fuses, and what it adds."""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping, Sequence
from typing import Any

from lrjax.planner.liveness import Kind, Operation
from lrjax.rules.elementwise import ELEMENTWISE

# What compilers fuse into readers beside elementwise operations.
# fmt: off
_MOVES = (
    "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "rev", "slice", "pad",
    "concatenate", "dynamic_slice", "gather", "iota", "tile", "split", "select_and_gather_add",
    "custom_jvp_call", "custom_vjp_call", "random_bits", "random_wrap", "random_unwrap",
    "random_fold_in", "random_seed", "threefry2x32",
)
_FUSED = frozenset((*ELEMENTWISE, *_MOVES)) - {"optimization_barrier"}
_LIBRARY = (
    "conv_general_dilated", "dot_general", "scatter", "sort", "scan", "while", "cond", "fft",
    "custom_call", "pure_callback",
)
# fmt: on
# What compilers do not compute a second time in the backward pass.
_EXPENSIVE = frozenset(
    (
        "cbrt",
        "cos",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "pow",
        "rsqrt",
        "sin",
        "sqrt",
        "tan",
        "tanh",
    )
)  # fmt: skip
_ZEROS = ("max", "select_n", "custom_jvp_call", "gradient of custom_jvp_call")

# Per element of a pooled map: the value in float32 and its place as four int32.
POOL_INDEX_BYTES = 20


def kind_of(primitive: Any) -> Kind:
    """How XLA runs a primitive."""
    if primitive.name in _FUSED:
        return Kind.FUSED
    if primitive.name.startswith(_LIBRARY):
        return Kind.LIBRARY
    return Kind.ROOT


def compiled(
    operations: Sequence[Operation], size: MutableMapping[int, float], fresh: int, target: str
) -> tuple[Operation, ...]:
    """The operations as XLA runs them on the target; new values are numbered from ``fresh``."""
    return tuple(_with_pool_gradients(_computed_once(operations), size, fresh))


def _computed_once(operations: Sequence[Operation]) -> list[Operation]:
    """Expensive results of the forward pass that the backward pass reads, if through others."""
    wanted: set[int] = set()
    found = []
    for operation in reversed(operations):
        is_wanted = not wanted.isdisjoint(operation.outputs)
        if operation.is_backward or (is_wanted and operation.kind is Kind.FUSED):
            wanted.update(operation.inputs)
        if is_wanted and not operation.is_backward and operation.name in _EXPENSIVE:
            operation = dataclasses.replace(operation, kind=Kind.ROOT)
        found.append(operation)
    return found[::-1]


def _with_pool_gradients(
    operations: Sequence[Operation], size: MutableMapping[int, float], fresh: int
) -> list[Operation]:
    """XLA:GPU's gradient of a max pool: a scatter of values to places that are found first.

    What it scatters into is a copy of zeros. A ReLU of a map of the same shape compares with those
    zeros; they are made with it, and both they and the copy exist from there on.
    """
    found = list(operations)
    added = {v for o in operations if o.name in ("add", "add_any") for v in o.inputs}
    zeros_of: dict[Any, int] = {}
    for operation in operations:
        if operation.name != "select_and_scatter_add":
            continue
        (made,) = operation.outputs
        pooled = size.get(operation.inputs[0], 0.0) / operation.like.dtype.itemsize
        changed = dataclasses.replace(operation, scratch=pooled * POOL_INDEX_BYTES)
        key = (operation.like.shape, operation.like.dtype)
        users = [o for o in found if o.name in _ZEROS and (o.like.shape, o.like.dtype) == key]
        place = found.index(operation)
        if made not in added and users and found.index(users[0]) < place:
            target = fresh
            fresh += 1
            size[target] = size[made]
            made_early = [target]
            if key not in zeros_of:
                zeros_of[key] = fresh
                fresh += 1
                size[zeros_of[key]] = size[made]
                made_early.append(zeros_of[key])
                last = users[-1]
                found[found.index(last)] = dataclasses.replace(
                    last, inputs=(*last.inputs, zeros_of[key])
                )
            changed = dataclasses.replace(
                changed, inputs=(*changed.inputs, target), overwrites=target
            )
            found[place] = changed
            early = Operation("zeros", (), tuple(made_early), Kind.ROOT)
            found.insert(found.index(users[0]) if users[0] in found else 0, early)
        else:
            found[place] = changed
    return found
