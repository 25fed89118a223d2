"""Options that several subcommands share, read and checked."""

from typing import Annotated, Any

import typer

Image = Annotated[str, typer.Option(help="N or HEIGHTxWIDTH.")]
Batch = Annotated[int, typer.Option(help="Images at a time.")]
Dtype = Annotated[str, typer.Option(help="Of images and computation.")]
Width = Annotated[float, typer.Option(help="Multiplier of the network's channels.")]
Head = Annotated[str | None, typer.Option(help="VGG-16's: gap or dense.")]
Norm = Annotated[
    str | None, typer.Option(help="Normalisation: batch, block, frozen, group or none.")
]
# Names are lrjax's, which is imported, with JAX, no earlier than a command runs.
Strategy = Annotated[
    str, typer.Option(help="A strategy of lrjax's, such as stream; an unknown name lists them all.")
]
MicroBatches = Annotated[int, typer.Option(help="Parts of the batch that run one after the other.")]
Devices = Annotated[
    int | None, typer.Option(help="How many devices share the rows of each image. Default: 1.")
]
NumBlocks = Annotated[
    str | None, typer.Option(help="Row blocks: a number, or one per segment, such as 8,4.")
]
Cuts = Annotated[
    str | None, typer.Option(help="Cut into segments at these values, such as pool2,pool4.")
]
Target = Annotated[
    str | None, typer.Option(help="The device, present or not; default: the one at hand.")
]

TargetDevices = Annotated[
    int,
    typer.Option(help="Devices that share the rows of every image; figures are those of one."),
]


def check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: got {count}; use 1 or more")


def training_step(
    model: str,
    image: str,
    batch: int,
    dtype: str,
    width: float,
    head: str | None,
    norm: str | None,
) -> dict[str, Any]:
    """A network's training step on ImageNet's classes: arguments of ``planning.training_call``."""
    from lrjax.app import building, profiling
    from lrjax.app.config import ModelSection
    from lrjax.models import registry

    numbers = profiling.dtype_of(dtype)
    chosen = ModelSection(name=model, width=width, head=head, norm=norm, dtype=numbers.name)
    network = building.network_of(chosen, 1000)
    size = building.size_of(image, "image")
    check_counts(batch=batch)
    return {
        "network": network,
        "image": size,
        "batch": batch,
        "dtype": numbers,
        "labels_pixels": registry.network(model).labels_pixels,
    }
