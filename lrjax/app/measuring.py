"""Memory that training takes, as XLA plans it and as the operating system sees it."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import psutil

from lrjax.memory.rss import return_freed_memory


@dataclass(frozen=True)
class Memory:
    """Peak memory of training, in bytes.

    Attributes:
      xla_temp: temporaries of the compiled step.
      xla_peak: what XLA plans to hold at most, parameters and optimizer state included.
      rss: largest resident size of the process while it trained, above that just before: on CPU the
        temporaries as the operating system saw them.
      device: the accelerator's own peak, where it reports one.
    """

    xla_temp: int
    xla_peak: int
    rss: int
    device: int | None


@dataclass
class ResidentSize:
    """Resident bytes of this process: before, and at most during, a measurement."""

    baseline: int
    peak: int


@contextmanager
def measured_rss() -> Iterator[ResidentSize]:
    """Samples the process's resident size, every two milliseconds, while the body runs.

    Memory that compilation freed is handed back to the operating system first: the allocator would
    otherwise reuse it and the training would seem to need less than it does.
    """
    gc.collect()
    return_freed_memory()
    process = psutil.Process()
    before = process.memory_info().rss
    size = ResidentSize(before, before)
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            size.peak = max(size.peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield size
    finally:
        done.set()
        sampler.join()


def device_peak() -> int | None:
    statistics_of_device = jax.local_devices()[0].memory_stats()
    return (statistics_of_device or {}).get("peak_bytes_in_use")
