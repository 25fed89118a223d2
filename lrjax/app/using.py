"""A trained network put to use: evaluated on labelled images, or asked about single ones."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lrjax.app import building, report, saved
from lrjax.app.data import ImageSource, SkippedFile, check_validation, decoding, finding
from lrjax.app.data.decoding import UnreadableImageError
from lrjax.app.data.finding import Found
from lrjax.app.evaluation import Evaluator, Predictor
from lrjax.app.placement import ONE_DEVICE, Placement, placement_of
from lrjax.app.strategy import Execution, Planned
from lrjax.files import replacing
from lrjax.plan import Plan
from lrjax.text import listed


def evaluate(
    run: Path,
    data: str | None,
    *,
    step: int | None = None,
    batch: int | None = None,
    devices: int = 1,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Numbers of a checkpoint on labelled images.

    Args:
      run: the run's directory.
      data: a folder; None: the images that the run held out, or else those it learnt from, which
        must be the same as then.
      step: of the checkpoint; None: the newest.
      batch: images at a time; None: the run's.
      devices: that share the rows of each image, however many the run had.
      note: is told of damaged checkpoints.

    Raises:
      ValueError: there is no such run, or the images do not fit it.
    """
    network = saved.load(run, note, step=step)
    source, description = _images_of(run, network, data)
    for text in getattr(source, "notes", ()):
        note(text)
    if source.class_names != network.class_names or source.image_shape != network.image_shape:
        check_validation(_shape(network), source, name="data")
    placement = _placement(network, devices)
    evaluator = Evaluator(
        network.model,
        source,
        _execution(run, network, placement),
        batch_size=_batch(network, batch),
        placement=placement,
    )
    found = evaluator(network.state.params, network.state.statistics, source)
    numbers = report.validation_numbers(found)
    return {
        "run": str(run),
        "step": network.step,
        "data": description,
        "images": len(source),
        **{name.removeprefix("validation_"): value for name, value in numbers.items()},
        "classes": list(network.class_names),
    }


def _images_of(run: Path, network: saved.SavedRun, data: str | None) -> tuple[ImageSource, str]:
    if data is None:
        return _own_images(run, network)
    if data == "digits":
        digits = {**network.config.flat(), "data.path": "digits"}
        return building.source_of(building.Config.of(digits)), data
    size = network.image_shape[:2]
    folder = building.folder_of(
        Path(data), network.config, size=size, num_classes=len(network.class_names)
    )
    return folder, data


def _own_images(run: Path, network: saved.SavedRun) -> tuple[ImageSource, str]:
    """What the run held out, or else what it learnt from."""
    # The checkpoint may be older than the names that folders have now.
    named = building.folders(saved.read_config(run))
    config = building.with_folders(network.config, named)
    missing = building.missing_folder(config)
    if missing is not None:
        raise ValueError(
            f"data: the images of the run, {missing[2]}, are not there; where they moved, say so "
            f"with lrjax train --out {run} --resume {missing[1]} FOLDER, or name others here with "
            "--data FOLDER"
        )
    prepared = building.prepare(config, kept_plan=saved.kept_plan(run))
    difference = prepared.difference(network.facts)
    if difference is not None:
        raise ValueError(
            f"data: what is in {config.data.path} is not what the run learnt from and held out: "
            f"{difference}; restore it, or name other images with --data FOLDER"
        )
    if prepared.validation is not None:
        return prepared.validation, "held out by the run"
    return prepared.source, "what the run learnt from"


