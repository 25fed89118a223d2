"""The `lrjax` command: train a network and use it, compare strategies, profile, plan, self-test."""

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
    app()


@app.callback()
def lrjax_command() -> None:
    """Row-centric CNN training for JAX: the same gradients in less memory."""


if __name__ == "__main__":
    main()
