"""Compile a function for a target, whether or not that device is present.

XLA decides every buffer at compile time, so a compiled function is an exact answer to "how much
memory will it take": nothing runs and nothing is allocated. What compilation cannot see is the
scratch that cuDNN asks for when the program runs; compare with ``device.memory_stats()`` there.

The kernels of a program compiled without its device are not autotuned: read its memory, do not
time it.
"""

import contextlib
import functools
import glob
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from lrjax.memory import targets

# Without the device there is nothing to time kernels on.
_COMPILER_OPTIONS: dict[str, Any] = {"xla_gpu_autotune_level": 0}


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
    analysis = _memory_analysis(compiled)
    # XLA:CPU's figure leaves the temporaries out (jax 0.10.2 and 0.12.0: 115 MiB where 965 MiB are
    # temporaries). They are one allocation there, held while the program runs.
    if analysis.peak_memory_in_bytes < analysis.temp_size_in_bytes:
        return (
            analysis.temp_size_in_bytes
            + analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
            - analysis.alias_size_in_bytes
        )
    return analysis.peak_memory_in_bytes


def temp_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes XLA sets aside for everything that is neither argument nor output.

    Raises:
      NotImplementedError: the backend that compiled the program does not report its memory.
    """
    return _memory_analysis(compiled).temp_size_in_bytes


def is_installed(target: str) -> bool:
    """Whether XLA's plugin for ``target`` is installed, so that ``compile_for`` can work.

    Raises:
      ValueError: ``target`` is not in the table.
    """
    targets.find(target)
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return any(plugin.name.startswith("xla_cuda") for plugin in plugins)


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
        with _without_driver_check():
            topology = topologies.get_topology_desc(
                name,
                platform="cuda",
                topology="1x1x1",  # hosts x processes x devices
                target_config=targets.target_config(target),
            )
    except NotImplementedError as error:  # no plugin has registered topologies for the platform
        raise ImportError(_plugin_advice(name)) from error
    return topology.devices[0]


@contextlib.contextmanager
def _without_driver_check() -> Iterator[None]:
    """Let JAX's CUDA plugin load without an NVIDIA driver, quietly.

    The plugin checks the CUDA libraries' versions when JAX first looks for plugins, and withdraws
    with a traceback on stderr where there is no driver, unless JAX_PLATFORMS leaves CUDA out.
    """
    switch = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
    if switch in os.environ or glob.glob("/dev/nvidia[0-9]*"):
        yield
        return
    os.environ[switch] = "1"
    try:
        yield
    finally:
        del os.environ[switch]


def _plugin_advice(name: str) -> str:
    """What to do about a CUDA plugin that has registered nothing."""
    if is_installed(name):
        return (
            f"target={name!r} needs XLA's CUDA plugin, which is installed but did not load when "
            "JAX started, as there is no NVIDIA driver: set JAX_PLATFORMS=cpu in the environment."
        )
    return (
        f"target={name!r} needs XLA's CUDA plugin, which is not installed: "
        f'pip install "jax[cuda13]=={jax.__version__}" (no GPU is needed).'
    )


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
