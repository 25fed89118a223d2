"""Compile a function for a target, whether or not that device is present.

XLA decides every buffer at compile time, so a compiled function is an exact answer to "how much
memory will it take": nothing runs and nothing is allocated. What compilation cannot see is the
scratch that cuDNN asks for when the program runs; compare with ``device.memory_stats()`` there.

The kernels of a program compiled without its device are not autotuned: read its memory, do not
time it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from lrjax.memory import targets

# Without the device there is nothing to time kernels on.
_COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}


def compile_for(
    fun: Callable[..., Any],
    *args: Any,
    target: str = "h200",
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
) -> jax.stages.Compiled:
    """Compile ``fun`` for one device of the kind ``target``.

    Args:
      fun: a function JAX can trace.
      *args: its arguments. Only shapes and dtypes are read, so pytrees of ``jax.ShapeDtypeStruct``
        do as well as arrays; static arguments are passed as they are.
      target: a name in ``lrjax.memory.TARGETS``.
      donate_argnums: as ``jax.jit``'s.
      static_argnums: as ``jax.jit``'s.

    Returns:
      The compiled program. It cannot run here; see ``peak_bytes``.

    Raises:
      ValueError: ``target`` is not in the table.
      ImportError: XLA's plugin for the target is not installed; the message has the command.

    Example::

        compiled = compile_for(jax.grad(loss), params, images, target="h200")
        print(peak_bytes(compiled) / 2**20, "MiB")
    """
    sharding = jax.sharding.SingleDeviceSharding(_device(target))
    static = _normalised(static_argnums, len(args))
    on_target = tuple(
        arg if position in static else _structs(arg, sharding) for position, arg in enumerate(args)
    )
    jitted = jax.jit(fun, donate_argnums=donate_argnums, static_argnums=static_argnums)
    return jitted.lower(*on_target).compile(compiler_options=dict(_COMPILER_OPTIONS))


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of device memory in use at the program's worst moment, arguments and outputs included.

    XLA's own figure, from its buffer assignment and schedule.

    Raises:
      NotImplementedError: the backend that compiled the program does not report its memory.
    """
    return _memory_analysis(compiled).peak_memory_in_bytes


def temp_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes XLA sets aside for everything that is neither argument nor output.

    Raises:
      NotImplementedError: the backend that compiled the program does not report its memory.
    """
    return _memory_analysis(compiled).temp_size_in_bytes


def _memory_analysis(compiled: jax.stages.Compiled) -> Any:
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotImplementedError(
            "compiled.memory_analysis() is None: this backend does not report its memory. "
            "Compile with lrjax.memory.compile_for(fun, *args, target=...) instead."
        )
    return analysis


@functools.cache
def _device(name: str) -> jax.Device:
    """A stand-in for one device of the kind ``name``, good for compiling only."""
    target = targets.find(name)
    try:
        topology = topologies.get_topology_desc(
            name,
            platform="cuda",
            topology="1x1x1",  # hosts x processes x devices
            target_config=targets.target_config(target),
        )
    except NotImplementedError as error:  # no plugin has registered a topology for the platform
        raise ImportError(
            f"target={name!r} needs XLA's CUDA plugin, which is not installed: "
            f'pip install "jax[cuda13]=={jax.__version__}"  (no GPU is needed)'
        ) from error
    return topology.devices[0]


def _structs(arg: Any, sharding: jax.sharding.Sharding) -> Any:
    """``arg`` with each leaf replaced by its shape and dtype, placed by ``sharding``."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type
        ),
        jax.eval_shape(lambda tree: tree, arg),
    )


def _normalised(argnums: int | Sequence[int], count: int) -> set[int]:
    """``argnums`` as a set of positions among ``count`` arguments."""
    positions = (argnums,) if isinstance(argnums, int) else argnums
    return {position % count for position in positions} if count else set()
