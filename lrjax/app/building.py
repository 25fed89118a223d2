"""From a configuration to what it names: images, network, optimiser. Nothing is compiled."""

import dataclasses
import functools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax

from lrjax.app import data
from lrjax.app.config import Config, DataSection, ModelSection, StrategySection
from lrjax.app.data import ImageSource
from lrjax.app.data.sources import checksum_of_files
from lrjax.app.placement import ONE_DEVICE, Placement, planned
from lrjax.app.strategy import ROWS, Planned, Strategy, parse_num_blocks
from lrjax.models import registry
from lrjax.plan import Plan

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# What a person calls the facts that not every checkpoint has.
_LATER_FACTS = {
    "files_checksum": "the checksum of the files' names and sizes in bytes",
    "held_out_checksum": "the checksum of the held-out files' names and sizes in bytes",
}


@dataclass(frozen=True)
class Prepared:
    """All that a run is made of, checked.

    Attributes:
      config: where it comes from.
      source: images to train on.
      validation: images held out, or None.
      model: the network.
      optimizer: optax's.
      execution: how the rows run; None where a budget is to be planned for.
      steps: of training.
      skipped: files that are left out, with reasons.
      notes: what a person should know of the data.
      placement: the devices.
    """

    config: Config
    source: ImageSource
    validation: ImageSource | None
    model: nn.Module = field(repr=False)
    optimizer: optax.GradientTransformation = field(repr=False)
    execution: Strategy | Planned | None
    steps: int
    skipped: tuple[str, ...]
    notes: tuple[str, ...] = ()
    placement: Placement = ONE_DEVICE

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint must find again in the data to go on."""
        labels = np.ascontiguousarray(self.source.labels)
        held_out = self.validation
        return {
            "class_names": list(self.source.class_names),
            "image_shape": list(self.source.image_shape),
            "images": len(self.source),
            "labels_checksum": zlib.crc32(labels.tobytes()),
            "files_checksum": checksum_of_files(self.source),
            "held_out_checksum": None if held_out is None else checksum_of_files(held_out),
        }

    def difference(self, found: Mapping[str, Any]) -> str | None:
        """In which of its facts the data are not those of a checkpoint; None where they are."""
        for name, value in self.facts.items():
            # Checkpoints of earlier versions have no checksums of files.
            if found.get(name) != value and not (name in _LATER_FACTS and name not in found):
                kind = _LATER_FACTS.get(name, name)
                return f"{kind} is {value} and was {found.get(name)}"
        return None


def prepare(
    config: Config, placement: Placement = ONE_DEVICE, *, kept_plan: Path | None = None
) -> Prepared:
    """Opens the data and builds the network, the optimiser and the strategy.

    Args:
      config: the run.
      placement: its devices.
      kept_plan: the run's own copy of the plan that it is run by, which the file it was given by
        may no longer be.

    Raises:
      ValueError: something does not exist, cannot be read or does not fit; says what to do.
    """
    chosen = config.strategy
    if kept_plan is not None and chosen.plan:
        chosen = chosen.model_copy(update={"plan": str(kept_plan)})
    execution = execution_of(chosen, placement)
    registry.network(config.model.name)
    whole = source_of(config)
    source, validation = _split(config, whole)
    opened = [whole, validation]  # a part of the whole has nothing of these
    skipped = [str(file) for one in opened for file in getattr(one, "skipped", ())]
    notes = [text for one in opened for text in getattr(one, "notes", ())]
    if skipped and config.data.unreadable == "error":
        raise ValueError(
            "data: files cannot be read; mend or remove them, or use data.unreadable=skip:\n  "
            + "\n  ".join(skipped)
        )
    augmentation = config.augment.build()
    if augmentation is not None:
        augmentation.check(source.image_shape)
    placement.check(source.image_shape, config.train.batch)
    steps = config.steps(len(source))
    config.optimizer.build().check_steps(steps)
    return Prepared(
        config=config,
        source=source,
        validation=validation,
        model=network_of(config.model, len(source.class_names)),
        optimizer=config.optimizer.build().build(config.schedule.build(), steps),
        execution=execution,
        steps=steps,
        skipped=tuple(skipped),
        notes=tuple(notes),
        placement=placement,
    )


def _split(config: Config, whole: ImageSource) -> tuple[ImageSource, ImageSource | None]:
    """Images to train on and images held out."""
    wanted = config.data.validation
    if wanted is None:
        return whole, None
    place = folders(config).get("data.validation")
    if place is None:
        source, validation = data.split(whole, float(wanted), seed=config.train.seed)
        data.check_validation(source, validation)
        return source, validation
    if not place.is_dir():
        raise ValueError(
            f"validation: {place} is no directory; give one, or a part of the images such as 0.1"
        )
    folder = folder_of(
        place, config, size=whole.image_shape[:2], num_classes=len(whole.class_names)
    )
    data.check_validation(whole, folder)
    return whole, folder


def folders(config: Config) -> dict[str, Path]:
    """The folders that the images come from, by the keys that name them."""
    found = {}
    if config.data.path != "digits":
        found["data.path"] = Path(config.data.path)
    held_out = config.data.validation
    if isinstance(held_out, str) and not _is_number(held_out):
        found["data.validation"] = Path(held_out)
    return found


def with_folders(config: Config, places: Mapping[str, Path]) -> Config:
    """The same with other names of the folders, by their keys."""
    changed = {key.removeprefix("data."): str(place) for key, place in places.items()}
    return config.model_copy(update={"data": config.data.model_copy(update=changed)})


def missing_folder(config: Config) -> tuple[str, str, Path] | None:
    """Of the first folder that is not there: its key, its option and its path."""
    options = {"data.path": "--data", "data.validation": "--validation"}
    for key, place in folders(config).items():
        if not place.is_dir():
            return key, options[key], place
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def source_of(config: Config) -> ImageSource:
    """The images, with labels of the kind that the model learns from.

    Raises:
      ValueError: there are none, or not of that kind.
    """
    chosen = config.data
    size = size_of(chosen.image_size) if chosen.image_size else None
    if place := folders(config).get("data.path"):
        return folder_of(place, config, size=size)
    canvases = data.ScatteredDigits(
        size or (512, 512),
        num_images=chosen.num_images,
        seed=config.train.seed,
        classes=_digit_classes(chosen.digits),
    )
    labels_pixels = registry.network(config.model.name).labels_pixels
    return data.DigitPixels(canvases) if labels_pixels else canvases


def folder_of(
    path: Path,
    config: Config,
    *,
    size: tuple[int, int] | None,
    num_classes: int | None = None,
) -> data.ImageFolder | data.SegmentationFolder:
    """A folder of classes, or of images and masks where the model labels pixels.

    Raises:
      ValueError: it is not of that kind.
    """
    chosen: DataSection = config.data
    settings: dict[str, Any] = {
        "image_size": size,
        "fit": chosen.fit,
        "max_pixels": chosen.max_pixels,
    }
    model = config.model.name
    if not registry.network(model).labels_pixels:
        return data.ImageFolder(path, **settings)
    if chosen.balanced:
        raise ValueError("balanced: masks have no class that images could take turns by")
    if path.is_dir() and not ((path / "images").is_dir() and (path / "masks").is_dir()):
        raise ValueError(
            f"data: {model} needs a label for every pixel and {path} has no directories images/ "
            "and masks/; make them, use --data digits, or another model"
        )
    return data.SegmentationFolder(path, num_classes=num_classes, **settings)


def network_of(chosen: ModelSection, num_classes: int) -> nn.Module:
    """The network.

    Raises:
      ValueError: it, or its setting, does not exist.
    """
    if chosen.dtype not in DTYPES:
        raise ValueError(f"dtype: got {chosen.dtype!r}; use {' or '.join(DTYPES)}")
    return registry.build(
        chosen.name,
        num_classes=num_classes,
        width=chosen.width,
        dtype=DTYPES[chosen.dtype],
        head=chosen.head,
        norm=chosen.norm,
    )


def execution_of(
    chosen: StrategySection, placement: Placement = ONE_DEVICE
) -> Strategy | Planned | None:
    """How the rows run, and on which devices; None where a budget is to be planned for.

    Raises:
      ValueError: a strategy that does not exist, or a file that is no plan.
    """
    by_name = strategy_of(chosen.name, chosen.num_blocks, chosen.cuts, chosen.micro_batches)
    plain = by_name == strategy_of(StrategySection().name, None, None, 1)
    source = "budget" if chosen.budget else "plan"
    if (chosen.budget or chosen.plan) and not plain:
        raise ValueError(
            f"{source}: the plan chooses strategy, blocks, cuts and micro-batches; leave them out"
        )
    if (chosen.budget or chosen.plan) and placement.data > 1:
        raise ValueError(
            f"{source}: a plan is for devices that share the rows of all images; leave "
            "--data-devices out, or give a strategy, blocks (of each device) and cuts"
        )
    if chosen.budget:
        return None
    if not chosen.plan:
        mesh, axis = (placement.mesh, ROWS) if placement.rows > 1 else (None, None)
        return dataclasses.replace(by_name, mesh=mesh, row_mesh_axis=axis)
    try:
        return planned(Plan.load(chosen.plan), placement)
    except OSError as error:
        raise ValueError(f"plan: cannot read {chosen.plan}: {error}") from None


def strategy_of(
    name: str, num_blocks: str | None, cuts: str | None, micro_batches: int
) -> Strategy:
    """A strategy from the texts that a command line has.

    Raises:
      ValueError: it does not exist, or does not take these.
    """
    return Strategy(
        name,
        parse_num_blocks(num_blocks) if num_blocks else None,
        tuple(cuts.split(",")) if cuts else (),
        micro_batches,
    )


def numbers_of(text: str) -> list[int] | None:
    """Whole numbers with commas between them; None where there are others."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        return None


def size_of(text: str, name: str = "image-size") -> tuple[int, int]:
    """`(height, width)` from N or HEIGHTxWIDTH.

    Raises:
      ValueError: it is neither.
    """
    numbers = numbers_of(text.lower().replace("x", ",")) or []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ValueError(f"{name}: got {text!r}; use N or HEIGHTxWIDTH, such as 512 or 512x768")
    return numbers[0], numbers[-1]


def _digit_classes(text: str) -> list[int]:
    found = numbers_of(text)
    if found is None:
        raise ValueError(f"digits: got {text!r}; use digits with commas, such as 0,1,7")
    return found
