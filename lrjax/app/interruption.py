"""A run that is asked to end: what schedulers send (SIGTERM) ends it behind the current step."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# What shells and schedulers take for "ended by SIGTERM".
EXIT_STATUS = 128 + signal.SIGTERM


class StoppedError(RuntimeError):
    """A run ended early because it was asked to.

    Attributes:
      step: steps that are done.
    """

    def __init__(self, step: int, *, is_saved: bool) -> None:
        rest = (
            "its checkpoint is written; go on with --resume"
            if is_saved
            else "no checkpoint was written, as --keep is 0"
        )
        super().__init__(f"asked to end by SIGTERM: stopped after step {step}; {rest}")
        self.step = step


class Request:
    """Whether the run was asked to end."""

    def __init__(self) -> None:
        self.is_made = False


@contextlib.contextmanager
def requests() -> Iterator[Request]:
    """Takes SIGTERM for a request to end; a second one ends the process at once, as always.

    Python hands signals to the main thread alone: in another one this changes nothing.
    """
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame
        request.is_made = True
        signal.signal(signal.SIGTERM, before)

    # None: what was there is no handler of Python's.
    before = signal.signal(signal.SIGTERM, handle) or signal.SIG_DFL
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
