"""One trainer at a time in a run's directory.

The lock is a file that says who holds it: host, process, and when that process started, for numbers
of processes come again. One that a killed run left is taken over: on the same host as soon as its
process is gone, else when its holder, who touches it every few seconds, no longer does.
"""

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from lrjax.files import write_whole

FILE = "train.lock"
# Seconds between touches by its holder, and after which one that was not touched is stale.
TOUCHED_EVERY = 5.0
STALE_AFTER = 20.0


@contextlib.contextmanager
def locked(run: Path, note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Holds the lock of a run's directory, which is made where it does not exist.

    Args:
      run: the directory.
      note: is told when a lock of another host is watched, to see whether it is stale.

    Raises:
      ValueError: another trainer holds it; says which. Or the directory cannot be written to.
    """
    made = [place for place in (run, *run.parents) if not place.exists()]
    path = run / FILE
    own = _identity()
    try:
        run.mkdir(parents=True, exist_ok=True)
        _take(path, own, note)
    except OSError as error:
        raise ValueError(
            f"out: cannot write to {run} ({error.strerror or error}); give a directory you may "
            "write to"
        ) from error
    done = threading.Event()
    toucher = threading.Thread(target=_touch, args=(path, done), daemon=True)
    toucher.start()
    try:
        yield
    finally:
        done.set()
        toucher.join()
        if _read(path) == own:
            path.unlink(missing_ok=True)
        for place in made:
            with contextlib.suppress(OSError):  # there is something in it
                place.rmdir()


def _take(path: Path, own: dict[str, Any], note: Callable[[str], None]) -> None:
    while not _created(path, own):
        holder = _read(path)
        if holder is None:
            continue  # it was given back just now
        if not _is_stale(path, holder, note):
            raise ValueError(
                f"out: {path.parent} is in use by process {holder.get('pid')} on "
                f"{holder.get('host')}; wait until it ends, or give another directory (if there is "
                f"no such process, remove {path})"
            )
        if _took_over(path, holder, own):
            return


def _took_over(path: Path, stale: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether the stale lock was replaced. One process at a time tries, so that one is replaced by
    one; it is there all the time, so that nobody makes another meanwhile."""
    taking = path.with_name(f"{FILE}.taking")
    if not _created(taking, own):
        _wait_for_the_end_of(taking)
        return False
    try:
        if _read(path) != stale:
            return False
        write_whole(path, json.dumps(own))
        return True
    finally:
        taking.unlink(missing_ok=True)


def _wait_for_the_end_of(taking: Path) -> None:
    """Until a takeover, which takes milliseconds, has ended; one that was killed is removed."""
    before, end = _touched(taking), time.monotonic() + STALE_AFTER
    while (now := _touched(taking)) is not None and now == before:
        if time.monotonic() > end:
            taking.unlink(missing_ok=True)
        time.sleep(0.01)


def _created(path: Path, own: dict[str, Any]) -> bool:
    """Whether the lock was made with its content, at once: no other process sees it without."""
    handle, name = tempfile.mkstemp(prefix=FILE, dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(json.dumps(own))
    try:
        os.link(name, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        return _created_without_links(path, own)
    finally:
        os.unlink(name)
    return True


def _created_without_links(path: Path, own: dict[str, Any]) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(own))
    except FileExistsError:
        return False
    return True


def _identity() -> dict[str, Any]:
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pid": process.pid,
        "started": process.create_time(),
    }


def _read(path: Path) -> dict[str, Any] | None:
    """The holder; None where there is no lock. One that cannot be read has no holder."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_stale(path: Path, holder: dict[str, Any], note: Callable[[str], None]) -> bool:
    if holder.get("host") == socket.gethostname():
        try:
            process = psutil.Process(int(holder["pid"]))
            is_another = abs(process.create_time() - float(holder["started"])) > 1
            return is_another or process.status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, KeyError, TypeError, ValueError, OverflowError):
            return True
        except psutil.AccessDenied:
            return False
    note(f"{path} is of {holder.get('host')}; looking for {STALE_AFTER:g} s whether it is stale")
    # Not by this host's clock, which may be another than the file system's.
    before = _touched(path)
    end = time.monotonic() + STALE_AFTER
    while time.monotonic() < end:
        time.sleep(min(1.0, STALE_AFTER / 4))
        if _touched(path) != before:
            return False
    return True


def _touched(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _touch(path: Path, done: threading.Event) -> None:
    while not done.wait(TOUCHED_EVERY):
        with contextlib.suppress(OSError):
            os.utime(path)
