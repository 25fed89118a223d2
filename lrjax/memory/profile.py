"""A memory profile: every buffer of a compiled program, when it lives and what made it.

Plain data, and questions asked of it. ``profiling`` makes profiles from compiled programs,
``assignment`` reads what XLA says of them, ``pictures`` draws them.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrjax.memory.collectives import Collective
from lrjax.memory.lifetimes import usage
from lrjax.text import aligned, shortened, size

if TYPE_CHECKING:
    from lrjax.memory.step_time import StepTime

# What a buffer is for, in the order in which tables and pictures show them.
KINDS = (
    "arguments",
    "outputs",
    "parameter gradients",
    "saved maps",
    "line buffers",
    "step intermediates",
    "copies",
    "convolution scratch",
    "constants",
    "unattributed",
)

FORMAT = "lrjax memory profile"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One value in device memory.

    Attributes:
      name: XLA's name of the value, unique in its profile, e.g. ``"fusion.12"``.
      bytes: its size, padding of the device's layout included.
      shape: of the array.
      dtype: of the array, as JAX names it, e.g. ``"bfloat16"``.
      operation: the JAX operation that made it, e.g. ``"conv_general_dilated"``; ``""``: unknown.
      layer: Flax module path or ``jax.named_scope``, e.g. ``"VGG16/conv1_1"``; ``""``: none.
      kind: one of ``KINDS``.
      source: ``"file.py:12"``, the line that made it; ``""``: unknown.
      start: the first step of the schedule in which it is live.
      end: the last one, inclusive.
    """

    name: str
    bytes: int
    shape: tuple[int, ...]
    dtype: str
    operation: str
    layer: str
    kind: str
    source: str
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class MemoryProfile:
    """What one compiled program needs of a device's memory; all sizes in bytes.

    Attributes:
      target: the device it was compiled for.
      peak_bytes: in use at the worst moment, arguments and outputs included; XLA's own figure.
      temp_bytes: set aside for everything that is neither argument nor output.
      argument_bytes: of the arguments.
      output_bytes: of the outputs.
      alias_bytes: of outputs that reuse a donated argument.
      host_bytes: in the host's memory (offloaded values).
      generated_code_bytes: of the program itself.
      capacity_bytes: the device's memory; ``None``: unknown.
      buffers: every value; ``"unattributed"`` is what XLA's peak holds beyond them.
      instructions: the name of every step of the schedule, loops unrolled once.
      peak_step: the step at which ``peak_bytes`` are in use.
      allocated_bytes: arguments, outputs and the block that XLA lays the temporaries out in, with
        the gaps between them, so at least ``peak_bytes``; ``None``: unknown.
      devices: how many it was compiled for; all sizes are those of one.
      collectives: what devices exchange.
    """

    target: str
    peak_bytes: int
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    host_bytes: int
    generated_code_bytes: int
    capacity_bytes: int | None
    buffers: tuple[Buffer, ...]
    instructions: tuple[str, ...]
    peak_step: int
    allocated_bytes: int | None = None
    devices: int = 1
    collectives: tuple[Collective, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether what is allocated is within the device's memory; ``None``: memory unknown.

        XLA's runtime allocates the temporaries as one block, gaps included: see
        ``allocated_bytes``.
        """
        if self.capacity_bytes is None:
            return None
        return max(self.peak_bytes, self.allocated_bytes or 0) <= self.capacity_bytes

    def __repr__(self) -> str:
        return f"MemoryProfile({self._headline()}; print it for a summary)"

    def __str__(self) -> str:
        parts = ("arguments", self.argument_bytes), ("outputs", self.output_bytes)
        sizes = [
            f"{name} {size(count)}" for name, count in (*parts, ("temporaries", self.temp_bytes))
        ]
        lines = [f"{self._headline()}; {', '.join(sizes)}", *self.exchanges(), ""]
        for title, totals in (("kind", self.by_kind()), ("layer", self.by_layer())):
            rows = [
                (shortened(name, 60), size(count), f"{count / max(self.peak_bytes, 1):.1%}")
                for name, count in totals.items()
            ]
            lines += _table((title, "at the peak", "of it"), rows)
        header = ("buffer", "size", "shape", "made by", "kind")
        return "\n".join([*lines, *_table(header, [_cells(b) for b in self.at_peak()])][:-1])

    def exchanges(self) -> list[str]:
        """A line for each kind of collective: how many, their bytes, and how many in loops."""
        found: dict[str, list[Collective]] = {}
        for one in self.collectives:
            found.setdefault(one.kind, []).append(one)
        return [
            f"{kind}: {len(several)}, {size(sum(one.bytes for one in several))} a device, "
            f"{sum(one.is_in_loop for one in several) or 'none'} in a loop"
            for kind, several in found.items()
        ]

    def _headline(self) -> str:
        fits = {True: ", fits", False: ", does not fit", None: ""}[self.fits]
        of = "" if self.capacity_bytes is None else f" of {size(self.capacity_bytes)}"
        of += "" if self.devices == 1 else f" on each of {self.devices}"
        return f"{self.target}: peak {size(self.peak_bytes)}{of}{fits}; {len(self.buffers)} buffers"

    def at_peak(self) -> list[Buffer]:
        """Buffers live at the peak, largest first."""
        return self.live_at(self.peak_step)

    def live_at(self, step: int) -> list[Buffer]:
        """Buffers live in a step of the schedule, largest first."""
        live = [b for b in self.buffers if b.start <= step <= b.end]
        return sorted(live, key=lambda b: (-b.bytes, b.name))

    def timeline(self) -> list[int]:
        """Bytes in use in every step of the schedule."""
        return usage(self.buffers, len(self.instructions))

    def by_layer(self) -> dict[str, int]:
        """Bytes at the peak per layer (Flax module path or ``jax.named_scope``), largest first."""
        return self._at_peak_by("layer")

    def by_kind(self) -> dict[str, int]:
        """Bytes at the peak per kind of buffer, largest first."""
        return self._at_peak_by("kind")

    def _at_peak_by(self, field: str) -> dict[str, int]:
        totals: Counter[str] = Counter()
        for b in self.at_peak():
            totals[getattr(b, field)] += b.bytes
        return dict(totals.most_common())

    def save_png(self, path: str | Path, *, step_time: StepTime | None = None) -> None:
        """Draw the timeline, stacked by kind, with the peak marked and its top buffers named.

        A ``step_time`` of the same program (``lrjax.roofline.estimate``) is drawn below it.
        """
        from lrjax.memory import pictures

        pictures.save_png(self, path, step_time=step_time)

    def save_html(self, path: str | Path, *, step_time: StepTime | None = None) -> None:
        """Write the timeline as one self-contained page: zoom, hover, click.

        A ``step_time`` of the same program (``lrjax.roofline.estimate``) stands at its end.
        """
        from lrjax.memory import pictures

        pictures.save_html(self, path, step_time=step_time)

    def to_json(self) -> str:
        """The profile as JSON text, for ``from_json``."""
        content = {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> MemoryProfile:
        """The profile that ``to_json`` wrote.

        Raises:
          ValueError: the text is no such profile, or of a version this lrjax does not know.
        """
        content = _checked_content(text)
        try:
            buffers = tuple(
                Buffer(**{**b, "shape": tuple(b["shape"])}) for b in content.pop("buffers")
            )
            instructions = tuple(content.pop("instructions"))
            exchanges = tuple(Collective(**one) for one in content.pop("collectives", ()))
            return cls(**content, buffers=buffers, instructions=instructions, collectives=exchanges)
        except (TypeError, KeyError) as error:
            raise ValueError(f"this is not a whole {FORMAT}: {error}") from error


_MOST_ROWS = 8  # of each table of a summary


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The first rows, how many there are besides, and an empty line."""
    others = len(rows) - _MOST_ROWS
    lines = aligned([header, *rows[:_MOST_ROWS]], left=(0, 2, 3, 4))
    return [*lines, *([f"... {others} more"] if others > 0 else []), ""]


def _cells(b: Buffer) -> tuple[str, ...]:
    shape = f"{b.dtype}{list(b.shape)}"
    return shortened(b.name, 40), size(b.bytes), shape, shortened(b.operation, 40), b.kind


def _checked_content(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not a {FORMAT}: it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"this is not a {FORMAT}: write one with MemoryProfile.to_json()")
    version = content.pop("version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{FORMAT} of version {version!r}: this lrjax reads version {FORMAT_VERSION}"
        )
    return content
