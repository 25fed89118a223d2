"""Bytes that kernels read and write.

A fusion reads of every operand what its results demand: a slice the slice, a window sum every
element once, a broadcast its operand once. What is updated in place (``dynamic-update-slice``,
``scatter``) is written where it is updated and read nowhere. Every read goes to the device's
memory; caches are not modelled.
"""

from __future__ import annotations

from collections import defaultdict

from lrjax.memory.collectives import KINDS as COLLECTIVES
from lrjax.roofline.hlo import Computation, Instruction

_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_UPDATES = frozenset(("dynamic-update-slice", "scatter"))
_PRODUCTS = frozenset(("dot", "convolution", "ragged-dot"))
_LIBRARIES = ("__cublas$", "__cudnn$")
_WITHOUT_READS = frozenset(("constant", "iota", "tuple", "parameter"))


def fusion_bytes(computation: Computation) -> float:
    """Bytes that a fused computation reads and writes."""
    demanded, written = _of_roots(computation)
    read = 0.0
    for instruction in reversed(computation.values()):
        elements = min(demanded[instruction.name], float(instruction.elements))
        if instruction.opcode == "parameter" and elements > 0:
            read += elements * instruction.bytes / max(instruction.elements, 1)
        if elements <= 0 or instruction.opcode in _WITHOUT_READS:
            continue
        for number, name in enumerate(instruction.operands):
            operand = computation.get(name)
            if operand is not None:
                wanted = demanded[name] + _operand_elements(instruction, number, operand, elements)
                demanded[name] = min(float(operand.elements), wanted)
    return read + written


def is_exchange(instruction: Instruction) -> bool:
    """Whether devices exchange values; of one that starts and ends apart, the start counts."""
    return instruction.opcode.removesuffix("-start") in COLLECTIVES


def exchanged_bytes(instruction: Instruction, computation: Computation) -> float:
    """Bytes that a device sends, by the usual ring algorithms with many devices.

    A reduction goes round twice, once to be made and once to be known.
    """
    kind = instruction.opcode.removesuffix("-start")
    own = sum(computation[name].bytes for name in instruction.operands if name in computation)
    if kind == "all-gather":
        return float(max((shape.bytes for shape in instruction.shapes), default=0))
    return 2.0 * own if kind == "all-reduce" else float(own)


def written_bytes(computation: Computation) -> float:
    """Bytes that a fused computation writes; of an update in place, the update."""
    return _of_roots(computation)[1]


def _of_roots(computation: Computation) -> tuple[defaultdict[str, float], float]:
    """Elements that are demanded of the results, and bytes written."""
    demanded: defaultdict[str, float] = defaultdict(float)
    written = 0.0
    root = next(i for i in computation.values() if i.is_root)
    roots = [computation[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for result in roots:
        made = result
        while made.opcode == "bitcast" and made.operands[0] in computation:
            made = computation[made.operands[0]]
        if made.opcode in _UPDATES:
            is_scatter = made.opcode == "scatter"
            update = computation[made.operands[2 if is_scatter else 1]]
            written += update.bytes * (2 if is_scatter else 1)  # a scatter reads what it adds to
            demanded[made.name] = float(update.elements)
        else:
            written += result.bytes
        demanded[result.name] = max(demanded[result.name], float(result.elements))
    return demanded, written


def _operand_elements(
    instruction: Instruction, number: int, operand: Instruction, elements: float
) -> float:
    """Elements of an operand that so many elements of the result need."""
    opcode, every = instruction.opcode, float(operand.elements)
    if opcode in _UPDATES:
        return 0.0 if number == 0 else every
    if opcode in _SLICES:
        return elements if number == 0 else every
    if opcode in ("reduce", "reduce-window"):
        share = elements / max(instruction.elements, 1)
        return every * share if number < len(instruction.shapes) else every
    return every if opcode in _PRODUCTS else elements


def instruction_bytes(instruction: Instruction, computation: Computation) -> float:
    """Bytes of an instruction that is a kernel of its own."""
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * computation[instruction.operands[1]].bytes
    if instruction.opcode in ("dynamic-slice", "slice"):
        return 2.0 * instruction.bytes
    operands = (computation[name].bytes for name in instruction.operands if name in computation)
    return float(instruction.bytes - _scratch_bytes(instruction) + sum(operands))


def _scratch_bytes(instruction: Instruction) -> int:
    """Of a library call, the space to work in that it has beside its result: cuBLAS always takes
    32 MiB, however small the product."""
    target = instruction.attribute("custom_call_target") or ""
    is_call = instruction.opcode == "custom-call" and target.startswith(_LIBRARIES)
    last = instruction.shapes[-1]
    has_scratch = is_call and len(instruction.shapes) > 1 and last.dtype in ("s8", "u8")
    return last.bytes if has_scratch else 0
