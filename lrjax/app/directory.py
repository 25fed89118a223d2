"""A run's directory: what may be in it when a run begins, and what is then taken out of it."""

import os
import shutil
from pathlib import Path

from lrjax.app import checkpoints, logs, report, saved
from lrjax.app.config import Config
from lrjax.text import listed


def check(out: Path, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Refuses a directory with files that the run would write, unless these may go.

    Raises:
      ValueError: there are some, of an earlier run or of somebody else.
    """
    if resume or overwrite:
        return
    steps = checkpoints.saved_steps(out)
    if steps:
        raise ValueError(
            f"out: {out} holds a run with checkpoints, the newest of step {steps[-1]}; go on with "
            "--resume, name another directory, or replace it with --overwrite"
        )
    there = [name for name in _written_by(config) if os.path.lexists(out / name)]
    if there:
        raise ValueError(
            f"out: {out} holds {listed(there)}, which the run would write; name another "
            "directory, replace them with --overwrite, or, if they are a run's, go on with --resume"
        )


def _written_by(config: Config) -> list[str]:
    chosen = {
        checkpoints.DIRECTORY: config.run.keep,
        logs.SAMPLES_FILE: config.run.samples,
        logs.TENSORBOARD_DIRECTORY: config.run.tensorboard,
        saved.PLAN_FILE: config.strategy.budget or config.strategy.plan,
    }
    always = (saved.CONFIG_FILE, logs.LOG_FILE, *report.RESULT_FILES)
    return [*always, *(name for name, is_written in chosen.items() if is_written)]


def remove_results(out: Path) -> None:
    """Removes what a run leaves at its end: it is not that of a run that has steps to make."""
    for name in report.RESULT_FILES:
        (out / name).unlink(missing_ok=True)


def clear(out: Path, *, everything: bool) -> None:
    """Removes what an earlier run left and one from the beginning would be taken to have made.

    Args:
      out: the directory.
      everything: its checkpoints and logs too.
    """
    remove_results(out)
    (out / saved.PLAN_FILE).unlink(missing_ok=True)
    if not everything:
        return
    for name in (checkpoints.DIRECTORY, checkpoints.DAMAGED, logs.TENSORBOARD_DIRECTORY):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in (logs.LOG_FILE, logs.SAMPLES_FILE):
        (out / name).unlink(missing_ok=True)
