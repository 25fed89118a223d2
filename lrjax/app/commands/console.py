"""The command itself, where it prints, and how it ends."""

from typing import NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    help="Row-centric CNN training for JAX: the same gradients in less memory.",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # the default takes [brackets] in help texts for styles
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
BAD_INPUT = 2
FAILED = 1
DOES_NOT_FIT = 3


def stop(message: object, code: int = BAD_INPUT) -> NoReturn:
    Console(stderr=True).print(f"[bold red]error:[/] {escaped(message)}", soft_wrap=True)
    raise typer.Exit(code)


def escaped(message: object) -> str:
    return str(message).replace("[", r"\[")
