"""The devices XLA can compile for, present or not: one table of data.

A row of the table holds what XLA needs to know of a device to compile for it. It is not a device
driver, and nothing here imports JAX: ``compile`` turns a row into a topology.

Figures are the vendors' public specifications (compute capability, multiprocessors, shared memory,
registers, L2, bandwidth, boost clock); ``memory_bytes`` is what the driver reports as the device's
total memory. XLA's decisions about memory depend on the architecture and the sizes, hardly on the
clocks.
"""

import difflib
import itertools
import os
from dataclasses import dataclass
from typing import Any

MIB = 2**20


@dataclass(frozen=True)
class GpuTarget:
    """An NVIDIA GPU, as XLA's ``GpuTargetConfigProto`` describes it.

    Attributes:
      name: the name users give, e.g. ``"h200"``.
      description: the name the driver reports.
      compute_capability: ``(major, minor)``.
      accelerated: whether the architecture has the ``a`` feature set (``sm_90a``).
      memory_bytes: total device memory.
      multiprocessors: streaming multiprocessors enabled.
      fp32_lanes: FP32 lanes per multiprocessor.
      threads_per_multiprocessor: resident threads, at most.
      shared_bytes_per_multiprocessor: shared memory of a multiprocessor.
      shared_bytes_per_block_optin: shared memory one block may opt in to.
      l2_bytes: level-2 cache.
      bandwidth_bytes_per_s: device memory bandwidth.
      clock_ghz: boost clock.
      host_bytes_per_s: what the link to the host's memory reaches in one direction: PCI Express
        of the card's generation, at about 0.8 of its nominal rate.
    """

    name: str
    description: str
    compute_capability: tuple[int, int]
    accelerated: bool
    memory_bytes: int
    multiprocessors: int
    fp32_lanes: int
    threads_per_multiprocessor: int
    shared_bytes_per_multiprocessor: int
    shared_bytes_per_block_optin: int
    l2_bytes: int
    bandwidth_bytes_per_s: int
    clock_ghz: float
    host_bytes_per_s: int

    @property
    def is_in_cuda13(self) -> bool:
        """Whether CUDA 13 can compile for it: CUDA 12 was the last for Volta and before."""
        return self.compute_capability >= (7, 5)


@dataclass(frozen=True)
class TpuTarget:
    """A TPU, as libtpu's topologies name it.

    Attributes:
      name: the name users give, e.g. ``"tpu-v5e"``.
      description: what one device is.
      topology: the smallest topology that has one, e.g. ``"v5e:1x1"``.
      accelerator_type: of the virtual machine that libtpu believes to be in.
      memory_bytes: what XLA gives a program; the chip has a little more.
      operations_per_s: bfloat16, at most.
      host_bytes_per_s: what the link to the host's memory reaches in one direction. Not published;
        PCI Express at the rate that Google's "How to Scale Your Model" reckons with.
    """

    name: str
    description: str
    topology: str
    accelerator_type: str
    memory_bytes: int
    operations_per_s: float
    host_bytes_per_s: int = 16_000_000_000


@dataclass(frozen=True)
class CpuTarget:
    """This machine's processor.

    Attributes:
      name: ``"cpu"``.
      description: what it is.
    """

    name: str
    description: str

    @property
    def memory_bytes(self) -> int:
        """The machine's memory."""
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


Target = CpuTarget | GpuTarget | TpuTarget

# What the cards of an architecture share, as ``GpuTarget`` names it.
_VOLTA = {
    **{"compute_capability": (7, 0), "accelerated": False, "fp32_lanes": 64},
    "threads_per_multiprocessor": 2048,
    "shared_bytes_per_multiprocessor": 96 * 1024,
    "shared_bytes_per_block_optin": 96 * 1024,
    "host_bytes_per_s": 12_000_000_000,
}
_AMPERE = {
    **{"compute_capability": (8, 0), "accelerated": False, "fp32_lanes": 64},
    "threads_per_multiprocessor": 2048,
    "shared_bytes_per_multiprocessor": 164 * 1024,
    "shared_bytes_per_block_optin": 163 * 1024,
    "host_bytes_per_s": 25_000_000_000,
}
_GEFORCE = {
    **{"compute_capability": (8, 6), "accelerated": False, "fp32_lanes": 128},
    "threads_per_multiprocessor": 1536,
    "shared_bytes_per_multiprocessor": 100 * 1024,
    "shared_bytes_per_block_optin": 99 * 1024,
    "host_bytes_per_s": 25_000_000_000,
}
_ADA = {**_GEFORCE, "compute_capability": (8, 9)}
_HOPPER = {
    **{"compute_capability": (9, 0), "accelerated": True, "fp32_lanes": 128},
    "threads_per_multiprocessor": 2048,
    "shared_bytes_per_multiprocessor": 228 * 1024,
    "shared_bytes_per_block_optin": 227 * 1024,
    "host_bytes_per_s": 50_000_000_000,
}

