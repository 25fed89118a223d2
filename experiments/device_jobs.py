"""What ``scripts/device_check.py`` runs on the device, one job per process.

    python -m experiments.device_jobs FOLDER JOB [--quick]

A job appends every result to ``FOLDER/results.jsonl`` as soon as it is known, so that what it found
survives its end. Programs are compiled in one process and measured in another, which finds them in
JAX's compilation cache: tuning a kernel takes memory, and the device's counter of its peak never
falls. Within a job programs run in the order of their predicted peaks for the same reason.
"""

import argparse
import dataclasses
import functools
import gzip
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

# Experiments compile for absent devices and choose the CPU, unless somebody has chosen.
os.environ.setdefault("JAX_PLATFORMS", "")

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import lrjax
from experiments import report
from experiments.device_exactness import checked
from experiments.device_profile import by_kernel, by_kind, device_events
from experiments.step_times import Task, of_params, split
from lrjax import memory, models, testing
from lrjax.memory.targets import row_of
from lrjax.plan import Plan
from lrjax.roofline import Roofline, rates_of, roofline_of
from lrjax.rules.pool_gradients import Pooling

NETWORKS = ("vgg16", "resnet50")
FRACTIONS = {"half": 0.5, "tenth": 0.1}
MOST_ROUNDS, TIMING_S = 9, 8.0
PROFILED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Session:
    """Of a job: where its results go, what they belong to, and whether sizes are tiny."""

    out: Path
    part: str
    quick: bool

    def emit(self, **record: Any) -> None:
        report.append_json_line(self.out / "results.jsonl", {"part": self.part, **record})

    @property
    def target(self) -> str:
        """The row of the table of targets that describes the device best."""
        device = jax.devices()[0]
        return row_of(device.platform, device.device_kind)


# --- Time and memory of training steps -------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A training step: a network at a size, by ``options`` of ``rowwise``; None: column."""

    network: str
    size: int
    way: str
    options: dict[str, Any] | None
    quick: bool

    def __str__(self) -> str:
        return f"{self.network}-{self.size}/{self.way}"

    @property
    def task(self) -> Task:
        dtype, width, classes = (jnp.float32, 1 / 16, 10) if self.quick else (jnp.bfloat16, 1, 1000)
        own = {"dtype": dtype, "width": width, "num_classes": classes}
        if self.network == "vgg16":
            return Task(models.VGG16(head="gap", **own), 1, self.size)
        return Task(models.ResNet50(norm="frozen", **own), 1, self.size)

    @property
    def function(self) -> Callable[..., Any]:
        fun = of_params(self.task)
        if self.options is None:
            return fun
        return lrjax.rowwise(fun, in_axes=(None, None, 1, None), **self.options)

    def lowered(self) -> jax.stages.Lowered:
        step = jax.value_and_grad(self.function, has_aux=True)
        return jax.jit(step).lower(*split(self.task.arguments()))


def programs(session: Session, part: str) -> list[Program]:
    """The steps of a part, in groups of a size, column first."""
    at = {2048: 64, 4096: 128} if session.quick else {2048: 2048, 4096: 4096}
    blocks = 2 if session.quick else 16
    hybrid = {"cuts": ["pool2"], "strategy": ["2ps", "column"]}
    own: list[tuple[int, str, dict[str, Any] | None]] = [
        (2048, "column", None),
        (2048, f"stream/{blocks}", {"num_blocks": blocks}),
        (2048, f"2ps/{blocks}", {"num_blocks": blocks, "strategy": "2ps"}),
    ]
    if part == "steps":
        own += [(4096, "column", None), (4096, "2ps/4+column", {"num_blocks": [4, 1], **hybrid})]
    if part == "profile":
        own = own[:2]
    return [Program("vgg16", at[size], way, options, session.quick) for size, way, options in own]


def compiled(session: Session, chosen: Sequence[Program]) -> dict[Program, jax.stages.Compiled]:
    """All that compile, at once: XLA leaves the interpreter's lock. What fails is recorded."""
    known = {
        r.get("program")
        for r in report.json_lines(session.out / "results.jsonl")
        if r["part"] == session.part and "xla_peak_bytes" in r
    }
    found = {}
    start = time.monotonic()
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool:
        pending = {}
        for program in chosen:  # traced here, one after the other
            try:
                pending[pool.submit(program.lowered().compile)] = program
            except Exception as error:
                session.emit(program=str(program), error=message_of(error))
        for future in as_completed(pending):
            program = pending[future]
            try:
                found[program] = future.result()
                if str(program) in known:
                    continue
                record = predicted(session, found[program])
            except Exception as error:
                record = {"error": message_of(error)}
            session.emit(program=str(program), compiled_s=time.monotonic() - start, **record)
    return {program: found[program] for program in chosen if program in found}


