"""A run's directory: what may be in it when a run begins, and what is then taken out of it."""

import os
import shutil
from pathlib import Path

from lrjax.app import building, checkpoints, logs, report, saved
from lrjax.app.config import Config
from lrjax.text import listed


def check(out: Path, config: Config, *, resume: bool, overwrite: bool) -> None:
    """Refuses a directory among the images, or with files that the run would write.

    Raises:
      ValueError: it lies in a folder of images, or has such files, of an earlier run or of somebody
        else, which may not go.
    """
    if not resume:
        _check_outside_of_images(out, config)
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


def _check_outside_of_images(out: Path, config: Config) -> None:
    for place in building.folders(config).values():
        if out.resolve().is_relative_to(place.resolve()):
            raise ValueError(
                f"out: {out} lies in {place}, where the run's plots and samples would be taken for "
                "images; name a directory outside of it"
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
    if not everything:
        return
    for name in (checkpoints.DIRECTORY, checkpoints.DAMAGED, logs.TENSORBOARD_DIRECTORY):
        _remove_directory(out / name)
    for name in (logs.LOG_FILE, logs.SAMPLES_FILE, saved.PLAN_FILE):
        (out / name).unlink(missing_ok=True)


def _remove_directory(place: Path) -> None:
    """A link, to another disk say, stays, and what it leads to is emptied."""
    if place.is_symlink():
        for path in place.iterdir() if place.is_dir() else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    elif place.exists():
        shutil.rmtree(place)
