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
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from lrjax.memory.targets import CpuTarget, GpuTarget, TpuTarget, find, row_of, target_config


class DoesNotFitError(MemoryError):
    """XLA's compiler for the target gave up: the program needs more memory than the device has.

    TPU's compiler does; the others compile any program.
    """


def compile_for(
    fun: Callable[..., Any],
    *args: Any,
    target: str | jax.Device | None = "h200",
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
    compiler_options: Mapping[str, Any] | None = None,
    mesh_shape: Mapping[str, int] | None = None,
    in_specs: Any = None,
) -> jax.stages.Compiled:
    """Compile ``fun`` for one device of the kind ``target``, or for a mesh of such.

    Args:
      fun: a function JAX can trace.
      *args: its arguments. Only shapes and dtypes are read, so pytrees of ``jax.ShapeDtypeStruct``
        do as well as arrays; static arguments are passed as they are.
      target: a name in ``lrjax.memory.TARGETS``, a device at hand, or None for JAX's default.
      donate_argnums: as ``jax.jit``'s.
      static_argnums: as ``jax.jit``'s.
      compiler_options: further options of XLA.
      mesh_shape: names and sizes of the axes (Auto ones) of a mesh of devices in one process, none
        of which need be there; it is the mesh at hand while ``fun`` is traced. Sizes are then those
        of one device. Not for TPUs.
      in_specs: with ``mesh_shape``: how the arguments are divided, a ``jax.P`` for each, or
        pytrees of such that fit them from the top, as ``jax.shard_map`` takes them. Default: every
        device has all of every argument.

    Returns:
      The compiled program. It cannot run here unless the device is at hand; see ``peak_bytes``.

    Raises:
      ValueError: ``target`` is not in the table, or not for a mesh; or ``mesh_shape`` or
        ``in_specs`` do not fit.
      TypeError: an argument has no shape and dtype.
      ImportError: XLA's plugin for the target is not installed; the message has the command.
      DoesNotFitError: the compiler for a TPU found no room for the program.

    Example::

        compiled = compile_for(jax.grad(loss), params, images, target="h200")
        print(peak_bytes(compiled) / 2**20, "MiB")
    """
    mesh = None if mesh_shape is None else mesh_for(target, mesh_shape)
    device = device_of(target)
    static = _normalised(static_argnums, len(args))
    shardings: Any = jax.sharding.SingleDeviceSharding(device)
    if in_specs is not None and mesh is None:
        raise ValueError("in_specs is given without mesh_shape; give the mesh's axes and sizes.")
    if mesh is not None:
        shardings = _shardings(mesh, in_specs, len(args))
    on_target = tuple(
        arg
        if position in static
        else _structs(arg, shardings if mesh is None else shardings[position], position)
        for position, arg in enumerate(args)
    )
    jitted = jax.jit(fun, donate_argnums=donate_argnums, static_argnums=static_argnums)
    options = dict(compiler_options or {})
    if isinstance(target, str) and device.platform == "gpu":
        options["xla_gpu_autotune_level"] = 0  # without the device there is nothing to time on
    with _at_hand(mesh):
        lowered = jitted.lower(*on_target)
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "Ran out of memory" in str(error):
            # An absent TPU's name says more than the kind that its stand-in reports.
            name = target if isinstance(target, str) else device.device_kind
            raise DoesNotFitError(f"{name}: {str(error).splitlines()[0]}") from error
        raise


def device_of(target: str | jax.Device | None) -> jax.Device:
    """The device, or a stand-in for it that is good for compiling only.

    Raises:
      ValueError: ``target`` is not in the table.
      ImportError: XLA's plugin for the target is not installed; the message has the command.
    """
    with _only_what_is_there():
        if target is None:
            return jax.devices()[0]
        return target if isinstance(target, jax.Device) else _stand_in(target)[0]


