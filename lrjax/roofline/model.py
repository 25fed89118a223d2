"""Step time of a compiled program by a roofline: every kernel takes the longest of three times.

``max(operations / rate, bytes / bandwidth, least time of a launch)``, added up over all kernels,
loops multiplied out (Williams, Waterman, Patterson: Roofline, CACM 2009). A kernel is a fusion, a
copy or a library call of XLA's optimised program; ``traffic`` and ``work`` count what it moves and
computes, ``rates`` says what is assumed of the device.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from lrjax.memory.attribution import layer_of
from lrjax.roofline.hlo import Computation, Instruction, Program, parse
from lrjax.roofline.rates import Rates
from lrjax.roofline.traffic import (
    exchanged_bytes,
    fusion_bytes,
    instruction_bytes,
    is_exchange,
    written_bytes,
)
from lrjax.roofline.work import Work, work_of
from lrjax.scopes import LINE_BUFFERS
from lrjax.text import aligned, shortened

# Instructions that are no kernel.
_FREE = frozenset((
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
    *("partition-id", "replica-id", "add-dependency", "domain"),
))  # fmt: skip
# What a fusion is for: the first of these among its instructions.
_KINDS_OF_FUSIONS = (
    ("scatter", "scatter"),
    ("reduce-window", "window"),
    ("reduce", "reduction"),
    ("concatenate", "concatenate and pad"),
    ("pad", "concatenate and pad"),
    ("dynamic-update-slice", "slices"),
    ("dynamic-slice", "slices"),
    ("slice", "slices"),
    ("transpose", "transpose"),
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the device is told to run.

    Attributes:
      name: XLA's, unique in the program.
      kind: ``"convolution"``, ``"image gradient"``, ``"kernel gradient"``, ``"matrix product"``,
        ``"reduction"``, ``"elementwise"``, ``"line buffers"``, ``"host copy"`` ...
      layer: Flax module path or ``jax.named_scope``, ``""``: none.
      source: ``file:line``, ``""``: not known.
      operations: of one launch, of library calls.
      bytes: read and written by one launch.
      launches: how often it runs.
      seconds: of all launches.
      bound: what decides its time: ``"operations"``, ``"bytes"`` or ``"launches"``.
    """

    name: str
    kind: str
    layer: str
    source: str
    operations: float
    bytes: float
    launches: int
    seconds: float
    bound: str


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The time of one run of a program.

    Attributes:
      rates: what was assumed.
      kernels: all, in the order of the program.
      conditionals: how often the host waits for a predicate.
    """

    rates: Rates
    kernels: tuple[Kernel, ...]
    conditionals: int = 0

    @property
    def seconds(self) -> float:
        return sum(k.seconds for k in self.kernels) + self.conditionals * self.rates.branch_s

    @property
    def launches(self) -> int:
        return sum(k.launches for k in self.kernels)

    @property
    def operations(self) -> float:
        """Floating-point operations of library calls."""
        return sum(k.operations * k.launches for k in self.kernels)

    @property
    def bytes(self) -> float:
        return sum(k.bytes * k.launches for k in self.kernels)

    def by_kind(self) -> dict[str, float]:
        """Seconds per kind of kernel, the longest first."""
        return self._by(lambda kernel: kernel.kind, {"conditional": self._waiting})

    def by_layer(self) -> dict[str, float]:
        """Seconds per layer, the longest first."""
        return self._by(lambda kernel: kernel.layer, {"": self._waiting})

    def by_source(self) -> dict[str, float]:
        """Seconds per source line, the longest first."""
        return self._by(lambda kernel: kernel.source, {"": self._waiting})

    def by_bound(self) -> dict[str, float]:
        """Seconds by what decides a kernel's time, the longest first."""
        return self._by(lambda kernel: kernel.bound, {"conditionals": self._waiting})

    @property
    def _waiting(self) -> float:
        return self.conditionals * self.rates.branch_s

    def _by(self, key: Callable[[Kernel], str], more: dict[str, float]) -> dict[str, float]:
        found: defaultdict[str, float] = defaultdict(float)
        for kernel in self.kernels:
            found[key(kernel)] += kernel.seconds
        for name, seconds in more.items():
            found[name] += seconds
        longest = sorted(found.items(), key=lambda item: -item[1])
        return {name: seconds for name, seconds in longest if seconds}

    def __repr__(self) -> str:
        """A summary that fits a screen."""
        lines = [
            f"{self.seconds * 1e3:,.2f} ms on {self.rates.target}: {self.launches:,} launches, "
            f"{self.operations / 1e12:,.2f} TFLOP, {self.bytes / 1e9:,.1f} GB",
            "bound by " + ", ".join(f"{n} {s * 1e3:,.2f} ms" for n, s in self.by_bound().items()),
            "",
        ]
        for title, seconds in (("kind", self.by_kind()), ("layer", self.by_layer())):
            rows = [
                (shortened(name or "(none)", 48), f"{s * 1e3:,.2f}", f"{s / self.seconds:.1%}")
                for name, s in list(seconds.items())[:8]
            ]
            lines += [*aligned([(title, "ms", "of the time"), *rows]), ""]
        return "\n".join([*lines, self.rates.assumptions()])


def roofline_of(text: str, rates: Rates, *, unknown_trip_count: int | None = None) -> Roofline:
    """The time of an optimised program.

    Args:
      text: as ``jax.stages.Compiled.as_text()`` gives it.
      rates: of the device it was compiled for.
      unknown_trip_count: how often a loop runs of which XLA does not know it.

    Raises:
      ValueError: the text is no program, or has a loop whose trip count is not known.
    """
    check_trip_count(unknown_trip_count)
    walk = _Walk(parse(text), rates, unknown_trip_count)
    return Roofline(rates, tuple(walk.kernels(walk.program.entry, 1)), walk.conditionals)


