"""The subcommands of `lrjax`, one module each."""

try:
    import rich as _rich  # noqa: F401
    import typer as _typer  # noqa: F401
except ModuleNotFoundError as error:
    raise SystemExit(
        f"lrjax: {error.name} is not installed; the command needs the experiments extra: "
        "pip install 'lrjax[experiments]'"
    ) from error
