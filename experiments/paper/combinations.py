"""Rows together with what else saves memory: peak of a whole training step, and exactness.

    python -m experiments.paper.combinations --quick
    python -m experiments.paper.combinations --resume

A training step of VGG-16 (loss, gradient, update; parameters and optimizer state donated) by column
and by stream, alone and with: cuts (checkpoints at the pools), maps between cuts on the host,
micro-batches (gradient accumulation), bfloat16, and optimizers of little state. Exactness: the same
step of a small VGG-16 in float64 on this CPU; the largest difference of a new parameter by rows
from the same step by column, over the largest update of its array (bfloat16: see ``difference``).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import lrjax
import lrjax.linen
from experiments import report
from experiments.gradcheck import excess_error, max_error
from experiments.paper import record
from experiments.paper.programs import (
    IN_AXES,
    MIB,
    NETWORKS,
    arguments_of,
    loss_of,
    quick_jit,
)
from lrjax import memory, models
from lrjax.strategies import MicroBatches

PARTS = 4
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: optax.adam(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3),
    "sm3": lambda: optax.sm3(1e-3),
    "lion": lambda: optax.lion(1e-4),
    "sgd": lambda: optax.sgd(1e-3),
}
FULL = {"side": 1024, "batch": 4, "rows": 32, "width": 1.0}
QUICK = {"side": 256, "batch": 4, "rows": 32, "width": 0.25}
CHECKED = {"side": 64, "batch": 4, "rows": 16, "width": 1 / 16}


@dataclasses.dataclass(frozen=True)
class Combination:
    """What a training step is made of beside its order; as columns and by rows."""

    optimizer: str = "adam"
    dtype: str = "float32"
    has_cuts: bool = False
    offload: bool = False
    parts: int = 1


COMBINATIONS = {
    "alone, adam": Combination(),
    "checkpoints at the pools": Combination(has_cuts=True),
    "maps at the pools on the host": Combination(has_cuts=True, offload=True),
    f"{PARTS} micro-batches": Combination(parts=PARTS),
    "bfloat16": Combination(dtype="bfloat16"),
    **{name: Combination(optimizer=name) for name in OPTIMIZERS if name != "adam"},
    "bfloat16, adafactor, on the host": Combination("adafactor", "bfloat16", True, True),
}


def loss_by(module: Any, way: str, combination: Combination, num_blocks: int) -> Callable[..., Any]:
    """The loss by column or by stream, in combination."""
    strategy: Any = "stream" if way == "stream" else "column"
    if way == "column" and combination.has_cuts:
        strategy = "checkpoint"
    blocks = num_blocks if way == "stream" else None
    if combination.parts > 1:  # of the network: the mean loss mixes the images of a batch
        parts = MicroBatches(strategy, combination.parts)
        by_parts = lrjax.linen.rowwise(module, in_axes=1, strategy=parts, num_blocks=blocks)
        return loss_of(by_parts)
    if way == "column" and strategy == "column":
        return loss_of(module)
    return lrjax.rowwise(
        loss_of(module),
        in_axes=IN_AXES,
        strategy=strategy,
        num_blocks=blocks,
        cuts=NETWORKS["vgg16"].cuts if combination.has_cuts else (),
        offload=combination.offload,
    )


def step_of(
    way: str, combination: Combination, module: Any, num_blocks: int
) -> tuple[Callable[..., Any], optax.GradientTransformation]:
    """A training step ``step(params, state, images, labels)``, and its optimizer."""
    optimizer = OPTIMIZERS[combination.optimizer]()
    loss = loss_by(module, way, combination, num_blocks)

    def step(params: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        gradients = jax.grad(loss, has_aux=True)(params, images, labels, {})[0]
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step, optimizer


def peak(way: str, combination: Combination, size: dict[str, Any], target: str) -> dict[str, Any]:
    """XLA's peak of a training step, on the device and of the host."""
    module = models.VGG16(head="gap", width=size["width"], dtype=jnp.dtype(combination.dtype))
    step, optimizer = step_of(way, combination, module, size["side"] // size["rows"])
    shape = (size["batch"], size["side"], size["side"], 3)
    images = jax.ShapeDtypeStruct(shape, jnp.dtype(combination.dtype))
    params, images, labels, _ = arguments_of(module, images)
    state = jax.eval_shape(optimizer.init, params)
    compiled = memory.compile_for(
        step, params, state, images, labels, target=target, donate_argnums=(0, 1)
    )
    return {"peak_bytes": memory.peak_bytes(compiled), "host_bytes": memory.host_bytes(compiled)}


def difference(combination: Combination) -> float:
    """Of new parameters by rows from those by column, over the update; a small network, here.

    In bfloat16: how far the update by rows is from column's in float32, over how far column's own
    is, all parameters as one vector (a gradient about zero has either sign, which some optimizers
    make a whole step of, so that a single bias may be much further).
    """
    is_half = combination.dtype == "bfloat16"
    dtype = jnp.dtype(combination.dtype if is_half else "float64")
    with jax.enable_x64(not is_half):
        size = CHECKED
        wide = jnp.dtype("float32" if is_half else "float64")
        module = models.VGG16(
            num_classes=10, head="gap", width=size["width"], dtype=dtype, param_dtype=wide
        )
        shape = (size["batch"], size["side"], size["side"], 3)
        images = jax.random.normal(jax.random.key(0), shape, dtype)
        params = jax.jit(module.init)(jax.random.key(1), images)["params"]
        labels = jnp.arange(size["batch"])
        moved = {}
        exact = module.clone(dtype=wide)
        for way in ("column", "stream", *(["exact"] if is_half else [])):
            runs, order = (exact, "column") if way == "exact" else (module, way)
            step, optimizer = step_of(order, combination, runs, size["side"] // size["rows"])
            new, _ = quick_jit(step)(params, optimizer.init(params), images, labels)
            moved[way] = jax.tree.map(jnp.subtract, new, params)
        if is_half:
            whole = {way: ravel_pytree(update)[0] for way, update in moved.items()}
            return excess_error(whole["stream"], whole["column"], whole["exact"])
        return max_error(moved["stream"], moved["column"])


def measure(settings: record.Settings, known: record.Results, save: record.Save) -> record.Results:
    size = QUICK if settings.quick else FULL
    results = {"combinations": {}, **known, "size": size}
    for name, combination in COMBINATIONS.items():
        own = results["combinations"].setdefault(name, {})
        for way in ("column", "stream"):
            if way not in own:
                own[way] = peak(way, combination, size, settings.target)
        if "difference" not in own:
            own["difference"] = difference(combination)
        mib = [f"{own[way]['peak_bytes'] / MIB:,.0f} MiB" for way in ("column", "stream")]
        print(name, *mib, f"{own['difference']:.1e}", flush=True)
        save(results)
    return results


def table(found: record.Record) -> str:
    results = found["results"]
    size, rows = results["size"], []
    for name, own in results["combinations"].items():
        column, stream = own["column"], own["stream"]
        rows.append(
            [
                name,
                *(report.mib(one["peak_bytes"]) for one in (column, stream)),
                report.ratio(stream["peak_bytes"] / column["peak_bytes"]),
                *(report.mib(one["host_bytes"]) for one in (column, stream)),
                _difference(COMBINATIONS[name], own["difference"]),
            ]
        )
    header = ["with", "column MiB", "stream MiB", "ratio", "column, host", "stream, host"]
    return "\n\n".join(
        [
            "# Rows together with what else saves memory",
            f"VGG-16, training step, {size['batch']} images of {size['side']}x{size['side']}, "
            f"float32 unless said, channels times {size['width']:g}; stream by {size['rows']} "
            "rows. "
            "Cuts under column are checkpoints. XLA's peak, parameters and optimizer state "
            "included; largest difference of an update by rows from the same by column: float64, "
            "a small network. In bfloat16: the distance by rows from float32, over column's own.",
            report.markdown_table([*header, "difference"], rows),
        ]
    )


def _difference(combination: Combination, value: float) -> str:
    if combination.dtype == "bfloat16":
        return f"{value:.2f} of column's own"
    return f"{value:.1e}"


def draw(found: record.Record, figure: Any) -> None:
    figure.set_size_inches(8, 5)
    axes = figure.add_subplot()
    combinations = found["results"]["combinations"]
    for offset, way in enumerate(("column", "stream")):
        places = [i + 0.4 * offset - 0.2 for i in range(len(combinations))]
        peaks = [own[way]["peak_bytes"] / MIB for own in combinations.values()]
        axes.barh(places, peaks, height=0.38, label=way)
    axes.set_yticks(range(len(combinations)), list(combinations))
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="peak of a training step, MiB", title="VGG-16")
    axes.legend()


EXPERIMENT = record.Experiment("combinations", measure, table, draw)

if __name__ == "__main__":
    record.main(EXPERIMENT, __doc__)
