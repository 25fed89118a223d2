"""The `lrjax` command: train a network and use it, compare strategies, profile, plan, self-test."""

import os
import signal
import sys

from lrjax.app.commands import compare, doctor, evaluate, memory, plan, predict, train
from lrjax.app.commands.console import app

__all__ = [
    "app",
    "compare",
    "doctor",
    "evaluate",
    "main",
    "memory",
    "plan",
    "predict",
    "train",
]


def main() -> None:
    """The console script."""
    try:
        app()
    except SystemExit as end:
        if not _was_interrupted(end):
            raise
        # XLA's compiler goes on in threads, among which Python's own end is a segmentation fault.
        print("interrupted", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + signal.SIGINT)


def _was_interrupted(error: BaseException) -> bool:
    """Whether a Ctrl-C ended the command that nobody took for a request to end."""
    before = error.__context__
    return isinstance(before, KeyboardInterrupt) or (
        before is not None and _was_interrupted(before)
    )


@app.callback()
def lrjax_command() -> None:
    """Row-centric CNN training for JAX: the same gradients in less memory."""


if __name__ == "__main__":
    main()
