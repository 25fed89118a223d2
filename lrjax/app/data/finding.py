"""Which files below a directory are images. What is left alone is counted, so that it can be said.

A link to a directory is followed. Each directory is read once, however many links lead to it, and
none that holds the directory that is searched: it has other images than this directory's.
"""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from lrjax.app.data.decoding import SIXTEEN_BIT_DIVISOR, SkippedFile
from lrjax.text import listed

# Values of 14 bits and less are almost black as 8 of 16 bits.
_FAR_BELOW = 2**14


@dataclass
class Found:
    """What lies below a directory.

    Attributes:
      files: with an image's suffix, not hidden, sorted.
      unreadable: directories whose files cannot be listed.
      others: how many other files there are, by suffix.
    """

    files: list[Path] = field(default_factory=list)
    unreadable: list[SkippedFile] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def images_below(directory: Path) -> Found:
    """The image files below a directory, and what else is there."""
    found = Found()
    root = os.path.realpath(directory)
    seen: set[str] = set()
    # Links last: a directory goes by its own name where it has one here.
    directories, links = [directory], list[Path]()
    while directories or links:
        place = (directories or links).pop(0)
        real = os.path.realpath(place)
        if real in seen or (real != root and _holds(real, root)):
            continue
        seen.add(real)
        for path, entry in _entries(place, found):
            if _is_directory(entry):
                (links if entry.is_symlink() else directories).append(path)
            else:
                _add_file(path, found)
    found.files.sort()
    return found


def _entries(place: Path, found: Found) -> list[tuple[Path, os.DirEntry[str]]]:
    try:
        with os.scandir(place) as entries:
            shown = sorted((one for one in entries if one.name[0] != "."), key=lambda one: one.name)
    except OSError as error:
        reason = f"a directory whose files cannot be listed ({error.strerror or error})"
        found.unreadable.append(SkippedFile(place, reason))
        return []
    return [(Path(place, entry.name), entry) for entry in shown]


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in circles, or to where nobody may look
        return False


def _holds(directory: str, other: str) -> bool:
    return Path(other).is_relative_to(directory)


def _add_file(path: Path, found: Found) -> None:
    suffix = path.suffix.lower()
    if suffix not in Image.registered_extensions():
        found.others[suffix or "without suffix"] += 1
    elif path.exists() and not path.is_file():  # reading a pipe would wait for ever
        found.unreadable.append(SkippedFile(path, "neither a file nor a directory"))
    else:
        found.files.append(path)


def notes_on(found: Iterable[Found], largest: Iterable[int | None] = ()) -> tuple[str, ...]:
    """What a person should know of a folder that can be read.

    Args:
      found: what lies in it.
      largest: the largest value of each 16-bit image, None of the others.
    """
    notes = []
    others = sum((one.others for one in found), Counter[str]())
    if others:
        counts = [f"{count} {suffix}" for suffix, count in others.most_common()]
        notes.append(f"files that are not read, as they have no image's suffix: {listed(counts)}")
    values = [value for value in largest if value is not None]
    if values and max(values) < _FAR_BELOW:
        notes.append(
            f"no 16-bit image has a value above {max(values):,}, and these are divided by "
            f"{SIXTEEN_BIT_DIVISOR}: they are dark, at most {max(values) // SIXTEEN_BIT_DIVISOR} "
            "of 255; rescale the files, so that white is 65,535"
        )
    return tuple(notes)
