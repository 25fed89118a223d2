"""`lrjax memory`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lrjax.app.commands import options
from lrjax.app.commands.console import DOES_NOT_FIT, FAILED, app, console, stop

Function = Annotated[
    str | None, typer.Argument(metavar="[MODULE:FUNCTION]", help="What to profile.")
]
Arguments = Annotated[
    str, typer.Option(help='Its arguments, "f32[8,128] bf16[3]", or JSON for pytrees of such.')
]
Model = Annotated[
    str | None, typer.Option(help="Instead: loss and gradient of a network, such as vgg16.")
]
ListTargets = Annotated[
    bool, typer.Option("--list-targets", help="List the devices and what they need.")
]
Time = Annotated[bool, typer.Option("--time", help="Step time too, by a roofline of the program.")]


# What describes the network of --model: a function has its own.
MODEL_OPTIONS = (
    *("image", "batch", "dtype", "width", "head", "norm"),
    *("strategy", "num_blocks", "cuts", "micro_batches"),
)


@app.command()
def memory(
    context: typer.Context,
    function: Function = None,
    args: Arguments = "",
    model: Model = None,
    image: options.Image = "1024",
    batch: options.Batch = 1,
    dtype: options.Dtype = "f32",
    width: options.Width = 1.0,
    head: options.Head = None,
    norm: options.Norm = None,
    strategy: options.Strategy = "column",
    num_blocks: options.NumBlocks = None,
    cuts: options.Cuts = None,
    micro_batches: options.MicroBatches = 1,
    target: options.Target = None,
    devices: options.TargetDevices = 1,
    list_targets: ListTargets = False,
    png: Annotated[Path | None, typer.Option(help="Draw the timeline.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the timeline as a page.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the whole profile.")] = None,
    time: Time = False,
    top: Annotated[int, typer.Option(help="Rows of each table.")] = 12,
) -> None:
    """What a program needs of a device's memory, and what for; nothing runs.

    Ends with status 3 where it does not fit.
    """
    from lrjax import memory
    from lrjax.app import building, profiling
    from lrjax.memory import text

    wide = Console(width=max(console.width, 150))
    if list_targets:
        return wide.print(_targets())
    with _stops():
        options.check_counts(devices=devices, top=top)
        profiling.check_target(target, devices)
        _check_files(png, html, json)
        _check_program(function, model, devices, _given(context))
        if function is not None:
            program = profiling.function_program(function, args)
        else:
            how = building.strategy_of(strategy, num_blocks, cuts, micro_batches)
            step = options.training_step(str(model), image, batch, dtype, width, head, norm)
            program = profiling.gradient_program(
                strategy=how, target=target, devices=devices, **step
            )
        with profiling.users_errors() if function is not None else nullcontext():
            roofline = _roofline(program, target) if time else None
            profile = memory.profile(program.fun, *program.args, target=target, **program.mesh)
    wide.print(*text.profile_tables(profile, top), *profile.exchanges(), sep="\n")
    if roofline is not None:
        wide.print(str(roofline), soft_wrap=True, highlight=False)
    wide.print(profiling.verdict(profile), soft_wrap=True, highlight=False)
    _save(profile, roofline, png, html, json)
    if profile.fits is False:
        raise typer.Exit(DOES_NOT_FIT)


@contextmanager
def _stops() -> Iterator[None]:
    """Turns what goes wrong into a message and a status; a user's own error is theirs."""
    from lrjax import memory
    from lrjax.app import profiling

    try:
        yield
    except memory.DoesNotFitError as error:
        stop(error, DOES_NOT_FIT)
    except profiling.UsersError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(FAILED) from None
    except (ValueError, OSError, ImportError) as error:
        stop(error)


def _given(context: typer.Context) -> set[str]:
    """The parameters that the command line has."""
    return {
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }


def _check_program(function: str | None, model: str | None, devices: int, given: set[str]) -> None:
    if (function is None) == (model is None):
        raise ValueError("give either MODULE:FUNCTION or --model")
    if model is not None and "args" in given:
        raise ValueError("args: --model has arguments of its own; leave them out, or use --image")
    own = [name for name in MODEL_OPTIONS if name in given]
    if function is not None and own:
        listed = ", ".join("--" + name.replace("_", "-") for name in own)
        raise ValueError(
            f"{own[0]}: got {listed}, which only --model takes; a function runs as it is written: "
            "leave that out, or give --model"
        )
    if function is not None and devices > 1:
        raise ValueError(
            "devices: a function does not say which of its arguments carry rows; give --model, or "
            "lrjax.memory.profile(..., mesh_shape=..., in_specs=...) from Python"
        )


def _roofline(program: Any, target: str | None) -> Any:
    from lrjax import roofline

    return roofline.estimate(program.fun, *program.args, target=target, **program.mesh)


def _targets() -> Any:
    """The table of --list-targets."""
    from lrjax import memory
    from lrjax.memory import text

    table = text.new_table("target", "GiB", "device", "to install")
    for row in memory.targets():
        needed = "" if row.is_installed else row.install.replace("[", r"\[")
        table.add_row(row.name, f"{row.memory_bytes / 2**30:,.1f}", row.description, needed)
    return table


def _check_files(*paths: Path | None) -> None:
    from lrjax import files

    for path in filter(None, paths):
        files.check_writable(path)


def _save(
    profile: Any, step_time: Any, png: Path | None, html: Path | None, json: Path | None
) -> None:
    from lrjax import files

    if png is not None:
        profile.save_png(png, step_time=step_time)
    if html is not None:
        profile.save_html(html, step_time=step_time)
    if json is not None:
        files.write_whole(json, profile.to_json())
