"""`lrjax memory`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lrjax.app.commands import options
from lrjax.app.commands.console import DOES_NOT_FIT, app, console, stop


@app.command()
def memory(
    function: Annotated[
        str | None, typer.Argument(metavar="[MODULE:FUNCTION]", help="What to profile.")
    ] = None,
    args: Annotated[
        str,
        typer.Option(help='Its arguments, "f32[8,128] bf16[3]", or JSON for pytrees of such.'),
    ] = "",
    model: Annotated[
        str | None, typer.Option(help="Instead: loss and gradient of a network, such as vgg16.")
    ] = None,
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
    list_targets: Annotated[
        bool, typer.Option("--list-targets", help="List the devices and what they need.")
    ] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the timeline.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the timeline as a page.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the whole profile.")] = None,
    top: Annotated[int, typer.Option(help="Rows of each table.")] = 12,
) -> None:
    """What a program needs of a device's memory, and what for; nothing runs.

    Ends with status 3 where it does not fit.
    """
    from lrjax import files, memory
    from lrjax.app import profiling
    from lrjax.memory import text
    from lrjax.models import registry

    wide = Console(width=max(console.width, 150))
    if list_targets:
        table = text.new_table("target", "GiB", "device", "to install")
        for row in memory.targets():
            needed = "" if row.is_installed else row.install.replace("[", r"\[")
            table.add_row(row.name, f"{row.memory_bytes / 2**30:,.1f}", row.description, needed)
        wide.print(table)
        return
    try:
        profiling.check_target(target)
    except (ValueError, ImportError) as error:
        stop(error)
    try:
        for path in filter(None, (png, html, json)):
            files.check_writable(path)
        if (function is None) == (model is None):
            raise ValueError("give either MODULE:FUNCTION or --model")
        if function is not None:
            program = profiling.function_program(function, args)
        else:
            numbers = profiling.dtype_of(dtype)
            network = options.network_of(
                str(model), 1000, width, numbers.name, head=head, norm=norm
            )
            chosen = options.strategy_of(strategy, num_blocks, cuts, micro_batches)
            size = options.size_of(image, "image")
            if batch < 1:
                raise ValueError(f"batch: got {batch}; use 1 or more")
            pixels = registry.network(str(model)).labels_pixels
            program = profiling.gradient_program(
                network, chosen, size, batch, numbers, labels_pixels=pixels
            )
    except (ValueError, OSError) as error:
        stop(error)
    try:
        profile = memory.profile(program.fun, *program.args, target=target)
    except memory.DoesNotFitError as error:
        stop(error, DOES_NOT_FIT)
    wide.print(*text.profile_tables(profile, top), sep="\n")
    wide.print(profiling.verdict(profile), soft_wrap=True, highlight=False)
    if png is not None:
        profile.save_png(png)
    if html is not None:
        profile.save_html(html)
    if json is not None:
        files.write_whole(json, profile.to_json())
    if profile.fits is False:
        raise typer.Exit(DOES_NOT_FIT)
