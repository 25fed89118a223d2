"""On the device at hand: exact, and as fast and as small as predicted? At most seven minutes.

    bash scripts/device_check.sh results/              # everything, on a GPU
    bash scripts/device_check.sh results/ --quick      # tiny sizes, on any device
    python scripts/device_check.py results/ --summary  # what a run found, ended or not

Jobs (``experiments/device_jobs.py``) are processes of their own, in the order of ``PARTS``, each
with a budget; what one leaves unused the later ones may use. Results are lines of
``results.jsonl``; a job that fails or takes too long is recorded there, and the next goes on. Plans
are made meanwhile on the CPU, for the device by its name. Status 1 unless everything is right.
"""

import argparse
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import report

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 408.0
# Predicted and measured are near each other if they differ by no more than this fraction.
NEAR = 0.25
NETWORKS, DTYPES = ("vgg", "resnet", "unet"), ("float32", "bfloat16")
PLANNED, FRACTIONS = ("vgg16", "resnet50"), ("half", "tenth")
COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE"


@dataclasses.dataclass(frozen=True)
class Part:
    """Jobs, one after the other or, where the machine has the cores, beside each other.

    ``budget_s`` is for a GPU, ``quick_s`` for tiny sizes on two cores.
    """

    jobs: tuple[str, ...]
    budget_s: float
    quick_s: float
    environment: tuple[tuple[str, str], ...] = ()
    side_by_side: bool = False


