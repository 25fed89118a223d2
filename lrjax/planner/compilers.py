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

# A place in a map is four of them.
INDEX_BYTES = 4
# Per element of a pooled map: the value in float32 and its place.
POOL_INDEX_BYTES = 4 + 4 * INDEX_BYTES


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
    is_cpu = target == "cpu"
    if is_cpu:
        operations = [_on_cpu(o, size) for o in operations]
    once = _computed_once(operations)
    if is_cpu:
        once, fresh = _with_differences(once, size, fresh)
    pools = _with_pool_places if is_cpu else _with_pool_gradients
    return tuple(pools(once, size, fresh))


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


def _with_pool_places(
    operations: Sequence[Operation], size: MutableMapping[int, float], fresh: int
) -> list[Operation]:
    """XLA:CPU's gradient of a max pool: a scatter to places that the forward pass finds.

    It counts all elements along four axes, from the start of the program until the places of the
    largest are known, and keeps these, and the zeros that it scatters into.
    """
    found = list(operations)
    early: list[int] = []
    for operation in operations:
        if operation.name != "select_and_scatter_add":
            continue
        (made,) = operation.outputs
        source, operand = operation.inputs[:2]
        elements = size[made] / operation.like.dtype.itemsize
        pooled = size.get(source, 0.0) / operation.like.dtype.itemsize
        counts, target, places = fresh, fresh + 1, fresh + 2
        fresh += 3
        size[counts] = elements * 4 * INDEX_BYTES
        size[target] = size[made]
        size[places] = pooled * 4 * INDEX_BYTES
        early += [counts, target]
        forward = [
            i
            for i, o in enumerate(found)
            if o.name.startswith("reduce_window") and operand in o.inputs
        ]
        where = forward[0] + 1 if forward else found.index(operation)
        find = Operation(
            "places",
            (operand, counts),
            (places,),
            Kind.ROOT,
            scratch=size.get(source, 0.0),
            is_backward=found[where - 1].is_backward,
        )
        found.insert(where, find)
        found[found.index(operation)] = dataclasses.replace(
            operation, inputs=(source, places, target), overwrites=target
        )
    return [Operation("counts", (), tuple(early), Kind.ROOT), *found] if early else found


def _on_cpu(operation: Operation, size: MutableMapping[int, float]) -> Operation:
    if operation.name.startswith("reduce_window"):
        return dataclasses.replace(operation, kind=Kind.LIBRARY)
    if operation.dense_bytes:
        return dataclasses.replace(operation, scratch=2 * operation.dense_bytes)
    return operation


def _with_differences(
    operations: Sequence[Operation], size: MutableMapping[int, float], fresh: int
) -> tuple[list[Operation], int]:
    """XLA:CPU keeps what normalisations subtract their means from, and the differences too.

    It computes a difference again for the ReLU's mask, and reads the kept one for the gradient of
    the scale.
    """
    last: dict[int, int] = {}
    for i, operation in enumerate(operations):
        if operation.is_backward:
            last.update((v, i) for v in operation.inputs)
    found = list(operations)
    kept = []
    for i, operation in enumerate(operations):
        if operation.name == "sub" and not operation.is_backward and operation.outputs[0] in last:
            reader = last[operation.outputs[0]]
            size[fresh] = size[operation.outputs[0]]
            found[reader] = dataclasses.replace(
                found[reader], inputs=(*found[reader].inputs, fresh)
            )
            kept.append((i, dataclasses.replace(operation, outputs=(fresh,), kind=Kind.ROOT)))
            fresh += 1
    for i, operation in reversed(kept):
        found.insert(i + 1, operation)
    return found, fresh
