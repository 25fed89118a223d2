"""The `lrjax` command: train a network, compare strategies, profile memory, plan, self-test."""

from lrjax.app.commands import compare, doctor, memory, plan, train
from lrjax.app.commands.console import app

__all__ = ["app", "compare", "doctor", "main", "memory", "plan", "train"]


def main() -> None:
    """The console script."""
    app()


@app.callback()
def lrjax_command() -> None:
    """Row-centric CNN training for JAX: the same gradients in less memory."""


if __name__ == "__main__":
    main()
