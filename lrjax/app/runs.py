"""A whole training run: from a configuration to a directory with its log, checkpoints and results.

This is what `lrjax train` does, without a terminal.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lrjax.app import (
    budget,
    building,
    checkpoints,
    diagnosis,
    directory,
    interruption,
    logs,
    processes,
    report,
    saved,
)
from lrjax.app.building import Prepared, prepare
from lrjax.app.checkpoints import Checkpoint, Checkpoints
from lrjax.app.config import LENGTH, Config, differences
from lrjax.app.evaluation import Evaluation, Evaluator
from lrjax.app.interruption import StoppedError
from lrjax.app.lock import locked
from lrjax.app.placement import placement_of, planned
from lrjax.app.step import CompiledStep, check_step, compile_step, initial_state, keys_of
from lrjax.app.strategy import Execution, Planned, Strategy
from lrjax.app.training import DivergedError, Progress, Start, Training, train
from lrjax.memory import DoesNotFitError
from lrjax.plan import Plan


class Listener:
    """Is told how a run goes; says nothing itself. Override what is of interest."""

    def prepared(self, prepared: Prepared) -> None:
        """Data and network are there."""

    def planned(self, plan: Plan) -> None:
        """A plan was made for the budget."""

    def compiling(self, label: str) -> None:
        """The step is compiled next."""

    def note(self, text: str) -> None:
        """Something that a person should know, and that does not stop the run."""

    def step(self, progress: Progress, steps: int) -> None:
        """A step of so many is done."""

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """The held-out images were looked at."""


@dataclass(frozen=True)
class Result:
    """What a run gave, the parts before an interruption among it.

    Attributes:
      training: parameters, losses and times of all steps, memory of this process.
      execution: how the rows ran.
      metrics: what `metrics.json` holds.
      evaluation: of the held-out images after the last step, or None.
    """

    training: Training
    execution: Execution
    metrics: report.Metrics = field(repr=False)
    evaluation: Evaluation | None


def check(
    config: Config,
    out: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> Prepared:
    """Looks whether everything fits, and trains nothing.

    Args:
      config, resume, overwrite: as for `run`.
      out: the directory that the run would have; None: it is not looked at.
      listener: is told of the data, and of the checkpoint to go on after.

    Returns:
      What would be trained.

    Raises:
      ValueError: it does not fit; says what to do.
    """
    listener = listener or Listener()
    if out is not None:
        report.check_writable(out)
        directory.check(out, config, resume=resume, overwrite=overwrite)
    prepared = _prepared(config, listener, out if resume else None)
    if out is not None and resume:
        _start(prepared, out, listener)
    # A budget is planned for by compiling, so only model and data are looked at.
    execution = prepared.execution or Strategy("column")
    check_step(prepared.model, prepared.source, execution, batch_size=config.train.batch)
    return prepared


def _prepared(config: Config, listener: Listener, resumed: Path | None) -> Prepared:
    """What is trained; ``resumed`` is the directory of a run that goes on."""
    if config.strategy.budget is not None:
        budget.bytes_of(config.strategy.budget)
    prepared = prepare(
        config,
        placement_of(config.mesh.rows, config.mesh.data),
        kept_plan=saved.kept_plan(resumed) if resumed is not None else None,
    )
    listener.prepared(prepared)
    for text in (*prepared.notes, *config.notes(prepared.steps)):
        listener.note(text)
    return prepared


def config_to_resume(out: Path, given: dict[str, Any]) -> Config:
    """The configuration of a run that goes on, with the changes that it may have.

    Args:
      out: the run's directory.
      given: dotted keys and values that were asked for now.

    Raises:
      ValueError: there is no run, a setting differs that would alter its numbers, or a folder of
        images that is not named now is no longer there.
    """
    before = saved.read_config(out)
    # One way of saying how long replaces the other.
    flat = before.flat()
    if "train.steps" in given:
        flat["train.epochs"] = None
    if "train.epochs" in given:
        flat["train.steps"] = None
    after = Config.of({**flat, **given})
    # That another folder holds the same files is seen when it is opened.
    folders = building.folders(before).keys() & building.folders(after).keys()
    different = {
        key: values for key, values in differences(before, after).items() if key not in folders
    }
    if different:
        lines = [
            f"  {key}: {old!r} in the run, {new!r} given"
            + (" (its schedule depends on the length)" if key in LENGTH else "")
            for key, (old, new) in different.items()
        ]
        raise ValueError(
            f"resume: the run in {out} has other settings; leave these out, or start a run of "
            "its own:\n" + "\n".join(lines)
        )
    missing = building.missing_folder(after)
    if missing is not None and missing[0] not in given:
        _, option, place = missing
        raise ValueError(
            f"resume: the images of the run, {place}, are not there; where they moved, name their "
            f"folder with {option}"
        )
    return after


def run(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    options: dict[str, Any] | None = None,
    listener: Listener | None = None,
) -> Result:
    """Trains as configured and leaves everything in `out`.

    Args:
      config: the run; where it goes on, from `config_to_resume`.
      out: its directory.
      resume: go on after the newest checkpoint that is whole, with the same numbers as if the run
        had not been interrupted; start at the beginning where there is none yet.
      overwrite: remove what an earlier run left in `out`.
      options: what `metrics.json` calls so; default: the configuration's keys.
      listener: is told how it goes.

    Raises:
      ValueError: bad input; nothing was compiled, and nothing written.
      lrjax.BudgetTooSmallError: no plan fits the budget.
      DivergedError: a loss or gradient is not finite; says where.
      lrjax.app.diagnosis.OutOfMemoryError: the step does not fit; says what would.
      lrjax.app.checkpoints.CannotWriteError: the disk is full, or may not be written to.
      lrjax.app.interruption.StoppedError: a signal asked the run to end, and after a step it did.
    """
    # What the run keeps is found from another working directory too.
    config = building.with_folders(
        config, {key: place.absolute() for key, place in building.folders(config).items()}
    )
    if listener is None or not processes.is_first():
        listener = Listener()
    if config.run.keep:
        checkpoints.check_directory(out)
    if config.run.tensorboard:
        logs.check_tensorboard()
    with ExitStack() as held:

        def enter() -> None:
            report.check_writable(out)
            held.enter_context(locked(out, listener.note))
            directory.check(out, config, resume=resume, overwrite=overwrite)

        processes.first_does(enter)
        return _run(config, out, listener, options, resume=resume, overwrite=overwrite)


def _run(
    config: Config,
    out: Path,
    listener: Listener,
    options: dict[str, Any] | None,
    *,
    resume: bool,
    overwrite: bool,
) -> Result:
    """`run`, in a directory that no other trainer uses."""
    prepared = _prepared(config, listener, out if resume else None)
    start = _start(prepared, out, listener) if resume else None
    compiled: CompiledStep | None = None
    try:
        compiled = _compiled(prepared, out, start, resume, listener)
        _begin(prepared, compiled, out, start, overwrite=overwrite)
        return _Run(prepared, compiled, out, start, listener).result(options)
    except DivergedError as error:
        assert compiled is not None
        if jax.process_count() > 1:  # which have parts of the batch each
            raise
        error.args = (diagnosis.of_divergence(error, compiled, prepared.source),)
        raise
    except (jax.errors.JaxRuntimeError, DoesNotFitError) as error:
        if not diagnosis.is_out_of_memory(error):
            raise
        message = diagnosis.of_memory(error, config, prepared.source.image_shape, compiled)
        raise diagnosis.OutOfMemoryError(message) from error


def _compiled(
    prepared: Prepared, out: Path, start: Start | None, resume: bool, listener: Listener
) -> CompiledStep:
    config = prepared.config
    arguments: dict[str, Any] = {
        "model": prepared.model,
        "source": prepared.source,
        "optimizer": prepared.optimizer,
        "batch_size": config.train.batch,
        "seed": config.train.seed,
        "state": start.state if start else None,
        "placement": prepared.placement,
    }
    execution = prepared.execution
    if execution is None and resume and (out / saved.PLAN_FILE).exists():
        # The same plan again: another one would round otherwise.
        plan = Plan.load(out / saved.PLAN_FILE)
        if plan.devices == prepared.placement.rows:
            execution = planned(plan, prepared.placement)
    if execution is not None:
        # Tracing takes a part of the time that compiling the first parameters does.
        check_step(prepared.model, prepared.source, execution, batch_size=config.train.batch)
        listener.compiling(execution.label)
        return compile_step(strategy=execution, **arguments)
    listener.compiling("planning")
    assert config.strategy.budget is not None

    def on_plan(plan: Plan) -> None:
        listener.planned(plan)
        listener.compiling("plan")

    return budget.compile_within(config.strategy.budget, arguments, on_plan)


def _start(prepared: Prepared, out: Path, listener: Listener) -> Start | None:
    """Where the run goes on; None where it has no checkpoint yet.

    Raises:
      ValueError: no checkpoint can be read, it is of another model or version, the data are not
        the run's, more steps are done than are asked for, or there are results without one.
    """
    if not checkpoints.saved_steps(out):
        if (out / report.PARAMETERS_FILE).exists():
            raise ValueError(
                f"resume: {out} holds a trained network, and no checkpoint to go on after; name "
                "another directory, or train it anew with --overwrite instead of --resume"
            )
        listener.note(f"{out} has no checkpoint yet; starting at the beginning")
        return None
    train = prepared.config.train
    init_key, dropout_key = keys_of(train.seed)
    like = jax.eval_shape(
        lambda key: initial_state(
            prepared.model, prepared.source, prepared.optimizer, batch_size=train.batch, key=key
        ),
        init_key,
    )
    found: Checkpoint = checkpoints.newest(
        out,
        lambda step: checkpoints.restore(out, step, like),
        lambda text: listener.note(f"{text}; trying the one before"),
    )
    difference = prepared.difference(found.facts)
    if difference is not None:
        raise ValueError(
            f"resume: the data are not those of the run: {difference}; restore them, or start a "
            "run of its own"
        )
    if not np.array_equal(found.random_key, np.asarray(jax.random.key_data(dropout_key))):
        raise ValueError("resume: random keys are not the run's; use the same JAX settings")
    if found.step > prepared.steps:
        raise ValueError(
            f"steps: got {prepared.steps}, and {found.step} are done; use more than that"
        )
    if not prepared.config.run.keep and found.step < prepared.steps:
        raise ValueError(
            f"keep: got 0, and {out} has checkpoints, which would be older than the results; use 1 "
            "or more"
        )
    listener.note(f"going on after step {found.step}")
    return Start(found.step, found.state, found.facts["position"])


def _begin(
    prepared: Prepared, compiled: CompiledStep, out: Path, start: Start | None, *, overwrite: bool
) -> None:
    """Makes the directory, with the configuration, the plan and the samples in it."""
    if processes.is_first():
        _write_beginning(prepared, compiled, out, start, overwrite=overwrite)
    processes.wait_for_all("lrjax: the run's directory")
    processes.check_shared(out / saved.CONFIG_FILE)


def _write_beginning(
    prepared: Prepared, compiled: CompiledStep, out: Path, start: Start | None, *, overwrite: bool
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if start is None:
        directory.clear(out, everything=overwrite)
    else:
        if start.step < prepared.steps:
            directory.remove_results(out)
        for step in checkpoints.saved_steps(out):
            if step > start.step:  # it could not be read
                checkpoints.set_aside(out, step)
    saved.write_config(out, prepared.config)
    if isinstance(compiled.execution, Planned):
        compiled.execution.plan.save(out / saved.PLAN_FILE)
    config = prepared.config
    if start is None and config.run.samples:
        logs.write_samples(
            out / logs.SAMPLES_FILE,
            prepared.source,
            count=min(config.run.samples, len(prepared.source)),
            seed=config.train.seed,
            balanced=config.data.balanced,
            augmentation=config.augment.build(),
        )


class _Run:
    """The loop with all that surrounds it, in one process."""

    def __init__(
        self,
        prepared: Prepared,
        compiled: CompiledStep,
        out: Path,
        start: Start | None,
        listener: Listener,
    ) -> None:
        self._prepared, self._compiled, self._out = prepared, compiled, out
        self._start, self._listener = start, listener
        self._config = prepared.config
        self._evaluation: Evaluation | None = None
        self._evaluator: Evaluator | None = None
        if prepared.validation is not None:
            self._evaluator = Evaluator(
                prepared.model,
                prepared.validation,
                compiled.execution,
                batch_size=self._config.train.batch,
                placement=prepared.placement,
            )

    def result(self, options: dict[str, Any] | None) -> Result:
        """Trains, and writes what a finished run leaves."""
        config, run = self._config, self._config.run
        with ExitStack() as stack:
            self._log: logs.Log | None = None
            if processes.is_first():
                after = self._start.step if self._start else 0
                self._log = stack.enter_context(
                    logs.Log(self._out, after=after, tensorboard=run.tensorboard)
                )
            self._request = stack.enter_context(interruption.requests())
            self._checkpoints: Checkpoints | None = None
            if run.keep:
                self._checkpoints = stack.enter_context(Checkpoints(self._out, keep=run.keep))
            training = train(
                self._compiled,
                self._prepared.source,
                batch_size=config.train.batch,
                steps=self._prepared.steps,
                seed=config.train.seed,
                balanced=config.data.balanced,
                augmentation=config.augment.build(),
                start=self._start,
                on_progress=self._after_step,
            )
            if self._start is not None and self._start.step == self._prepared.steps:
                self._evaluate_again(self._start.step, training)
        whole = self._with_earlier_steps(training) if processes.is_first() else training
        metrics = report.metrics_of(
            whole,
            self._compiled.execution,
            options or config.flat(),
            self._prepared.skipped,
            self._evaluation,
        )
        if processes.is_first():
            report.write_run(self._out, whole, metrics)
        return Result(whole, self._compiled.execution, metrics, self._evaluation)

    def _after_step(self, progress: Progress) -> None:
        last = progress.step == self._prepared.steps
        numbers = ("loss", "gradient_norm", "seconds")
        self._write(progress.step, {name: getattr(progress, name) for name in numbers})
        self._listener.step(progress, self._prepared.steps)
        if self._evaluator is not None and (last or progress.step % self._validate_every == 0):
            state = progress.state
            self._evaluation = self._evaluated(self._evaluator, state.params, state.statistics)
            self._write(progress.step, report.validation_numbers(self._evaluation))
            self._listener.evaluated(progress.step, self._evaluation)
        is_stopped = processes.any_says(self._request.is_made) and not last
        is_due = last or is_stopped or progress.step % self._config.run.checkpoint_every == 0
        if self._checkpoints is not None and is_due:
            self._checkpoints.save(self._checkpoint(progress))
        if is_stopped:
            if self._checkpoints is not None:
                self._checkpoints.wait()
            is_saved = self._checkpoints is not None
            raise StoppedError(progress.step, is_saved=is_saved, by=self._request.by)

    def _write(self, step: int, numbers: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(step, numbers)

    @property
    def _validate_every(self) -> int:
        epoch = math.ceil(len(self._prepared.source) / self._config.train.batch)
        return self._config.train.validate_every or epoch

    def _evaluated(self, evaluator: Evaluator, params: Any, statistics: Any) -> Evaluation:
        assert self._prepared.validation is not None
        return evaluator(params, statistics, self._prepared.validation)

    def _evaluate_again(self, step: int, training: Training) -> None:
        """Of a run with no step to make: what it found before is in the log, if anywhere."""
        if self._evaluator is None:
            return
        params, statistics = training.params, training.statistics
        self._evaluation = self._evaluated(self._evaluator, params, statistics)
        logged = (line for line in logs.read(self._out) if line["step"] == step)
        if not any("validation_loss" in line for line in logged):
            self._write(step, report.validation_numbers(self._evaluation))
        self._listener.evaluated(step, self._evaluation)

    def _checkpoint(self, progress: Progress) -> Checkpoint:
        facts = {
            "config": self._config.kept(),
            "position": progress.position,
            **self._prepared.facts,
        }
        key = np.asarray(jax.random.key_data(self._compiled.dropout_key))
        return Checkpoint(progress.step, progress.state, key, facts)

    def _with_earlier_steps(self, training: Training) -> Training:
        """The log has the steps before an interruption too."""
        lines = [line for line in logs.read(self._out) if "loss" in line]
        whole = replace(
            training,
            losses=tuple(line["loss"] for line in lines),
            step_seconds=tuple(line["seconds"] for line in lines),
        )
        if training.losses:
            return whole
        # No step was measured; an earlier process may have done so.
        return replace(whole, memory=report.memory_before(self._out, whole))
