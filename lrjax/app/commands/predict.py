"""`lrjax predict`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lrjax.app.commands import options
from lrjax.app.commands.console import FAILED, app, stop
from lrjax.app.commands.evaluate import Batch, Run, Step, note


@app.command()
def predict(
    run: Run,
    images: Annotated[list[Path], typer.Argument(help="Image files, or directories of them.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory for masks, where the network labels pixels.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace masks that --out holds.")
    ] = False,
    step: Step = None,
    batch: Batch = None,
    devices: options.Devices = None,
) -> None:
    """The class of each image as a line of JSON; masks as PNG where pixels have classes.

    An image that cannot be read has a line with an error, and the command ends with status 1.
    """
    from lrjax.app import using

    failed = False
    try:
        lines = using.predict(
            run,
            images,
            out=out,
            overwrite=overwrite,
            step=step,
            batch=batch,
            devices=devices or 1,
            note=note,
        )
        for line in lines:
            failed |= "error" in line
            typer.echo(json.dumps(line))
    except (ValueError, OSError, ImportError) as error:
        stop(error)
    if failed:
        raise typer.Exit(FAILED)
