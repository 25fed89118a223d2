"""Tests that need several devices, in a process of their own: JAX counts them when it starts."""

import os
import subprocess
import sys

_VARIABLE = "LRJAX_TESTS_DEVICES"


def is_process_with(count):
    """Whether this is the process that ``run_with`` started for so many devices."""
    return os.environ.get(_VARIABLE) == str(count)


def run_with(count, file, marks=""):
    """Run a file's tests, or those with these marks, on so many CPU devices; all must pass."""
    flags = f"--xla_force_host_platform_device_count={count} " + os.environ.get("XLA_FLAGS", "")
    settings = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", _VARIABLE: str(count)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks]
    process = subprocess.run(
        [*command, "-p", "no:xdist", "--timeout=0", file],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-6000:] + process.stderr[-2000:]
    assert " passed" in process.stdout
