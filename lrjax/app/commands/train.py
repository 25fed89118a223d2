"""`lrjax train`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lrjax.app.commands import options
from lrjax.app.commands.console import FAILED, app, console, escaped, stop

Data = Annotated[
    str, typer.Option(help='Folder with one directory of images per class, or "digits" (built in).')
]
ImageSize = Annotated[
    str | None,
    typer.Option(help="N or HEIGHTxWIDTH. Default: 512 for digits, else the images' own."),
]
Fit = Annotated[
    str, typer.Option(help="Folder images of another size: native (crop and pad) or resize.")
]
Digits = Annotated[str, typer.Option(help="Which digits are the classes of the built-in data.")]
Model = Annotated[
    str,
    typer.Option(
        help="Network: vgg16, resnet18, resnet34, resnet50, resnet101, convnext_tiny, "
        "mobilenet_v2, efficientnet_b0, densenet121, or unet, which labels every pixel."
    ),
]
Norm = Annotated[
    str | None, typer.Option(help="Normalisation of the others: batch, frozen, group or none.")
]
Dtype = Annotated[str, typer.Option(help="Of the computation: float32 or bfloat16.")]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Directory for metrics, plot and parameters.")],
    data: Data = "digits",
    image_size: ImageSize = None,
    fit: Fit = "native",
    digits: Digits = "0,1,2,3,4,5,6,7,8,9",
    num_images: Annotated[int, typer.Option(help="Canvases of the built-in data.")] = 1024,
    model: Model = "vgg16",
    width: options.Width = 1.0,
    head: Annotated[str | None, typer.Option(help="Of vgg16: gap or dense. Default: gap.")] = None,
    norm: Norm = None,
    dtype: Dtype = "float32",
    strategy: options.Strategy = "stream",
    num_blocks: options.NumBlocks = None,
    cuts: options.Cuts = None,
    micro_batches: options.MicroBatches = 1,
    batch: Annotated[int, typer.Option(help="Images per step.")] = 2,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="Let the classes take turns within a batch.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 20,
    optimizer: Annotated[str, typer.Option(help="sgd (momentum 0.9) or adam.")] = "sgd",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of parameters, data and dropout.")] = 0,
    check: Annotated[
        bool, typer.Option("--check", help="Only look whether everything fits; train nothing.")
    ] = False,
) -> None:
    """Train a network, and write losses, step times, peak memory, a plot and the parameters.

    Memory is measured two ways: what XLA plans for the compiled step, and how much the process
    grows while it trains.
    """
    given = {name: value for name, value in locals().items() if name not in ("out", "check")}
    # Imported here so that `--help` and a mistyped option do not wait for JAX.
    from lrjax.app import report, training

    try:
        report.check_writable(out)
        chosen = options.strategy_of(strategy, num_blocks, cuts, micro_batches)
        source = options.source_of(model, data, image_size, fit, digits, num_images, seed)
        classes = len(source.class_names)
        network = options.network_of(model, classes, width, dtype, head=head, norm=norm)
        update = options.optimizer_of(optimizer, lr)
        options.check_counts(steps=steps, batch=batch)
        if check:
            training.check_step(network, source, chosen, batch_size=batch)
            return
        skipped = [str(file) for file in getattr(source, "skipped", ())]
        _announce(source, skipped)
        with console.status(f"{chosen.label}: compiling"):
            compiled = training.compile_step(
                network, source, update, chosen, batch_size=batch, seed=seed
            )
    except (ValueError, TypeError) as error:
        stop(error)
    run = {"batch_size": batch, "steps": steps, "seed": seed, "balanced": balanced}
    try:
        result = _trained(chosen.label, compiled, source, run)
    except training.DivergedError as error:
        stop(error, FAILED)
    report.write_run(out, result, report.metrics_of(result, chosen, given, skipped))
    _print_result(chosen.label, result, out)


def _trained(label: str, compiled: Any, source: Any, run: dict[str, Any]) -> Any:
    """``training.train`` beside a progress bar."""
    from lrjax.app import training

    with _progress() as progress:
        task = progress.add_task(label, total=run["steps"], loss="", seconds="")

        def on_step(step: int, loss: float, seconds: float) -> None:
            progress.update(
                task, completed=step, loss=f"loss {loss:.4f}", seconds=f"{seconds:.2f} s/step"
            )

        return training.train(compiled, source, on_step=on_step, **run)


def _print_result(label: str, result: Any, out: Path) -> None:
    from lrjax.app import report

    console.print(
        f"{label}: loss {result.losses[0]:.4f} -> {result.losses[-1]:.4f}, "
        f"{result.seconds_per_step:.3f} s/step, compiled in {result.compile_seconds:.1f} s; "
        f"peak memory: XLA {result.memory.xla_peak / report.MIB:.0f} MiB, "
        f"RSS {result.memory.rss / report.MIB:.0f} MiB; written to {out}",
        soft_wrap=True,
        highlight=False,
    )


def _announce(source: Any, skipped: list[str]) -> None:
    height, width, _ = source.image_shape
    console.print(
        f"{len(source)} images of {height}x{width}, {len(source.class_names)} classes",
        highlight=False,
    )
    if skipped:
        console.print(f"[yellow]{len(skipped)} unreadable files left out:[/]")
        for file in skipped:
            console.print(f"  {escaped(file)}", soft_wrap=True, highlight=False)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[seconds]}"),
        TimeElapsedColumn(),
        console=console,
    )
