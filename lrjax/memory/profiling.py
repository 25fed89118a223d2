"""Make memory profiles: compile for a target with XLA's dump, read it, attribute every buffer."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from lrjax.memory.assignment import HOST_COLOR, Assignment, read_dump, schedule
from lrjax.memory.attribution import Attribution
from lrjax.memory.collectives import collectives
from lrjax.memory.compile import (
    compile_for,
    device_of,
    host_bytes,
    install_command,
    is_installed,
    memory_analysis,
    peak_bytes,
)
from lrjax.memory.lifetimes import pieces, usage
from lrjax.memory.profile import Buffer, MemoryProfile
from lrjax.memory.targets import TARGETS, find

UNATTRIBUTED = "unattributed"


@dataclasses.dataclass(frozen=True)
class TargetStatus:
    """A device one can compile for.

    Attributes:
      name: what ``target`` takes.
      description: what it is.
      memory_bytes: its memory.
      is_installed: whether ``profile`` can use it now.
      install: the command that makes it so; ``""``: nothing is needed.
    """

    name: str
    description: str
    memory_bytes: int
    is_installed: bool
    install: str


def targets() -> list[TargetStatus]:
    """Every target, its memory, and what has to be installed for it.

    Example::

        for target in lrjax.memory.targets():
            print(target.name, target.memory_bytes, target.is_installed or target.install)
    """
    return [
        TargetStatus(
            name, row.description, row.memory_bytes, is_installed(name), install_command(name)
        )
        for name, row in TARGETS.items()
    ]


def profile(
    fun: Callable[..., Any],
    *args: Any,
    target: str | jax.Device | None = None,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    mesh_shape: Mapping[str, int] | None = None,
    in_specs: Any = None,
) -> MemoryProfile:
    """What ``fun`` needs of a device's memory, present or not, and what for.

    XLA compiles the function for the device and says where it puts every value; nothing runs and
    nothing is allocated on a device.

    Args:
      fun: a function JAX can trace; a jitted one does as well.
      *args: its arguments: arrays or ``jax.ShapeDtypeStruct``, in pytrees; static ones as they are.
      target: a name that ``targets()`` lists, a ``jax.Device``, or None for the default device.
      donate_argnums: as ``jax.jit``'s.
      static_argnums: as ``jax.jit``'s.
      mesh_shape: compile for a mesh of such devices, by the names and sizes of its axes; see
        ``compile_for``.
      in_specs: with ``mesh_shape``: how the arguments are divided; see ``compile_for``.

    Returns:
      The profile; its sizes are bytes, of one device.

    Raises:
      ValueError: no such target; ``mesh_shape`` or ``in_specs`` do not fit.
      TypeError: an argument without shape and dtype.
      ImportError: the target's plugin is not installed; the message has the command.
      DoesNotFitError: the compiler for a TPU found no room for the program.
      RuntimeError: XLA wrote no buffer assignment that this lrjax can read.

    Example::

        images = jax.ShapeDtypeStruct((1, 4096, 4096, 3), jnp.bfloat16)
        profile = lrjax.memory.profile(jax.grad(loss), params, images, target="rtx3090")
        print(profile.peak_bytes, profile.fits, profile.by_kind())
    """
    with tempfile.TemporaryDirectory(prefix="lrjax-profile-") as dump:
        with _without_cache(), _quietly():
            compiled = compile_for(
                fun,
                *args,
                target=target,
                donate_argnums=donate_argnums,
                static_argnums=static_argnums,
                compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_proto": True},
                mesh_shape=mesh_shape,
                in_specs=in_specs,
            )
        device = device_of(target)
        try:
            assignment = read_dump(dump)
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f"XLA wrote no buffer assignment that lrjax can read (jax {jax.__version__}, "
                f"{device.device_kind}): {error}"
            ) from error
    name = target if isinstance(target, str) else device.device_kind
    found = _assemble(name, compiled, assignment, _capacity(target, device))
    return dataclasses.replace(found, devices=math.prod((mesh_shape or {}).values()))


def device_memory_bytes(target: str | jax.Device | None) -> int | None:
    """A device's memory; None where the default device does not say.

    Raises:
      ValueError: no such target.
    """
    return _capacity(target, device_of(None) if target is None else target)


def profile_dump(path: str | Path, *, target: str | None = None) -> MemoryProfile:
    """The profile of a program that was compiled elsewhere, from XLA's dump of it.

    Args:
      path: the directory given to ``--xla_dump_to`` (together with ``--xla_dump_hlo_as_proto``), or
        a ``*after_optimizations.hlo.pb`` in it. The largest program in a directory is taken.
      target: the device it was compiled for, to know its memory.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is corrupt or of an unknown format; or no such target.
    """
    capacity = None if target is None else find(target).memory_bytes
    return _from_assignment(target or "unknown", read_dump(path), capacity)


def _assemble(
    name: str, compiled: jax.stages.Compiled, assignment: Assignment, capacity: int | None
) -> MemoryProfile:
    """A profile whose sizes are those that XLA reports of the compiled program."""
    found = _from_assignment(name, assignment, capacity)
    analysis = memory_analysis(compiled)
    peak = peak_bytes(compiled)
    buffers = tuple(b for b in found.buffers if b.name != UNATTRIBUTED)
    return dataclasses.replace(
        found,
        peak_bytes=peak,
        temp_bytes=analysis.temp_size_in_bytes,
        argument_bytes=analysis.argument_size_in_bytes,
        output_bytes=analysis.output_size_in_bytes,
        alias_bytes=analysis.alias_size_in_bytes,
        host_bytes=host_bytes(compiled),
        generated_code_bytes=analysis.generated_code_size_in_bytes,
        buffers=buffers + _unattributed(peak - found.peak_bytes, len(found.instructions)),
    )


def _from_assignment(name: str, assignment: Assignment, capacity: int | None) -> MemoryProfile:
    """A profile whose sizes are sums over the buffer assignment."""
    steps = schedule(assignment)
    found = pieces(assignment, steps)
    in_use = usage(found, len(steps))
    attribution = Attribution(assignment, steps)
    sizes = assignment.allocations
    on_device = [a for a in sizes if a.color == 0 and not a.is_thread_local]
    return MemoryProfile(
        target=name,
        peak_bytes=max(in_use),
        temp_bytes=sum(a.bytes for a in on_device if a.is_temporary),
        argument_bytes=sum(a.bytes for a in on_device if a.is_parameter),
        output_bytes=sum(a.bytes for a in on_device if a.is_output),
        alias_bytes=sum(a.bytes for a in on_device if a.is_output and a.is_parameter),
        host_bytes=sum(a.bytes for a in sizes if a.color == HOST_COLOR),
        generated_code_bytes=0,
        capacity_bytes=capacity,
        buffers=_with_unique_names(attribution.buffer(piece) for piece in found),
        instructions=tuple(step.name for step in steps),
        peak_step=in_use.index(max(in_use)),
        allocated_bytes=sum(a.bytes for a in on_device),
        collectives=collectives(assignment),
    )


def _unattributed(size: int, steps: int) -> tuple[Buffer, ...]:
    """What XLA's peak holds beyond the buffers."""
    if size <= 0:
        return ()
    return (Buffer(UNATTRIBUTED, size, (), "", "", UNATTRIBUTED, UNATTRIBUTED, "", 0, steps - 1),)


def _with_unique_names(buffers: Iterable[Buffer]) -> tuple[Buffer, ...]:
    """A value that lives twice, in two places, is told apart by a number."""
    count: dict[str, int] = {}
    named = []
    for buffer in buffers:
        number = count[buffer.name] = count.get(buffer.name, 0) + 1
        suffix = f" ({number})" if number > 1 else ""
        named.append(dataclasses.replace(buffer, name=buffer.name + suffix))
    return tuple(named)


def _capacity(target: str | jax.Device | None, device: Any) -> int | None:
    if isinstance(target, str):
        return find(target).memory_bytes
    if device.platform == "cpu":
        return find("cpu").memory_bytes
    limit: Mapping[str, int] = device.memory_stats() or {}
    return limit.get("bytes_limit")


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """A program out of the compilation cache is not compiled, and so not dumped."""
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        yield
        return

    def use(is_used: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", is_used)
        compilation_cache.reset_cache()  # JAX asks for the setting once

    use(False)
    try:
        yield
    finally:
        use(True)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what XLA's compilers write to stderr, below Python, unless they fail.

    They warn where a program does not fit, which is what a profile is asked to find out.
    """
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(before, 2)
            kept.seek(0)
            os.write(2, kept.read())
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)
