"""Several processes of one run: how they start, and what they agree on.

Every process runs the same program on the same configuration. The first alone writes what is not
a checkpoint. What only one of them can know (a signal, a lock) all are told before any acts on it:
a process that stopped alone would leave the others waiting in a collective.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

_LONGEST_MESSAGE = 4096
# Network file systems show what others write a little later.
_SECONDS_UNTIL_SEEN = 10.0


def start(count: str | int | None, coordinator: str | None, number: int | None) -> None:
    """Joins the processes of a run; before anything else is done with JAX.

    Args:
      count: how many there are, or `"auto"`: JAX finds all three where Slurm, Open MPI, GKE or a
        Cloud TPU started the processes; None: this one alone.
      coordinator: `HOST:PORT` of the first, at which the others find it.
      number: of this one, from 0.

    Raises:
      ValueError: something is missing or out of range, or the others do not answer.
    """
    if count is None:
        if coordinator is not None or number is not None:
            raise ValueError("processes: missing; give their number too, such as --processes 2")
        return
    try:
        if count == "auto":
            if coordinator is not None or number is not None:
                raise ValueError(
                    "processes: auto finds coordinator and number; leave these out, or give a count"
                )
            jax.distributed.initialize()
            return
        _check(count, coordinator, number)
        jax.distributed.initialize(coordinator, int(count), number)
    except RuntimeError as error:
        raise ValueError(
            f"processes: they did not find each other ({str(error).splitlines()[0][:300]}); is "
            f"the coordinator running, its port free and open, and every --process-id another?"
        ) from error


def _check(count: str | int, coordinator: str | None, number: int | None) -> None:
    if not str(count).isdecimal() or int(count) < 1:
        raise ValueError(f"processes: got {count!r}; use a number, 1 or more, or auto")
    if coordinator is None or ":" not in coordinator:
        raise ValueError(
            f"coordinator: got {coordinator!r}; give HOST:PORT of the first process, or "
            "--processes auto on Slurm, GKE or a TPU"
        )
    if number is None or not 0 <= number < int(count):
        raise ValueError(
            f"process_id: got {number}; every process has one of its own, 0 to {int(count) - 1}"
        )


def is_first() -> bool:
    """Whether this process writes for all."""
    return jax.process_index() == 0


def wait_for_all(where: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        _utilities().sync_global_devices(where)


def any_says(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(_utilities().process_allgather(np.asarray(flag))))


def first_does(action: Callable[[], Any]) -> None:
    """Runs `action` in the first process; what it raises for bad input, every process raises.

    Raises:
      ValueError: as in the first process.
    """
    if jax.process_count() == 1:
        action()
        return
    failure: ValueError | OSError | None = None
    if is_first():
        try:
            action()
        except (ValueError, OSError) as error:
            failure = error
    told = np.zeros(_LONGEST_MESSAGE, np.uint8)
    text = str(failure).encode()[:_LONGEST_MESSAGE] if failure else b""
    told[: len(text)] = np.frombuffer(text, np.uint8)
    heard = _utilities().broadcast_one_to_all(told)
    if failure is not None:
        raise failure
    message = bytes(np.asarray(heard)).rstrip(b"\0").decode(errors="replace")
    if message:
        raise ValueError(message)


def check_shared(path: os.PathLike[str]) -> None:
    """Refuses a directory that other processes than the first do not see.

    Raises:
      ValueError: in every process, where one of them has no such file.
    """
    end = time.monotonic() + _SECONDS_UNTIL_SEEN
    while not os.path.exists(path) and time.monotonic() < end:
        time.sleep(0.2)
    if any_says(not os.path.exists(path)):
        raise ValueError(
            f"out: what the first process wrote to {path} is not there for all; give a directory "
            "on a file system that every process sees"
        )


def _utilities() -> Any:
    from jax.experimental import multihost_utils

    return multihost_utils
