"""What XLA adds to operations on its targets.

How it runs each of them (``kind``, ``is_kept``) the rules of the primitives say. The primitives
that are named here are parts of patterns: a pooling's gradient, a ReLU's zeros, a normalisation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from jax import lax
from jax.extend.core import primitives as public

from lrjax.memory.targets import GpuTarget, TpuTarget, find
from lrjax.planner.liveness import GradientOf, Kind, Operation
from lrjax.program.inline import FlatEquation, FlatProgram
from lrjax.rowgraph.graph import size_bytes
from lrjax.rules.base import traits_of
from lrjax.rules.windows import POOLINGS

# What a row loop does beside its operations.
KERNEL_GRADIENT = "kernel gradient"  # of a step
WINDOW = "window"  # rows that a step reads
EXTEND = "extend"  # a line buffer's rows and a slab, as one array

_SUMS = (lax.add_p, public.add_jaxvals_p)
# What XLA:GPU keeps within a step: a GELU's tanh or erfc, what normalises, a Mish's logarithm, a
# sine. A SiLU's logistic, an ELU's exponential and an erf it computes again.
_KEPT_IN_STEPS = (lax.tanh_p, lax.erfc_p, lax.rsqrt_p, lax.log1p_p, lax.sin_p)
_POOL_GRADIENT = lax.select_and_scatter_add_p
POOL_GRADIENTS = (_POOL_GRADIENT, GradientOf(lax.reduce_window_max_p))
# What a ReLU and its gradient compare with zeros.
_RELU = public.custom_jvp_call_p
_ZEROS = (lax.max_p, lax.select_n_p, _RELU, GradientOf(_RELU))

# A TPU's vectors: channels are padded to as many. Narrower maps are laid out another way.
LANES = 128
# A TPU's vector memory (a v5e's), where XLA keeps what lives within a step.
FAST_BYTES = 128 * 2**20
# Copies in other layouts that XLA:TPU makes for a kernel gradient of few channels. Measured with
# VGG-16's second convolution at 1024x1024.
RELAID_COPIES = 2.5
# A place in a map is four of them.
INDEX_BYTES = 4
# Per element of a pooled map: the value in float32 and its place.
POOL_INDEX_BYTES = 4 + 4 * INDEX_BYTES


def compiled(
    operations: Sequence[Operation], size: MutableMapping[int, float], fresh: int, target: str
) -> tuple[Operation, ...]:
    """The operations as XLA runs them on the target; new values are numbered from ``fresh``."""
    operations = _computed_once(operations)
    if is_gpu(target):
        if _is_step(operations):
            operations = _kept_within_a_step(operations)
        return _with_pool_gradients(operations, size, fresh)
    return tuple(operations) if is_tpu(target) else _on_cpu(operations, size, fresh)


def is_gpu(target: str) -> bool:
    return isinstance(find(target), GpuTarget)


def is_tpu(target: str) -> bool:
    return isinstance(find(target), TpuTarget)


def buffer_bytes(aval: Any, target: str) -> float:
    """Bytes of a value as a whole array on the target."""
    size = float(size_bytes(aval))
    channels = aval.shape[-1] if len(aval.shape) > 2 else LANES
    if is_tpu(target) and LANES / 4 <= channels < LANES:
        return size * LANES / channels
    return size


def in_main_memory(step_bytes: float, target: str) -> float:
    """What of the bytes that live within a step of a loop is in the device's main memory."""
    return max(step_bytes - FAST_BYTES, 0.0) if is_tpu(target) else step_bytes


def convolution_scratch(program: FlatProgram, equation: FlatEquation, target: str) -> float:
    """Bytes that a convolution on whole maps needs while it runs, beside what it reads and gives.

    XLA:CPU makes the kernel gradient of a grouped convolution as if it were not grouped, twice.
    XLA:TPU reads a map of few channels for its kernel gradient from shifted copies, which are in
    the vector memory if they fit there.
    """
    if equation.primitive is not lax.conv_general_dilated_p:
        return 0.0
    image, other, given = (program.aval(v) for v in (*equation.inputs, *equation.outputs))
    spec = equation.params["dimension_numbers"]
    groups = equation.params["batch_group_count"]
    if target == "cpu" and groups > 1:
        return 2.0 * size_bytes(given) * groups
    kernel = [given.shape[d] for d in spec.out_spec[2:]]
    is_kernel_gradient = math.prod(kernel) < math.prod(other.shape[d] for d in spec.rhs_spec[2:])
    if is_tpu(target) and is_kernel_gradient and buffer_bytes(image, target) > size_bytes(image):
        copies = (kernel[-1] + RELAID_COPIES) * buffer_bytes(image, target)
        return copies if copies > FAST_BYTES else 0.0
    return 0.0


