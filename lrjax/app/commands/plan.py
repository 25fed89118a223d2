"""`lrjax plan`."""

import functools
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lrjax.app.commands import options
from lrjax.app.commands.console import DOES_NOT_FIT, app, console, stop


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="The network, such as vgg16; see `lrjax train`.")],
    target: options.Target = None,
    devices: options.TargetDevices = 1,
    budget: Annotated[
        str | None,
        typer.Option(help="Of a device: 8GiB, bytes, or 0.5 of its memory. Default: all of it."),
    ] = None,
    image: options.Image = "1024",
    batch: options.Batch = 1,
    dtype: options.Dtype = "f32",
    width: options.Width = 1.0,
    head: options.Head = None,
    norm: options.Norm = None,
    maximise: Annotated[
        str | None, typer.Option(help="Ask for the largest image (its side) or batch that fits.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan as JSON.")] = None,
    frontier: Annotated[
        Path | None, typer.Option(help="Draw memory against operations, from column to the least.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Points of the frontier.")] = 8,
    timed: Annotated[
        bool, typer.Option("--timed", help="Measure the frontier's times on this device.")
    ] = False,
) -> None:
    """The fastest plan of a training step within a memory budget, proved by XLA.

    With --maximise, the largest square image or batch that fits by column, the best checkpoints and
    lrjax. Ends with status 3 where nothing fits.
    """
    from lrjax.app import budget as budgets
    from lrjax.memory import DoesNotFitError

    wide = Console(width=max(console.width, 150))
    try:
        _check(target, maximise, save, frontier, timed, devices)
        step = options.training_step(model, image, batch, dtype, width, head, norm)
        amount = 1.0 if budget is None else budgets.amount_of(budget)
        with console.status("planning") as status:
            tell = functools.partial(_tell, status)
            if maximise is not None:
                _print_largest(step, maximise, amount, target, devices, tell, wide)
                return
            call = {"target": target, "on_progress": tell}
            curve = _curve(step, devices, steps=steps, timed=timed, **call) if frontier else None
            made = _planned(step, amount, devices, **call)
            if curve is not None:
                curve.save_png(frontier, f"{model}, {image}, batch {batch}, {dtype}")
                wide.print(str(curve), highlight=False)
    except DoesNotFitError as error:
        stop(error, DOES_NOT_FIT)
    except (ValueError, ImportError, OSError) as error:
        stop(error)
    wide.print(str(made), highlight=False)
    if save is not None:
        made.save(save)


def _check(
    target: str | None,
    maximise: str | None,
    save: Path | None,
    frontier: Path | None,
    timed: bool,
    devices: int,
) -> None:
    from lrjax import files
    from lrjax.app import profiling

    options.check_counts(devices=devices)
    profiling.check_target(target, devices)
    for path in filter(None, (save, frontier)):
        files.check_writable(path)
    if timed and devices > 1:
        raise ValueError("timed: times are measured on one device; leave --devices or --timed out")
    if timed and frontier is None:
        raise ValueError("timed: times belong to the frontier; give --frontier FILE too")
    if maximise is not None and (save or frontier):
        raise ValueError(
            "maximise: it answers with a table alone; ask for --save or --frontier without "
            "--maximise, at the size it found"
        )


def _planned(step: dict[str, Any], amount: str | float | int, devices: int, **call: Any) -> Any:
    import lrjax
    from lrjax.app import planning

    fun, args, in_axes = planning.training_call(**step)
    mesh = planning.mesh_of(devices)
    return lrjax.plan(fun, *args, in_axes=in_axes, budget=amount, wrt=0, mesh=mesh, **call)


def _curve(step: dict[str, Any], devices: int, **call: Any) -> Any:
    import lrjax
    from lrjax.app import planning

    fun, args, in_axes = planning.training_call(**step)
    mesh = planning.mesh_of(devices)
    return lrjax.frontier(fun, *args, in_axes=in_axes, wrt=0, mesh=mesh, **call)


def _tell(status: Any, progress: Any) -> None:
    if not progress.strategies:
        status.update(f"{progress.doing} ...")
        return
    status.update(f"{progress.doing} {progress.compilations}: {_told(progress)}")
    if progress.verified_bytes is not None:
        console.print(_told(progress), highlight=False)


def _told(progress: Any) -> str:
    told = f"predicted {progress.predicted_bytes / 2**20:,.0f} MiB"
    told += f" and {progress.predicted_seconds * 1e3:,.2f} ms"
    if progress.verified_bytes is not None:
        told += f", XLA {progress.verified_bytes / 2**20:,.0f} MiB"
    if progress.roofline_seconds is not None:
        told += f" and {progress.roofline_seconds * 1e3:,.2f} ms"
    return f"{' + '.join(progress.strategies)}: {told}"


def _print_largest(
    step: dict[str, Any],
    maximise: str,
    amount: str | float | int,
    target: str | None,
    devices: int,
    tell: Any,
    wide: Console,
) -> None:
    from lrjax.app import planning
    from lrjax.memory import text

    answers = planning.largest_by_method(
        **step, maximise=maximise, budget=amount, target=target, devices=devices, on_progress=tell
    )
    name = "side" if maximise == "image" else "batch"
    table = text.new_table("method", name, "peak MiB", "operations", "compilations", "segments")
    for a in answers:
        table.add_row(
            a.method, f"{a.size:,}", a.peak_mib, f"{a.operations:.3f}", str(a.compilations),
            a.strategies,
        )  # fmt: skip
    wide.print(table)
