"""Every model in training mode, by rows against column: the largest error of any array.

    python -m experiments.model_exactness                      # all, in float64 and float32
    python -m experiments.model_exactness --models resnet unet --dtypes float64
    python -m experiments.model_exactness --dtypes bfloat16 float16

The small networks of ``experiments.small_models`` on images of an odd height, under every strategy
and three block counts; compared are outputs, updated running statistics and all gradients, each
relative to its own largest value. Arrays that are rounding error in column too (the gradient of a
bias in front of a normalisation) are left out. In float32 the last two columns say how far rows
and column are from column in float64.

In bfloat16 and float16 (parameters too) every array is made of roundings, which are chance: with
three classes the distance of the logits from float64's is that of six roundings, by rows 0.7 to 1.5
times column's from image to image. So there are 256 classes there, and a second table has the
Euclidean distance of all outputs, and of all gradients, from float64's for the same arguments, by
rows over column's; with ``--draws N`` the root mean square over N draws of the images.

The answers go to ``results/model_exactness.json`` and ``.md``, beside those of models that were
measured earlier.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # small programs, and exactness is not a device's

import jax
import jax.numpy as jnp
import numpy as np

import lrjax
from experiments import report
from experiments.small_models import MODELS, training_call
from lrjax import testing

# (strategy, block counts). 2PS and OverL divide the rows of the result, which are few.
RUNS = (("stream", (2, 5, 9)), ("2ps", (1, 2, 3)), ("overl", (1, 2, 3)))
IN_AXES = (None, 1, None)
MANY_CLASSES = 256
DTYPES = ("float64", "float32", "bfloat16", "float16")


def largest_error(found: testing.Results, expected: testing.Results) -> float:
    """Over all arrays but those that cancel."""
    pairs = list(
        zip(jax.tree.leaves(found.outputs), jax.tree.leaves(expected.outputs), strict=True)
    )
    gradients = list(zip(found.gradients.values(), expected.gradients.values(), strict=True))
    largest = max(float(jnp.abs(column).max()) for _, column in gradients)
    noise = 1e3 * float(jnp.finfo(gradients[0][1].dtype).eps) * largest
    pairs += [pair for pair in gradients if float(jnp.abs(pair[1]).max()) > noise]
    return max(testing.max_error(rows, column) for rows, column in pairs)


def distances(found: testing.Results, truth: testing.Results) -> dict[str, float]:
    """Of all outputs, and of all gradients, from those in float64, relative to their size."""

    def together(arrays: Any) -> np.ndarray:
        return np.concatenate(
            [np.ravel(np.asarray(a, np.float64)) for a in jax.tree.leaves(arrays)]
        )

    pairs = {
        "outputs": (found.outputs, truth.outputs),
        "gradients": (dict(found.gradients), dict(truth.gradients)),
    }
    return {
        kind: testing.norm_error(together(ours), together(true))
        for kind, (ours, true) in pairs.items()
    }


def measured(name: str, dtype: Any, draws: int = 1) -> list[dict[str, Any]]:
    """One row per strategy and block count."""
    if jnp.dtype(dtype).name in testing.HALF_PRECISION:
        return measured_in_half_precision(name, dtype, draws)
    call = training_call(name, dtype)
    arguments = call.arguments()
    expected = testing.results(call, arguments)
    truth = columns_own = None
    if dtype == jnp.float32:
        truth = testing.results(training_call(name, jnp.float64), widened(arguments))
        columns_own = largest_error(expected, truth)

    def errors(fun: Any) -> dict[str, Any]:
        found = testing.results(fun, arguments)
        own = largest_error(found, truth) if truth else None
        return {"error": largest_error(found, expected), "own_error": own}

    rows = each_run(call, {"model": name, "dtype": jnp.dtype(dtype).name}, errors)
    return [{**row, "columns_own_error": columns_own} for row in rows]


def measured_in_half_precision(name: str, dtype: Any, draws: int) -> list[dict[str, Any]]:
    """One row per strategy and block count; distances from float64."""
    call = training_call(name, dtype, num_classes=MANY_CLASSES)
    precise = training_call(name, jnp.float64, num_classes=MANY_CLASSES)
    arguments = [call.arguments(seed) for seed in range(1, 1 + draws)]
    truths = [testing.results(precise, widened(own)) for own in arguments]

    def away(fun: Any) -> dict[str, float]:
        pairs = zip(arguments, truths, strict=True)
        found = [distances(testing.results(fun, own), truth) for own, truth in pairs]
        return {kind: float(np.sqrt(np.mean([d[kind] ** 2 for d in found]))) for kind in found[0]}

    described = {"model": name, "dtype": jnp.dtype(dtype).name, "draws": draws}
    rows = each_run(call, described, lambda fun: {"distances": away(fun)})
    columns = away(call)
    return [{**row, "columns_distances": columns} for row in rows]


def each_run(
    call: Any, described: dict[str, Any], measure: Callable[[Any], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What is measured of a call under every strategy and block count."""
    rows = []
    for strategy, counts in RUNS:
        for num_blocks in counts:
            row = {**described, "strategy": strategy, "num_blocks": num_blocks}
            fun = lrjax.rowwise(call, in_axes=IN_AXES, num_blocks=num_blocks, strategy=strategy)
            try:
                row |= measure(fun)
            except Exception as failure:  # a table of what works says what does not
                row["failure"] = f"{type(failure).__name__}: {failure}".splitlines()[0]
            rows.append(row)
            print(row, flush=True)
    return rows


