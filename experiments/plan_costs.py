"""Predicted memory of plans against XLA's peaks.

    python -m experiments.plan_costs                              # everything
    python -m experiments.plan_costs --target h200 --only vgg16/1024 resnet50/512/column

Training steps in bfloat16 (on CPU float32), batch 1 (ResNet-50: 4), gradients with respect to the
parameters. A plan is written ``network/size/segments``, the segments joined by ``+``:
``stream-32+column`` is a first half in 32 blocks of rows and a second half by whole maps. The
network is cut where the maps are narrowest.

Compiled programs are not compiled again: XLA's peaks are kept, per version of jax, in
``results/plan_costs.json``; predictions are made anew and go with them into ``.md``.
"""

import argparse
import json
import os
import statistics
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs: no device is wanted

import jax

from experiments import report
from experiments.plans import Plan, compiled_bytes, parse, predicted_bytes

MIB = 2**20
RESULTS = report.RESULTS / "plan_costs.json"


_THREE = "checkpoint+checkpoint+checkpoint"
_FOUR = f"{_THREE}+checkpoint"
# XLA:CPU undoes checkpoints, so there are none for it.
PLANS = {
    "h200": (
        *(f"vgg16/{s}/{p}" for s in (1024, 2048, 4096) for p in ("column", _FOUR)),
        "vgg16/512/column", "vgg16/512/stream-16",
        "vgg16/1024/stream-32", "vgg16/2048/stream-64", "vgg16/4096/stream-128",
        "vgg16/1024/stream-8", "vgg16/2048/stream-16",
        "vgg16/1024/2ps-8", "vgg16/2048/2ps-16", "vgg16/4096/2ps-64",
        "vgg16/1024/overl-8", "vgg16/2048/overl-16", "vgg16/4096/overl-16",
        "vgg16/1024/stream-32+column", "vgg16/2048/stream-64+column",
        "vgg16/4096/stream-128+column",
        *(f"unet/{s}/{p}" for s in (1024, 2048, 4096) for p in ("column", _THREE)),
        "unet/1024/stream-32", "unet/2048/stream-64", "unet/4096/stream-128",
        "unet/1024/stream-32+column", "unet/2048/stream-64+column",
        "unet/4096/stream-128+column",
        "unet/2048/2ps-16", "unet/1024/overl-8", "unet/2048/overl-16",
        *(f"resnet50/{s}/{p}" for s in (512, 1024, 2048) for p in ("column", _THREE)),
        "resnet50/512/stream-16",
        *(f"convnext/{s}/{p}" for s in (512, 1024, 2048) for p in ("column", _THREE)),
        "convnext/512/stream-16", "convnext/1024/stream-32", "convnext/2048/overl-16",
    ),
    "cpu": (
        "vgg16/512/column", "vgg16/1024/column", "vgg16/2048/column",
        "vgg16/512/stream-16", "vgg16/1024/stream-32", "vgg16/2048/stream-64",
        "vgg16/1024/stream-8",
        "vgg16/512/2ps-4", "vgg16/1024/2ps-8", "vgg16/2048/2ps-16",
        "vgg16/512/overl-4", "vgg16/1024/overl-8", "vgg16/2048/overl-16",
        "vgg16/512/stream-16+column", "vgg16/1024/stream-32+column",
        "vgg16/2048/stream-64+column",
        "unet/1024/column", "unet/1024/stream-32", "unet/1024/2ps-8", "unet/1024/overl-8",
        "unet/1024/stream-32+column",
        "resnet50/512/column", "resnet50/512/stream-16", "convnext/1024/column",
    ),
    "tpu-v5e": (
        "vgg16/512/column", "vgg16/512/stream-16", "vgg16/1024/column", "unet/512/column",
    ),
}  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """All results, of every version of jax, as Markdown."""
    lines, summary = [], []
    for version, own in results.items():
        for target, known in own.items():
            found = {name: one for name, one in known.items() if "predicted_mib" in one}
            if not found:
                continue
            errors = sorted(abs(_error(one)) for one in found.values())
            worst = max(found, key=lambda name: abs(_error(found[name])))
            median = statistics.median(errors)
            row = [version, target, len(errors), f"{median:.1%}", f"{errors[-1]:.1%}", worst]
            summary.append(row)
            lines += [
                [
                    version,
                    target,
                    name,
                    one["predicted_mib"],
                    one["peak_mib"],
                    f"{_error(one):+.1%}",
                ]
                for name, one in found.items()
            ]
    return "\n\n".join(
        [
            "# Predicted memory of plans, and XLA's peaks",
            "Training steps, bfloat16 (float32 on CPU), batch 1 (ResNet-50: 4), gradients with "
            "respect to the parameters; ResNet-50 with BatchNorm, U-Net with frozen BatchNorm. "
            "Segments of a plan are joined by `+`. MiB. Printed by "
            "`python -m experiments.plan_costs`.",
            "The model's constants were tuned on plans of this table: there is no held-out set. "
            "Checkpoints on CPU are left out: XLA:CPU undoes them, and three that were tried were "
            "30% under (VGG-16), 10% over (U-Net) and 14% under (ConvNeXt-T).",
            report.markdown_table(
                ["jax", "target", "plans", "median error", "worst error", "worst plan"], summary
            ),
            report.markdown_table(["jax", "target", "plan", "predicted", "XLA", "error"], lines),
        ]
    )


def _error(one: dict[str, Any]) -> float:
    return one["predicted_mib"] / one["peak_mib"] - 1


def measure(plan: Plan, known: dict[str, Any]) -> dict[str, Any]:
    """Both peaks; the compiler's only if it is not known yet."""
    if "peak_mib" not in known:
        known = {"peak_mib": round(compiled_bytes(plan) / MIB, 1)}
        jax.clear_caches()
    start = time.process_time()
    predicted = predicted_bytes(plan)
    return known | {
        "predicted_mib": round(predicted / MIB, 1),
        "predict_cpu_s": round(time.process_time() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", nargs="*", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of plans' names")
    options = parser.parse_args()
    version = report.versions()["jax"]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for target in options.target:
        for name in PLANS[target]:
            if not name.startswith(tuple(options.only)):
                continue
            known = results.get(version, {}).get(target, {}).get(name, {})
            found = measure(parse(name, target), known)
            print(target, name, found, f"{_error(found):+.1%}", flush=True)
            results = report.merge(RESULTS, version, {target: {name: found}})
            RESULTS.with_suffix(".md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