class _Rewrite:
    """Changes to a sequence of operations, and values that they add."""

    def __init__(
        self, operations: Sequence[Operation], size: MutableMapping[int, float], fresh: int
    ):
        self.operations, self.size, self.next = list(operations), size, fresh
        self.early: dict[int, list[Operation]] = {}

    def value(self, size: float) -> int:
        self.size[self.next] = size
        self.next += 1
        return self.next - 1

    def change(self, index: int, **fields: Any) -> None:
        self.operations[index] = dataclasses.replace(self.operations[index], **fields)

    def read(self, index: int, value: int) -> None:
        """An operation reads one value more."""
        self.change(index, inputs=(*self.operations[index].inputs, value))

    def insert(self, index: int, operation: Operation) -> None:
        """Put an operation before the one at ``index``."""
        self.early.setdefault(index, []).append(operation)

    def make(self, index: int, value: int) -> None:
        """Make a value, out of nothing, before the operation at ``index``."""
        backward = self.operations[index].is_backward
        self.insert(index, Operation("", (), (value,), Kind.ROOT, is_backward=backward))

    def result(self) -> tuple[Operation, ...]:
        found: list[Operation] = []
        for i, operation in enumerate(self.operations):
            found += [*self.early.get(i, ()), operation]
        return tuple(found)


