"""What ``scripts/bench_device.py`` runs on the device, one job per process.

    python -m experiments.device_jobs JOB_AS_JSON

A job writes one JSON record per line to stdout as it goes, so that what it found survives its
end. A process per job keeps the device's peak-memory counter, which only grows, honest: within a
job the programs run in the order of their predicted peaks, and each must raise the counter to
have its peak counted as measured.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp

from experiments import report
from experiments.gradcheck import excess_error, max_error
from experiments.vgg16_stack import COLUMN, Method, init, parse_method, stack
from lrjax import memory

CHECK_SHAPE = (1, 165, 64, 3)  # an odd height: five output rows and a remainder
CHECK_METHODS = ("stream/8", "2ps/3", "overl/3")
FLOAT32_LIMIT = 1e-5
BFLOAT16_LIMIT = 1.5  # times as far from float32 as column is

MIN_STEPS, MAX_STEPS, TIMING_S = 3, 20, 2.0


@dataclass(frozen=True)
class Job:
    """``kind`` is ``"check"`` (``size`` and ``methods`` unused), ``"measure"`` or ``"predict"``."""

    kind: str
    size: int = 0
    dtype: str = "bfloat16"
    methods: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        fields = json.loads(text)
        return cls(**fields | {"methods": tuple(fields["methods"])})


def emit(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def check() -> None:
    """Outputs and gradients, by parameters and images, of every strategy against column's.

    float32, at the highest matmul precision, is compared with column's directly. bfloat16 is
    compared with float32 column on the same (rounded) values: a strategy passes when it is not
    much further from the truth than column in bfloat16.
    """
    methods = [COLUMN, *map(parse_method, CHECK_METHODS)]
    args = _arguments(CHECK_SHAPE, jnp.bfloat16)
    exact_args = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), args)
    with jax.default_matmul_precision("highest"):
        exact = _compile_all({method: (_vjp(method), exact_args) for method in methods})
    truth = jax.device_get(exact[COLUMN](*exact_args))
    for method in methods[1:]:
        error = max_error(jax.device_get(exact[method](*exact_args)), truth)
        emit(_check_record(method, "float32", error, FLOAT32_LIMIT))

    rounded = _compile_all({method: (_vjp(method), args) for method in methods})
    columns = jax.device_get(rounded[COLUMN](*args))
    for method in methods[1:]:
        excess = excess_error(jax.device_get(rounded[method](*args)), columns, truth)
        emit(_check_record(method, "bfloat16", excess, BFLOAT16_LIMIT))


def _vjp(method: Method) -> Callable[..., Any]:
    """The stack's output ``y``, and the gradients of ``sum(y**2) / 2``."""

    def outputs_and_gradients(params: Any, images: jax.Array) -> Any:
        y, pullback = jax.vjp(method.apply(stack), params, images)
        return y, pullback(y)

    return outputs_and_gradients


def _check_record(method: Method, dtype: str, error: float, limit: float) -> dict[str, Any]:
    return {
        "check": str(method),
        "dtype": dtype,
        "error": error,
        "limit": limit,
        "passed": error <= limit,
    }


def measure(size: int, methods: tuple[str, ...], dtype: str) -> None:
    """Step time and peak memory of the gradient by each of ``methods``."""
    args = _arguments((1, size, size, 3), dtype)
    compiled = _compile_all({m: (m.gradient(), args) for m in map(parse_method, methods)})
    predicted = {method: memory.peak_bytes(program) for method, program in compiled.items()}
    for method in sorted(compiled, key=lambda method: predicted[method]):
        record = {"size": size, "dtype": dtype, "method": str(method)}
        record |= {"xla_peak_bytes": predicted[method]}
        record |= {"xla_temp_bytes": memory.temp_bytes(compiled[method])}
        try:
            record |= _run(compiled.pop(method), args)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            record |= {"out_of_memory": True}
        emit(record)


def predict(size: int, methods: tuple[str, ...], dtype: str) -> None:
    """What a profile says of each gradient, and what the device says when it runs.

    The profile is made as somebody without the device would make it, where the table of targets
    has the device. Least first, so that each program raises the device's peak.
    """
    args = _arguments((1, size, size, 3), dtype)
    target = target_at_hand()
    found = {
        method: memory.profile(parse_method(method).gradient(), *args, target=target)
        for method in methods
    }
    for method in sorted(methods, key=lambda method: found[method].peak_bytes):
        profile = found[method]
        program = jax.jit(parse_method(method).gradient()).lower(*args).compile()
        record = {"predict": method, "size": size, "dtype": dtype, "target": target}
        record |= {"predicted_bytes": profile.peak_bytes, "argument_bytes": profile.argument_bytes}
        record |= {"allocated_bytes": profile.allocated_bytes}
        record |= {"compiled_bytes": memory.peak_bytes(program)}
        try:
            emit(record | _peak(lambda program=program: jax.block_until_ready(program(*args))))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            emit(record | {"out_of_memory": True})


def target_at_hand() -> str | None:
    """The name of the device at hand in the table of targets; ``None``: it is not there."""
    kind = jax.devices()[0].device_kind
    matches = [
        name
        for name, row in memory.TARGETS.items()
        if isinstance(row, memory.GpuTarget)
        and (row.description.startswith(kind) or kind.startswith(row.description))
    ]
    return matches[0] if matches else None


def _run(program: jax.stages.Compiled, args: tuple[Any, Any]) -> dict[str, Any]:
    """Peak memory of the first step, then the time of the following ones."""

    def step() -> Any:
        return jax.block_until_ready(program(*args))

    record = _peak(step)
    seconds: list[float] = []
    while len(seconds) < MIN_STEPS or (sum(seconds) < TIMING_S and len(seconds) < MAX_STEPS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return record | {"step_s": statistics.median(seconds), "steps": len(seconds)}


def _peak(step: Callable[[], Any]) -> dict[str, Any]:
    """What the device says ``step`` takes; where it says nothing, what the process grew by."""
    device = jax.devices()[0]
    before = device.memory_stats()
    if before is None:
        return {"peak_bytes": memory.rss_growth(step).growth_bytes, "peak_source": "RSS growth"}
    step()
    peak = device.memory_stats()["peak_bytes_in_use"]
    return {
        "peak_bytes": peak,
        "peak_source": "memory_stats",
        # Not raised: compilation (autotuning) or an earlier program had used as much already.
        "peak_is_upper_bound": peak <= before["peak_bytes_in_use"],
    }


def _arguments(shape: tuple[int, ...], dtype: Any) -> tuple[Any, jax.Array]:
    images = jax.random.normal(jax.random.key(1), shape, jnp.dtype(dtype))
    return init(jax.random.key(0), jnp.dtype(dtype)), images


def _compile_all(
    functions: dict[Method, tuple[Callable[..., Any], tuple[Any, ...]]],
) -> dict[Method, jax.stages.Compiled]:
    """Compile at once: XLA leaves the interpreter's lock, and locks the device to autotune."""
    lowered = {method: jax.jit(fun).lower(*args) for method, (fun, args) in functions.items()}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        programs = pool.map(lambda one: one.compile(), lowered.values())
        return dict(zip(lowered, programs, strict=True))


def main() -> None:
    job = Job.from_json(sys.argv[1])
    emit({"environment": report.environment()})
    if job.kind == "check":
        check()
    elif job.kind == "predict":
        predict(job.size, job.methods, job.dtype)
    else:
        measure(job.size, job.methods, job.dtype)


if __name__ == "__main__":
    main()