def message_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1500]


def predicted(session: Session, program: jax.stages.Compiled) -> dict[str, Any]:
    """XLA's peak, and the roofline's time of what was compiled for the device at hand."""
    arguments = memory.compile.memory_analysis(program).argument_size_in_bytes
    record = {"xla_peak_bytes": memory.peak_bytes(program), "argument_bytes": arguments}
    try:
        found = roofline(session, program)
    except Exception as error:
        return record | {"roofline_error": message_of(error)}
    return record | {
        "roofline_s": found.seconds,
        "launches": found.launches,
        "conditionals": found.conditionals,
        "operations": found.operations,
        "bytes": found.bytes,
        "kinds_s": found.by_kind(),
    }


def roofline(session: Session, program: jax.stages.Compiled) -> Roofline:
    # A device without rates, such as a CPU, gets those of another: a rehearsal.
    target = session.target if session.target != "cpu" else "h100"
    return roofline_of(str(program.as_text()), rates_of(target), unknown_trip_count=1)


def measure(session: Session, chosen: Sequence[Program]) -> None:
    """Peak and time of each; groups of a network and size take turns."""
    groups: dict[tuple[str, int], list[Program]] = defaultdict(list)
    for program in chosen:
        groups[program.network, program.size].append(program)
    ready = compiled(session, chosen)
    for group in groups.values():
        arguments = arguments_of(group[0].task)
        own = [program for program in group if program in ready]
        own.sort(key=lambda program: memory.peak_bytes(ready[program]))
        runs = {}
        for program in own:
            step = functools.partial(_finished, ready[program], arguments)
            try:
                session.emit(program=str(program), **peak(step, arguments))
                runs[program] = step
            except jax.errors.JaxRuntimeError as error:
                session.emit(program=str(program), error=message_of(error))
        for program, seconds in in_turns(runs).items():
            session.emit(program=str(program), step_s=statistics.median(seconds), steps_s=seconds)


def _finished(function: Callable[..., Any], arguments: Any) -> Any:
    return jax.block_until_ready(function(*arguments))


def in_turns(runs: dict[Any, Callable[[], Any]]) -> dict[Any, list[float]]:
    """Seconds of every run, side by side, so that what else happens meets all alike."""
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    start = time.monotonic()
    for _ in range(MOST_ROUNDS):
        for name, run_once in runs.items():
            before = time.perf_counter()
            run_once()
            seconds[name].append(time.perf_counter() - before)
        if time.monotonic() - start > TIMING_S:
            break
    return seconds


def peak(step: Callable[[], Any], arguments: Any) -> dict[str, Any]:
    """What the device says a step takes, its arguments included and other arrays left out."""
    device = jax.devices()[0]
    before = device.memory_stats()
    step()
    if not before:
        return {"peak_bytes": None}
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments))
    most = device.memory_stats()["peak_bytes_in_use"]
    return {
        "peak_bytes": most - (before["bytes_in_use"] - own),
        # Not raised: something else had used as much already.
        "peak_is_upper_bound": most <= before["peak_bytes_in_use"],
    }


def arguments_of(task: Task) -> Any:
    """Random numbers; ones where a normalisation divides by them."""
    generator = np.random.default_rng(0)

    def array(struct: Any) -> jax.Array:
        if jnp.issubdtype(struct.dtype, jnp.integer):
            return jnp.asarray(generator.integers(0, 10, struct.shape), struct.dtype)
        if struct.ndim < 2:
            return jnp.ones(struct.shape, struct.dtype)
        numbers = generator.standard_normal(struct.shape, np.float32)
        return jnp.asarray(numbers if struct.shape[-1] == 3 else 0.02 * numbers, struct.dtype)

    return jax.tree.map(array, split(task.arguments()))


def profile(session: Session) -> None:
    """Device time of steps by kernel, beside what the roofline says of the same kernels."""
    chosen = programs(session, "profile")
    for program, executable in compiled(session, chosen).items():
        arguments = arguments_of(program.task)
        for _ in range(2):
            _finished(executable, arguments)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(PROFILED_STEPS):
                    _finished(executable, arguments)
            (path,) = Path(folder).rglob("*.xplane.pb")
            name = str(program).replace("/", "-")
            (session.out / f"{name}.xplane.pb.gz").write_bytes(gzip.compress(path.read_bytes()))
            events = [*device_events(jax.profiler.ProfileData.from_file(str(path)))]
        session.emit(program=str(program), profile=by_kernel(events, PROFILED_STEPS))
        session.emit(
            program=str(program),
            rates=by_kind(events, PROFILED_STEPS, roofline(session, executable)),
        )


