"""Checkpoints of a training run: all that is needed to go on bit for bit, written by orbax.

A checkpoint appears whole or not at all. Beside orbax's own metadata it holds a checksum of every
array, so that a damaged one is noticed and the one before it is used.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from lrjax.app.step import State

DIRECTORY = "checkpoints"
DAMAGED = "damaged"
# Raised when a checkpoint of this version could not be read by the one before.
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, of another version or of another model."""


class CannotWriteError(OSError):
    """A checkpoint could not be written; the ones before it are whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A run after some steps.

    Attributes:
      step: how many.
      state: parameters, statistics, optimizer state.
      random_key: data of the run's dropout key, uint32.
      facts: what JSON can hold: the configuration, the data's position, names of classes.
    """

    step: int
    state: State = field(repr=False)
    random_key: np.ndarray = field(repr=False)
    facts: Mapping[str, Any] = field(repr=False)


def check_directory(run: Path) -> None:
    """Refuses a directory in which orbax would lose arrays: it looks for its files by patterns.

    Raises:
      ValueError: its path has a character of such patterns.
    """
    found = sorted(set("[]*?") & set(str(run.absolute())))
    if found:
        raise ValueError(
            f"out: {run.absolute()} has {' '.join(found)} in its path, and checkpoints cannot be "
            "read from such directories; give another one, or --keep 0 for no checkpoints"
        )


class Checkpoints:
    """The checkpoints of one run; a context, which waits for the last one to be written.

    Args:
      run: the run's directory; they lie in its `checkpoints/`.
      keep: the newest ones that stay.
    """

    def __init__(self, run: Path, *, keep: int) -> None:
        self.directory = run / DIRECTORY
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, create=True
        )
        try:
            self._manager = ocp.CheckpointManager(self.directory.absolute(), options=self._options)
        except OSError as error:
            raise self._cannot_write(error) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        except Exception as failure:
            if error is None:
                raise self._cannot_write(failure) from failure

    def save(self, checkpoint: Checkpoint) -> None:
        """Copies the state and writes it in the background, after the one before it.

        Raises:
          CannotWriteError: this one, or the one before it, cannot be written.
        """
        arrays = _host_copy(_arrays(checkpoint.state, checkpoint.random_key))
        facts = {**checkpoint.facts, "format": FORMAT, "checksums": _checksums(arrays)}
        try:
            self._manager.save(
                checkpoint.step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays), facts=ocp.args.JsonSave(facts)
                ),
                force=True,
            )
        except Exception as error:
            raise self._cannot_write(error) from error

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
          CannotWriteError: it cannot be.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: Exception) -> CannotWriteError:
        steps = saved_steps(self.directory.parent)
        kept = f"the checkpoint of step {steps[-1]} is whole" if steps else "there is none yet"
        return CannotWriteError(
            f"a checkpoint cannot be written to {self.directory} ({_first_line(error)}); {kept}. "
            "Make room (or give another --out, or a smaller --keep) and go on with --resume."
        )


def saved_steps(run: Path) -> list[int]:
    """The steps that have a checkpoint, in order; none for a directory without."""
    try:
        found = [path for path in (run / DIRECTORY).iterdir() if path.name.isdecimal()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    # orbax writes under another name and renames, so what has this name was whole once.
    return sorted(int(path.name) for path in found)


def read_facts(run: Path, step: int) -> dict[str, Any]:
    """What a checkpoint says of its run, without its arrays.

    Raises:
      CheckpointError: it cannot be read, or is of another version.
    """
    try:
        with _reader(run) as manager:
            facts = manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))
        facts = dict(facts["facts"])
    except Exception as error:
        raise CheckpointError(f"step {step}: {_first_line(error)}") from error
    if facts.get("format") != FORMAT:
        raise CheckpointError(
            f"step {step}: it is of format {facts.get('format')}, and this lrjax reads {FORMAT}; "
            "use the lrjax that wrote it"
        )
    if not isinstance(facts.get("checksums"), dict) or "position" not in facts:
        raise CheckpointError(f"step {step}: its facts are not whole")
    return facts


