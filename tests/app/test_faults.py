"""What goes wrong in a run is named, with what to do, and what was saved before stays whole."""

import dataclasses
import errno
import resource
import struct
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from PIL import Image
from tiny_runs import go_on, train

from lrjax.app import checkpoints, diagnosis, logs, report, runs, saved, step
from lrjax.app.data import ImageFolder
from lrjax.app.strategy import Strategy
from lrjax.app.training import DivergedError
from lrjax.models import registry

# --- The disk -------------------------------------------------------------------------------------


class Full:
    """Lets no file grow beyond a few bytes, as a disk that is full, from a step on."""

    def __init__(self, monkeypatch, from_step):
        self._save, self._from = checkpoints.Checkpoints.save, from_step
        monkeypatch.setattr(checkpoints.Checkpoints, "save", lambda *args: self._limited(*args))

    def _limited(self, manager, checkpoint):
        if checkpoint.step < self._from:
            self._save(manager, checkpoint)
            manager.wait()
            return
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
        try:
            self._save(manager, checkpoint)
            manager.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_the_run_and_leaves_earlier_checkpoints_whole(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Full(patch, from_step=4)
        with pytest.raises(checkpoints.CannotWriteError) as caught:
            train(tmp_path)
    message = str(caught.value)
    assert "a checkpoint cannot be written" in message
    assert "the checkpoint of step 2 is whole" in message
    assert "go on with --resume" in message
    assert not (tmp_path / report.METRICS_FILE).exists()
    assert len(go_on(tmp_path).training.losses) == 4


def test_a_log_that_cannot_be_written_says_what_to_do(tmp_path):
    class File:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    with logs.Log(tmp_path) as log:
        log._file.close()
        log._file = File()
        with pytest.raises(OSError, match=r"metrics.jsonl cannot be written.*go on with --resume"):
            log.write(1, {"loss": 1.0})
        log._file = (tmp_path / "other").open("w")


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_compiled(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out: cannot write to"):
        train(tmp_path / "file" / "run")


@pytest.mark.parametrize("name", ["run [a]", "run*", "what?"])
def test_a_path_that_checkpoints_would_be_lost_in_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="in its path, and checkpoints cannot be read from such"):
        train(tmp_path / name)
    assert not (tmp_path / name).exists()


# --- Numbers --------------------------------------------------------------------------------------


class Overflowing(nn.Module):
    """Divides by zero in its second layer where an image is dark in its first pixel."""

    num_classes: int
    width: float = 1.0
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Conv(3, (3, 3), name="first")(images.astype(jnp.float32) / 255)
        x = Reciprocal(name="second")(x, images)
        return nn.Dense(self.num_classes, name="third")(x.mean(axis=(1, 2)))


class Reciprocal(nn.Module):
    @nn.compact
    def __call__(self, x, images):
        return x / jnp.where(images.mean(axis=-1, keepdims=True) > 253, 0.0, 1.0)


class SquareRoot(nn.Module):
    """Finite, but its gradient is not: the root of zero."""

    num_classes: int
    width: float = 1.0
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, images, *, train=False):
        x = nn.Conv(3, (3, 3), use_bias=False, name="first")(images.astype(jnp.float32) * 0)
        return nn.Dense(self.num_classes, name="second")(jnp.sqrt(jnp.abs(x)).mean(axis=(1, 2)))


@pytest.fixture
def networks(monkeypatch):
    for name, module in (("overflowing", Overflowing), ("square_root", SquareRoot)):
        monkeypatch.setitem(registry.NETWORKS, name, registry.Network(module))


@pytest.mark.parametrize("strategy", ["column", "stream"])
def test_the_first_layer_that_is_not_finite_is_named_with_step_and_images(
    tmp_path, networks, strategy
):
    folder = tmp_path / "images"
    for name, values in {"ant": (10, 20, 255), "bee": (30, 40, 50)}.items():
        (folder / name).mkdir(parents=True)
        for value in values:
            Image.new("RGB", (16, 16), (value,) * 3).save(folder / name / f"{value}.png")
    with pytest.raises(DivergedError) as caught:
        train(
            tmp_path / "run",
            data__path=str(folder),
            data__image_size=None,
            model__name="overflowing",
            strategy__name=strategy,
            train__batch=1,
            train__steps=6,
        )
    message = str(caught.value)
    assert f"at step {caught.value.step}" in message
    assert f"images: {folder / 'ant' / '255.png'}" in message
    assert "first layer whose output is not finite: second" in message


def test_a_gradient_that_is_not_finite_is_named(tmp_path, networks):
    with pytest.raises(DivergedError) as caught:
        train(tmp_path, model__name="square_root")
    assert "a gradient is not finite at step 1" in str(caught.value)
    assert "gradients that are not: first/kernel" in str(caught.value)


