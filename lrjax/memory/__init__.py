"""What uses the memory: XLA's own answer for a device, present or not, and the process's."""

from lrjax.memory.compile import compile_for, is_installed, peak_bytes, temp_bytes
from lrjax.memory.rss import RssGrowth, measure_rss, rss_growth
from lrjax.memory.targets import TARGETS, GpuTarget

__all__ = [
    "TARGETS",
    "GpuTarget",
    "RssGrowth",
    "compile_for",
    "is_installed",
    "measure_rss",
    "peak_bytes",
    "rss_growth",
    "temp_bytes",
]
