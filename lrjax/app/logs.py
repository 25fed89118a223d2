"""What a run tells while it goes: a line of JSON for every step, TensorBoard events, sample images.

The lines are the run's memory: a run that goes on cuts off those after its checkpoint.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from lrjax.app.data import ImageSource, batches
from lrjax.app.data.augmentation import Augmentation
from lrjax.files import replacing, write_whole

LOG_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.png"
TENSORBOARD_DIRECTORY = "tensorboard"
_TILE = 256


class Log:
    """Appends numbers of steps to `metrics.jsonl`, and to TensorBoard's events; a context.

    Args:
      run: the run's directory.
      after: steps that stay; later lines are cut off.
      tensorboard: write events too.

    Raises:
      ValueError: TensorBoard's writer is not installed.
    """

    def __init__(self, run: Path, *, after: int = 0, tensorboard: bool = False) -> None:
        self._writer = (
            _tensorboard_writer(run / TENSORBOARD_DIRECTORY, after) if tensorboard else None
        )
        kept = [line for line in read(run) if line["step"] <= after]
        write_whole(run / LOG_FILE, "".join(map(_line, kept)))
        self._path = run / LOG_FILE
        self._file = self._path.open("a", encoding="utf-8")

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def write(self, step: int, numbers: Mapping[str, Any]) -> None:
        """One line; a number's name is `loss`, `validation_accuracy` and the like."""
        try:
            self._file.write(_line({"step": step, **numbers}))
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"{self._path} cannot be written ({error.strerror or error}); earlier checkpoints "
                "are whole. Make room and go on with --resume."
            ) from error
        if self._writer is not None:
            for name, value in numbers.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name.replace("validation_", "validation/"), value, step)


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of a run; damaged ones, as a last one that was cut short, do not count."""
    lines = []
    try:
        texts = (run / LOG_FILE).read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for text in texts:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps({name: _finite(value) for name, value in content.items()}) + "\n"


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, tuple | list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_tensorboard() -> None:
    """Raises `ValueError` where TensorBoard's writer is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            "tensorboard: tensorboardX is not installed; pip install 'lrjax[experiments]'"
        ) from error


def _tensorboard_writer(directory: Path, after: int) -> Any:
    check_tensorboard()
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(directory), purge_step=after + 1)


def write_samples(
    path: Path,
    source: ImageSource,
    *,
    count: int,
    seed: int,
    balanced: bool,
    augmentation: Augmentation | None,
) -> None:
    """Draws the first images as training sees them, each at most 256 pixels, labels beside them.

    Where pixels have labels these are drawn under their image, in greys.
    """
    stream = batches(source, 1, seed=seed, balanced=balanced, augmentation=augmentation)
    tiles = [_tile(next(stream), len(source.class_names)) for _ in range(count)]
    columns = math.ceil(math.sqrt(count))
    height, width = tiles[0].shape[:2]
    sheet = np.full((math.ceil(count / columns) * height, columns * width, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = divmod(number, columns)
        sheet[top * height : (top + 1) * height, left * width : (left + 1) * width] = tile
    with replacing(path) as file:
        Image.fromarray(sheet).save(file, format="png")


def _tile(batch: Mapping[str, np.ndarray], classes: int) -> np.ndarray:
    pictures = [_reduced(Image.fromarray(batch["image"][0]), Image.Resampling.BOX)]
    if batch["label"].ndim > 1:
        greys = (batch["label"][0] * (255 // max(1, classes - 1))).astype(np.uint8)
        pictures.append(_reduced(Image.fromarray(greys), Image.Resampling.NEAREST))
    tile = np.concatenate([np.asarray(picture.convert("RGB")) for picture in pictures])
    return np.pad(tile, ((2, 2), (2, 2), (0, 0)), constant_values=255)


def _reduced(image: Image.Image, method: Image.Resampling) -> Image.Image:
    scale = min(1.0, _TILE / max(image.size))
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize((size[0], size[1]), method)
