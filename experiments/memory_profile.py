"""What memory profiles are worth: do they say what XLA says, explain it, and agree with a run?

    python -m experiments.memory_profile                     # everything, one at a time
    python -m experiments.memory_profile --only targets --targets cpu h200

Three questions, answered in the tables of ``results/memory_profile.md``:

``targets``: the gradient of VGG-16's convolutions by five methods for four devices: is the
profile's peak what XLA says of a compilation by hand, and how much of it has a layer and a kind?
``rss``: on CPU, the prediction against the growth of a fresh process that runs the program.
``large``: time and memory that the profile of a 16384x16384 step for an H200 takes.

"""

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import jax.numpy as jnp

from experiments import report
from experiments.vgg16_stack import parse_method, structs
from lrjax import memory
from lrjax.memory.attribution import NO_SCOPE

MIB = 2**20

# Image size, dtype and methods by target; TPU's compiler takes minutes for larger ones.
GPU_METHODS = ("column", "checkpoint-block", "stream/64", "2ps/32", "overl/8")
SMALL_METHODS = ("column", "checkpoint-block", "stream/16", "2ps/8", "overl/4")
TARGETS: dict[str, tuple[int, Any, tuple[str, ...]]] = {
    "cpu": (512, jnp.float32, SMALL_METHODS),
    "h200": (2048, jnp.bfloat16, GPU_METHODS),
    "rtx3090": (2048, jnp.bfloat16, GPU_METHODS),
    "tpu-v5e": (256, jnp.bfloat16, SMALL_METHODS),
}
RSS_RUNS = (("column", 512), ("column", 1024), ("checkpoint-block", 1024), ("stream/32", 1024))
LARGE_SIZE, LARGE_METHOD = 16384, "stream/256"

EXPLAINED = 0.95
LARGE_S, LARGE_BYTES = 120, 4 * 2**30


def profile_target(target: str, method: str) -> dict[str, Any]:
    """The profile of one gradient, next to XLA's figure from a compilation of its own."""
    size, dtype, _ = TARGETS[target]
    fun, args = parse_method(method).gradient(), structs(size, size, dtype)
    start = time.perf_counter()
    found = memory.profile(fun, *args, target=target)
    seconds = time.perf_counter() - start
    analysis = memory.compile_for(fun, *args, target=target).memory_analysis()
    by_hand = analysis.peak_memory_in_bytes
    if target == "cpu":  # XLA:CPU's figure leaves the temporaries out
        by_hand += analysis.temp_size_in_bytes
    named = sum(b.bytes for b in found.at_peak() if b.layer not in ("", NO_SCOPE, "unattributed"))
    of_a_kind = sum(b.bytes for b in found.at_peak() if b.kind != "unattributed")
    return {
        "size": size,
        "peak_bytes": found.peak_bytes,
        "allocated_bytes": found.allocated_bytes,
        "by_hand_bytes": by_hand,
        "buffers_bytes": sum(b.bytes for b in found.at_peak()),
        "with_layer": round(named / found.peak_bytes, 4),
        "with_kind": round(of_a_kind / found.peak_bytes, 4),
        "profile_s": round(seconds, 1),
        "by_kind": found.by_kind(),
    }


def measure_run(method: str, size: int) -> dict[str, Any]:
    """Prediction and growth of resident memory, float32, on CPU."""
    args = structs(size, size, jnp.float32)
    found = memory.measure(parse_method(method).gradient(), *args)
    return {"predicted_bytes": found.predicted_bytes, "measured_bytes": found.measured_bytes}


def profile_large() -> dict[str, Any]:
    """One large profile; this process's own peak is part of the answer."""
    fun = parse_method(LARGE_METHOD).gradient()
    start = time.perf_counter()
    found = memory.profile(fun, *structs(LARGE_SIZE, LARGE_SIZE, jnp.bfloat16), target="h200")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_bytes": found.peak_bytes,
        "buffers": len(found.buffers),
    }


