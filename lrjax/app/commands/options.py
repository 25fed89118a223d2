"""Options that several subcommands share, read and checked."""

from typing import Annotated, Any

import typer

from lrjax.app.commands.console import console

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
NumBlocks = Annotated[
    str | None, typer.Option(help="Row blocks: a number, or one per segment, such as 8,4.")
]
Cuts = Annotated[
    str | None, typer.Option(help="Cut into segments at these values, such as pool2,pool4.")
]
Target = Annotated[
    str | None, typer.Option(help="The device, present or not; default: the one at hand.")
]


def numbers_of(text: str) -> list[int] | None:
    """Whole numbers with commas between them; None where there are others."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        return None


def strategy_of(name: str, num_blocks: str | None, cuts: str | None, micro_batches: int) -> Any:
    from lrjax.app import training

    return training.Strategy(
        name,
        training.parse_num_blocks(num_blocks) if num_blocks else None,
        tuple(cuts.split(",")) if cuts else (),
        micro_batches,
    )


def check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: got {count}; use 1 or more")


def source_of(
    model: str,
    data: str,
    image_size: str | None,
    fit: str,
    digits: str,
    num_images: int,
    seed: int,
) -> Any:
    """The images, with labels of the kind that the model learns from."""
    from lrjax.app.data import DigitPixels, ImageFolder, ScatteredDigits
    from lrjax.models import registry

    labels_pixels = registry.network(model).labels_pixels
    size = size_of(image_size) if image_size else None
    if data == "digits":
        canvases = ScatteredDigits(
            size or (512, 512), num_images=num_images, seed=seed, classes=_digit_classes(digits)
        )
        return DigitPixels(canvases) if labels_pixels else canvases
    if labels_pixels:
        raise ValueError(
            f"data: {model} needs a label for every pixel and a folder has one per image; use "
            "--data digits, or another model"
        )
    with console.status(f"checking the images in {data}"):
        return ImageFolder(data, image_size=size, fit=fit)  # type: ignore[arg-type]  # checked there


def size_of(text: str, name: str = "image-size") -> tuple[int, int]:
    numbers = numbers_of(text.lower().replace("x", ",")) or []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError(f"{name}: got {text!r}; use N or HEIGHTxWIDTH, such as 512 or 512x768")
    return numbers[0], numbers[-1]


def _digit_classes(text: str) -> list[int]:
    found = numbers_of(text)
    if found is None:
        raise ValueError(f"digits: got {text!r}; use digits with commas, such as 0,1,7")
    return found


def network_of(model: str, num_classes: int, width: float, dtype: str, **settings: Any) -> Any:
    import jax.numpy as jnp

    from lrjax.models import registry

    dtypes = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"dtype: got {dtype!r}; use {' or '.join(dtypes)}")
    return registry.build(
        model, num_classes=num_classes, width=width, dtype=dtypes[dtype], **settings
    )


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
    from lrjax.app import profiling
    from lrjax.models import registry

    numbers = profiling.dtype_of(dtype)
    network = network_of(model, 1000, width, numbers.name, head=head, norm=norm)
    size = size_of(image, "image")
    check_counts(batch=batch)
    return {
        "network": network,
        "image": size,
        "batch": batch,
        "dtype": numbers,
        "labels_pixels": registry.network(model).labels_pixels,
    }


def optimizer_of(name: str, learning_rate: float) -> Any:
    import optax

    if not learning_rate > 0:
        raise ValueError(f"lr: got {learning_rate}; use a positive number")
    if name == "sgd":
        return optax.sgd(learning_rate, momentum=0.9)
    if name == "adam":
        return optax.adam(learning_rate)
    raise ValueError(f"optimizer: got {name!r}; use sgd or adam")
