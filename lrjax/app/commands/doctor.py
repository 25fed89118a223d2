"""`lrjax doctor`."""

import os
from typing import Annotated, Any

import typer
from rich.console import Console

from lrjax.app.commands.console import FAILED, app, console, escaped

_CHOSEN = "JAX_PLATFORMS"
SelfTest = Annotated[bool, typer.Option(help="Compare gradients of a small network with column's.")]


@app.command()
def doctor(self_test: SelfTest = True) -> None:
    """Whether lrjax works here: versions, devices, targets, extras, and a self-test of a minute.

    The self-test compares outputs and all gradients of a small network, by every strategy, with
    ordinary execution on the device at hand. Ends with status 1 where a package that is needed is
    missing or too old, no device answers, or a gradient differs.
    """
    from lrjax.app import doctor as checks

    # Files and pipes count as 80 columns, too few for the tables.
    wide = Console(width=max(console.width, 110))
    packages = checks.packages()
    wide.print(_packages(packages))
    wide.print(_extras(checks.extras()))
    troubles = [f"{p.name} {p.version or 'missing'}" for p in packages if not p.suits]
    try:
        wide.print(_devices())
        if hint := checks.idle_accelerator():
            wide.print(f"[bold yellow]note:[/] {escaped(hint)}", soft_wrap=True)
    except Exception as error:  # JAX raises an AssertionError too where no platform starts
        chosen = f" ({_CHOSEN}={os.environ[_CHOSEN]})" if _CHOSEN in os.environ else ""
        problem = escaped(f"{type(error).__name__} {error}".strip())
        wide.print(f"[bold red]no device{chosen}:[/] {problem}", soft_wrap=True)
        troubles.append("no device")
        self_test = False
    wide.print(_targets())
    if self_test:
        failed = _run_self_tests(checks, wide)
        troubles += [f"self-test of {name}" for name in failed]
    if troubles:
        wide.print(f"[bold red]not well:[/] {escaped('; '.join(troubles))}", soft_wrap=True)
        raise typer.Exit(FAILED)
    wide.print("[bold green]all is well[/]" + ("" if self_test else ", as far as was looked at"))


def _packages(packages: Any) -> Any:
    from lrjax.memory import text

    table = text.new_table("package", "version", "needed", "enough")
    for found in packages:
        verdict = "yes" if found.suits else "[bold red]no[/]"
        table.add_row(found.name, found.version or "not installed", found.wanted or "any", verdict)
    return table


def _extras(extras: Any) -> Any:
    from lrjax.memory import text

    if not extras:
        return "extras: unknown, for lrjax is run from its folder and is not installed"
    table = text.new_table("extra", "missing", "to install")
    for extra in extras:
        command = escaped(extra.install) if extra.missing else ""
        table.add_row(extra.name, ", ".join(extra.missing) or "nothing", command)
    return table


def _devices() -> Any:
    import jax

    from lrjax import memory
    from lrjax.memory import text

    table = text.new_table("device", "platform", "kind", "GiB")
    for device in jax.devices():
        size = memory.device_memory_bytes(device)
        gib = "?" if size is None else f"{size / 2**30:,.1f}"
        table.add_row(str(device.id), device.platform, device.device_kind, gib)
    return table


def _targets() -> str:
    """A line each for the targets that XLA compiles for here, and for what others need."""
    from lrjax import memory

    found = memory.targets()
    ready = ", ".join(t.name for t in found if t.is_installed)
    needed: dict[str, list[str]] = {}
    for target in found:
        if not target.is_installed:
            needed.setdefault(target.install, []).append(target.name)
    lines = [f"compiles for: {ready}"]
    lines += [f"{', '.join(names)}: {escaped(command)}" for command, names in needed.items()]
    return "\n".join(lines)


def _run_self_tests(checks: Any, wide: Console) -> list[str]:
    """Prints a table of the self-tests, then what went wrong; the names of those that failed."""
    from lrjax.memory import text

    table = text.new_table("self-test", "seconds", "against column")
    failed = {}
    with console.status("self-test"):
        for test in checks.self_tests():
            verdict = "[bold red]differs[/]" if test.error else "the same"
            table.add_row(test.name, f"{test.seconds:.1f}", verdict)
            if test.error:
                failed[test.name] = test.error
    wide.print(table)
    for name, error in failed.items():
        wide.print(f"[bold red]{name}:[/] {escaped(error)}", soft_wrap=True, highlight=False)
    return list(failed)