def _computed_once(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """Expensive results of the forward pass that the backward pass reads, if through others."""
    wanted: set[int] = set()
    found = []
    for operation in reversed(operations):
        is_wanted = not wanted.isdisjoint(operation.outputs)
        if operation.is_backward or (is_wanted and operation.kind is Kind.FUSED):
            wanted.update(operation.inputs)
        if is_wanted and not operation.is_backward and traits_of(operation.what).is_kept:
            operation = dataclasses.replace(operation, kind=Kind.ROOT)
        found.append(operation)
    return tuple(reversed(found))


def _kept_within_a_step(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """Expensive results that more than one kernel reads, if through others.

    A step of stream's backward pass does both passes' operations, and none says which it is of.
    Measured on XLA:GPU alone.
    """
    if any(operation.is_backward for operation in operations):
        return tuple(operations)
    given = {v for o in operations if o.kind is Kind.LIBRARY for v in o.inputs}
    readers: dict[int, set[int]] = {}
    found = []
    for i, operation in reversed(list(enumerate(operations))):
        own = {i}
        if operation.kind is Kind.FUSED and given.isdisjoint(operation.outputs):
            own = set().union(*(readers.get(v, ()) for v in operation.outputs))
            if len(own) > 1 and operation.what in _KEPT_IN_STEPS:
                operation, own = dataclasses.replace(operation, kind=Kind.ROOT), {i}
        for v in operation.inputs:
            readers.setdefault(v, set()).update(own)
        found.append(operation)
    return tuple(reversed(found))


def _shape_of(operation: Operation) -> Any:
    like = operation.like
    return None if like is None else (like.shape, like.dtype)


def _is_step(operations: Sequence[Operation]) -> bool:
    """Whether these are of a step of a row loop, where a pool's gradient is elementwise work
    (``rules.pool_gradients``)."""
    return any(operation.what in (WINDOW, EXTEND) for operation in operations)


def _with_pool_gradients(
    operations: Sequence[Operation], size: MutableMapping[int, float], fresh: int
) -> tuple[Operation, ...]:
    """XLA:GPU's gradient of a max pool: a scatter of values to places that are found first.

    What it scatters into is a copy of zeros, made where a ReLU of a map of the same shape first
    compares with zeros; the ReLU's own zeros come to exist as well. In a step of a row loop it is
    elementwise work instead (``rules.pool_gradients``).
    """
    if _is_step(operations):
        return tuple(operations)
    new = _Rewrite(operations, size, fresh)
    added = {v for o in operations if o.what in _SUMS for v in o.inputs}
    maker = {v: o for o in operations for v in o.outputs}
    shared: set[Any] = set()
    for i, operation in enumerate(operations):
        if operation.what not in POOL_GRADIENTS or operation.like is None:
            continue
        (made,) = operation.outputs
        pooled = size.get(operation.inputs[0], 0.0) / operation.like.dtype.itemsize
        new.change(i, scratch=pooled * POOL_INDEX_BYTES)
        shape = _shape_of(operation)
        users = [
            j
            for j, o in enumerate(operations)
            if o.what in _ZEROS and _shape_of(o) == shape and not _is_scaled(o, maker)
        ]
        if made in added or not users or users[0] > i:
            continue
        target = new.value(size[made])
        new.make(users[0], target)
        new.read(i, target)
        new.change(i, overwrites=target)
        if operation.what is _POOL_GRADIENT and shape not in shared:
            shared.add(shape)
            zeros = new.value(size[made])
            new.make(users[0], zeros)
            new.read(users[-1], zeros)
    return new.result()


def _is_scaled(operation: Operation, maker: Mapping[int, Operation]) -> bool:
    """Whether what is compared with zeros comes from a product, as a normalisation gives it.

    XLA:GPU fuses more into such a ReLU, and zeros are not among its results.
    """
    behind = list(operation.inputs)
    while not operation.is_backward and behind:
        made = maker.get(behind.pop())
        if made is not None and made.what is lax.mul_p:
            return True
        if made is not None and made.kind is Kind.FUSED:
            behind += made.inputs
    return False


# --- CPU -----------------------------------------------------------------------------------------


def _on_cpu(
    operations: Sequence[Operation], size: MutableMapping[int, float], fresh: int
) -> tuple[Operation, ...]:
    new, is_step = _Rewrite(operations, size, fresh), _is_step(operations)
    for i, operation in enumerate(operations):
        if operation.what in POOLINGS:
            new.change(i, kind=Kind.LIBRARY)
        if operation.what == KERNEL_GRADIENT:
            # In loops its operands are transposed first: see ``rules.convolution``.
            new.change(i, scratch=sum(size.get(v, 0.0) for v in operation.inputs))
        if operation.what in POOL_GRADIENTS and operation.like is not None and not is_step:
            _find_places(new, i)
    _keep_differences(new)
    return new.result()


def _find_places(new: _Rewrite, index: int) -> None:
    """XLA:CPU's gradient of a max pool: a scatter to places that the forward pass finds.

    It counts all elements along four axes, from the start of the program until the places of the
    largest are known, and keeps these, and the zeros that it scatters into.
    """
    operation = new.operations[index]
    (made,) = operation.outputs
    source, operand = operation.inputs[0], operation.inputs[-1]
    itemsize = operation.like.dtype.itemsize
    counts = new.value(new.size[made] / itemsize * 4 * INDEX_BYTES)
    places = new.value(new.size.get(source, 0.0) / itemsize * 4 * INDEX_BYTES)
    target = new.value(new.size[made])
    new.make(0, counts)
    new.make(0, target)
    forward = (
        i for i, o in enumerate(new.operations) if o.what in POOLINGS and operand in o.inputs
    )
    where = next(forward, index - 1) + 1
    found = Operation(
        "places",
        (operand, counts),
        (places,),
        Kind.ROOT,
        scratch=new.size.get(source, 0.0),
        is_backward=new.operations[where].is_backward,
    )
    new.insert(where, found)
    new.change(index, inputs=(source, places, target), overwrites=target)


def _keep_differences(new: _Rewrite) -> None:
    """XLA:CPU keeps what normalisations subtract their means from, and the differences too.

    It computes a difference again for the ReLU's mask, and reads the kept one for the gradient of
    the scale.
    """
    last: dict[int, int] = {}
    for i, operation in enumerate(new.operations):
        if operation.is_backward:
            last.update((v, i) for v in operation.inputs)
    for i, operation in enumerate(new.operations):
        is_difference = operation.what is lax.sub_p and not operation.is_backward
        if is_difference and operation.outputs[0] in last:
            kept = new.value(new.size[operation.outputs[0]])
            new.insert(i + 1, dataclasses.replace(operation, outputs=(kept,), kind=Kind.ROOT))
            new.read(last[operation.outputs[0]], kept)
