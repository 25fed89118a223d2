"""Writes the tables of measured results into the documents that show them.

A table stands between ``<!-- results: NAME -->`` and ``<!-- /results -->``, and is made of a file
of experiments/results that its experiment wrote.

    python scripts/results_page.py            # writes
    python scripts/results_page.py --check    # status 1 where a page is not what would be written
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.report import markdown_table  # noqa: E402

RESULTS = ROOT / "experiments/results"
PLACE = re.compile(r"(<!-- results: ([a-z0-9-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)

# Of step_times.
NETWORKS = {
    "vgg16-4096": "VGG-16, 4,096",
    "vgg16-1024": "VGG-16, 1,024",
    "resnet50-frozen-4096": "ResNet-50, frozen statistics, 4,096",
    "unet-none-2048": "U-Net, no normalisation, 2,048",
    "convnext-4096": "ConvNeXt-T, 4,096",
    "resnet50-batch-8x1024": "ResNet-50, batch statistics, 8 images of 1,024",
}

# Of rows_over_devices.
DEVICES_NETWORKS = {
    "vgg16": "VGG-16",
    "resnet50-frozen": "ResNet-50, frozen statistics",
    "resnet50-batch": "ResNet-50, batch statistics",
    "unet-none": "U-Net, no normalisation",
}
LARGE = "16384x16384"


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def newest(found: dict[str, Any]) -> tuple[str, Any]:
    """The results of the newest version of JAX among them."""
    return max(found.items(), key=lambda item: [int(part) for part in item[0].split(".")])


def mib(row: dict[str, Any] | None) -> str:
    return f"{row['peak_mib']:,.0f}" if row else ""


def vgg16_memory() -> str:
    version, found = newest(read("vgg16_memory"))
    methods = {
        "column": "column",
        "checkpoint-layer": "`jax.checkpoint`, a layer at a time",
        "checkpoint-block": "`jax.checkpoint`, a block at a time",
        "overl": "OverL",
        "2ps": "2PS",
        "stream": "stream",
        "stream-offload": "stream, maps between segments on the host",
    }
    sides = ("4096", "16384", "32768", "32768 of uint8")
    rows = []
    for method, name in methods.items():
        cells = [name]
        for side in sides:
            number, _, kind = side.partition(" of ")
            programs = [
                row
                for program, row in found["peaks"].items()
                if program.split("/")[:2] == [number, method]
                and program.endswith("uint8") == bool(kind)
            ]
            cells.append(mib(programs[0] if programs else None))
        rows.append(cells)
    header = ["", *(f"{int(s.split()[0]):,}{s[5:]}" for s in sides)]
    note = f"Peak in MiB by XLA, compiled for an H200 by jax {version}; empty: not compiled."
    return f"{markdown_table(header, rows)}\n\n{note}"


def networks_memory() -> str:
    version, found = newest(read("barrier_memory"))
    peaks = found["peaks"]
    names = {
        "resnet50-batch": "ResNet-50, batch statistics, 8 images of 1,024",
        "resnet50-frozen": "ResNet-50, frozen statistics, 4,096",
        "resnet50-frozen-16384": "the same, 16,384",
        "convnext": "ConvNeXt-T, 4,096",
        "convnext-16384": "the same, 16,384",
        "unet-frozen": "U-Net, frozen statistics, 4,096",
        "unet-group": "U-Net, GroupNorm, 4,096",
    }
    rows = []
    for key, name in names.items():
        own = {p.removeprefix(key + "/"): r for p, r in peaks.items() if p.startswith(key + "/")}
        remat = [own[p] for p in ("remat", "remat-stages") if p in own]
        streams = [row for p, row in own.items() if p.startswith("stream")]
        best = [
            min(some, key=lambda r: r["peak_mib"]) if some else None for some in (remat, streams)
        ]
        rows.append([name, mib(own.get("column")), mib(best[0]), mib(best[1])])
    header = ["", "column", "best `nn.remat`", "best stream"]
    note = f"Peak in MiB by XLA, compiled for an H200 by jax {version}, bfloat16."
    return f"{markdown_table(header, rows)}\n\n{note}"


def step_times() -> str:
    version, found = newest(read("step_times"))
    rows = []
    for key, name in NETWORKS.items():
        own = {p.removeprefix(key + "/"): r for p, r in found["steps"].items()
               if p.startswith(key + "/")}  # fmt: skip
        column = own.pop("column")
        rows.append([name, "column", f"{column['peak_mib']:,.0f} MiB", f"{column['ms']:.1f} ms"])
        for program, row in sorted(own.items(), key=lambda item: -item[1]["peak_mib"]):
            rows.append([
                "",
                run_as(program, row),
                f"{row['peak_mib'] / column['peak_mib']:.3f}",
                f"{row['ms'] / column['ms']:.2f}",
            ])  # fmt: skip
    header = ["network", "run as", "peak over column's", "time over column's"]
    note = f"Compiled for an H200 by jax {version}, bfloat16; time by a roofline, not measured."
    return f"{markdown_table(header, rows)}\n\n{note}"


def choices() -> str:
    """The same, a row per network: whole maps computed again, and plans by their peak."""
    version, found = newest(read("step_times"))
    rows = []
    for key, name in NETWORKS.items():
        own = {p.removeprefix(key + "/"): r for p, r in found["steps"].items()
               if p.startswith(key + "/")}  # fmt: skip
        column = own["column"]

        def ratios(row: dict[str, Any], column: dict[str, Any] = column) -> str:
            return f"{row['peak_mib'] / column['peak_mib']:.2f} : {row['ms'] / column['ms']:.2f}"

        whole = [r for p, r in own.items() if p.startswith(("remat", "checkpoint"))]
        plans = [r for p, r in own.items() if p.startswith("plan/")]
        if plans:
            plans.sort(key=lambda r: -r["peak_mib"])
            again = ", ".join(map(ratios, whole))
            rows.append([name, again, ", ".join(map(ratios, plans))])
    header = ["network, side of the image", "`nn.remat`, `jax.checkpoint`", "plans"]
    note = f"Peak : time over column's; H200, jax {version}, bfloat16, time by a roofline."
    return f"{markdown_table(header, rows)}\n\n{note}"


def run_as(program: str, row: dict[str, Any]) -> str:
    kind, _, number = program.partition("/")
    if kind == "plan":
        return f"plan: {row['segments']}"
    if kind.startswith("remat") or kind == "checkpoint":
        return f"`{kind}`"
    return f"{ {'2ps': '2PS', 'overl': 'OverL'}.get(kind, kind) }, {number} blocks"


def plans() -> str:
    version, found = newest(read("plan_networks"))
    rows = []
    for network, results in found.items():
        cells = [network]
        for budget in ("0.5", "0.25", "0.1"):
            row = results.get(budget)
            if row is None:
                cells.append("")
            elif "peak" in row:
                simple = f"{row['simple_time']:.2f}" if "simple_time" in row else "none fits"
                cells.append(f"{row['peak']:.2f} : {row['time']:.2f} ({simple})")
            elif row["smallest"] is None:
                cells.append("no plan can be")
            else:
                cells.append(f"none; smallest {row['smallest']:.2f}")
        rows.append(cells)
    header = ["network", "half of column's peak", "a quarter", "a tenth"]
    note = (
        "Peak : time over column's, and in brackets the time of the best simple plan; "
        f"jax {version}, H200, one image in bfloat16."
    )
    return f"{markdown_table(header, rows)}\n\n{note}"


def cpu_time() -> str:
    found, one_pass = read("cpu_time"), read("one_pass")
    rows = [
        [name, method["method"], f"{method['peak_ratio']:.2f}", f"{method['time_ratio']:.2f}"]
        for name, programs in (
            (f"VGG-16's stack, {found['size']}", found["methods"]),
            (f"U-Net's loss over pixels, {one_pass['size']}", one_pass["programs"]),
        )
        for method in programs
    ]
    where = found["environment"]
    note = (
        f"Measured: jax {where['jax']}, {where['cpus']} cores, float32, medians of turns "
        f"({found['repeats']} and {one_pass['repeats']}); peak by XLA."
    )
    header = ["", "run as", "peak over column's", "time over column's"]
    return f"{markdown_table(header, rows)}\n\n{note}"


def exactness() -> str:
    rows = list(exactness_rows())
    return markdown_table(["what was compared with column", "result"], rows)


def exactness_rows() -> Iterator[list[str]]:
    models = read("model_exactness")["rows"]
    errors = [r["error"] for r in models if r["dtype"] == "float64"]
    names = {r["model"] for r in models}
    yield [
        f"{len(names)} networks of `lrjax.models`, {len(errors)} runs in float64: largest error",
        f"{max(errors):.1e} of an array's largest magnitude",
    ]
    fuzz = read("fuzz")
    yield [
        f"{fuzz['compared']:,} random networks in float64",
        f"{fuzz['mismatches']} mismatches, {len(fuzz['failures'])} failures",
    ]
    mutations = read("mutations")["mutations"]
    caught = sum(m["caught"] for m in mutations)
    yield [
        f"{len(mutations)} errors made in the library on purpose",
        f"{caught} noticed by the tests",
    ]


def compile_times() -> str:
    found = read("compile_times")
    rows = []
    for record in found["records"]:
        if record["label"] or "compile_s" not in record["column"]:
            continue
        parts = ("trace_s", "lower_s", "compile_s")
        column, stream = (
            sum(record[method][part] for part in parts) for method in ("column", "stream")
        )
        rows.append([record["network"], record["target"], f"{column:.1f}", f"{stream:.1f}",
                     f"{stream / column:.1f}"])  # fmt: skip
    header = ["network", "target", "column, s", "stream in 16 blocks, s", "ratio"]
    note = f"Trace, lower and compile a gradient; processor time, jax {found['jax']}."
    return f"{markdown_table(header, rows)}\n\n{note}"


def of_devices() -> tuple[str, dict[tuple[str, str, int, str], dict[str, Any]]]:
    """The version of JAX, and rows by network, image, devices and method."""
    version, found = newest(read("rows_over_devices"))
    parsed = {(*text.split("/"),): row for text, row in found["rows"].items()}
    return version, {
        (n, size, int(count), how): row for (n, size, count, how), row in parsed.items()
    }


def method_label(method: str) -> str:
    """In words: ``stream:16@pool2`` is ``stream, 16 blocks, cut at pool2``."""
    head, _, cuts = method.partition("@")
    name, _, blocks = head.partition(":")
    if name == "plan":
        return f"`lrjax.plan` for {blocks.replace('MiB', ' MiB').replace('GiB', ' GiB')}"
    words = [name, *([f"{blocks} block" + "s" * (blocks != "1")] if blocks else [])]
    named = cuts.split(",")
    return ", ".join([*words, *([f"cut at {', '.join(named)}"] if cuts else [])])


def devices_weak() -> str:
    version, found = of_devices()
    lines = []
    for (network, size, count, method), own in found.items():
        alone = found.get((network, "4096x4096", 1, method))
        if size != "32768x4096" or count != 8 or alone is None:
            continue
        kinds = ", ".join(f"{n} {kind}" for kind, n in own["exchanges"].items())
        lines.append([
            DEVICES_NETWORKS[network], method_label(method), mib(alone), mib(own),
            f"{own['peak_mib'] / alone['peak_mib']:.2f}", f"{alone['ms']:,.1f}",
            f"{own['ms']:,.1f}", f"{kinds}: {own['exchanged_mib']:,.1f}", own["exchanges_in_loops"],
        ])  # fmt: skip
    header = ["network", "how", "MiB, one device", "of eight", "ratio", "ms, one device"]
    header += ["of eight", "exchanges, MiB", "in loops"]
    note = (
        "4096 x 4096 on one device, 32768 x 4096 on eight: value and gradient, bfloat16, training "
        f"mode; compiled for H200s by jax {version}, time by roofline."
    )
    return f"{markdown_table(header, lines)}\n\n{note}"


def devices_strong() -> str:
    version, found = of_devices()
    alone = next(row for (n, size, count, _), row in found.items() if (size, count) == (LARGE, 1))
    lines = []
    for (network, size, count, method), own in found.items():
        if network != "vgg16" or not size.endswith("x16384"):
            continue
        efficiency = f"{alone['ms'] / own['ms'] / count:.2f}" if size == LARGE else ""
        lines.append([size.replace("x", " x "), count, method_label(method), mib(own),
                      f"{own['ms']:,.0f}", efficiency])  # fmt: skip
    lines.sort(key=lambda line: (len(line[0]), line[1]))
    header = ["VGG-16 at", "devices", "how", "MiB a device", "ms", "efficiency"]
    note = f"Efficiency: one device's time over devices x time. Compiled by jax {version}."
    return f"{markdown_table(header, lines)}\n\n{note}"


def devices_waste() -> str:
    version, found = of_devices()
    column, lines = found["vgg16", "1024x1024", 1, "column"], []
    for (network, size, count, method), own in found.items():
        alone = found.get((network, "1024x1024", 1, method))
        if size != "8192x1024" or count != 8 or alone is None:
            continue
        times = [f"{row['tflop'] / column['tflop']:.3f}" for row in (alone, own)]
        is_same = own.get("plan") == alone.get("plan")
        plans = "" if is_same else f": {alone['plan']}, and of eight {own['plan']}"
        lines.append([method_label(method) + plans, mib(alone), mib(own), *times,
                      f"{own['tflop'] / alone['tflop'] - 1:.1%}" if is_same else "",
                      f"{alone['ms']:,.1f}", f"{own['ms']:,.1f}"])  # fmt: skip
    header = ["how", "MiB, one device", "of eight", "operations, one device", "of eight"]
    header += ["wasted", "ms, one device", "of eight"]
    note = (
        "VGG-16, 1024 x 1024 on one device, 8192 x 1024 on eight; operations as multiples of "
        f"column's on one device; wasted: what eight take more. Compiled by jax {version}. In one "
        "block one device computes as many rows outside the image as eight do of their neighbours'."
    )
    return f"{markdown_table(header, lines)}\n\n{note}"


TABLES: dict[str, Callable[[], str]] = {
    "vgg16-memory": vgg16_memory,
    "networks-memory": networks_memory,
    "step-times": step_times,
    "choices": choices,
    "plans": plans,
    "cpu-time": cpu_time,
    "exactness": exactness,
    "compile-times": compile_times,
    "devices-weak": devices_weak,
    "devices-strong": devices_strong,
    "devices-waste": devices_waste,
}


def rendered(text: str) -> str:
    """A page with its tables made anew.

    Raises:
      ValueError: it names a table that there is not.
    """

    def table(place: re.Match[str]) -> str:
        if place[2] not in TABLES:
            raise ValueError(f"results: {place[2]!r} is no table; there are {', '.join(TABLES)}")
        return f"{place[1]}\n{TABLES[place[2]]()}\n\n{place[3]}"

    return PLACE.sub(table, text)


def main() -> int:
    stale = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text()
        if (wanted := rendered(text)) != text:
            stale.append(page.relative_to(ROOT))
            if "--check" not in sys.argv:
                page.write_text(wanted)
    for page in stale:
        print(f"{page}: {'stale' if '--check' in sys.argv else 'written'}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
