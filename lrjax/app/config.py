"""A training run as a value: read from TOML or YAML, overridden key by key, and compared.

A key is dotted, `section.name`. What a value may be is known to whoever takes it; here it gets its
type.
"""

import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pydantic

from lrjax.app.data import DEFAULT_MAX_PIXELS, Augmentation
from lrjax.app.optimization import Optimizer, Schedule
from lrjax.app.suggestions import did_you_mean


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _not_empty_and_no_truth_for_a_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        if isinstance(value, str) and not value.strip():
            raise ValueError("give a value, or leave the key out")
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError("write a number")
        return value


class DataSection(_Section):
    """The images.

    Attributes:
      path: a folder, or `"digits"`.
      validation: what is held out: a part of the images, such as 0.1, or another folder.
      image_size: N or HEIGHTxWIDTH; default: 512 for digits, else the images' own.
      fit: how images of another size get there: `"native"` (crop and pad) or `"resize"`.
      digits: which digits are the classes of the built-in data.
      num_images: canvases of the built-in data.
      balanced: the classes take turns within a batch.
      max_pixels: images with more, by their header, are not decoded.
      unreadable: `"skip"`: leave unreadable files out and name them; `"error"`: stop.
    """

    path: str = "digits"
    validation: float | str | None = None
    image_size: str | None = None
    fit: str = "native"
    digits: str = "0,1,2,3,4,5,6,7,8,9"
    num_images: int = 1024
    balanced: bool = False
    max_pixels: int = DEFAULT_MAX_PIXELS
    unreadable: Literal["skip", "error"] = "skip"

    @pydantic.field_validator("validation", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        """A part is a number, also where the command line gives its text."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            return value
        return value if isinstance(value, bool) or not math.isfinite(number) else number

    @pydantic.field_validator("digits", "image_size", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return ",".join(map(str, value))
        return value


class AugmentSection(_Section):
    """Random changes to the images; see `lrjax.app.data.Augmentation`."""

    flip: bool = False
    flip_rows: bool = False
    crop: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def build(self) -> Augmentation | None:
        """The augmentation; None where it changes nothing."""
        made = Augmentation(**self.model_dump())
        return None if made == Augmentation() else made


class ModelSection(_Section):
    """The network: its name, multiplier of channels, head, normalisation, dtype of computation.

    Parameters are float32 whatever the dtype.
    """

    name: str = "vgg16"
    width: float = 1.0
    head: str | None = None
    norm: str | None = None
    dtype: str = "float32"


class StrategySection(_Section):
    """How the rows run: a strategy by name, a plan within a memory budget, or a saved plan.

    Attributes:
      name, num_blocks, cuts, micro_batches: as for `lrjax.app.strategy.Strategy`.
      budget: bytes that a step may take, such as `"8GiB"`; lrjax plans for it.
      plan: a file that `lrjax plan --save` or an earlier run wrote.
    """

    name: str = "stream"
    num_blocks: str | None = None
    cuts: str | None = None
    micro_batches: int = 1
    budget: str | None = None
    plan: str | None = None

    @pydantic.field_validator("num_blocks", "cuts", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


class MeshSection(_Section):
    """Devices; see `lrjax.app.placement`.

    Attributes:
      rows: that share the rows of each image. Default: one; of several processes, all there are.
      data: groups of devices that share a batch.
    """

    rows: int | None = None
    data: int = 1


class ProcessesSection(_Section):
    """How several processes find each other; see `lrjax.app.processes.start`. Not kept with a run.

    Attributes:
      count: how many, or `"auto"`, where JAX knows the scheduler. Default: this one alone.
      coordinator: `HOST:PORT` of the first.
      id: the number of this one.
    """

    count: int | Literal["auto"] | None = None
    coordinator: str | None = None
    id: int | None = None


class OptimizerSection(_Section):
    """The optimiser; keys beyond these are its own (`weight_decay`, `b1`, ...)."""

    model_config = pydantic.ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = "sgd"
    lr: float = 1e-3
    clip_norm: float | None = None
    accumulate: int = 1

    def build(self) -> Optimizer:
        settings = {key: _typed(value) for key, value in (self.model_extra or {}).items()}
        return Optimizer(self.name, self.lr, settings, self.clip_norm, self.accumulate)


class ScheduleSection(_Section):
    """The learning rate over the steps; see `lrjax.app.optimization.Schedule`."""

    name: str = "constant"
    warmup_steps: int = 0
    end: float = 0.0
    factor: float = 0.1
    boundaries: tuple[int, ...] = ()
    every: int | None = None

    @pydantic.field_validator("boundaries", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple) or any(isinstance(one, bool) for one in value):
            raise ValueError("write a list of steps, such as [1000, 2000]")
        return value

    def build(self) -> Schedule:
        return Schedule(**self.model_dump())


class TrainSection(_Section):
    """How long, and on how much.

    Attributes:
      batch: images per step.
      steps: of training; or
      epochs: rounds through the images.
      seed: of parameters, data, augmentation and dropout.
      validate_every: steps between looks at the held-out images; default: once an epoch.
    """

    batch: int = 2
    steps: int | None = None
    epochs: float | None = None
    seed: int = 0
    validate_every: int | None = None


class RunSection(_Section):
    """What a run leaves behind, which changes no number of it.

    Attributes:
      checkpoint_every: steps between checkpoints; the last step always has one.
      keep: the newest checkpoints that stay; 0: none are written.
      tensorboard: write event files for TensorBoard.
      samples: how many images, as training sees them, are drawn into `samples.png`.
    """

    checkpoint_every: int = 500
    keep: int = 2
    tensorboard: bool = False
    samples: int = 8


class Config(_Section):
    """A whole training run. Every section has a table of its own in a configuration file."""

    data: DataSection = DataSection()
    augment: AugmentSection = AugmentSection()
    model: ModelSection = ModelSection()
    strategy: StrategySection = StrategySection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = TrainSection()
    run: RunSection = RunSection()
    mesh: MeshSection = MeshSection()
    processes: ProcessesSection = ProcessesSection()

    @classmethod
    def of(cls, flat: Mapping[str, Any]) -> "Config":
        """A configuration from dotted keys; the others have their defaults.

        Raises:
          ValueError: for a key that does not exist, naming the nearest; for a value of another
            type; for numbers that no run can have.
        """
        nested: dict[str, Any] = {}
        for key, value in flat.items():
            _check_key(key)
            section, _, name = key.partition(".")
            nested.setdefault(section, {})[name] = value
        try:
            made = cls.model_validate(nested)
        except pydantic.ValidationError as error:
            lines = [
                f"{'.'.join(map(str, one['loc'][:2]))}: got {one['input']!r}; "
                + one["msg"].removeprefix("Value error, ")
                for one in error.errors()
            ]
            raise ValueError("\n".join(lines)) from None
        made.check()
        return made

    def flat(self) -> dict[str, Any]:
        """Every key with its value."""
        return {
            f"{section}.{name}": value
            for section, values in self.model_dump(mode="json").items()
            for name, value in values.items()
        }

    def kept(self) -> dict[str, Any]:
        """What a run's directory keeps, for JSON: all but where its processes met."""
        return self.model_dump(mode="json", exclude={"processes"})

    def check(self) -> None:
        """Raises `ValueError` for numbers that no run can have."""
        train, run = self.train, self.run
        positive = {
            "steps": train.steps,
            "batch": train.batch,
            "train.validate_every": train.validate_every,
            "checkpoint_every": run.checkpoint_every,
            "data.max_pixels": self.data.max_pixels,
            "devices": self.mesh.rows,
            "data_devices": self.mesh.data,
        }
        for name, number in positive.items():
            if number is not None and not number > 0:
                raise ValueError(f"{name}: got {number}; use 1 or more")
        not_negative = {"keep": run.keep, "run.samples": run.samples, "seed": train.seed}
        for name, number in not_negative.items():
            if number < 0:
                raise ValueError(f"{name}: got {number}; use 0 or more")
        if train.epochs is not None and not train.epochs > 0:
            raise ValueError(f"epochs: got {train.epochs}; use more than 0")
        if train.seed > _LARGEST_SEED:
            raise ValueError(f"seed: got {train.seed}; use {_LARGEST_SEED} or less")
        if train.steps is not None and train.epochs is not None:
            raise ValueError(
                f"steps: got {train.steps}, and epochs={train.epochs} too; give one of them"
            )
        if self.strategy.budget and self.strategy.plan:
            raise ValueError("budget: a plan is given too; give one of them")
        self.optimizer.build()
        self.schedule.build()
        self.augment.build()

    def notes(self, steps: int) -> tuple[str, ...]:
        """What a person should know before so many steps of training, and may have meant."""
        found = (*self.optimizer.build().notes(steps), *self.schedule.build().notes(steps))
        path, held_out = self.data.path, self.data.validation
        if (
            path == "digits"
            or not isinstance(held_out, str)
            or Path(held_out).resolve() != Path(path).resolve()
        ):
            return found
        return (
            f"validation: {held_out} is the folder of --data: loss and accuracy are of images that "
            "were learnt from; give another folder, or a part such as 0.1",
            *found,
        )

    def steps(self, num_images: int) -> int:
        """Steps of training on so many images."""
        if self.train.epochs is not None:
            return max(1, round(self.train.epochs * num_images / self.train.batch))
        return 20 if self.train.steps is None else self.train.steps


# JAX makes keys of 32 bits of a seed: greater ones would stand for the same keys.
_LARGEST_SEED = 2**32 - 1
LENGTH = {"train.steps", "train.epochs"}
# Keys that may change when a run goes on: they alter no number that it computes.
FREE_ON_RESUME = {
    *LENGTH,
    "train.validate_every",
    *(f"run.{name}" for name in RunSection.model_fields),
    *(f"processes.{name}" for name in ProcessesSection.model_fields),
}
# These change sums' order, and so the last bits; blocks are each device's own.
MESH = {f"mesh.{name}" for name in MeshSection.model_fields}


def differences(saved: Config, given: Config) -> dict[str, tuple[Any, Any]]:
    """Keys in which a run that goes on may not differ, and does: saved and given values."""
    one, other, before, now = _meaning(saved), _meaning(given), saved.flat(), given.flat()
    keys = {key for key in (*before, *now) if one.get(key) != other.get(key)}
    allowed = FREE_ON_RESUME - (LENGTH if saved.schedule.build().depends_on_length else set())
    allowed |= MESH | ({"strategy.num_blocks"} if keys & MESH else set())
    return {
        key: (before.get(key, one.get(key)), now.get(key, other.get(key)))
        for key in sorted(keys - allowed)
    }


def _meaning(config: Config) -> dict[str, Any]:
    """Every key, the optimiser's defaults among them, with one value for all that mean the same."""
    own = config.optimizer.build().all_settings
    found = config.flat() | {f"optimizer.{name}": value for name, value in own.items()}
    for key in ("data.digits", "data.image_size", "strategy.num_blocks", "strategy.budget"):
        if found[key] is not None:
            found[key] = "".join(found[key].split())
    size = found["data.image_size"]
    if size is not None:
        height, _, width = size.lower().replace("x", ",").partition(",")
        found["data.image_size"] = (height, width or height)
    return found


def keys() -> tuple[str, ...]:
    """Every key, but the optimisers' own."""
    return tuple(Config().flat())


def read(path: Path) -> dict[str, Any]:
    """The dotted keys and values of a TOML (`.toml`) or YAML (`.yaml`, `.yml`) file.

    Raises:
      ValueError: it cannot be read, is neither, or is no table of tables.
    """
    if path.suffix.lower() not in (".toml", ".yaml", ".yml"):
        raise ValueError(f"config: got {path}; use a .toml, .yaml or .yml file")
    try:
        text = path.read_text("utf-8-sig")  # Windows' editors begin files with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config: cannot read {path}: {error}") from None
    try:
        tables = tomllib.loads(text) if path.suffix.lower() == ".toml" else _yaml(text)
    except ValueError as error:
        raise ValueError(f"config: {path}: {error}") from None
    if not isinstance(tables, dict):
        raise ValueError(f"config: {path} is no table; write sections, such as [data]")
    return dict(_dotted(tables, path))


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice, as TOML does."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            names = [str(key.value) for key, _ in pairs]
            for (key, _), name in zip(pairs, names, strict=True):
                if names.count(name) > 1:
                    line = key.start_mark.line + 1
                    raise ValueError(f"line {line}: {name} is given twice; keep one of them")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _dotted(tables: Mapping[Any, Any], path: Path) -> Iterator[tuple[str, Any]]:
    for section, values in tables.items():
        if not isinstance(values, dict):
            if str(section) in Config.model_fields:
                raise ValueError(f"config: {path}: {section} is a section; give it keys of its own")
            if section in keys():
                own, name = str(section).split(".")
                raise ValueError(
                    f"config: {path}: {section} is no section; write {name} into section {own}"
                )
            raise ValueError(
                f"config: {path}: {section} is no section; {did_you_mean(str(section), keys())}"
            )
        for name, value in values.items():
            yield f"{section}.{name}", value


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Reads `key=value` texts; a value is TOML's, or else the text itself.

    Raises:
      ValueError: a text has no `=`.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"set: got {text!r}; write key=value, such as optimizer.lr=0.01")
        found[key.strip()] = _value(value.strip())
    return found


def _value(text: str) -> Any:
    if "\n" in text:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


# YAML 1.1 takes 1e-4 for a text, TOML does not know True, and either may have quotes around both.
_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _typed(value: Any) -> Any:
    """A setting of the optimiser, whose keys have no types here, by what its text says."""
    if not isinstance(value, str):
        return value
    if _FLOAT.fullmatch(value):
        return float(value)
    return _TRUTHS.get(value.lower(), value)


def _check_key(key: str) -> None:
    section, _, name = key.partition(".")
    fields = Config.model_fields
    own = section == "optimizer" and name != ""  # its further keys are judged with its name
    if not own and key not in keys():
        known = keys() if section in fields or not name else fields
        near = did_you_mean(key if known is not fields else section, known)
        raise ValueError(f"{key}: there is no such key; {near}")
