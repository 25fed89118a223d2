"""Peak resident memory of a computation on CPU, over a baseline, in a fresh process.

The CPU backend keeps no statistics of its own, so the process is the witness: Linux's high-water
mark of resident memory, reset when the computation is ready to run. A fresh process per
measurement keeps one computation's freed but unreturned memory out of the next one's.

Linux only: the mark is read from ``/proc``.
"""

import contextlib
import ctypes
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RssGrowth:
    """What a computation added to a process.

    Attributes:
      baseline_bytes: resident memory when the computation was ready to run.
      peak_bytes: the most resident memory while it ran.
    """

    baseline_bytes: int
    peak_bytes: int

    @property
    def growth_bytes(self) -> int:
        """Resident memory the computation needed beyond the baseline."""
        return self.peak_bytes - self.baseline_bytes


def measure_rss(prepare: str, *args: Any, timeout_s: float | None = None) -> RssGrowth:
    """Measure the peak resident memory of a computation in a fresh process, on CPU.

    Args:
      prepare: ``"module:function"``, importable from the current directory or ``sys.path``. It is
        called as ``function(*args)``, makes ready whatever shall count as baseline (imports,
        arguments, compilation) and returns the computation: a callable without arguments. The
        computation runs once; what it returns is waited for.
      *args: JSON values.
      timeout_s: seconds the whole process may take; ``None``: no limit.

    Returns:
      The baseline and the peak, bytes.

    Raises:
      ValueError: ``prepare`` is not of the form ``"module:function"``.
      TypeError: an argument is not a JSON value.
      RuntimeError: the process failed; the message ends with what it wrote to stderr.
      subprocess.TimeoutExpired: it took longer than ``timeout_s``.

    Example::

        # bench.py: def prepare(n): x = jnp.ones((n, n)); return lambda: x @ x
        measure_rss("bench:prepare", 4096).growth_bytes
    """
    _split(prepare)
    search_path = [entry or os.getcwd() for entry in sys.path]  # this process's, for the fresh one
    process = subprocess.run(
        [sys.executable, "-m", "lrjax.memory.rss", prepare, json.dumps(args)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(search_path)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    if process.returncode != 0:
        raise RuntimeError(
            f"measuring {prepare!r} failed with exit status {process.returncode}"
            f"{' (killed: out of memory?)' if process.returncode == -9 else ''}:\n"
            f"{process.stderr[-4000:]}"
        )
    return RssGrowth(**json.loads(process.stdout.splitlines()[-1]))


def rss_growth(computation: Callable[[], Any]) -> RssGrowth:
    """Run ``computation`` once in this process and measure the peak resident memory over now.

    Memory this process freed but did not return hides growth: ``measure_rss`` is the honest one.
    """
    import jax

    return_freed_memory()
    _reset_high_water_mark()
    baseline = _status_bytes("VmRSS")
    jax.block_until_ready(computation())
    return RssGrowth(baseline_bytes=baseline, peak_bytes=_status_bytes("VmHWM"))


def _split(prepare: str) -> tuple[str, str]:
    module, colon, function = prepare.partition(":")
    if not (module and colon and function):
        raise ValueError(
            f"prepare={prepare!r} does not name a function: write 'module:function', "
            "e.g. 'scripts.bench_cpu:prepare'."
        )
    return module, function


def return_freed_memory() -> None:
    """Give what compilation allocated and freed back to the system.

    It would stay resident otherwise, and the computation would reuse it unseen.
    """
    # Only glibc has it; elsewhere there is nothing to do.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # man proc(5): 5 resets the peak resident set


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}: this kernel cannot be asked for peak memory.")


def _main(prepare: str, args: str) -> None:
    module, function = _split(prepare)
    computation = getattr(importlib.import_module(module), function)(*json.loads(args))
    print(json.dumps(asdict(rss_growth(computation))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
