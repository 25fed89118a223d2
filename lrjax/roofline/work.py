"""Floating-point operations of library calls: convolutions and matrix products.

Others are counted by their bytes alone: elementwise operations never reach a GPU's rate.
"""

from __future__ import annotations

import dataclasses
import math
import re

from lrjax.roofline.hlo import Computation, Instruction, Shape

_CONVOLUTION = "__cudnn$conv"
_PRODUCTS = ("__cublas$", "__triton_gemm", "__cublas$lt$")

_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[:=][\[{]"?([\d",]*)')


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations of a library call.

    Attributes:
      kind: ``"convolution"``, its gradients ``"image gradient"`` and ``"kernel gradient"``, or
        ``"matrix product"``.
      operations: multiplications and additions of real numbers: four of each for a product of
        complex ones.
      dtype: of the operands, as XLA writes it.
    """

    kind: str
    operations: float
    dtype: str


def work_of(instruction: Instruction, computation: Computation) -> Work | None:
    """What a library call computes; None for another instruction."""
    if instruction.opcode in ("convolution", "dot"):
        target = instruction.opcode
    elif instruction.opcode == "custom-call":
        target = instruction.attribute("custom_call_target") or ""
    else:
        return None
    operands = [computation[name].shapes[0] for name in instruction.operands if name in computation]
    if len(operands) < 2:
        return None
    if target.startswith(_CONVOLUTION) or target == "convolution":
        found = _convolution(instruction, target, operands)
    elif target.startswith(_PRODUCTS) or target == "dot":
        found = _product(instruction, operands)
    else:
        return None
    is_complex = found.dtype in ("c64", "c128")
    return dataclasses.replace(found, operations=4 * found.operations) if is_complex else found


def _convolution(instruction: Instruction, target: str, operands: list[Shape]) -> Work:
    result = instruction.shapes[0]
    labels = (instruction.attribute("dim_labels") or "").replace("->", "_").split("_")
    window = instruction.attribute("window") or ""
    taps, stride, dilation = (
        _product_of(window, name) for name in ("size", "stride", "lhs_dilate")
    )

    def size(shape: Shape, which: int, letter: str) -> int:
        return shape.sizes[labels[which].index(letter)]

    dtype = operands[0].dtype
    if "BackwardFilter" in target:
        cotangent, features = operands[1], size(result, 1, "i")
        return Work("kernel gradient", 2.0 * cotangent.elements * taps * features, dtype)
    if "BackwardInput" in target:
        kernel = operands[1]
        # With stride 1 every tap of every pixel is computed, else those of the cotangent.
        elements = (
            operands[0].elements * size(kernel, 1, "i")
            if stride > 1
            else result.elements * size(kernel, 1, "o")
        )
        return Work("image gradient", 2.0 * taps * elements, dtype)
    features = size(operands[1], 1, "i")
    return Work("convolution", 2.0 * result.elements * taps * features / dilation, dtype)


def _product_of(window: str, name: str) -> int:
    found = re.search(rf"\b{name}=([\dx]+)", window)
    return math.prod(int(size) for size in found.group(1).split("x")) if found else 1


def _product(instruction: Instruction, operands: list[Shape]) -> Work:
    contracted = _CONTRACTED.search(instruction.attributes)
    axes = [int(axis) for axis in re.findall(r"\d+", contracted.group(1))] if contracted else [-1]
    length = math.prod(operands[0].sizes[axis] for axis in axes if operands[0].sizes)
    return Work("matrix product", 2.0 * instruction.shapes[0].elements * length, operands[0].dtype)
