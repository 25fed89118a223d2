"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file whole or leave what is there; text is UTF-8.

    Raises:
      OSError: ``path`` cannot be written; the message says why and what to do.
    """
    with replacing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Find out early that a file could not be written.

    Raises:
      OSError: ``path`` cannot be written; the message says why and what to do.
    """
    _check(path, Path(os.path.realpath(path)))


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write that takes ``path``'s place when all went well, and is gone otherwise.

    Raises:
      OSError: ``path`` cannot be written; the message says why and what to do.
    """
    destination = Path(os.path.realpath(path))  # a link stays a link
    _check(path, destination)
    try:
        file = tempfile.NamedTemporaryFile(  # noqa: SIM115 (closed below, before it is renamed)
            dir=destination.parent, prefix=f".{destination.name[:64]}.", delete=False
        )
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error), type(error)) from error
    try:
        with file:
            yield file
        os.chmod(file.name, _mode(destination))
        os.replace(file.name, destination)
    except BaseException:
        os.unlink(file.name)
        raise


def _check(path: str | os.PathLike[str], destination: Path) -> None:
    if not destination.parent.exists():
        raise _unwritable(
            path, f"the directory {str(destination.parent)!r} does not exist", FileNotFoundError
        )
    if not destination.parent.is_dir():
        raise _unwritable(
            path, f"{str(destination.parent)!r} is not a directory", NotADirectoryError
        )
    if destination.is_dir():
        raise _unwritable(path, "it is a directory", IsADirectoryError)
    if destination.exists() and not destination.is_file():
        raise _unwritable(path, "it is a device or a pipe, not a file", OSError)
    if destination.exists() and not os.access(destination, os.W_OK):
        raise _unwritable(path, "the file is read-only", PermissionError)


def _unwritable(path: str | os.PathLike[str], reason: str, kind: type[OSError]) -> OSError:
    return kind(
        f"path={str(path)!r} cannot be written: {reason}. "
        "Name a file in a directory that exists and may be written to."
    )


def _mode(destination: Path) -> int:
    """Permissions of the file there, or of a new one; temporary files are private."""
    if destination.exists():
        return stat.S_IMODE(destination.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