def predict(
    run: Path,
    images: Sequence[Path],
    *,
    out: Path | None = None,
    overwrite: bool = False,
    step: int | None = None,
    batch: int | None = None,
    devices: int = 1,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """What the network says of images, one after another.

    Args:
      run: the run's directory.
      images: files, or directories of them.
      out: where masks go, `<stem>.png`, whose values are the classes; asked for where the network
        labels pixels, refused where it does not.
      overwrite: replace masks that are there. An image is never replaced.
      step, batch, devices, note: as for `evaluate`.

    Yields:
      `file`, `class`, `probability` and `probabilities` (by class); of pixels `file`, `mask`,
      `offset` and `scale` (of the mask in its image, see `decoding.Window`) and `pixels` (by
      class). For a file that cannot be read, `file` and `error`.

    Raises:
      ValueError: there is no such run, no image, or no directory for masks; a mask would replace
        an image, or (without `overwrite`) another file.
    """
    network = saved.load(run, note, step=step)
    files, unreadable = _files(images, note)
    if network.labels_pixels:
        _check_masks(files, out, len(network.class_names), overwrite=overwrite)
    elif out is not None:
        raise ValueError("out: this network gives a class per image, no masks; leave it out")
    placement = _placement(network, devices)
    predictor = Predictor(
        network.model,
        _shape(network),
        _execution(run, network, placement),
        batch_size=_batch(network, batch),
        placement=placement,
    )
    return _lines(network, predictor, files, unreadable, out)


def _lines(
    network: saved.SavedRun,
    predictor: Predictor,
    files: Sequence[Path],
    unreadable: Sequence[SkippedFile],
    out: Path | None,
) -> Iterator[dict[str, Any]]:
    """The files are read as the predictor asks for them, so order is kept within a batch."""
    chosen = network.config.data
    fit: Any = chosen.fit
    pending = [_Asked(one.path, error=one.reason) for one in unreadable]
    size = network.image_shape[:2]

    def readable() -> Iterator[np.ndarray]:
        for file in files:
            try:
                image = decoding.decoded(file, chosen.max_pixels)
            except UnreadableImageError as error:
                pending.append(_Asked(file, error=str(error)))
                continue
            place = decoding.window((image.height, image.width), size, fit)
            pending.append(_Asked(file, place))
            yield np.asarray(decoding.fitted(image, size, fit))

    for answer in predictor(network.state.params, network.state.statistics, readable()):
        yield from _errors(pending)
        yield _line(network, pending.pop(0), answer, out)
    yield from _errors(pending)


@dataclass(frozen=True)
class _Asked:
    """A file to predict: where the answer lies in it, or why it cannot be read."""

    file: Path
    place: decoding.Window | None = None
    error: str | None = None


def _errors(pending: list[_Asked]) -> Iterator[dict[str, Any]]:
    while pending and pending[0].error is not None:
        asked = pending.pop(0)
        yield {"file": str(asked.file), "error": asked.error}


def _line(
    network: saved.SavedRun, asked: _Asked, answer: np.ndarray, out: Path | None
) -> dict[str, Any]:
    names, file = network.class_names, asked.file
    if out is None:
        best = int(np.argmax(answer))
        return {
            "file": str(file),
            "class": names[best],
            "probability": float(answer[best]),
            "probabilities": dict(zip(names, map(float, answer), strict=True)),
        }
    place = _mask_of(file, out)
    with replacing(place) as opened:
        Image.fromarray(answer).save(opened, format="png")
    assert asked.place is not None  # there is an answer
    counts = np.bincount(answer.ravel(), minlength=len(names))
    return {
        "file": str(file),
        "mask": str(place),
        "offset": list(asked.place.offset),
        "scale": list(asked.place.scale),
        "pixels": dict(zip(names, map(int, counts), strict=True)),
    }


def _files(
    images: Sequence[Path], note: Callable[[str], None]
) -> tuple[list[Path], list[SkippedFile]]:
    """The files, and the directories among them that cannot be read."""
    files: list[Path] = []
    below: list[Found] = []
    for path in images:
        if not path.exists():
            raise ValueError(f"images: {path} does not exist; give image files or directories")
        if path.is_dir():
            below.append(finding.images_below(path))
            files += below[-1].files
        else:
            files.append(path)
    for text in finding.notes_on(below):
        note(text)
    unreadable = [directory for one in below for directory in one.unreadable]
    if not files:
        reasons = "".join(f"\n  {directory}" for directory in unreadable)
        raise ValueError(
            f"images: no image in {', '.join(map(str, images))}; give image files{reasons}"
        )
    decoding.lift_pillows_limit()
    return files, unreadable


def _mask_of(file: Path, out: Path) -> Path:
    return out / f"{file.stem}.png"


def _check_masks(files: Sequence[Path], out: Path | None, classes: int, *, overwrite: bool) -> None:
    if out is None:
        raise ValueError("out: this network gives a mask per image; give a directory for them")
    if classes > 256:
        raise ValueError(f"out: PNG masks hold 256 classes, and this network has {classes}")
    stems: dict[str, Path] = {}
    for file in files:
        if stems.setdefault(file.stem, file) is not file:
            raise ValueError(
                f"images: {stems[file.stem]} and {file} would have one mask, {file.stem}.png; "
                "predict them one after the other, into two directories"
            )
    _check_targets([_mask_of(file, out) for file in files], files, overwrite=overwrite)
    report.check_writable(out)
    out.mkdir(parents=True, exist_ok=True)


def _check_targets(targets: Sequence[Path], files: Sequence[Path], *, overwrite: bool) -> None:
    there = [target for target in targets if os.path.lexists(target)]
    images = {_identity(file) for file in files}
    replaced = [target for target in there if _identity(target) in images]
    if replaced:
        raise ValueError(
            f"out: masks would replace images to predict, {listed(replaced)}; give another "
            "directory for them"
        )
    if there and not overwrite:
        raise ValueError(
            f"out: masks would replace files that are there, {listed(there)}; give another "
            "directory for them, or replace the files with --overwrite"
        )


def _identity(path: Path) -> object:
    """The same for all names of one file, whatever links and the case of letters."""
    try:
        found = path.stat()
    except OSError:
        return path.resolve()
    return found.st_dev, found.st_ino


def _shape(network: saved.SavedRun) -> saved.ImageShape:
    label_shape = network.image_shape[:2] if network.labels_pixels else ()
    return saved.ImageShape(network.image_shape, network.class_names, label_shape)


def _placement(network: saved.SavedRun, devices: int) -> Placement:
    if devices < 1:
        raise ValueError(f"devices: got {devices}; use 1 or more")
    found = placement_of(devices, 1)
    found.check(network.image_shape, 1)
    return found


def _execution(run: Path, network: saved.SavedRun, placement: Placement) -> Execution:
    made = run / saved.PLAN_FILE
    if made.exists() and placement == ONE_DEVICE:
        return Planned(Plan.load(made))
    found = building.execution_of(network.config.strategy, placement)
    assert found is not None  # a run with a budget leaves its plan
    return found


def _batch(network: saved.SavedRun, batch: int | None) -> int:
    if batch is not None and batch < 1:
        raise ValueError(f"batch: got {batch}; use 1 or more")
    return batch or network.config.train.batch
