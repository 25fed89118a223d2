"""Fine-tuning: what it costs to train the last stage alone.

    python -m experiments.paper.frozen --quick
    python -m experiments.paper.frozen --resume

Loss and gradient by all parameters, or by those of the last stage and the classifier. Column keeps
no maps of layers that are not trained, but makes each of them whole; stream runs frozen layers
once, and saves what the trained part reads; ``rows + column`` runs the frozen stages by
rows, and the trained one on whole maps.
"""

from collections.abc import Callable
from typing import Any

import jax

import lrjax
from experiments import report
from experiments.gradcheck import max_error
from experiments.paper import record
from experiments.paper.programs import (
    IN_AXES,
    MIB,
    NETWORKS,
    Program,
    loss_of,
    measured,
    quick_jit,
)

FULL = {"side": 2048, "blocks": 32, "width": 1.0}
QUICK = {"side": 512, "blocks": 16, "width": 0.25}
CHECKED = {"side": 64, "blocks": 4, "width": 1 / 16}
# What is trained, by the beginnings of names of layers.
TRAINED = {"vgg16": ("conv5", "classifier"), "resnet50": ("stage4", "classifier")}
WAYS = ("column", "stream", "rows + column")


def is_trained(network: str, path: tuple[Any, ...]) -> bool:
    """Whether a parameter belongs to the last stage or the classifier."""
    names = [str(getattr(key, "key", key)) for key in path]
    return any(name.startswith(TRAINED[network]) for name in names)


def separate(
    network: str, params: Any
) -> tuple[dict[str, Any], dict[str, Any], Callable[..., Any]]:
    """Trained parameters and others, by path, and what makes one tree of them again."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    trained = {
        n: leaf for n, (path, leaf) in zip(names, leaves, strict=True) if is_trained(network, path)
    }
    frozen = {n: leaf for n, (_, leaf) in zip(names, leaves, strict=True) if n not in trained}

    def together(trained: dict[str, Any], frozen: dict[str, Any]) -> Any:
        return jax.tree.unflatten(tree, [(trained | frozen)[name] for name in names])

    return trained, frozen, together


def step_of(
    program: Program, way: str, only_last: bool
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """``step(trained, frozen, images, labels, statistics)``, and shapes of its arguments."""
    params, *others = program.arguments()
    trained, frozen, together = separate(program.network, params)
    if not only_last:
        trained, frozen = trained | frozen, {}
    whole = loss_of(program.module)

    def loss(trained: Any, frozen: Any, *rest: Any) -> Any:
        return whole(together(trained, frozen), *rest)

    in_axes = (None, *IN_AXES)
    if way == "stream":
        loss = lrjax.rowwise(loss, in_axes=in_axes, num_blocks=program.num_blocks)
    elif way == "rows + column":
        cut = NETWORKS[program.network].cuts[-1:]
        loss = lrjax.rowwise(
            loss,
            in_axes=in_axes,
            cuts=cut,
            strategy=("stream", "column"),
            num_blocks=(program.num_blocks, None),
        )
    return jax.value_and_grad(loss, has_aux=True), (trained, frozen, *others)


def difference(network: str, way: str, only_last: bool) -> float:
    """Of the gradients from column's, relative; float64, a small network, on this CPU."""
    with jax.enable_x64(True):
        size = CHECKED
        program = Program(
            network, "column", 1, size["side"], size["blocks"], size["width"], "float64"
        )
        found = []
        for one in ("column", way):
            step, shapes = step_of(program, one, only_last)
            keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(shapes)))
            leaves = [_numbers(k, s) for k, s in zip(keys, jax.tree.leaves(shapes), strict=True)]
            found.append(quick_jit(step)(*jax.tree.unflatten(jax.tree.structure(shapes), leaves)))
        return max_error(found[1][1], found[0][1])


def _numbers(key: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Values that keep activations of about one; labels are zero."""
    if not jax.numpy.issubdtype(shape.dtype, jax.numpy.inexact):
        return jax.numpy.zeros(shape.shape, shape.dtype)
    scale = jax.numpy.sqrt(2 / max(1, shape.size // shape.shape[-1]))
    if len(shape.shape) < 2:
        return jax.random.uniform(key, shape.shape, jax.numpy.float64, 0.5, 1.5)
    return scale * jax.random.normal(key, shape.shape, jax.numpy.float64)


def measure(settings: record.Settings, known: record.Results, save: record.Save) -> record.Results:
    size = QUICK if settings.quick else FULL
    results = {"networks": {}, **known, "size": size}
    for network in ("vgg16",) if settings.quick else tuple(TRAINED):
        if not settings.wants(network):
            continue
        own = results["networks"].setdefault(network, {})
        for only_last in (False, True):
            for way in WAYS:
                key = f"{'last stage' if only_last else 'all'}, {way}"
                if key in own or (way == "rows + column" and not only_last):
                    continue
                program = Program(network, "column", 1, size["side"], size["blocks"], size["width"])
                step, shapes = step_of(program, way, only_last)
                own[key] = measured(step, shapes, settings.target)
                if network == "vgg16" and way != "column":
                    own[key]["difference"] = difference(network, way, only_last)
                print(network, key, f"{own[key]['peak_bytes'] / MIB:,.0f} MiB", flush=True)
                save(results)
    return results


def table(found: record.Record) -> str:
    results = found["results"]
    size, rows = results["size"], []
    for network, own in results["networks"].items():
        for name, one in own.items():
            trained, way = name.split(", ")
            base = own["all, column"]
            time = f"{one['seconds'] / base['seconds']:.2f}" if "seconds" in one else ""
            apart = f"{one['difference']:.1e}" if "difference" in one else ""
            ratio = report.ratio(one["peak_bytes"] / base["peak_bytes"])
            rows.append([network, trained, way, report.mib(one["peak_bytes"]), ratio, time, apart])
    header = ["network", "trained", "way", "peak MiB", "peak ratio", "time ratio", "difference"]
    return "\n\n".join(
        [
            "# Training the last stage alone",
            f"Loss and gradient in float32, one image of {size['side']}x{size['side']}, channels "
            f"times {size['width']:g}; rows in {size['blocks']} blocks. Ratios are to column with "
            "everything trained; time by the roofline of the compiled program, where the target is "
            "a GPU. Difference: of the gradients from column's, a small network in float64.",
            report.markdown_table(header, rows),
        ]
    )


EXPERIMENT = record.Experiment("frozen", measure, table, parts=tuple(TRAINED))

if __name__ == "__main__":
    record.main(EXPERIMENT, __doc__)
