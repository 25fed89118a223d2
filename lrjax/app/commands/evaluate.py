"""`lrjax evaluate`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lrjax.app.commands import options
from lrjax.app.commands.console import app, stop

Run = Annotated[Path, typer.Argument(help="Directory of a run of `lrjax train`.")]
Step = Annotated[int | None, typer.Option(help="Of the checkpoint. Default: the newest.")]
Batch = Annotated[int | None, typer.Option(help="Images at a time. Default: the run's.")]


@app.command()
def evaluate(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(help="Folder of labelled images. Default: what the run held out, or its own."),
    ] = None,
    step: Step = None,
    batch: Batch = None,
    devices: options.Devices = None,
) -> None:
    """Loss, accuracy and intersection over union of a checkpoint, as one line of JSON."""
    from lrjax.app import using

    try:
        found = using.evaluate(run, data, step=step, batch=batch, devices=devices or 1, note=note)
    except (ValueError, OSError, ImportError) as error:
        stop(error)
    typer.echo(json.dumps(found))


def note(text: str) -> None:
    """On stderr, as stdout is data."""
    typer.echo(text, err=True)
