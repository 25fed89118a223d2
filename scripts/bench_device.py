"""Correctness, step time and peak memory on the device at hand, in under eight minutes.

    python scripts/bench_device.py                       # whatever JAX finds: GPU, or CPU
    python scripts/bench_device.py --sizes 4096 --budget 120

First the strategies' outputs and gradients are compared with column's in float32 and bfloat16.
Then VGG-16's gradient (batch 1, mean(y**2), by the parameters) is timed by column, by
``jax.checkpoint`` and by every strategy at several sizes and block counts, and the peak the
device reports is read. All ratios are to column at the same size in the same run. Last, profiles
(``lrjax.memory.profile``) are compared with the peaks that the device reports.

Each job is a process of its own. Jobs are in the order of their interest; what the budget leaves
no room for is listed as skipped. The JSON is rewritten after every job.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import report
from experiments.device_jobs import Job

ROOT = Path(__file__).resolve().parents[1]

BUDGET_S = 450.0
LEAST_JOB_S = 15.0  # starting a process and compiling anything takes about this
SIZES = {"gpu": (4096, 2048, 8192, 1024), "cpu": (128, 256)}
DTYPES = {"gpu": "bfloat16", "cpu": "float32"}  # bfloat16 is emulated on most CPUs

BASELINES = ("column", "checkpoint-block", "checkpoint-layer")
# Rows of the image per block; a size gives them block counts.
ROWS_PER_BLOCK = {
    "gpu": {"stream": (32, 64, 256), "2ps": (64, 256), "overl": (256, 512)},
    "cpu": {"stream": (32, 64), "2ps": (64,), "overl": (64,)},
}

# Programs whose profile is compared with what the device reports.
PREDICTED_SIZES = {"gpu": 2048, "cpu": 256}
PREDICTED = {
    "gpu": (*BASELINES, "stream/64", "stream/32", "stream/8", "2ps/32", "2ps/8", "overl/8"),
    "cpu": ("column", "stream/8"),
}


def planned_jobs(platform: str, sizes: tuple[int, ...], dtype: str) -> list[Job]:
    """The measuring jobs, most interesting first: baselines and strategies of each size."""
    jobs = []
    for size in sizes:
        methods = [
            f"{strategy}/{size // rows}"
            for strategy, choices in ROWS_PER_BLOCK[platform].items()
            for rows in choices
            if size // rows >= 2
        ]
        jobs += [Job("measure", size, dtype, BASELINES), Job("measure", size, dtype, (*methods,))]
    return [*jobs, Job("predict", PREDICTED_SIZES[platform], dtype, PREDICTED[platform])]


def run_job(job: Job, timeout_s: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run ``job`` in a process of its own: its records, and how it ended."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        # As much as a process can have: column at the largest size needs it.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95"),
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        try:
            process = subprocess.run(
                [sys.executable, "-m", "experiments.device_jobs", job.to_json()],
                env=environment,
                stdout=stdout,
                stderr=stderr,
                timeout=timeout_s,
            )
            status = "done" if process.returncode == 0 else f"failed ({process.returncode})"
        except subprocess.TimeoutExpired:
            status = "timed out"
        stdout.seek(0)
        stderr.seek(0)
        records = _complete_records(stdout.read())
        outcome = {"job": asdict(job), "status": status, "seconds": time.monotonic() - start}
        if status != "done":
            outcome["stderr"] = stderr.read()[-3000:]
    return records, outcome


def _complete_records(text: str) -> list[dict[str, Any]]:
    """The JSON lines of ``text``; a last line cut short by a kill is dropped."""
    lines = text.splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("\n")]


def with_ratios(measurements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each measurement with its ratios to column at the same size, where column ran."""
    columns = {m["size"]: m for m in measurements if m["method"] == "column"}
    result = []
    for measurement in measurements:
        column = columns.get(measurement["size"], {})
        ratios = {
            f"{field}_ratio": measurement[field] / column[field]
            for field in ("step_s", "peak_bytes", "xla_peak_bytes")
            if field in measurement and field in column
        }
        result.append(measurement | ratios)
    return result


