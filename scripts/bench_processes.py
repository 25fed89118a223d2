"""Step times of `lrjax train` in one process and in two that share rows, or images, on this CPU.

    python scripts/bench_processes.py --image-size 512 --steps 6 --rounds 2

Each process has one thread for every operation, so that two have twice the computing power where
there are two idle cores that share nothing. How near they come to that, two processes tell that
have half of the batch each and know nothing of each other. Runs take turns, and the least of their
median step times counts: on a machine that does other things too only ratios say anything.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lrjax.app import report

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
# Devices that share rows, groups that share the batch; none: each has a batch of its own.
WAYS = {
    "one process": (1, 1),
    "two share rows": (2, 1),
    "two share the batch": (1, 2),
    "two share nothing, half of the batch each": None,
}


def seconds(out: Path, way: tuple[int, int] | None, args: argparse.Namespace) -> float:
    """The median step time of a run."""
    rows, data = way or (1, 1)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lrjax.app.cli", "train", "--keep", "0"]
    command += ["--image-size", str(args.image_size), "--width", str(args.width)]
    command += ["--steps", str(args.steps), "--num-blocks", str(max(1, args.num_blocks // rows))]
    command += ["--devices", str(rows), "--data-devices", str(data)]
    if way is None:
        alone = [["--batch", "1", "--out", str(out / name)] for name in "ab"]
    elif rows * data == 1:
        alone = [["--batch", "2", "--out", str(out)]]
    else:
        common = ["--batch", "2", "--out", str(out), "--processes", "2"]
        common += ["--coordinator", f"localhost:{port}"]
        alone = [[*common, "--process-id", str(i)] for i in range(2)]
    flags = f"{ONE_THREAD} {os.environ.get('XLA_FLAGS', '')}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    running = [
        subprocess.Popen(command + own, env=environment, stdout=subprocess.DEVNULL) for own in alone
    ]
    if any([process.wait() for process in running]):
        raise SystemExit(f"lrjax train failed: {' '.join(command)}")
    written = [out / "a", out / "b"] if way is None else [out]
    return max(report.read_metrics(one)["median_step_seconds"] for one in written)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image-size", type=int, default=512)
    parser.add_argument("--width", type=float, default=0.25, help="of VGG-16's channels")
    parser.add_argument("--num-blocks", type=int, default=8, help="of an image, over all devices")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as directory:
        for turn in range(args.rounds):
            for number, (name, way) in enumerate(WAYS.items()):
                out = Path(directory, f"{turn}-{number}")
                found[name].append(seconds(out, way, args))
    table = Table("", "step, s", "times one process")
    least = {name: min(times) for name, times in found.items()}
    for name, time in least.items():
        table.add_row(name, f"{time:.3f}", f"{time / least['one process']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
