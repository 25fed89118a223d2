"""What a device does in a second: the assumptions behind every time.

Peaks are the vendors' figures (dense, without sparsity). What programs reach of them, and what a
launch costs, are assumptions; none was measured.
"""

from __future__ import annotations

import dataclasses
import functools
import os

from lrjax.memory.targets import CpuTarget, GpuTarget, TpuTarget, find

_HALF, _SINGLE, _DOUBLE = "half", "float32", "float64"
_PRECISION = {
    **dict.fromkeys(("bf16", "f16"), _HALF),
    **dict.fromkeys(("f32", "c64"), _SINGLE),
    **dict.fromkeys(("f64", "c128"), _DOUBLE),
}
# Operations in a second of tensor cores: half precision with float32 sums, float32 as TF32 where
# the device has it, float64.
_PEAKS: dict[str, dict[str, float]] = {
    "h200": {_HALF: 989e12, _SINGLE: 495e12, _DOUBLE: 67e12},
    "h100": {_HALF: 989e12, _SINGLE: 495e12, _DOUBLE: 67e12},
    "a100-80gb": {_HALF: 312e12, _SINGLE: 156e12, _DOUBLE: 19.5e12},
    "a100-40gb": {_HALF: 312e12, _SINGLE: 156e12, _DOUBLE: 19.5e12},
    "l4": {_HALF: 121e12, _SINGLE: 60e12, _DOUBLE: 0.5e12},
    "rtx4090": {_HALF: 165e12, _SINGLE: 83e12, _DOUBLE: 1.3e12},
    "rtx3090": {_HALF: 71e12, _SINGLE: 36e12, _DOUBLE: 0.56e12},
    "rtx3080": {_HALF: 59e12, _SINGLE: 30e12, _DOUBLE: 0.47e12},
    "v100": {_HALF: 125e12, _SINGLE: 15.7e12, _DOUBLE: 7.8e12},
}
# Bytes in a second from a device to others of its machine, in one direction: NVLink of the fourth,
# third and second generation (vendors' figures for both directions, halved). Others exchange over
# PCI Express, as they do with the host.
_LINKS = {"h200": 450e9, "h100": 450e9, "a100-80gb": 300e9, "a100-40gb": 300e9, "v100": 150e9}
# Bytes in a second of a TPU's memory (Google's system architecture pages; of a v4 one core's half).
_TPU_BANDWIDTHS = {"tpu-v4": 614e9, "tpu-v5e": 819e9, "tpu-v5p": 2765e9, "tpu-v6e": 1640e9}
# A processor's core, an order of magnitude: XLA:CPU's convolutions in float32, copies of all cores,
# and the least time of an operation.
_CPU_CORE_OPERATIONS, _CPU_BANDWIDTH, _CPU_LAUNCH = 25e9, 10e9, 5e-6


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of a device, as programs reach them.

    Attributes:
      target: its name in the table of targets.
      operations_per_s: by precision, of convolutions and matrix products.
      bytes_per_s: of the device's memory.
      host_bytes_per_s: of copies to and from the host's memory.
      launch_s: the least time of a kernel.
      branch_s: a conditional, for which the host waits.
      link_bytes_per_s: from a device to others of its machine; None: as to the host.
    """

    target: str
    operations_per_s: dict[str, float]
    bytes_per_s: float
    host_bytes_per_s: float
    launch_s: float = 3e-6
    branch_s: float = 15e-6
    link_bytes_per_s: float | None = None

    @property
    def exchange_bytes_per_s(self) -> float:
        """Bytes that a device sends to others of its machine."""
        return self.host_bytes_per_s if self.link_bytes_per_s is None else self.link_bytes_per_s

    def of_devices(self, count: int) -> Rates:
        """Rates of so many devices together, which launch every kernel at once."""
        operations = {name: count * rate for name, rate in self.operations_per_s.items()}
        return dataclasses.replace(
            self, operations_per_s=operations, bytes_per_s=count * self.bytes_per_s
        )

    def operations_rate(self, dtype: str) -> float:
        return self.operations_per_s[_PRECISION.get(dtype, _HALF)]

    def assumptions(self) -> str:
        """In words, for the foot of a table."""
        half, single = (self.operations_per_s[p] / 1e12 for p in (_HALF, _SINGLE))
        return (
            f"assumed of {self.target}: convolutions and products at {half:,.0f} (half) and "
            f"{single:,.0f} (float32) TFLOP/s, memory at {self.bytes_per_s / 1e12:.2f} TB/s, "
            f"copies to the host at {self.host_bytes_per_s / 1e9:.0f} GB/s, exchanges between "
            f"devices at {self.exchange_bytes_per_s / 1e9:.0f} GB/s, "
            f"{self.launch_s * 1e6:.0f} us a launch, {self.branch_s * 1e6:.0f} us a conditional; "
            "no caches, nothing overlaps"
        )


@functools.cache
def rates_of(target: str, *, of_peak: float = 0.48, of_bandwidth: float = 0.8) -> Rates:
    """Rates of a target.

    Those of CPUs and TPUs are orders of magnitude, good for comparing plans with each other.

    Args:
      target: a name in ``lrjax.memory.TARGETS``.
      of_peak: what convolutions reach of the peak; cuDNN's large ones reach about half.
      of_bandwidth: what kernels reach of the memory's bandwidth, and exchanges of a link's.

    Raises:
      ValueError: no such target, or none with rates.
    """
    row = find(target)
    if isinstance(row, CpuTarget):
        rate = _CPU_CORE_OPERATIONS * (os.cpu_count() or 1)
        peaks = {_HALF: rate, _SINGLE: rate, _DOUBLE: rate / 2}
        return Rates(target, peaks, _CPU_BANDWIDTH, _CPU_BANDWIDTH, _CPU_LAUNCH, _CPU_LAUNCH)
    if isinstance(row, TpuTarget) and target in _TPU_BANDWIDTHS:
        # In float32 products take six passes in bfloat16 at the most, three by default.
        rate = of_peak * row.operations_per_s
        peaks = {_HALF: rate, _SINGLE: rate / 3, _DOUBLE: rate / 36}
        bandwidth = of_bandwidth * _TPU_BANDWIDTHS[target]
        return Rates(target, peaks, bandwidth, float(row.host_bytes_per_s), 1e-6, 1e-6)
    if not isinstance(row, GpuTarget) or target not in _PEAKS:
        known = ", ".join(sorted(_PEAKS))
        raise ValueError(
            f"target={target!r}: no rates are known of it, so that no time can be told; known are "
            f"{known}. lrjax.memory.profile tells its memory."
        )
    return Rates(
        target,
        {precision: of_peak * peak for precision, peak in _PEAKS[target].items()},
        of_bandwidth * row.bandwidth_bytes_per_s,
        float(row.host_bytes_per_s),
        link_bytes_per_s=of_bandwidth * _LINKS[target] if target in _LINKS else None,
    )
