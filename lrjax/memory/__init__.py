"""What uses the memory: XLA's own answer for a device, present or not."""

from lrjax.memory.compile import compile_for, peak_bytes, temp_bytes
from lrjax.memory.targets import TARGETS, GpuTarget

__all__ = ["TARGETS", "GpuTarget", "compile_for", "peak_bytes", "temp_bytes"]
