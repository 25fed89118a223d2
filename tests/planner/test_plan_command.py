"""``lrjax plan``: what it prints and writes, and what it says of bad input."""

import numpy as np
import pytest
from networks import logits, structs
from typer.testing import CliRunner

import lrjax
from lrjax.app import planning as command
from lrjax.app.cli import app
from lrjax.planner import inverse
from marks import COMPILES_FOR_H200

pytestmark = pytest.mark.users_compiler

SMALL = ("--model", "vgg16", "--width", "0.03125", "--image", "64x32", "--target", "cpu")


def invoke(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def sides(output):
    """The largest size by every method, of the table that is printed."""
    found = dict.fromkeys(("column", "best checkpoint", "lrjax"), 0)
    for line in output.splitlines():
        cells = [cell.strip() for cell in line.split("│")]
        if len(cells) > 2 and cells[1] in found:
            found[cells[1]] = int(cells[2].replace(",", ""))
    return found


@pytest.fixture
def small_network(monkeypatch):
    """Four convolutions for VGG-16's thirteen, for which a search of many plans takes minutes."""

    def call(network, image, batch, dtype, **options):
        return logits, structs(*image, batch=batch, dtype=np.float32), (None, 1)

    monkeypatch.setattr(command, "training_call", call)


@pytest.mark.slow
def test_a_plan_is_printed_and_saved(tmp_path):
    result = invoke(*SMALL, "--budget", "1GiB", "--save", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    assert "1.000 x column's operations" in result.output
    assert lrjax.Plan.load(tmp_path / "plan.json").is_column


class TestDevices:
    pytestmark = COMPILES_FOR_H200
    SMALL = ("--model", "vgg16", "--width", "0.03125", "--target", "h200", "--devices", 2)

    @pytest.mark.slow
    def test_a_plan_for_several(self, tmp_path):
        size = "--image", "128x32", "--budget", "1GiB"
        result = invoke(*self.SMALL, *size, "--save", tmp_path / "plan.json")
        assert result.exit_code == 0, result.output
        assert "h200 x 2 (rows along the mesh axis 'rows')" in result.output
        assert lrjax.Plan.load(tmp_path / "plan.json").devices == 2

    @pytest.mark.slow
    def test_a_frontier_for_several(self, tmp_path, small_network):
        call = "--image", "128x32", "--budget", "1GiB", "--steps", 2
        result = invoke(*self.SMALL, *call, "--frontier", tmp_path / "frontier.png")
        assert result.exit_code == 0, result.output
        assert (tmp_path / "frontier.png").stat().st_size > 1000
        assert "method      budget MiB  peak MiB" in result.output

    def test_times_on_several_are_refused(self, tmp_path):
        call = "--image", "128x32", "--timed", "--frontier", tmp_path / "frontier.png"
        result = invoke(*self.SMALL, *call)
        assert result.exit_code == 2
        assert "leave --devices or --timed out" in " ".join(result.output.split())
        assert not (tmp_path / "frontier.png").exists()

    @pytest.mark.slow
    def test_the_largest_batch_on_several(self, monkeypatch, small_network):
        only = {"column": inverse.METHODS["column"]}  # others take minutes
        monkeypatch.setattr(inverse, "METHODS", only)
        call = "--maximise", "batch", "--image", "128x32", "--budget", "16MiB"
        result = invoke(*self.SMALL, *call)
        assert result.exit_code == 0, result.output
        alone = sides(invoke(*self.SMALL[:-2], *call).output)
        assert sides(result.output)["column"] > alone["column"] > 0


@pytest.mark.slow
def test_the_largest_batch_by_every_method(small_network):
    result = invoke(*SMALL, "--maximise", "batch", "--budget", "2MiB")
    assert result.exit_code == 0, result.output
    found = sides(result.output)
    assert found["lrjax"] >= found["best checkpoint"] >= found["column"] > 0
    assert found["lrjax"] > found["column"]


def test_the_largest_batch_is_of_the_images_asked_for(monkeypatch):
    def seen(network, image, batch, dtype, **options):
        raise ValueError(f"images of {image}")

    monkeypatch.setattr(command, "training_call", seen)
    result = invoke(*SMALL, "--maximise", "batch", "--budget", "24MiB")
    assert result.exit_code == 2
    assert "images of (64, 32)" in result.output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--budget", "8GX"), 2, "no unit"),
        (("--budget", "1KiB"), 3, "arguments and gradients"),
        (("--budget", "1024"), 3, "budget=1.0 KiB: arguments and gradients"),
        (("--budget", "1"), 3, "budget=1 bytes: arguments and gradients"),
        (("--maximise", "beauty"), 2, "use image or batch"),
        (("--maximise", "batch", "--save", "plan.json"), 2, "answers with a table alone"),
        (("--batch", "0"), 2, "use 1 or more"),
        (("--image", "big"), 2, "use N or HEIGHTxWIDTH"),
        (("--dtype", "f33"), 2, "dtype: got 'f33'"),
        (("--save", "nowhere/plan.json"), 2, "does not exist"),
        (("--devices", "0"), 2, "devices: got 0; use 1 or more"),
        (("--devices", "4096"), 2, "wants 4096 devices and there"),
    ],
)
def test_bad_input(arguments, status, message):
    result = invoke(*SMALL, *arguments)
    assert result.exit_code == status, result.output
    assert message in result.output.replace("\n", " ")


def test_a_curve_that_rises_below_its_points_hides_no_size(monkeypatch):
    """Predictions at half, once and twice the reference; a parabola through them is high at 1."""
    question = inverse.Question(lambda size: None, 1, 64, memory_bytes=512, grows_rows=False)
    search = inverse._Largest(question, "lrjax", lambda progress: None)
    peaks = {32: 500, 64: 480, 128: 900}
    monkeypatch.setattr(search, "predicted", lambda reference, size: peaks[size])
    assert 64 <= search.predicted_size(64, 1.0) < 128
