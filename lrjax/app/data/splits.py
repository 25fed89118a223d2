"""Images held out of training, to judge it by."""

import numpy as np

from lrjax.app.data.sources import ImageSource, Subset, classes_of

_DRAWS = 100


def split(source: ImageSource, fraction: float, *, seed: int) -> tuple[Subset, Subset]:
    """Images to train on, and a fraction of every class that is held out.

    Which ones depends on the seed and the source's labels alone. At least one image of each class
    is on either side; where pixels have labels, images are drawn until those held out show every
    class, a hundred times at most.

    Args:
      source: the images.
      fraction: of them that is held out, between 0 and 1.
      seed: of the drawing.

    Raises:
      ValueError: for another fraction, and where a class has too few images for both sides.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation: got {fraction}; use a fraction between 0 and 1, or a folder")
    for draw in range(_DRAWS):
        training, validation = _drawn(source, fraction, np.random.default_rng([seed, draw]))
        if not _shown(training) - _shown(validation):
            break
    return training, validation


def _drawn(
    source: ImageSource, fraction: float, random: np.random.Generator
) -> tuple[Subset, Subset]:
    held_out: list[int] = []
    for label in np.unique(source.labels):
        own = np.flatnonzero(source.labels == label)
        if len(own) < 2:
            name = source.class_names[label]
            raise ValueError(
                f"validation: class {name!r} has one image, none is left to hold out; add images "
                "or give a folder of validation images"
            )
        count = min(max(1, round(fraction * len(own))), len(own) - 1)
        held_out += random.permutation(own)[:count].tolist()
    training = np.setdiff1d(np.arange(len(source)), held_out)
    return Subset(source, training), Subset(source, np.sort(held_out))


def check_validation(
    training: ImageSource, validation: ImageSource, *, name: str = "validation"
) -> None:
    """Refuses held-out images that do not fit the training's.

    Args:
      training: images of the shape and classes that are learnt.
      validation: the others.
      name: of the option that chose them, for messages.

    Raises:
      ValueError: their classes, or sizes, are not the training's, or one of its classes is missing.
    """
    if validation.class_names != training.class_names:
        own, other = set(training.class_names), set(validation.class_names)
        differences = [
            f"{which} {', '.join(sorted(names))}"
            for which, names in (("lacks", own - other), ("adds", other - own))
            if names
        ]
        raise ValueError(
            f"{name}: its classes are not the training's, it {' and '.join(differences)}; "
            "give a folder with the same classes"
        )
    if validation.image_shape != training.image_shape:
        sizes = [f"{one.image_shape[0]}x{one.image_shape[1]}" for one in (validation, training)]
        raise ValueError(
            f"{name}: images are {sizes[0]} and those to train on {sizes[1]}; give image_size"
        )
    missing = _shown(training) - _shown(validation)
    if missing:
        names = ", ".join(training.class_names[label] for label in sorted(missing))
        raise ValueError(
            f"{name}: no held-out image shows {names}; hold more out, take another seed, or "
            "give a folder of validation images"
        )


def _shown(source: ImageSource) -> set[int]:
    """Classes that any image shows; of pixels' labels that are drawn when asked for, none."""
    if source.label_shape and not _knows_classes(source):
        return set()
    return set().union(*(classes_of(source, index) for index in range(len(source))))


def _knows_classes(source: ImageSource) -> bool:
    inner = source.source if isinstance(source, Subset) else source
    return hasattr(inner, "classes_of")