# fmt: off
# Architecture, name, driver's name, MiB, multiprocessors, MiB of L2, GB/s, GHz.
_GPUS: tuple[tuple[dict[str, Any], str, str, int, int, int, int, float], ...] = (
    (_HOPPER, "h200", "NVIDIA H200 141GB HBM3e", 144_384, 132, 50, 4_800, 1.98),
    (_HOPPER, "h100", "NVIDIA H100 80GB HBM3", 81_008, 132, 50, 3_350, 1.98),
    (_AMPERE, "a100-80gb", "NVIDIA A100-SXM4-80GB", 81_920, 108, 40, 2_039, 1.41),
    (_AMPERE, "a100-40gb", "NVIDIA A100-SXM4-40GB", 40_960, 108, 40, 1_555, 1.41),
    (_ADA, "l4", "NVIDIA L4", 23_034, 58, 48, 300, 2.04),
    (_ADA, "rtx4090", "NVIDIA GeForce RTX 4090", 24_564, 128, 72, 1_008, 2.52),
    (_GEFORCE, "rtx3090", "NVIDIA GeForce RTX 3090", 24_576, 82, 6, 936, 1.695),
    (_GEFORCE, "rtx3080", "NVIDIA GeForce RTX 3080", 10_240, 68, 5, 760, 1.71),
    (_VOLTA, "v100", "Tesla V100-SXM2-16GB", 16_160, 80, 6, 900, 1.53),
)
# Name, description, topology, type of accelerator, MiB, operations a second.
_TPUS = (
    ("tpu-v4", "TPU v4, one of a chip's two cores", "v4:1x1x1", "v4-8", 15_616, 137e12),
    ("tpu-v5e", "TPU v5e, one chip", "v5e:1x1", "v5litepod-1", 16_128, 197e12),
    ("tpu-v5p", "TPU v5p, one chip", "v5p:1x1x1", "v5p-8", 98_028, 459e12),
    ("tpu-v6e", "TPU v6e, one chip", "v6e:1x1", "v6e-1", 31_990, 918e12),
)
# fmt: on

_ROWS: tuple[Target, ...] = (
    CpuTarget(name="cpu", description="this machine's CPU and memory"),
    *(
        GpuTarget(
            name=name,
            description=description,
            memory_bytes=memory * MIB,
            multiprocessors=multiprocessors,
            l2_bytes=l2 * MIB,
            bandwidth_bytes_per_s=bandwidth * 10**9,
            clock_ghz=clock,
            **architecture,
        )
        for architecture, name, description, memory, multiprocessors, l2, bandwidth, clock in _GPUS
    ),
    *(
        TpuTarget(name, description, topology, accelerator, memory * MIB, operations)
        for name, description, topology, accelerator, memory, operations in _TPUS
    ),
)
TARGETS: dict[str, Target] = {target.name: target for target in _ROWS}

# The proto of a target, in protocol buffers' text form. cuDNN 9.10 is what XLA's own samples name;
# without a device nothing is asked of cuDNN but which fusions its version knows.
_TARGET_CONFIG = """\
gpu_device_info {{
  name: "{description}"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
  core_count: {multiprocessors}
  fpus_per_core: {fp32_lanes}
  clock_rate_ghz: {clock_ghz}
  device_memory_size: {memory_bytes}
  memory_bandwidth: {bandwidth_bytes_per_s}
  l2_cache_size: {l2_bytes}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {shared_bytes_per_block_optin}
  shared_memory_per_core: {shared_bytes_per_multiprocessor}
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {threads_per_multiprocessor}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{description}"
"""


def find(name: str) -> Target:
    """The row of the table called ``name``.

    Raises:
      ValueError: no such target; the message lists the table and names the nearest.
    """
    if isinstance(name, str) and name in TARGETS:
        return TARGETS[name]
    nearest = difflib.get_close_matches(str(name).lower(), TARGETS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"target={name!r} is not a device lrjax knows; it knows {', '.join(sorted(TARGETS))}. "
        f"Did you mean {nearest!r}?"
    )


def row_of(platform: str, kind: str) -> str:
    """Name of the row for a device: the one its driver names, else the first of its platform.

    Args:
      platform: as ``jax.Device.platform`` gives it: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      kind: as ``jax.Device.device_kind`` gives it.
    """
    own_kind = {"cpu": CpuTarget, "tpu": TpuTarget}.get(platform, GpuTarget)
    rows = [row for row in TARGETS.values() if isinstance(row, own_kind)]
    named = (row for row in rows if row.description.startswith(kind))
    longer = (row for row in rows if kind.startswith(row.description))
    return next(itertools.chain(named, longer, rows)).name


def target_config(target: GpuTarget) -> str:
    """``target`` as the text of an XLA ``GpuTargetConfigProto``."""
    major, minor = target.compute_capability
    return _TARGET_CONFIG.format(
        **vars(target),
        major=major,
        minor=minor,
        features=" feature_extension: ACCELERATED_FEATURES" if target.accelerated else "",
    )
