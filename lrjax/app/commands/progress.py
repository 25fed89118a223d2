"""A run's progress in the terminal."""

from types import TracebackType
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from lrjax.app.building import Prepared
from lrjax.app.commands.console import console, escaped
from lrjax.app.evaluation import Evaluation
from lrjax.app.runs import Listener
from lrjax.app.training import Progress as Step
from lrjax.text import listed


class TerminalListener(Listener):
    """Prints what is worth knowing, and a bar for the steps; a context."""

    def __init__(self) -> None:
        self._label = ""
        self._status: Any = console.status("checking the data")
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "TerminalListener":
        self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.stop()
        if self._bar is not None:
            self._bar.stop()

    def prepared(self, prepared: Prepared) -> None:
        source, held_out = prepared.source, prepared.validation
        height, width, _ = source.image_shape
        also = f", {len(held_out)} held out" if held_out is not None else ""
        self._print(
            f"{len(source)} images of {height}x{width}, {len(source.class_names)} classes{also}"
        )
        if prepared.skipped:
            console.print(f"[yellow]{len(prepared.skipped)} unreadable files left out:[/]")
            for file in prepared.skipped:
                self._print(f"  {file}")

    def checked(self, prepared: Prepared) -> None:
        """What would be trained, beyond what `prepared` says."""
        self._print(
            f"classes: {listed(prepared.source.class_names, 10)}\n"
            f"{prepared.steps} steps of {prepared.config.train.batch} images; checked, and nothing "
            "trained"
        )

    def planned(self, plan: Any) -> None:
        console.print(str(plan), highlight=False, markup=False, soft_wrap=True)

    def compiling(self, label: str) -> None:
        self._label = label
        self._status.update("planning" if label == "planning" else f"{label}: compiling")

    def note(self, text: str) -> None:
        console.print(f"[yellow]{escaped(text)}[/]", highlight=False, soft_wrap=True)

    def step(self, progress: Step, steps: int) -> None:
        if self._bar is None:
            self._status.stop()
            self._bar = _bar()
            self._task = self._bar.add_task(self._label, total=steps, loss="", seconds="")
            self._bar.start()
        assert self._task is not None
        self._bar.update(
            self._task,
            completed=progress.step,
            loss=f"loss {progress.loss:.4f}",
            seconds=f"{progress.seconds:.2f} s/step",
        )

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        self._print(
            f"step {step}: held-out loss {evaluation.loss:.4f}, "
            f"accuracy {evaluation.accuracy:.4f}, mean IoU {evaluation.mean_iou:.4f}"
        )

    def _print(self, text: str) -> None:
        console.print(escaped(text), soft_wrap=True, highlight=False)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[seconds]}"),
        TimeElapsedColumn(),
        console=console,
    )
