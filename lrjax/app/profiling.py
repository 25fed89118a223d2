"""What ``lrjax memory`` does: name a program, profile it, say whether it fits."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp

from lrjax.memory.compile import device_of, mesh_for
from lrjax.memory.profile import MemoryProfile
from lrjax.memory.text import MIB
from lrjax.meshes import check_heights
from lrjax.planner.mesh import compile_options, planned_row_mesh

_ABBREVIATIONS = {
    **{"f16": "float16", "f32": "float32", "f64": "float64", "bf16": "bfloat16", "pred": "bool"},
    **{f"s{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"i{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"u{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
_SPEC = re.compile(r"([a-z][a-z0-9_]*)\[([0-9, ]*)\]")


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the shapes of its arguments; on a mesh, what ``compile_for`` takes for it."""

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    mesh: dict[str, Any] = dataclasses.field(default_factory=dict)


class UsersError(Exception):
    """What the user's own code raised, as Python would print it, from the user's first line on."""


@contextlib.contextmanager
def users_errors() -> Iterator[None]:
    """What goes wrong in code that is not lrjax's nor JAX's is a `UsersError`.

    Raises:
      UsersError: from what the code raised.
      ValueError: the function gives what is no array.
    """
    try:
        yield
    except Exception as error:
        trace = _users_part(error.__traceback__)
        if trace is None and "not a valid JAX type" in str(error):  # what the function gave
            raise ValueError(str(error).splitlines()[0]) from error
        if trace is None and not isinstance(error, SyntaxError):
            raise
        lines = traceback.format_exception(type(error), error, trace, chain=False)
        raise UsersError("".join(lines).rstrip()) from error


def _users_part(trace: TracebackType | None) -> TracebackType | None:
    """A traceback from the first frame on that is the user's; None where there is none."""
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        if package not in ("lrjax", "jax", "importlib", "contextlib"):
            return trace
        trace = trace.tb_next
    return None


def dtype_of(name: str) -> Any:
    """The dtype that a name such as ``bf16`` or ``bfloat16`` stands for.

    Raises:
      ValueError: no such dtype.
    """
    try:
        return jnp.dtype(_ABBREVIATIONS.get(name, name))
    except TypeError:
        raise ValueError(
            f"dtype: got {name!r}; use one of {', '.join(_ABBREVIATIONS)} or a dtype's full name"
        ) from None


def parse_arguments(spec: str) -> tuple[Any, ...]:
    """Arguments from text: ``"f32[8,128] bf16[1,512,512,3]"``, or JSON for pytrees.

    JSON is a list with one entry per argument; lists and objects in it are pytrees whose leaves are
    such specs, e.g. ``'[{"kernel": "f32[3,3,3,64]"}, "f32[1,64,64,3]"]'``.

    Raises:
      ValueError: the text is neither.
    """
    if spec.lstrip().startswith("["):
        try:
            entries = json.loads(spec)
        except json.JSONDecodeError as error:
            raise ValueError(f"args: {spec!r} begins like JSON and is not: {error}") from None
        return tuple(jax.tree.map(_struct, entries))
    return tuple(_struct(part) for part in re.findall(r"[^\s\[;]+(?:\[[^\]]*\]?)?", spec))


def _struct(spec: Any) -> jax.ShapeDtypeStruct:
    match = _SPEC.fullmatch(spec) if isinstance(spec, str) else None
    if match is None:
        raise ValueError(
            f"args: {spec!r} is no array; write dtype[shape], such as f32[8,128] or bf16[]"
        )
    shape = [int(size) for size in match[2].split(",") if size.strip()]
    return jax.ShapeDtypeStruct(tuple(shape), dtype_of(match[1]))