def print_report(result: dict[str, Any]) -> None:
    print(f"\n{result['environment']}, {result['elapsed_s']:.0f} s")
    header = ["check", "dtype", "error", "limit", ""]
    rows = [
        [c["check"], c["dtype"], f"{c['error']:.1e}", f"{c['limit']:.1e}",
         "passed" if c["passed"] else "FAILED"]
        for c in result["checks"]
    ]  # fmt: skip
    print(report.markdown_table(header, rows))
    header = ["size", "method", "step ms", "ratio", "peak MiB", "ratio", "XLA peak MiB", "ratio"]
    rows = [
        [
            m["size"],
            m["method"],
            "out of memory" if m.get("out_of_memory") else f"{1e3 * m['step_s']:.1f}",
            report.ratio(m.get("step_s_ratio")),
            ("≤ " if m.get("peak_is_upper_bound") else "") + report.mib(m.get("peak_bytes")),
            report.ratio(m.get("peak_bytes_ratio")),
            report.mib(m["xla_peak_bytes"]),
            report.ratio(m.get("xla_peak_bytes_ratio")),
        ]
        for m in result["measurements"]
    ]
    print("\n" + report.markdown_table(header, rows))
    print("\n" + predictions_table(result["predictions"]))
    for outcome in result["jobs"]:
        if outcome["status"] != "done":
            print(f"{outcome['status']}: {outcome['job']}")


def predictions_table(predictions: list[dict[str, Any]]) -> str:
    """Profiles against the device: MiB, and measured over predicted."""
    header = ["size", "method", "profile of", "predicted", "allocated", "measured", "ratio"]
    rows = [
        [
            p["size"],
            p["predict"],
            p["target"] or "this device",
            report.mib(p["predicted_bytes"]),
            report.mib(p["allocated_bytes"]),
            ("≤ " if p.get("peak_is_upper_bound") else "") + report.mib(p.get("peak_bytes")),
            report.ratio(p.get("peak_bytes") and predicted_ratio(p)),
        ]
        for p in predictions
    ]
    return report.markdown_table(header, rows)


def predicted_ratio(prediction: dict[str, Any]) -> float:
    """Measured over predicted; growth of a process leaves the arguments out."""
    without = prediction["argument_bytes"] if prediction["peak_source"] == "RSS growth" else 0
    return prediction["peak_bytes"] / (prediction["predicted_bytes"] - without)


class Benchmark:
    """One run: its deadline, and what it has found so far."""

    def __init__(self, budget_s: float, out: Path | None):
        self.start = time.monotonic()
        self.deadline = self.start + budget_s
        self.out = out
        self.records: list[dict[str, Any]] = []
        self.outcomes: list[dict[str, Any]] = []

    def run(self, job: Job, jobs_left: int) -> None:
        """Run ``job`` unless the budget is spent; a job may overdraw its even share threefold."""
        remaining = self.deadline - time.monotonic()
        if remaining < LEAST_JOB_S:
            self.outcomes.append({"job": asdict(job), "status": "skipped"})
            return
        print(f"{job.kind} {job.size or ''} {' '.join(job.methods)}", file=sys.stderr, flush=True)
        records, outcome = run_job(job, min(remaining, 3 * remaining / jobs_left))
        self.records += records
        self.outcomes.append(outcome)
        self.write()

    def environment(self) -> dict[str, Any] | None:
        return next((r["environment"] for r in self.records if "environment" in r), None)

    def result(self) -> dict[str, Any]:
        return {
            "environment": self.environment(),
            "elapsed_s": time.monotonic() - self.start,
            "checks": [record for record in self.records if "check" in record],
            "measurements": with_ratios([record for record in self.records if "method" in record]),
            "predictions": [record for record in self.records if "predict" in record],
            "jobs": self.outcomes,
        }

    def write(self) -> None:
        environment = self.environment()
        if environment is not None:
            default = report.RESULTS / f"bench_device_{environment['platform']}.json"
            report.write_json(self.out or default, self.result())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds (default 450)")
    parser.add_argument("--sizes", type=int, nargs="+", help="pixels a side, in order of interest")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--out", type=Path, help="default: results/bench_device_PLATFORM.json")
    options = parser.parse_args()

    benchmark = Benchmark(options.budget, options.out)
    benchmark.run(Job("check"), jobs_left=2 + 2 * len(options.sizes or SIZES["gpu"]))
    environment = benchmark.environment()
    if environment is None:
        print(f"no device came up: {benchmark.outcomes[0].get('stderr')}", file=sys.stderr)
        return 1
    platform = environment["platform"] if environment["platform"] in SIZES else "gpu"
    sizes = tuple(options.sizes or SIZES[platform])
    jobs = planned_jobs(platform, sizes, options.dtype or DTYPES[platform])
    for number, job in enumerate(jobs):
        benchmark.run(job, jobs_left=len(jobs) - number)
    print_report(benchmark.result())
    failed = any(not record.get("passed", True) for record in benchmark.records)
    return 1 if failed or benchmark.outcomes[0]["status"] != "done" else 0


if __name__ == "__main__":
    sys.exit(main())