def mesh_for(target: str | jax.Device | None, shape: Mapping[str, int]) -> jax.sharding.Mesh:
    """A mesh of devices of one process, which are good for compiling only unless they are there.

    Raises:
      ValueError: the target is a single device or a TPU, the machine has too few, or the shape is
        none.
      ImportError: XLA's plugin for the target is not installed; the message has the command.
    """
    sizes = tuple(shape.values()) if isinstance(shape, Mapping) else ()
    if not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ValueError(f"mesh_shape={shape!r:.80} must name axes and sizes, as {{'rows': 8}}.")
    count = math.prod(sizes)
    if isinstance(target, jax.Device):
        raise ValueError("mesh_shape: target is a single device; give the name of a target.")
    with _only_what_is_there():
        if target is not None and isinstance(find(target), TpuTarget):
            raise ValueError(
                f"mesh_shape: {target} is a TPU, of which lrjax knows single ones; choose a GPU."
            )
        devices = jax.devices()[:count] if target is None else _stand_in(target, count)
    if len(devices) < count:
        raise ValueError(
            f"mesh_shape={dict(shape)} wants {count} devices and there are {len(devices)}; start "
            f"with XLA_FLAGS=--xla_force_host_platform_device_count={count} for CPUs, or name a "
            "GPU as target."
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.sharding.Mesh(np.array(devices).reshape(sizes), tuple(shape), axis_types=kinds)


def _at_hand(mesh: jax.sharding.Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The mesh for what is traced; an abstract one, for JAX would run small operations on it."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def _shardings(mesh: jax.sharding.Mesh, in_specs: Any, arguments: int) -> list[Any]:
    """Of every argument, its sharding or a pytree of such."""
    if in_specs is None or isinstance(in_specs, jax.P):
        in_specs = (in_specs,) * arguments
    if not isinstance(in_specs, Sequence) or len(in_specs) != arguments:
        raise ValueError(
            f"in_specs={in_specs!r:.80} must have one entry for each of {arguments} arguments."
        )

    def sharding(spec: Any) -> jax.sharding.NamedSharding:
        try:
            return jax.sharding.NamedSharding(mesh, jax.P() if spec is None else spec)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"in_specs: {spec!r:.80} does not fit the mesh {dict(mesh.shape)}; give a jax.P of "
                f"its axes. (JAX: {str(error).splitlines()[0]})"
            ) from error

    return [
        jax.tree.map(sharding, spec, is_leaf=lambda one: one is None or isinstance(one, jax.P))
        for spec in in_specs
    ]


def target_name(target: str | None) -> str:
    """The row of the table for ``target``; for None, the one that describes JAX's default best."""
    if target is not None:
        return target
    device = device_of(None)
    return row_of(device.platform, device.device_kind)


@contextlib.contextmanager
def _only_what_is_there() -> Iterator[None]:
    """Let JAX start, if it has not, without looking for accelerators that are not there.

    Else CUDA's and the TPU's plugins complain on stderr, and CUDA's withdraws: nothing could be
    compiled for a GPU any more.
    """
    devices = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")
    chosen = jax.config.jax_platforms  # type: ignore[attr-defined]
    if chosen or any(map(glob.glob, devices)) or sys.platform != "linux":
        yield
        return
    jax.config.update("jax_platforms", "cpu")
    try:
        with _environment({"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}):
            jax.devices()
            yield
    finally:
        jax.config.update("jax_platforms", None)


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of device memory in use at the program's worst moment, arguments and outputs included.

    XLA's own figure, from its buffer assignment and schedule. Where values are offloaded and more
    of the host's memory is in use than of the device's, it is an upper bound: what XLA sets aside.

    Raises:
      NotImplementedError: the backend that compiled the program does not report its memory.
    """
    analysis = memory_analysis(compiled)
    # XLA:CPU's figure leaves the temporaries out (jax 0.10.2 and 0.12.0: 115 MiB where 965 MiB are
    # temporaries). They are one allocation there, held while the program runs.
    if _platform(compiled) == "cpu":
        return analysis.peak_memory_in_bytes + analysis.temp_size_in_bytes
    if not analysis.host_temp_size_in_bytes:
        return analysis.peak_memory_in_bytes
    # With values in the host's memory, XLA's figure is that of the fuller of the two memories.
    everything = (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    )
    return min(analysis.peak_memory_in_bytes, everything)


def host_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of the host's memory that the program sets aside for values it offloads.

    Raises:
      NotImplementedError: the backend that compiled the program does not report its memory.
    """
    analysis = memory_analysis(compiled)
    return (
        analysis.host_temp_size_in_bytes
        + analysis.host_argument_size_in_bytes
        + analysis.host_output_size_in_bytes
        - analysis.host_alias_size_in_bytes
    )


def temp_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes XLA sets aside for everything that is neither argument nor output.

    Raises:
      NotImplementedError: the backend that compiled the program does not report its memory.
    """
    return memory_analysis(compiled).temp_size_in_bytes


def is_installed(target: str) -> bool:
    """Whether XLA's plugin for ``target`` is installed, so that ``compile_for`` can work.

    Raises:
      ValueError: ``target`` is not in the table.
    """
    found = find(target)
    if isinstance(found, CpuTarget):
        return True
    if isinstance(found, TpuTarget):
        return importlib.util.find_spec("libtpu") is not None
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    wanted = "xla_cuda" if found.is_in_cuda13 else "xla_cuda12"
    return any(plugin.name.startswith(wanted) for plugin in plugins)


def install_command(target: str) -> str:
    """What installs XLA's plugin for ``target``; ``""``: nothing is needed.

    Raises:
      ValueError: ``target`` is not in the table.
    """
    found = find(target)
    if isinstance(found, CpuTarget):
        return ""
    if isinstance(found, TpuTarget):
        extra = "tpu"
    else:
        extra = "cuda13" if found.is_in_cuda13 else "cuda12"
    return f'pip install "jax[{extra}]=={jax.__version__}"'


def _platform(compiled: jax.stages.Compiled) -> str:
    shardings = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    return next(iter(shardings[0].device_set)).platform if shardings else jax.default_backend()


def memory_analysis(compiled: jax.stages.Compiled) -> Any:
    """XLA's figures of a compiled program.

    Raises:
      NotImplementedError: the backend that compiled the program does not report its memory.
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise NotImplementedError(
            "compiled.memory_analysis() is None: this backend does not report its memory. "
            "Compile with lrjax.memory.compile_for(fun, *args, target=...) instead."
        )
    return analysis


@functools.cache
def _stand_in(name: str, count: int = 1) -> list[jax.Device]:
    """Devices of the kind ``name`` in one process, good for compiling only unless they are CPUs."""
    target = find(name)
    if isinstance(target, CpuTarget):
        return list(jax.devices("cpu")[:count])
    if not is_installed(name):
        raise ImportError(
            f"target={name!r} needs XLA's plugin for it, which is not installed: "
            f"{install_command(name)} (the device itself is not needed)."
        )
    return [_tpu(target)] if isinstance(target, TpuTarget) else _gpus(target, count)


def _gpus(target: GpuTarget, count: int) -> list[jax.Device]:
    try:
        topology = topologies.get_topology_desc(
            target.name,
            platform="cuda",
            topology=f"1x1x{count}",  # hosts x processes x devices
            target_config=target_config(target),
        )
    except NotImplementedError as error:  # no plugin has registered topologies for the platform
        raise ImportError(
            f"target={target.name!r} needs XLA's CUDA plugin, which is installed but did not load "
            "when JAX started, as there is no NVIDIA driver: set JAX_PLATFORMS=cpu in the "
            "environment."
        ) from error
    return list(topology.devices)


def _tpu(target: TpuTarget) -> jax.Device:
    # Without these libtpu asks Google Cloud's metadata server, for minutes, which machine it is on,
    # and only one process at a time may load it.
    pretended = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": target.accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    with _environment(pretended):
        topology = topologies.get_topology_desc(
            target.topology, platform="tpu", chips_per_host_bounds=[1, 1, 1]
        )
    return topology.devices[0]


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that are not set, for a while."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _structs(arg: Any, shardings: Any, position: int) -> Any:
    """``arg`` with each leaf replaced by its shape and dtype.

    It is placed by ``shardings``, a sharding or a pytree of such that fits from the top.
    """
    try:
        shaped = jax.eval_shape(lambda tree: tree, arg)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"argument {position} has no shape and dtype: {arg!r:.200}. Give arrays, numbers, "
            "jax.ShapeDtypeStruct(shape, dtype) or pytrees of them; name what is none of these "
            f"in static_argnums. (JAX: {str(error).splitlines()[0]})"
        ) from error

    def placed(sharding: Any, part: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding, weak_type=leaf.weak_type
            ),
            part,
        )

    try:
        return jax.tree.map(placed, shardings, shaped)
    except ValueError as error:
        raise ValueError(
            f"in_specs: entry {position} does not fit the argument: {str(error).splitlines()[0]}"
        ) from error


def _normalised(argnums: int | Sequence[int], count: int) -> set[int]:
    """``argnums`` as a set of positions among ``count`` arguments."""
    positions = (argnums,) if isinstance(argnums, int) else argnums
    return {position % count for position in positions} if count else set()