def check_trip_count(count: int | None) -> None:
    """An error that says what may be given for loops of which XLA does not know it."""
    is_count = isinstance(count, numbers.Integral) and not isinstance(count, bool)
    if count is not None and not (is_count and count >= 0):
        raise ValueError(f"unknown_trip_count: got {count!r}; give a whole number of at least 0")


class _Walk:
    def __init__(self, program: Program, rates: Rates, unknown_trip_count: int | None):
        self.program, self.rates, self.unknown_trip_count = program, rates, unknown_trip_count
        self.conditionals = 0

    def kernels(self, name: str, times: int) -> Iterator[Kernel]:
        """The kernels of a computation that runs so many times."""
        computation = self.program.computations[name]
        for instruction in computation.values():
            opcode = instruction.opcode
            if opcode in _FREE or opcode.endswith("-done") or _allocates(instruction):
                continue
            if opcode == "while":
                (body,) = instruction.called("body")
                yield from self.kernels(body, times * self.trip_count(instruction))
            elif opcode == "conditional":
                self.conditionals += times
                yield from self.longest_branch(instruction, times)
            elif opcode in ("call", "async-start"):
                for called in instruction.called("to_apply", "calls"):
                    yield from self.kernels(called, times)
            else:
                yield self.kernel(instruction, computation, times)

    def trip_count(self, loop: Instruction) -> int:
        count = self.unknown_trip_count if loop.trip_count is None else loop.trip_count
        if count is None:
            raise ValueError(
                f"{loop.name}: XLA does not know how often this loop runs ({loop.name_stack}); "
                "give unknown_trip_count=N, or use lax.scan or fori_loop with static bounds"
            )
        return count

    def longest_branch(self, instruction: Instruction, times: int) -> list[Kernel]:
        """Of a conditional, in every run; waits within branches that are shorter do not count."""
        branches = instruction.called(
            "branch_computations", "true_computation", "false_computation"
        )
        outside, found = self.conditionals, []
        for branch in branches:
            self.conditionals = 0
            kernels = list(self.kernels(branch, times))
            found.append((sum(k.seconds for k in kernels), self.conditionals, kernels))
        _, waits, kernels = max(found, key=lambda entry: entry[0])
        self.conditionals = outside + waits
        return kernels

    def kernel(self, instruction: Instruction, computation: Computation, times: int) -> Kernel:
        works = list(self.works(instruction, computation))
        operations = sum(work.operations for work in works)
        is_copied = _is_on_host(instruction, computation)
        if is_exchange(instruction):
            moved = exchanged_bytes(instruction, computation)
            bandwidth = self.rates.exchange_bytes_per_s
        elif is_copied:
            moved = self.copied_bytes(instruction, computation)
            bandwidth = self.rates.host_bytes_per_s
        else:
            moved, bandwidth = self.bytes_of(instruction, computation), self.rates.bytes_per_s
        bounds = {
            "operations": sum(w.operations / self.rates.operations_rate(w.dtype) for w in works),
            "bytes": moved / bandwidth,
            "launches": self.rates.launch_s,
        }
        bound = max(bounds, key=lambda name: bounds[name])
        return Kernel(
            name=instruction.name,
            kind="host copy" if is_copied else self.kind_of(instruction, works),
            layer=layer_of(instruction.name_stack),
            source=self.program.source(instruction),
            operations=operations,
            bytes=moved,
            launches=times,
            seconds=times * bounds[bound],
            bound=bound,
        )

    def bytes_of(self, instruction: Instruction, computation: Computation) -> float:
        if instruction.opcode == "fusion":
            return fusion_bytes(self.fused(instruction))
        return instruction_bytes(instruction, computation)

    def copied_bytes(self, instruction: Instruction, computation: Computation) -> float:
        """Bytes that cross between the host and the device: of rows that are put, the rows."""
        if instruction.opcode in ("fusion", "fusion-start"):
            return written_bytes(self.fused(instruction))
        if instruction.opcode == "dynamic-update-slice":
            return float(computation[instruction.operands[1]].bytes)
        return float(instruction.shapes[0].bytes)

    def fused(self, instruction: Instruction) -> Computation:
        (called,) = instruction.called("calls")
        return self.program.computations[called]

    def works(self, instruction: Instruction, computation: Computation) -> Iterator[Work]:
        """Library calls, and products within fusions (Triton's)."""
        work = work_of(instruction, computation)
        if work is not None:
            yield work
        elif instruction.opcode == "fusion":
            fused = self.fused(instruction)
            for inner in fused.values():
                yield from self.works(inner, fused)

    def kind_of(self, instruction: Instruction, works: Sequence[Work]) -> str:
        if works:
            return works[0].kind
        if f"/{LINE_BUFFERS}/" in f"/{instruction.name_stack}/":
            return LINE_BUFFERS.replace("_", " ")
        if instruction.opcode == "custom-call":
            return instruction.attribute("custom_call_target") or "custom call"
        if instruction.opcode != "fusion":
            return instruction.opcode.removesuffix("-start")
        opcodes = {inner.opcode for inner in self.fused(instruction).values()}
        return next(
            (kind for opcode, kind in _KINDS_OF_FUSIONS if opcode in opcodes), "elementwise"
        )


def _allocates(instruction: Instruction) -> bool:
    return instruction.attribute("custom_call_target") == "AllocateBuffer"


def _is_on_host(instruction: Instruction, computation: Computation) -> bool:
    """Whether an instruction reads or writes an array in the host's memory."""
    operands = [computation[name] for name in instruction.operands if name in computation]
    return any(shape.is_on_host for one in (instruction, *operands) for shape in one.shapes)