# --- The gradient of a max pool --------------------------------------------------------------


def pools(session: Session) -> None:
    """XLA's select and scatter against elementwise work, of VGG-16's and ResNet's pools."""
    size, channels = (64, 8) if session.quick else (2048, 64)
    generator = np.random.default_rng(0)
    for window, padding in ((2, 0), (3, 1)):
        own = {"size": window, "stride": 2, "padding": padding}
        x = jnp.asarray(generator.standard_normal((1, size, size, channels)), jnp.bfloat16)
        ways = pool_gradients(window, padding)
        windows = jax.eval_shape(ways["pool"], x)
        ct = jnp.asarray(generator.standard_normal(windows.shape), windows.dtype)
        xla, elementwise = (jax.jit(ways[name]) for name in ("xla", "elementwise"))
        error = testing.norm_error(elementwise(x, ct), xla(x, ct))
        runs = {f: functools.partial(_finished, f, (x, ct)) for f in (xla, elementwise)}
        seconds = [statistics.median(s) for s in in_turns(runs).values()]
        session.emit(
            pool=own, xla_s=seconds[0], elementwise_s=seconds[1], norm_error=error, bytes=x.nbytes
        )


def pool_gradients(window: int, padding: int) -> dict[str, Callable[..., Any]]:
    size, stride = (1, window, window, 1), (1, 2, 2, 1)
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))

    def pool(x: jax.Array) -> jax.Array:
        return lax.reduce_window(x, -jnp.inf, lax.max, size, stride, pads)

    pooling = Pooling(size, stride, pads, True)
    return {
        "pool": pool,
        "xla": lambda x, ct: jax.vjp(pool, x)[1](ct)[0],
        "elementwise": lambda x, ct: pooling.gradient(ct, x),
    }


# --- Plans -----------------------------------------------------------------------------------


def planned(session: Session, network: str, fraction: str, target: str) -> None:
    """A plan for a fraction of column's memory, saved; nothing runs on the device."""
    column = column_of(session, network)
    arguments = split(column.task.arguments())
    step = jax.value_and_grad(column.function, has_aux=True)
    peak_bytes = memory.peak_bytes(memory.compile_for(step, *arguments, target=target))
    record = {"plan": f"{column.network}-{column.size}/{fraction}", "column_bytes": peak_bytes}
    start = time.monotonic()
    try:
        plan = lrjax.plan(
            column.function,
            *arguments,
            in_axes=(None, None, 1, None),
            # Of tiny steps, arguments and gradients are more than a tenth.
            budget=int(max(FRACTIONS[fraction], 0.3 * session.quick) * peak_bytes),
            target=target,
            wrt=0,
        )
        plan.save(session.out / f"plan_{network}_{fraction}.json")
        record |= {"verified_bytes": plan.verified_peak_bytes, "operations": plan.operations}
        record |= {"choices": [str(choice) for choice in plan.choices]}
        record |= {"compilations": plan.compilations}
    except Exception as error:
        record |= {"error": message_of(error)}
    session.emit(**record, seconds=time.monotonic() - start)


def column_of(session: Session, network: str) -> Program:
    return Program(network, 128 if session.quick else 4096, "column", None, session.quick)


def plans(session: Session, network: str) -> list[Program]:
    """Steps by the plans that are there, beside column; none without a plan."""
    column = column_of(session, network)
    paths = {name: session.out / f"plan_{network}_{name}.json" for name in FRACTIONS}
    found = [
        dataclasses.replace(column, way=name, options={"plan": Plan.load(path)})
        for name, path in paths.items()
        if path.exists()
    ]
    return [column, *found] if found else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("job")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    part, *arguments = options.job.split(":")
    session = Session(options.out, arguments[0] if part == "compile" else part, options.quick)
    if part == "environment":
        session.emit(**report.environment(), target=session.target)
    elif part == "checks":
        for record in checked(*arguments):
            session.emit(**record)
    elif options.job == "compile:steps":
        compiled(session, programs(session, "steps"))
    elif part == "compile":
        compiled(session, [p for network in NETWORKS for p in plans(session, network)])
    elif part in ("steps", "graphs"):
        measure(session, programs(session, part))
    elif part == "plan":
        planned(session, *arguments)
    elif part == "plans":
        measure(session, plans(session, *arguments))
    else:
        {"profile": profile, "pools": pools}[part](session)


if __name__ == "__main__":
    main()