def in_fresh_process(part: str, *arguments: str) -> dict[str, Any]:
    """Run one entry on its own, so that none sees another's memory or warm compiler."""
    command = [sys.executable, "-m", "experiments.memory_profile", "--entry", part, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{part} {arguments}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


ENTRIES = {
    "targets": lambda target, method: profile_target(target, method),
    "rss": lambda method, size: measure_run(method, int(size)),
    "large": profile_large,
}


def tables(results: dict[str, Any]) -> str:
    version = results["jax"]
    return "\n\n".join(
        [
            "# Memory profiles: what they say and how far it holds",
            f"jax {version}. Printed by `python -m experiments.memory_profile`. The gradient of "
            "VGG-16's convolutions (batch 1) with respect to the parameters; MiB.",
            "Peak in the profile, and XLA's from a compilation by hand; the sum of the buffers at "
            "the peak; the share of the peak with a layer and with a kind. `allocated` is what the "
            "runtime sets aside: the peak and the gaps between buffers.",
            _targets_table(results.get("targets", {})),
            "What holds the memory at the peak:",
            _kinds_table(results.get("targets", {})),
            "CPU, float32: memory beyond the arguments, predicted and measured as the growth of a "
            "fresh process.",
            _rss_table(results.get("rss", {})),
            f"The profile of {LARGE_METHOD} at {LARGE_SIZE}x{LARGE_SIZE} for an H200:",
            _large_table(results.get("large", {})),
        ]
    )


def _targets_table(entries: dict[str, Any]) -> str:
    rows = []
    for name, e in entries.items():
        target, _, method = name.partition(" ")
        cells = [report.mib(e[f]) for f in ("peak_bytes", "by_hand_bytes", "buffers_bytes")]
        shares = [f"{e['with_layer']:.1%}", f"{e['with_kind']:.1%}"]
        allocated = report.mib(e["allocated_bytes"])
        rows.append([target, e["size"], method, *cells, allocated, *shares, e["profile_s"]])
    header = ["target", "image", "method", "peak", "by hand", "buffers", "allocated"]
    return report.markdown_table([*header, "layer", "kind", "seconds"], rows)


def _kinds_table(entries: dict[str, Any]) -> str:
    kinds = [
        k for k in memory.KINDS if any(e["by_kind"].get(k, 0) >= MIB for e in entries.values())
    ]
    rows = [[n, *(report.mib(e["by_kind"].get(k, 0)) for k in kinds)] for n, e in entries.items()]
    return report.markdown_table(["program", *kinds], rows)


def _rss_table(entries: dict[str, Any]) -> str:
    rows = [
        [
            name,
            report.mib(e["predicted_bytes"]),
            report.mib(e["measured_bytes"]),
            report.ratio(e["measured_bytes"] / e["predicted_bytes"]),
        ]
        for name, e in entries.items()
    ]
    return report.markdown_table(["program", "predicted", "measured", "ratio"], rows)


def _large_table(entry: dict[str, Any]) -> str:
    if not entry:
        return "not measured"
    return report.markdown_table(
        ["seconds", "process, MiB", "peak of the program, MiB", "buffers"],
        [
            [
                entry["seconds"],
                report.mib(entry["rss_bytes"]),
                report.mib(entry["peak_bytes"]),
                entry["buffers"],
            ]
        ],
    )


def failures(results: dict[str, Any]) -> list[str]:
    """Claims that the results do not bear out."""
    found = []
    for name, e in results.get("targets", {}).items():
        if e["peak_bytes"] != e["by_hand_bytes"]:
            found.append(f"{name}: peak {e['peak_bytes']}, by hand {e['by_hand_bytes']}")
        if abs(e["buffers_bytes"] / e["peak_bytes"] - 1) > 0.01:
            found.append(f"{name}: buffers sum up to {e['buffers_bytes']} of {e['peak_bytes']}")
        if min(e["with_layer"], e["with_kind"]) < EXPLAINED:
            found.append(f"{name}: layer {e['with_layer']}, kind {e['with_kind']}")
    large = results.get("large")
    if large and (large["seconds"] > LARGE_S or large["rss_bytes"] > LARGE_BYTES):
        found.append(f"large: {large}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=ENTRIES, default=tuple(ENTRIES))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=tuple(TARGETS))
    parser.add_argument("--methods", nargs="+", help="of the targets' methods, only these")
    parser.add_argument("--entry", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.entry:
        part, *arguments = options.entry
        print(json.dumps(ENTRIES[part](*arguments)))
        return
    path = report.RESULTS / "memory_profile.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["jax"] = report.versions()["jax"]

    def record(part: str, name: str, *arguments: str) -> None:
        entry = in_fresh_process(part, *arguments)
        if name:
            results.setdefault(part, {})[name] = entry
        else:
            results[part] = entry
        print(part, name, {k: v for k, v in entry.items() if k != "by_kind"}, flush=True)
        report.write_json(path, results)
        path.with_suffix(".md").write_text(tables(results) + "\n")

    if "large" in options.only:
        record("large", "")
    if "targets" in options.only:
        for target in options.targets:
            for method in options.methods or TARGETS[target][2]:
                record("targets", f"{target} {method}", target, method)
    if "rss" in options.only:
        for method, size in RSS_RUNS:
            record("rss", f"{method} {size}x{size}", method, str(size))
    print("\n" + tables(results))
    problems = failures(results)
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
