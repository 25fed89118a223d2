"""What a function really takes when it runs, next to what its profile predicts."""

from __future__ import annotations

import dataclasses
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.memory.profile import MemoryProfile
from lrjax.memory.profiling import profile
from lrjax.memory.rss import measure_rss


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One run of a function; sizes in bytes.

    Attributes:
      profile: the prediction, whole.
      predicted_bytes: the part of it that ``measured_bytes`` is comparable with.
      measured_bytes: what the device or the process reports.
      source: ``"memory_stats"``: the device's peak since the process began, arguments and what
        else lives there included. ``"rss"``: growth of a fresh process over a baseline that holds
        the arguments.
    """

    profile: MemoryProfile
    predicted_bytes: int
    measured_bytes: int
    source: str

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured_bytes / max(self.predicted_bytes, 1)


def measure(
    fun: Callable[..., Any], *args: Any, static_argnums: int | Sequence[int] = ()
) -> Measurement:
    """Run ``fun`` on the default device and compare the memory it took with its profile.

    On an accelerator this is ``memory_stats()["peak_bytes_in_use"]``, which never falls: measure
    in a process that has done nothing larger before. On CPU, where JAX keeps no statistics, the
    compiled program and the arguments are handed to a fresh process, and its peak resident memory
    over the baseline is read (Linux).

    Args:
      fun: a function JAX can trace.
      *args: arrays (or ``jax.ShapeDtypeStruct``: zeros are used), in pytrees.
      static_argnums: as ``jax.jit``'s.

    Raises:
      TypeError: an argument without shape and dtype.
      NotImplementedError: the device reports no statistics.
      RuntimeError: the fresh process failed; the message ends with what it wrote to stderr.

    Example::

        measured = lrjax.memory.measure(jax.grad(loss), params, images)
        print(measured.predicted_bytes, measured.measured_bytes, measured.ratio)
    """
    prediction = profile(fun, *args, static_argnums=static_argnums)
    positions = (static_argnums,) if isinstance(static_argnums, int) else static_argnums
    static = {p % len(args): args[p] for p in positions}
    leaves, tree = jax.tree.flatten([a for i, a in enumerate(args) if i not in static])

    def flat(*leaves: Any) -> list[Any]:
        moving = iter(jax.tree.unflatten(tree, leaves))
        whole = [static[i] if i in static else next(moving) for i in range(len(args))]
        return jax.tree.leaves(fun(*whole))

    if jax.default_backend() == "cpu":
        return _measure_process(prediction, flat, leaves)
    return _measure_device(prediction, flat, leaves)


def _measure_device(
    prediction: MemoryProfile, flat: Callable[..., Any], leaves: Sequence[Any]
) -> Measurement:
    device = jax.devices()[0]
    if not device.memory_stats():
        raise NotImplementedError(f"{device.device_kind} reports no memory_stats()")
    arrays = [jnp.asarray(_array(leaf)) for leaf in leaves]
    jax.block_until_ready(jax.jit(flat)(*arrays))
    peak = (device.memory_stats() or {})["peak_bytes_in_use"]
    return Measurement(prediction, prediction.peak_bytes, peak, "memory_stats")


def _measure_process(
    prediction: MemoryProfile, flat: Callable[..., Any], leaves: Sequence[Any]
) -> Measurement:
    from jax.experimental import serialize_executable

    compiled = jax.jit(flat).lower(*leaves).compile()
    with tempfile.TemporaryDirectory(prefix="lrjax-measure-") as directory:
        program = Path(directory) / "program.pickle"
        program.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
        arrays = Path(directory) / "arguments.pickle"
        arrays.write_bytes(pickle.dumps([_array(leaf) for leaf in leaves]))
        growth = measure_rss(f"{__name__}:_prepare", str(program), str(arrays))
    predicted = prediction.peak_bytes - prediction.argument_bytes
    return Measurement(prediction, predicted, growth.growth_bytes, "rss")


def _prepare(program: str, arrays: str) -> Callable[[], Any]:
    """In the fresh process: the program with its arguments in place, ready to run."""
    from jax.experimental import serialize_executable

    run = serialize_executable.deserialize_and_load(*pickle.loads(Path(program).read_bytes()))
    arguments = [jnp.asarray(a) for a in pickle.loads(Path(arrays).read_bytes())]
    jax.block_until_ready(arguments)
    return lambda: run(*arguments)


def _array(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return np.zeros(leaf.shape, leaf.dtype)
    return np.asarray(leaf)
