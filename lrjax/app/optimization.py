"""Optimisers and learning-rate schedules by name: optax's own, put together from numbers.

A schedule counts steps of training; with accumulation, several steps make one update.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from lrjax.app.suggestions import did_you_mean

SCHEDULES = ("constant", "cosine", "warmup", "step", "exponential")

# What takes a learning rate and is no optimiser that a loss alone can drive.
_NOT_ALONE = {
    "dpsgd": "it needs the gradient of every image by itself",
    "sophia": "it estimates a Hessian with passes of its own",
    "schedule_free": "its parameters are not the ones to evaluate",
    "schedule_free_adamw": "its parameters are not the ones to evaluate",
    "schedule_free_sgd": "its parameters are not the ones to evaluate",
}
# Beyond optax's: the momentum that people mean by SGD.
_DEFAULTS: dict[str, dict[str, Any]] = {"noisy_sgd": {"key": 0}, "sgd": {"momentum": 0.9}}
_RATES = {"learning_rate", "max_learning_rate"}
_WITHOUT_SCHEDULE = ("optimistic_adam", "polyak_sgd", "rprop", "sm3")


@dataclass(frozen=True)
class Schedule:
    """A learning rate over the steps of training.

    Attributes:
      name: `"constant"`; `"warmup"` (linear, then constant); `"cosine"` (to `end` times the rate at
        the last step); `"step"` (times `factor` after each of `boundaries`); `"exponential"` (times
        `factor` every `every` steps, smoothly).
      warmup_steps: of a linear start from zero, before any of these; `"warmup"` needs some.
      end: cosine's last rate, as a part of the first.
      factor: of step and exponential.
      boundaries: numbers of steps after which step multiplies.
      every: steps in which exponential multiplies once; default: all of them.

    Raises:
      ValueError: for a name that does not exist and numbers out of range.
    """

    name: str = "constant"
    warmup_steps: int = 0
    end: float = 0.0
    factor: float = 0.1
    boundaries: tuple[int, ...] = ()
    every: int | None = None

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            hint = did_you_mean(self.name, SCHEDULES)
            raise ValueError(f"schedule: got {self.name!r}; {hint}")
        if self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps: got {self.warmup_steps}; use 0 or more")
        if self.name == "warmup" and not self.warmup_steps:
            raise ValueError("schedule.warmup_steps: got 0; warmup needs some, or use constant")
        if not 0 <= self.end <= 1:
            raise ValueError(f"schedule.end: got {self.end}; use a part of the rate, 0 to 1")
        if not self.factor > 0:
            raise ValueError(f"schedule.factor: got {self.factor}; use a positive number")
        if self.name == "step" and not self.boundaries:
            raise ValueError("schedule.boundaries: got none; give steps, such as [1000, 2000]")
        if any(b < 1 for b in self.boundaries) or sorted(set(self.boundaries)) != list(
            self.boundaries
        ):
            raise ValueError(
                f"schedule.boundaries: got {list(self.boundaries)}; use rising positive steps"
            )
        if self.every is not None and self.every < 1:
            raise ValueError(f"schedule.every: got {self.every}; use 1 or more steps")

    @property
    def depends_on_length(self) -> bool:
        """Another number of steps gives other rates from the first step on."""
        return self.name == "cosine" or (self.name == "exponential" and self.every is None)

    def notes(self, steps: int) -> tuple[str, ...]:
        """What is odd about so many steps of training, and allowed."""
        if self.warmup_steps < steps:
            return ()
        return (
            f"schedule.warmup_steps: got {self.warmup_steps}, and training has {steps} steps: the "
            "learning rate never reaches optimizer.lr; use fewer, or more steps",
        )

    def of(self, rate: float, steps: int) -> optax.Schedule:
        """The rate of every step, counted from 0, where training has so many."""
        after = max(1, steps - self.warmup_steps)
        if self.name == "cosine":
            # Cosine reaches its end with the last step, not one later.
            main = optax.cosine_decay_schedule(rate, max(1, after - 1), alpha=self.end)
        elif self.name == "step":
            boundaries = {b - self.warmup_steps: self.factor for b in self.boundaries}
            main = optax.piecewise_constant_schedule(rate, boundaries)
        elif self.name == "exponential":
            main = optax.exponential_decay(rate, self.every or after, self.factor)
        else:
            main = optax.constant_schedule(rate)
        if not self.warmup_steps:
            return main
        # The first step has a rate already, the step after the last of these has all of it.
        count = self.warmup_steps + 1
        warmup = optax.linear_schedule(rate / count, rate, self.warmup_steps)
        return optax.join_schedules([warmup, main], [self.warmup_steps])


@dataclass(frozen=True)
class Optimizer:
    """An optimiser and what surrounds it.

    Attributes:
      name: of a function of `optax` or `optax.contrib` that takes a learning rate (`names()`).
      lr: the learning rate, before the schedule.
      settings: further arguments of that function, such as `{"weight_decay": 1e-4}`. Where it has
        no `weight_decay`, the decay is added to the gradient (`optax.add_decayed_weights`).
      clip_norm: gradients are scaled down to this norm, of all together; None: not at all.
      accumulate: batches whose gradients are averaged for one update (`optax.MultiSteps`).

    Raises:
      ValueError: for what does not exist or is out of range.
    """

    name: str = "sgd"
    lr: float = 1e-3
    settings: Mapping[str, Any] = field(default_factory=dict)
    clip_norm: float | None = None
    accumulate: int = 1

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr: got {self.lr}; use a positive number")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"optimizer.clip_norm: got {self.clip_norm}; use a positive number")
        if self.accumulate < 1:
            raise ValueError(f"optimizer.accumulate: got {self.accumulate}; use 1 or more batches")
        allowed = _parameters(self.name)
        for setting, value in self.settings.items():
            if setting not in (*allowed, "weight_decay"):
                hint = did_you_mean(setting, {*allowed, "weight_decay"})
                raise ValueError(f"optimizer.{setting}: {self.name} has no such option; {hint}")
            _check_setting(setting, value, allowed.get(setting))
        if self.name == "lbfgs" and self.accumulate > 1:
            raise ValueError("optimizer.accumulate: lbfgs searches along every batch; use 1")

    @property
    def all_settings(self) -> dict[str, Any]:
        """The settings, and what those that are not given are; lists as tuples."""
        every = {**_parameters(self.name), **self.settings}
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in every.items()
        }

    def check_steps(self, steps: int) -> None:
        """Refuses a training of so many steps that makes no update.

        Raises:
          ValueError: says what to do.
        """
        if self.accumulate > steps:
            raise ValueError(
                f"optimizer.accumulate: got {self.accumulate}, and training has {steps} steps (a "
                f"step is a batch), which make no update; use {steps} or less, or more steps"
            )

    def notes(self, steps: int) -> tuple[str, ...]:
        """What is odd about so many steps of training, and allowed."""
        left = steps % self.accumulate
        if not left:
            return ()
        updates = steps // self.accumulate
        many = "1 update" if updates == 1 else f"{updates} updates"
        which = "the last batch changes" if left == 1 else f"the last {left} batches change"
        return (
            f"optimizer.accumulate: {steps} steps make {many} of {self.accumulate} batches, and "
            f"{which} nothing; use {steps - left} steps, or {steps - left + self.accumulate}",
        )

    def build(self, schedule: Schedule, steps: int) -> optax.GradientTransformationExtraArgs:
        """The transformation, for a training of so many steps.

        Raises:
          ValueError: where optax does not accept a setting.
        """
        settings = {**_DEFAULTS.get(self.name, {}), **self.settings}
        parameters = _parameters(self.name)
        decay = None if "weight_decay" in parameters else settings.pop("weight_decay", None)
        settings[_rate_parameter(self.name)] = self._rate(schedule, steps)
        try:
            parts = [_function(self.name)(**settings)]
            if decay is not None:
                parts.insert(0, optax.add_decayed_weights(decay))
            if self.clip_norm is not None:
                parts.insert(0, optax.clip_by_global_norm(self.clip_norm))
            whole = optax.with_extra_args_support(
                optax.chain(*parts) if len(parts) > 1 else parts[0]
            )
            if self.name != "lbfgs":  # its line search takes long to trace
                jax.eval_shape(lambda: _tried(whole))
        except Exception as error:
            raise ValueError(
                f"optimizer: {self.name} does not accept {dict(self.settings)}: {error}"
            ) from None
        if self.accumulate == 1:
            return whole
        steps_together = optax.MultiSteps(whole, self.accumulate)
        # MultiSteps' own `gradient_transformation` drops the loss, which some optimisers read.
        return optax.GradientTransformationExtraArgs(steps_together.init, steps_together.update)

    def _rate(self, schedule: Schedule, steps: int) -> float | optax.Schedule:
        if schedule == Schedule():
            return self.lr
        if self.name in _WITHOUT_SCHEDULE:
            raise ValueError(f"schedule: {self.name} takes one learning rate; use constant")
        rate = schedule.of(self.lr, steps)
        # optax counts updates, a schedule steps.
        return lambda updates: rate(updates * self.accumulate)


def names() -> tuple[str, ...]:
    """Every optimiser of `optax` and `optax.contrib` that can be asked for."""
    return tuple(sorted(_functions()))


@functools.cache
def _functions() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for module in (optax.contrib, optax):
        for name, function in vars(module).items():
            public = name[0] != "_" and not name.startswith("scale_by")
            if not (public and inspect.isfunction(function)) or name in _NOT_ALONE:
                continue
            if _RATES & inspect.signature(function).parameters.keys():
                found[name] = function
    return found


def _tried(optimizer: optax.GradientTransformationExtraArgs) -> Any:
    """An update of small parameters, so that a setting that fails does so early."""
    params = {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}
    state = optimizer.init(params)
    return optimizer.update(params, state, params, value=jnp.ones(()), grad=params)


def _function(name: str) -> Callable[..., Any]:
    if name in _NOT_ALONE:
        raise ValueError(f"optimizer: got {name!r}; {_NOT_ALONE[name]}")
    if name not in _functions():
        raise ValueError(f"optimizer: got {name!r}; {did_you_mean(name, _functions())}")
    return _functions()[name]


def _parameters(name: str) -> dict[str, Any]:
    """What may be set, beside the learning rate, and what it is where it is not set."""
    parameters = inspect.signature(_function(name)).parameters
    defaults = {one: parameters[one].default for one in parameters if one not in _RATES}
    return {**defaults, **_DEFAULTS.get(name, {})}


def _check_setting(name: str, value: Any, default: Any) -> None:
    """Refuses a value that optax would take for another: any text counts as true."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool) and (isinstance(value, str) or is_number):
        raise ValueError(f"optimizer.{name}: got {value!r}; write true or false")
    takes_number = isinstance(default, int | float) and not isinstance(default, bool)
    is_nan = is_number and math.isnan(value)
    if is_nan or (takes_number and isinstance(value, str | bool)):
        raise ValueError(f"optimizer.{name}: got {value!r}; write a number")
    if name == "weight_decay" and value is not None and not (is_number and 0 <= value < math.inf):
        raise ValueError(
            f"optimizer.weight_decay: got {value!r}; write a number, 0 or more, such as 1e-4"
        )


def _rate_parameter(name: str) -> str:
    (rate,) = _RATES & inspect.signature(_function(name)).parameters.keys()
    return rate