def test_a_step_that_is_not_finite_changes_nothing(networks):
    source = type("Black", (), {"image_shape": (16, 16, 3), "label_shape": ()})()
    optimizer = tiny_runs.configured().optimizer.build()
    compiled = step.compile_step(
        SquareRoot(2),
        source,
        optimizer.build(tiny_runs.configured().schedule.build(), 1),
        Strategy("column"),
        batch_size=1,
        seed=0,
    )
    before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), compiled.state)
    images = np.zeros((1, 16, 16, 3), np.uint8)
    after, outcome = compiled.call(compiled.state, images, np.zeros(1, np.int32), jax.random.key(0))
    assert not outcome.is_finite
    jax.tree.map(np.testing.assert_array_equal, before, after)


# --- Memory ---------------------------------------------------------------------------------------


def test_out_of_memory_says_what_is_needed_what_holds_it_and_what_fits(tmp_path, monkeypatch):
    def full(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte.")

    compiled = runs.compile_step
    monkeypatch.setattr(
        runs, "compile_step", lambda **given: dataclasses.replace(compiled(**given), call=full)
    )
    with pytest.raises(diagnosis.OutOfMemoryError) as caught:
        train(tmp_path, model__name="vgg16", model__width=0.03125, data__image_size=32)
    message = str(caught.value)
    assert "out of memory: RESOURCE_EXHAUSTED" in message
    assert "the step needs" in message
    assert "VGG16/" in message  # a layer's buffer
    assert "lrjax plan --model vgg16 --image 32x32 --batch 2 --dtype float32" in message


def test_another_error_of_xla_is_not_taken_for_it(tmp_path, monkeypatch):
    def broken(**given):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(runs, "compile_step", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        train(tmp_path)


# --- Images ---------------------------------------------------------------------------------------


def bomb(path, side):
    """A PNG of a few bytes whose header claims a square of pixels."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 64))
        + chunk(b"IEND", b"")
    )


def test_an_absurd_header_is_refused_before_decoding(tmp_path, monkeypatch):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    bomb(tmp_path / "ant" / "bomb.png", 100_000)
    (skipped,) = ImageFolder(tmp_path).skipped
    assert skipped.path == tmp_path / "ant" / "bomb.png"
    assert "its header says 100000x100000, 10,000,000,000 pixels" in skipped.reason
    assert "raise max_pixels" in skipped.reason
    assert len(ImageFolder(tmp_path, max_pixels=64)) == 2
    with pytest.raises(ValueError, match="no readable image in"):
        ImageFolder(tmp_path, max_pixels=63)


def test_unreadable_images_stop_the_run_where_asked_to(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / name / "0.png")
    broken = tmp_path / "images" / "bee" / "broken.png"
    broken.write_text("no image")
    with pytest.raises(ValueError, match=rf"files cannot be read.*\n  {broken}: Unidentified"):
        train(tmp_path / "run", data__path=str(tmp_path / "images"), data__unreadable="error")
    assert not (tmp_path / "run").exists()


# --- Files that are read back ---------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "{", "[]", '{"segments": []}', "\x80"])
def test_a_damaged_plan_is_refused(tmp_path, content):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ValueError, match="plan"):
        train(tmp_path / "run", strategy__plan=str(tmp_path / "plan.json"), strategy__name="stream")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"data": 3}', '{"data": {"pth": "x"}}'])
def test_a_damaged_configuration_of_a_run_is_refused(tmp_path, content):
    (tmp_path / saved.CONFIG_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"config.json is no configuration of this lrjax"):
        saved.load(tmp_path, print)


def test_a_log_that_was_cut_short_is_read_to_its_last_whole_line(tmp_path):
    (tmp_path / logs.LOG_FILE).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert logs.read(tmp_path) == [{"step": 1, "loss": 2.0}]
    with logs.Log(tmp_path, after=1) as log:
        log.write(2, {"loss": float("nan")})
    assert logs.read(tmp_path)[1] == {"step": 2, "loss": None}


@pytest.mark.parametrize("damaged", [b'{"step": 2, "lo', b"\xff\x00", b"[]", b'{"step": "2"}', b""])
def test_lines_after_a_damaged_one_are_kept(tmp_path, damaged):
    lines = [b'{"step": 1, "loss": 2.0}', damaged, b'{"step": 3, "loss": 1.0}', b""]
    (tmp_path / logs.LOG_FILE).write_bytes(b"\n".join(lines))
    assert [line["step"] for line in logs.read(tmp_path)] == [1, 3]
    with logs.Log(tmp_path, after=3) as log:
        log.write(4, {"loss": 0.5})
    assert [line["step"] for line in logs.read(tmp_path)] == [1, 3, 4]