SHARING = (("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),)
CHECKS = tuple(f"checks:{network}:{dtype}" for dtype in DTYPES for network in NETWORKS)
PARTS = (
    Part(("environment",), 15, 5, SHARING),
    Part(CHECKS, 80, 245, SHARING, side_by_side=True),
    Part(("compile:steps",), 75, 42),
    Part(("steps",), 30, 12),
    Part(("profile",), 30, 10),
    Part(("pools",), 18, 7),
    Part(("graphs",), 42, 35, (("XLA_FLAGS", COMMAND_BUFFERS),)),
    # A process per network: of one that takes less than the other the peak would not be seen.
    Part(("compile:plans", *(f"plans:{network}" for network in PLANNED)), 118, 50),
)


class Run:
    """One run: its folder, its deadline, and the processes that it has started."""

    def __init__(self, out: Path, limit_s: float, quick: bool, cache: str):
        self.out, self.quick, self.cache = out, quick, cache
        self.deadline = time.monotonic() + limit_s
        self.processes: list[subprocess.Popen[bytes]] = []
        self.planners: dict[str, tuple[subprocess.Popen[bytes], float]] = {}

    def start(self, job: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        own = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "JAX_COMPILATION_CACHE_DIR": self.cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
            # As much as a process can have: column at the largest size needs it.
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        flags = [os.environ.get("XLA_FLAGS", ""), environment.pop("XLA_FLAGS", "")]
        command = [sys.executable, "-m", "experiments.device_jobs", str(self.out), job]
        with (self.out / f"{job.replace(':', '-')}.log").open("wb") as log:
            process = subprocess.Popen(
                command + ["--quick"] * self.quick,
                env=own | environment | {"XLA_FLAGS": " ".join(filter(None, flags))},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
        self.processes.append(process)
        return process

    def run(self, part: Part, jobs: Sequence[str], limit_s: float) -> None:
        """Jobs of a part, until they end or the part's time is over."""
        end = time.monotonic() + limit_s
        waiting, running = list(jobs), {}
        at_once = max(1, len(os.sched_getaffinity(0)) // 2) if part.side_by_side else 1
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[job] = self.start(job, dict(part.environment)), time.monotonic()
            for job, (process, start) in [*running.items()]:
                is_late = time.monotonic() > end
                if is_late:
                    _end(process)
                if process.poll() is not None:
                    del running[job]
                    self.record(job, process, is_late, time.monotonic() - start)
            if time.monotonic() > end:
                for job in waiting:
                    self.emit({"part": "outcome", "job": job, "status": "not started"})
                return
            time.sleep(0.05)

    def record(self, job: str, process: Any, is_late: bool, seconds: float) -> None:
        outcome: dict[str, Any] = {"part": "outcome", "job": job, "seconds": round(seconds, 1)}
        outcome["status"] = "done" if process.returncode == 0 else f"failed ({process.returncode})"
        if is_late:
            outcome["status"] = "timed out"
        if process.returncode:
            log = (self.out / f"{job.replace(':', '-')}.log").read_text(errors="replace")
            outcome["log"] = log[-2000:]
        self.emit(outcome)
        print(f"{outcome['seconds']:6.1f} s  {job}: {outcome['status']}", flush=True)

    def emit(self, record: dict[str, Any]) -> None:
        report.append_json_line(self.out / "results.jsonl", record)

    def start_planners(self) -> None:
        """On the CPU, at low priority, while the device is used by others."""
        found = [r for r in _records(self.out) if r["part"] == "environment"]
        if found:
            own = {"JAX_PLATFORMS": "cpu"}
            for network, fraction in itertools.product(
                PLANNED[: 1 if self.quick else 2], FRACTIONS
            ):
                job = f"plan:{network}:{fraction}:{found[0]['target']}"
                self.planners[job] = self.start(job, dict(own)), time.monotonic()
                os.setpriority(os.PRIO_PROCESS, self.planners[job][0].pid, 15)

    def await_planners(self, limit_s: float) -> None:
        end = time.monotonic() + limit_s
        for job, (process, start) in self.planners.items():
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
            is_late = process.poll() is None
            _end(process)
            self.record(job, process, is_late, time.monotonic() - start)

    def everything(self, only: Sequence[str]) -> None:
        chosen = [(p, [j for j in p.jobs if not only or _is_chosen(j, only)]) for p in PARTS]
        budgets = [(p.quick_s if self.quick else p.budget_s) if jobs else 0.0 for p, jobs in chosen]
        # Two cores cannot plan and check at once within the time.
        plans_start_with = "checks" if self.quick else "environment"
        for number, (part, jobs) in enumerate(chosen):
            available = self.deadline - time.monotonic()
            own, later = budgets[number], sum(budgets[number + 1 :])
            if "compile:plans" in jobs:
                self.await_planners(available - 0.7 * own)
                available = self.deadline - time.monotonic()
            if jobs:
                self.run(part, jobs, available - later * min(1.0, available / (own + later)))
            if part.jobs[0].startswith(plans_start_with) and (not only or "plans" in only):
                self.start_planners()


def _is_chosen(job: str, only: Sequence[str]) -> bool:
    names = (job, job.partition(":")[0], job.partition(":")[2])
    return job == "environment" or any(name in only for name in names)


def _end(process: Any) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def _records(out: Path) -> list[dict[str, Any]]:
    return report.json_lines(out / "results.jsonl")


# --- The summary ---------------------------------------------------------------------------------


def summary(found: Sequence[dict[str, Any]]) -> tuple[str, bool]:
    """What was found, as text, and whether everything is right."""
    environment = next((r for r in found if r["part"] == "environment"), {})
    is_judged = environment.get("platform") == "gpu"
    steps = _steps(found)
    wrong = [
        *(f"{r['network']} {r['dtype']} {r['way']}: {r['error']}" for r in _failed_checks(found)),
        *(f"{r['job']}: {r['status']}" for r in found if r.get("status", "done") != "done"),
        *(f"{part} {name}: {s['error']}" for (part, name), s in steps.items() if "error" in s),
        *(f"plan {r['plan']}: {r['error']}" for r in found if "plan" in r and "error" in r),
    ]
    far = [line for line in _ratios(steps) if is_judged and not line[-1]]
    wrong += [
        f"{part} {name}: {what} is {ratio:.2f} of predicted" for part, name, what, ratio, _ in far
    ]
    checks = [r for r in found if r["part"] == "checks"]
    lines = [
        f"{environment.get('device')}, jax {environment.get('jax')}",
        f"{sum(r['passed'] for r in checks)} of {len(checks)} checks passed",
        _steps_table(steps),
        *_profile_lines(found),
        *_pool_lines(found),
        *(line[:300] for line in wrong),
        "all right" if not wrong else f"{len(wrong)} things are not right",
    ]
    if not is_judged:
        lines.append("no GPU: times and peaks were not judged")
    return "\n".join(lines), not wrong


def _failed_checks(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in found if r["part"] == "checks" and not r["passed"]]


def _steps(found: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """All that is known of a program in a part, whenever it was written."""
    steps: dict[tuple[str, str], dict[str, Any]] = {}
    for record in found:
        if "program" in record and record["part"] != "profile":
            steps.setdefault((record["part"], record["program"]), {}).update(record)
    return steps


def _ratios(steps: dict[tuple[str, str], Any]) -> list[tuple[str, str, str, float, bool]]:
    """Measured over predicted, and whether that is near one."""
    lines = []
    for (part, name), own in steps.items():
        for what, key, prediction in (
            ("time", "step_s", "roofline_s"),
            ("peak", "peak_bytes", "xla_peak_bytes"),
        ):
            if own.get(key) and own.get(prediction):
                ratio = own[key] / own[prediction]
                is_near = abs(ratio - 1) <= NEAR
                is_bound = what == "peak" and own.get("peak_is_upper_bound", False)
                lines.append((part, name, what, ratio, is_near or (is_bound and ratio > 1)))
    return lines


def _steps_table(steps: dict[tuple[str, str], dict[str, Any]]) -> str:
    rows = []
    for (part, name), own in steps.items():
        column = steps.get((part, f"{name.partition('/')[0]}/column"), {})

        def of_column(key: str, own: Any = own, column: Any = column) -> str:
            is_known = own.get(key) and column.get(key)
            return report.ratio(own[key] / column[key] if is_known else None)

        rows.append(
            (
                *(part, name, _ms(own.get("step_s")), _ms(own.get("roofline_s"))),
                *(of_column("step_s"), of_column("roofline_s")),
                ("≤ " if own.get("peak_is_upper_bound") else "")
                + report.mib(own.get("peak_bytes")),
                report.mib(own.get("xla_peak_bytes")),
                *(of_column("peak_bytes"), of_column("xla_peak_bytes")),
            )
        )
    header = ["part", "program", "ms", "predicted", "of column", "predicted"]
    return report.markdown_table(header + ["peak MiB", "predicted", "of column", "predicted"], rows)


def _ms(seconds: float | None) -> str:
    return "—" if seconds is None else f"{1e3 * seconds:.1f}"


def _profile_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for record in found:
        if "profile" in record:
            groups = record["profile"]["groups"].items()
            listed = ", ".join(f"{n} {own['ms']:.1f}" for n, own in groups)
            gaps = record["profile"]["gaps_ms"]
            lines.append(f"{record['program']}, ms a step: {listed}, between kernels {gaps:.1f}")
        for kind, own in record.get("rates", {}).items():
            if "operations_per_s" in own:
                rates = own["operations_per_s"] / 1e12, own["bytes_per_s"] / 1e12
                lines.append(
                    f"  {kind}: {_ms(own['measured_s'])} ms, "
                    f"predicted {_ms(own.get('predicted_s'))}; "
                    f"{rates[0]:.0f} TFLOP/s, {rates[1]:.2f} TB/s"
                )
    return lines


def _pool_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"gradient of a max pool, {r['pool']}: {_ms(r['xla_s'])} ms by XLA, "
        f"{_ms(r['elementwise_s'])} elementwise, which differ by {r['norm_error']:.1e}"
        for r in found
        if "pool" in r
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--only", nargs="+", default=(), help="parts, or single jobs")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds (default 408)")
    parser.add_argument("--summary", action="store_true", help="of a run that was")
    options = parser.parse_args()
    out = options.out.resolve()
    if not options.summary:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.jsonl").unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as cache:
            run = Run(out, options.limit, options.quick, cache)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended before it was done"))
            try:
                run.everything(options.only)
            finally:
                for process in run.processes:
                    _end(process)
    text, is_right = summary(_records(out))
    (out / "summary.md").write_text(text + "\n")
    print(text)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
