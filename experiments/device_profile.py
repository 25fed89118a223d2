"""Profiles of the device by kernel, and beside the roofline's prediction, for ``device_jobs``."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lrjax.roofline import Roofline

# Operation, kernel, start and duration in ns of what ran on the device.
Event = tuple[str, str, float, float]

# By the name of the operation and of the kernel, the first that matches.
KERNELS = (
    ("weight gradients", r"wgrad|bw-filter|backward_filter|bwd_filter"),
    ("image gradients", r"dgrad|bw-input|backward_data|bwd_data"),
    ("convolution", r"conv(?!ert)|fprop|implicit_gemm|xmma|cudnn"),
    ("matrix product", r"gemm|dot|cublas|matmul|cutlass"),
    ("scatter", r"scatter"),
    ("pooling", r"reduce[-_]window|pool"),
    ("concatenation", r"concat|pad"),
    ("slices", r"slice"),
    ("copies", r"copy|memcpy|memset|transpose"),
    ("reduction", r"reduce"),
    ("elementwise", r""),
)


def device_events(data: Any) -> Iterator[Event]:
    """All that ran on the device, of a ``jax.profiler.ProfileData``."""
    warnings.simplefilter("ignore", DeprecationWarning)  # of ProfileData's own types
    for plane in data.planes:
        is_device = plane.name.startswith("/device:")
        for line in plane.lines:
            if is_device and not line.name.startswith("Stream"):
                continue  # sums of what streams did
            for event in line.events:
                operation = str(dict(event.stats).get("hlo_op", ""))
                loops = operation.startswith(("while", "call", "conditional"))
                if is_device or (operation and not loops):
                    yield operation, event.name, event.start_ns, event.duration_ns


def by_kernel(events: Sequence[Event], steps: int) -> dict[str, Any]:
    """Milliseconds and launches a step: by group, of the longest kernels, and between kernels."""
    groups: dict[str, list[float]] = defaultdict(list)
    kernels: dict[str, list[float]] = defaultdict(list)
    for operation, kernel, _, duration in events:
        text = f"{operation} {kernel}".lower()
        groups[next(g for g, pattern in KERNELS if re.search(pattern, text))].append(duration)
        kernels[f"{operation}: {kernel}"[:160]].append(duration)
    longest = sorted(kernels, key=lambda name: -sum(kernels[name]))[:40]
    return {
        "groups": {name: _a_step(durations, steps) for name, durations in groups.items()},
        "gaps_ms": _gaps(events) / 1e6 / steps,
        "longest": {name: _a_step(kernels[name], steps) for name in longest},
    }


def _a_step(durations: Sequence[float], steps: int) -> dict[str, float]:
    return {
        "ms": sum(durations) / 1e6 / steps,
        "launches": len(durations) / steps,
    }


def _gaps(events: Sequence[Event]) -> float:
    """ns between the first kernel and the last in which nothing ran."""
    spans = sorted((start, start + duration) for _, _, start, duration in events)
    idle, end = 0.0, spans[0][0] if spans else 0.0
    for start, stop in spans:
        idle += max(0.0, start - end)
        end = max(end, stop)
    return idle


def by_kind(events: Sequence[Event], steps: int, found: Roofline) -> dict[str, dict[str, float]]:
    """Measured and predicted time of the model's kinds, and the rates that were reached."""
    kernels = {re.sub(r"\W", "_", kernel.name): kernel for kernel in found.kernels}
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for operation, name, _, duration in events:
        names = (re.sub(r"\W", "_", text) for text in (operation, name))
        kernel = next((kernels[n] for n in names if n in kernels), None)
        own = sums[kernel.kind if kernel else "(unknown to the model)"]
        own["measured_s"] += duration / 1e9 / steps
        own["operations"] += kernel.operations / steps if kernel else 0
        own["bytes"] += kernel.bytes / steps if kernel else 0
    for kind, seconds in found.by_kind().items():
        sums[kind]["predicted_s"] = seconds
    for own in sums.values():
        if own["measured_s"]:
            own["operations_per_s"] = own["operations"] / own["measured_s"]
            own["bytes_per_s"] = own["bytes"] / own["measured_s"]
    return {kind: dict(own) for kind, own in sums.items()}
