"""What uses the memory: XLA's own answer for a device, present or not, and the process's."""

from lrjax.memory import pictures
from lrjax.memory.collectives import Collective
from lrjax.memory.comparison import Comparison, compare
from lrjax.memory.compile import (
    DoesNotFitError,
    compile_for,
    host_bytes,
    is_installed,
    peak_bytes,
    temp_bytes,
)
from lrjax.memory.profile import KINDS, Buffer, MemoryProfile
from lrjax.memory.profiling import (
    TargetStatus,
    device_memory_bytes,
    profile,
    profile_dump,
    targets,
)
from lrjax.memory.rss import RssGrowth, measure_rss, rss_growth
from lrjax.memory.runtime import Measurement, measure
from lrjax.memory.targets import TARGETS, CpuTarget, GpuTarget, TpuTarget

__all__ = [
    "KINDS",
    "TARGETS",
    "Buffer",
    "Collective",
    "Comparison",
    "CpuTarget",
    "DoesNotFitError",
    "GpuTarget",
    "Measurement",
    "MemoryProfile",
    "RssGrowth",
    "TargetStatus",
    "TpuTarget",
    "compare",
    "compile_for",
    "device_memory_bytes",
    "host_bytes",
    "is_installed",
    "measure",
    "measure_rss",
    "peak_bytes",
    "pictures",
    "profile",
    "profile_dump",
    "rss_growth",
    "targets",
    "temp_bytes",
]