def restore(run: Path, step: int, like: State) -> Checkpoint:
    """Reads a checkpoint and checks it.

    Args:
      run: the run's directory.
      step: which.
      like: a state of the same shapes, or their structs.

    Raises:
      CheckpointError: it cannot be read, is damaged, or is of another model or version.
    """
    facts = read_facts(run, step)
    template = _structs(_arrays(like, jax.random.key_data(jax.random.key(0))))
    _check_shapes(step, facts["checksums"], template)
    try:
        with _reader(run) as manager:
            restored = manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template))
            )
    except Exception as error:
        raise CheckpointError(f"step {step}: {_first_line(error)}") from error
    arrays = restored["state"]
    for name, entry in _checksums(arrays).items():
        if entry != facts["checksums"].get(name):
            raise CheckpointError(f"step {step}: {name} is not what was written")
    state = jax.tree.map(_as_given, State(*arrays["state"]), like)
    return Checkpoint(step, state, arrays["random_key"], facts)


def newest(run: Path, read: Callable[[int], Any], on_damaged: Callable[[str], None]) -> Any:
    """What `read` makes of the newest checkpoint that it can read.

    Args:
      run: the run's directory.
      read: takes a step, raises `CheckpointError`.
      on_damaged: is told of each that cannot be read.

    Raises:
      CheckpointError: there is none, or none can be read.
    """
    steps = saved_steps(run)
    for step in reversed(steps):
        try:
            return read(step)
        except CheckpointError as error:
            on_damaged(f"the checkpoint of {error}")
            last = error
    if not steps:
        raise CheckpointError(f"{run} holds no checkpoint; train with --keep 1 or more")
    raise CheckpointError(f"no checkpoint in {run / DIRECTORY} can be read; {last}")


def set_aside(run: Path, step: int) -> Path:
    """Moves a checkpoint that cannot be read out of the way of the one to come."""
    place = run / DAMAGED / str(step)
    place.parent.mkdir(exist_ok=True)
    number = 1
    while place.exists():
        number += 1
        place = place.with_name(f"{step}-{number}")
    return (run / DIRECTORY / str(step)).rename(place)


def _reader(run: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(create=False)
    return ocp.CheckpointManager((run / DIRECTORY).absolute(), options=options)


def _arrays(state: State, random_key: Any) -> dict[str, Any]:
    """One tree of plain arrays; random keys within are taken apart."""
    plain = jax.tree.map(_plain, tuple(state))
    return {"state": list(plain), "random_key": random_key}


def _plain(leaf: Any) -> Any:
    if not _is_key(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.random.key_data(leaf)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_given(array: Any, like: Any) -> Any:
    if _is_key(like):
        return jax.random.wrap_key_data(jnp.asarray(array))
    # A copy: on CPUs JAX would otherwise donate memory that is NumPy's.
    return jnp.array(array, copy=True)


def _host_copy(tree: Any) -> Any:
    """Copies, which stay as they are when the next step reuses the state's memory."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def _structs(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), tree)


def _by_path(arrays: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(arrays)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _checksums(arrays: Any) -> dict[str, list[Any]]:
    """Shape, type and CRC-32 of every array by its path."""
    return {
        name: [*_kind(array), zlib.crc32(_bytes_of(array))]
        for name, array in _by_path(arrays).items()
    }


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _kind(array: np.ndarray) -> list[Any]:
    return [list(array.shape), str(array.dtype)]


def _check_shapes(step: int, saved: Mapping[str, Any], template: Any) -> None:
    """Raises `CheckpointError` where arrays were saved of another model or optimizer."""
    wanted = {name: _kind(array) for name, array in _by_path(template).items()}
    found = {name: entry[:2] for name, entry in saved.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"step {step}: it is of another model or optimizer: {name} is "
                f"{_described(found.get(name))} in it and {_described(wanted.get(name))} here"
            )


def _described(entry: Any) -> str:
    return f"{entry[1]}{entry[0]}" if entry else "missing"


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[0][:300]}"