def widened(arguments: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), arguments)


def table(rows: Sequence[dict[str, Any]]) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    header = ["model", "dtype", "strategy", "blocks", "largest error"]
    header += ["rows from float64", "column from float64"]
    cells = [
        [
            row["model"],
            row["dtype"],
            row["strategy"],
            row["num_blocks"],
            row.get("failure") or number(row["error"]),
            number(row.get("own_error")),
            number(row["columns_own_error"]),
        ]
        for row in rows
    ]
    return report.markdown_table(header, cells)


def half_precision_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["model", "dtype", "strategy", "blocks", "draws"]
    for kind in ("outputs", "gradients"):
        header += [f"{kind}: rows", "column", "ratio"]
    cells = []
    for row in rows:
        cell = [row["model"], row["dtype"], row["strategy"], row["num_blocks"], row.get("draws", 1)]
        if "failure" in row:
            cell += [row["failure"], *[""] * 5]
        else:
            for kind in ("outputs", "gradients"):
                ours, own = row["distances"][kind], row["columns_distances"][kind]
                cell += [f"{ours:.2e}", f"{own:.2e}", f"{ours / own:.2f}"]
        cells.append(cell)
    return report.markdown_table(header, cells)


def document(rows: Sequence[dict[str, Any]], version: str) -> str:
    is_half = [row["dtype"] in testing.HALF_PRECISION for row in rows]
    half = [row for row, yes in zip(rows, is_half, strict=True) if yes]
    other = [row for row, yes in zip(rows, is_half, strict=True) if not yes]
    text = f"# Models by rows against column\n\nCPU, jax {version}\n\n{table(other)}\n"
    if half:
        text += f"\n## Half precision: distance from float64\n\n{half_precision_table(half)}\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float64", "float32"])
    parser.add_argument("--draws", type=int, default=1, help="draws of images, in half precision")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    rows = [
        row
        for dtype in options.dtypes
        for name in options.models
        for row in measured(name, jnp.dtype(dtype).type, options.draws)
    ]
    path = report.RESULTS / "model_exactness.json"
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    measured_now = {(row["model"], row["dtype"]) for row in rows}
    rows += [row for row in earlier if (row["model"], row["dtype"]) not in measured_now]
    rows.sort(key=lambda row: (DTYPES.index(row["dtype"]), list(MODELS).index(row["model"])))
    environment = report.environment()
    report.write_json(path, {"environment": environment, "rows": rows})
    text = document(rows, environment["jax"])
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
