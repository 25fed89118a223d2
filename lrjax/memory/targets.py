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

MIB = 2**20
GIB = 2**30


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

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        CpuTarget(name="cpu", description="this machine's CPU and memory"),
        GpuTarget(
            name="h200",
            description="NVIDIA H200 141GB HBM3e",
            compute_capability=(9, 0),
            accelerated=True,
            memory_bytes=144_384 * MIB,
            multiprocessors=132,
            fp32_lanes=128,
            threads_per_multiprocessor=2048,
            shared_bytes_per_multiprocessor=228 * 1024,
            shared_bytes_per_block_optin=227 * 1024,
            l2_bytes=50 * MIB,
            bandwidth_bytes_per_s=4_800_000_000_000,
            clock_ghz=1.98,
            host_bytes_per_s=50_000_000_000,
        ),
        GpuTarget(
            name="h100",
            description="NVIDIA H100 80GB HBM3",
            compute_capability=(9, 0),
            accelerated=True,
            memory_bytes=81_008 * MIB,
            multiprocessors=132,
            fp32_lanes=128,
            threads_per_multiprocessor=2048,
            shared_bytes_per_multiprocessor=228 * 1024,
            shared_bytes_per_block_optin=227 * 1024,
            l2_bytes=50 * MIB,
            bandwidth_bytes_per_s=3_350_000_000_000,
            clock_ghz=1.98,
            host_bytes_per_s=50_000_000_000,
        ),
        GpuTarget(
            name="a100-80gb",
            description="NVIDIA A100-SXM4-80GB",
            compute_capability=(8, 0),
            accelerated=False,
            memory_bytes=81_920 * MIB,
            multiprocessors=108,
            fp32_lanes=64,
            threads_per_multiprocessor=2048,
            shared_bytes_per_multiprocessor=164 * 1024,
            shared_bytes_per_block_optin=163 * 1024,
            l2_bytes=40 * MIB,
            bandwidth_bytes_per_s=2_039_000_000_000,
            clock_ghz=1.41,
            host_bytes_per_s=25_000_000_000,
        ),
        GpuTarget(
            name="a100-40gb",
            description="NVIDIA A100-SXM4-40GB",
            compute_capability=(8, 0),
            accelerated=False,
            memory_bytes=40_960 * MIB,
            multiprocessors=108,
            fp32_lanes=64,
            threads_per_multiprocessor=2048,
            shared_bytes_per_multiprocessor=164 * 1024,
            shared_bytes_per_block_optin=163 * 1024,
            l2_bytes=40 * MIB,
            bandwidth_bytes_per_s=1_555_000_000_000,
            clock_ghz=1.41,
            host_bytes_per_s=25_000_000_000,
        ),
        GpuTarget(
            name="l4",
            description="NVIDIA L4",
            compute_capability=(8, 9),
            accelerated=False,
            memory_bytes=23_034 * MIB,
            multiprocessors=58,
            fp32_lanes=128,
            threads_per_multiprocessor=1536,
            shared_bytes_per_multiprocessor=100 * 1024,
            shared_bytes_per_block_optin=99 * 1024,
            l2_bytes=48 * MIB,
            bandwidth_bytes_per_s=300_000_000_000,
            clock_ghz=2.04,
            host_bytes_per_s=25_000_000_000,
        ),
        GpuTarget(
            name="rtx4090",
            description="NVIDIA GeForce RTX 4090",
            compute_capability=(8, 9),
            accelerated=False,
            memory_bytes=24_564 * MIB,
            multiprocessors=128,
            fp32_lanes=128,
            threads_per_multiprocessor=1536,
            shared_bytes_per_multiprocessor=100 * 1024,
            shared_bytes_per_block_optin=99 * 1024,
            l2_bytes=72 * MIB,
            bandwidth_bytes_per_s=1_008_000_000_000,
            clock_ghz=2.52,
            host_bytes_per_s=25_000_000_000,
        ),
        GpuTarget(
            name="rtx3090",
            description="NVIDIA GeForce RTX 3090",
            compute_capability=(8, 6),
            accelerated=False,
            memory_bytes=24_576 * MIB,
            multiprocessors=82,
            fp32_lanes=128,
            threads_per_multiprocessor=1536,
            shared_bytes_per_multiprocessor=100 * 1024,
            shared_bytes_per_block_optin=99 * 1024,
            l2_bytes=6 * MIB,
            bandwidth_bytes_per_s=936_000_000_000,
            clock_ghz=1.695,
            host_bytes_per_s=25_000_000_000,
        ),
        GpuTarget(
            name="rtx3080",
            description="NVIDIA GeForce RTX 3080",
            compute_capability=(8, 6),
            accelerated=False,
            memory_bytes=10_240 * MIB,
            multiprocessors=68,
            fp32_lanes=128,
            threads_per_multiprocessor=1536,
            shared_bytes_per_multiprocessor=100 * 1024,
            shared_bytes_per_block_optin=99 * 1024,
            l2_bytes=5 * MIB,
            bandwidth_bytes_per_s=760_000_000_000,
            clock_ghz=1.71,
            host_bytes_per_s=25_000_000_000,
        ),
        GpuTarget(
            name="v100",
            description="Tesla V100-SXM2-16GB",
            compute_capability=(7, 0),
            accelerated=False,
            memory_bytes=16_160 * MIB,
            multiprocessors=80,
            fp32_lanes=64,
            threads_per_multiprocessor=2048,
            shared_bytes_per_multiprocessor=96 * 1024,
            shared_bytes_per_block_optin=96 * 1024,
            l2_bytes=6 * MIB,
            bandwidth_bytes_per_s=900_000_000_000,
            clock_ghz=1.53,
            host_bytes_per_s=12_000_000_000,
        ),
        TpuTarget(
            name="tpu-v4",
            description="TPU v4, one of a chip's two cores",
            topology="v4:1x1x1",
            accelerator_type="v4-8",
            memory_bytes=15_616 * MIB,
            operations_per_s=137e12,
        ),
        TpuTarget(
            name="tpu-v5e",
            description="TPU v5e, one chip",
            topology="v5e:1x1",
            accelerator_type="v5litepod-1",
            memory_bytes=16_128 * MIB,
            operations_per_s=197e12,
        ),
        TpuTarget(
            name="tpu-v5p",
            description="TPU v5p, one chip",
            topology="v5p:1x1x1",
            accelerator_type="v5p-8",
            memory_bytes=98_028 * MIB,
            operations_per_s=459e12,
        ),
        TpuTarget(
            name="tpu-v6e",
            description="TPU v6e, one chip",
            topology="v6e:1x1",
            accelerator_type="v6e-1",
            memory_bytes=31_990 * MIB,
            operations_per_s=918e12,
        ),
    )
}

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