def function_program(name: str, spec: str) -> Program:
    """The program ``module:function``, importable from the current directory.

    Raises:
      ValueError: the name is of another form, there is no such module or function, or it does not
        take so many arguments.
      UsersError: what the module raised when it was imported.
    """
    module_name, colon, function = name.partition(":")
    if not (colon and module_name and function):
        raise ValueError(f"function: got {name!r}; write MODULE:FUNCTION, such as train:loss")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with users_errors():
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that is there and imports something that is not has an error of its own.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(f"function: there is no module {module_name!r} here") from None
    try:
        fun = getattr(module, function)
    except AttributeError:
        raise ValueError(f"function: module {module_name!r} has no {function!r}") from None
    if not callable(fun):
        raise ValueError(f"function: {name} is no function but {fun!r:.80}; name a function")
    args = parse_arguments(spec)
    _check_call(name, fun, args)
    return Program(fun, args)


def _check_call(name: str, fun: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        signature = inspect.signature(fun)
    except (TypeError, ValueError):  # not every function of C says what it takes
        return
    keywords = [
        one.name
        for one in signature.parameters.values()
        if one.kind is one.KEYWORD_ONLY and one.default is one.empty
    ]
    if keywords:
        raise ValueError(
            f"function: {name}{signature} wants {', '.join(keywords)} by name, and --args are by "
            "position; name a function that gives them"
        )
    try:
        signature.bind(*args)
    except TypeError as error:
        raise ValueError(
            f"args: got {len(args)} for {name}{signature}: {error}; give one entry for each "
            'argument, such as "f32[8,128] bf16[3]"'
        ) from None


def gradient_program(
    network: Any,
    strategy: Any,
    image: tuple[int, int],
    batch: int,
    dtype: Any,
    *,
    labels_pixels: bool = False,
    target: str | None = None,
    devices: int = 1,
) -> Program:
    """Loss and gradient by the parameters of a classifier, run under a strategy.

    Args:
      network: a Flax Linen module that takes ``[B, H, W, 3]``.
      strategy: a ``lrjax.app.training.Strategy``, or a plan for so many devices.
      image: height and width.
      batch: images at a time.
      dtype: of the images; the parameters are float32.
      labels_pixels: the network classifies every pixel.
      target: the kind of device, where there are several.
      devices: that share the rows.

    Raises:
      ValueError: there are fewer rows than devices, or not so many devices.
    """
    from lrjax.app.planning import mesh_of, training_call
    from lrjax.app.strategy import ROWS, Strategy

    _, args, in_axes = training_call(network, image, batch, dtype, labels_pixels=labels_pixels)
    row_mesh = planned_row_mesh(mesh_of(devices), None, target)
    if row_mesh is not None:
        check_heights(args[1:2], (1,), row_mesh)
        if isinstance(strategy, Strategy):  # a plan knows its axis
            strategy = dataclasses.replace(strategy, row_mesh_axis=ROWS)
    loss = strategy.loss(network, labels_pixels=labels_pixels)
    gradient = jax.value_and_grad(loss, has_aux=True)
    return Program(gradient, args, compile_options(args, in_axes, row_mesh))


def check_target(target: str | None, devices: int = 1) -> None:
    """Before anything is traced.

    Raises:
      ValueError: no such target, or not so many of them.
      ImportError: its plugin is not installed; the message has the command.
    """
    device_of(target)
    if devices > 1:
        mesh_for(target, {"devices": devices})


def verdict(profile: MemoryProfile) -> str:
    """One sentence: the peak, the device's memory, and whether it fits."""
    peak = f"{profile.target}: peak {profile.peak_bytes / MIB:,.0f} MiB"
    peak += f" on each of {profile.devices} devices" if profile.devices > 1 else ""
    if profile.allocated_bytes is not None and profile.allocated_bytes > profile.peak_bytes:
        peak += f" ({profile.allocated_bytes / MIB:,.0f} MiB with the gaps between buffers)"
    if profile.capacity_bytes is None:
        return f"{peak}; the device's memory is unknown"
    fits = "fits" if profile.fits else "does not fit"
    return f"{peak} of {profile.capacity_bytes / MIB:,.0f} MiB: {fits}"
