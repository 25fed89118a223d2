"""A run that is asked to end by a signal ends behind the current step, with a checkpoint.

Schedulers send SIGTERM, or SIGUSR1 some time before; Ctrl-C sends SIGINT, a closed terminal SIGHUP.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# Not every system has all of them.
_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
SIGNALS = tuple(signal.Signals[name] for name in _NAMES if hasattr(signal, name))
# A second one of these ends the process at once. A closed terminal may send SIGHUP twice.
_ENDS_AT_ONCE = (signal.SIGTERM, signal.SIGINT)


class StoppedError(RuntimeError):
    """A run ended early because it was asked to.

    Attributes:
      step: steps that are done.
      exit_status: what shells and schedulers take for "ended by this signal".
    """

    def __init__(self, step: int, *, is_saved: bool, by: signal.Signals = signal.SIGTERM) -> None:
        rest = (
            "its checkpoint is written; go on with --resume"
            if is_saved
            else "no checkpoint was written, as --keep is 0"
        )
        how = "Ctrl-C (SIGINT)" if by == signal.SIGINT else by.name
        super().__init__(f"asked to end by {how}: stopped after step {step}; {rest}")
        self.step = step
        self.exit_status = 128 + by


class Request:
    """Whether the run was asked to end.

    Attributes:
      is_made: it was.
      by: the first signal; where another process had it, what schedulers send.
    """

    def __init__(self) -> None:
        self.is_made = False
        self.by = signal.SIGTERM


@contextlib.contextmanager
def requests() -> Iterator[Request]:
    """Takes `SIGNALS` for a request to end; a second SIGTERM or Ctrl-C is what it was before.

    SIGINT and SIGHUP that are ignored (`nohup`, a job in the background) stay so, and so does a
    SIGUSR1 that somebody else handles. Python hands signals to the main thread alone: in another
    one this changes nothing.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # None: what was there is no handler of Python's.
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        if not request.is_made:
            request.is_made, request.by = True, signal.Signals(number)
        if number in _ENDS_AT_ONCE:
            signal.signal(number, before[signal.Signals(number)])
        _tell(number)

    taken = [number for number in SIGNALS if _is_free(number, before[number])]
    for number in taken:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _is_free(number: signal.Signals, handler: Callable[..., Any] | int) -> bool:
    if number == signal.SIGTERM:
        return True
    if number == signal.SIGINT:
        return handler != signal.SIG_IGN
    return handler == signal.SIG_DFL


def _tell(number: int) -> None:
    """Says that the request was heard; a terminal that is gone is written to no more.

    A handler must not print: it may have interrupted a print.
    """
    if number == signal.SIGINT:
        text = b"\nstopping after this step; press Ctrl-C again to stop at once\n"
        with contextlib.suppress(OSError):
            os.write(2, text)
    if number not in _ENDS_AT_ONCE:
        for stream in (1, 2):
            _leave_if_gone(stream)


def _leave_if_gone(stream: int) -> None:
    """Lets a stream whose terminal was closed lead nowhere: writing to it fails."""
    import errno
    import termios

    try:
        termios.tcgetattr(stream)
    except termios.error as error:
        if error.args[0] == errno.EIO:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)
