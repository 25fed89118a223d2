"""Nothing of anybody's is lost: what a run finds in its directory, beside it and above it."""

import os
import shutil

import numpy as np
import pytest
import tiny_runs
from PIL import Image
from tiny_runs import go_on, train

from lrjax import Plan
from lrjax.app import checkpoints, cli, directory, report, runs, saved, using
from lrjax.app.commands import compare
from lrjax.app.data import finding


def pictures(folder, classes=("ant", "bee"), count=4):
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_a_plan_that_the_run_does_not_write_stays(tmp_path):
    (tmp_path / saved.PLAN_FILE).write_text("mine")
    train(tmp_path, train__steps=1)
    assert (tmp_path / saved.PLAN_FILE).read_text() == "mine"


def test_a_trained_network_without_checkpoints_is_not_trained_over(tmp_path):
    train(tmp_path, train__steps=2, run__keep=0)
    before = (tmp_path / report.PARAMETERS_FILE).read_bytes()
    with pytest.raises(ValueError, match="no checkpoint to go on after"):
        go_on(tmp_path, train__steps=3)
    assert (tmp_path / report.PARAMETERS_FILE).read_bytes() == before


def test_a_run_with_checkpoints_goes_on_with_them(tmp_path):
    train(tmp_path, train__steps=2)
    with pytest.raises(ValueError, match="older than the results; use 1 or more"):
        go_on(tmp_path, train__steps=4, run__keep=0)
    assert report.read_metrics(tmp_path)["losses"]


def test_a_link_to_another_disk_is_emptied_and_stays(tmp_path):
    scratch, out = tmp_path / "scratch", tmp_path / "run"
    scratch.mkdir()
    out.mkdir()
    (out / checkpoints.DIRECTORY).symlink_to(scratch)
    runs.run(tiny_runs.configured(train__steps=4), out, overwrite=True)
    assert checkpoints.saved_steps(out) == [2, 4]
    runs.run(tiny_runs.configured(train__steps=2, train__seed=5), out, overwrite=True)
    assert (out / checkpoints.DIRECTORY).is_symlink()
    assert checkpoints.saved_steps(out) == [2]
    assert using.evaluate(out, None)["step"] == 2


def test_what_cannot_be_removed_is_said(tmp_path, monkeypatch):
    (tmp_path / checkpoints.DIRECTORY).mkdir()

    def fails(place):
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(shutil, "rmtree", fails)
    with pytest.raises(PermissionError):
        directory.clear(tmp_path, everything=True)


def test_a_run_keeps_the_plan_that_it_was_given(tmp_path):
    settings = {"data__image_size": 64, "train__steps": 2, "strategy__name": "stream"}
    for name, budget in (("roomy", "8GiB"), ("tight", "3MiB")):
        train(tmp_path / name, strategy__budget=budget, **settings)
    given, out = tmp_path / "given.json", tmp_path / "run"
    shutil.copy(tmp_path / "roomy" / saved.PLAN_FILE, given)
    train(out, strategy__plan=str(given), **settings)
    kept = Plan.load(out / saved.PLAN_FILE)
    shutil.copy(tmp_path / "tight" / saved.PLAN_FILE, given)
    assert Plan.load(given) != kept
    assert go_on(out, train__steps=3).execution.plan == kept
    given.unlink()
    assert go_on(out, train__steps=4).execution.plan == kept
    assert using.evaluate(out, None)["step"] == 4


@pytest.mark.parametrize("place", ["run", "ant/run", "."])
def test_a_run_among_the_images_is_refused(tmp_path, place):
    folder = pictures(tmp_path / "images")
    config = tiny_runs.configured(data__path=str(folder), data__image_size=None)
    for use in (runs.check, runs.run):
        with pytest.raises(ValueError, match="would be taken for images"):
            use(config, folder / place)
    assert sorted(os.listdir(folder)) == ["ant", "bee"]


def test_a_pipe_is_left_alone(tmp_path):
    folder = pictures(tmp_path / "images")
    os.mkfifo(folder / "ant" / "pipe.png")
    found = finding.images_below(folder)
    assert len(found.files) == 8
    assert [str(one) for one in found.unreadable if "neither a file" in str(one)]


def test_a_validation_folder_that_is_not_there(tmp_path):
    folder = pictures(tmp_path / "images")
    config = tiny_runs.configured(
        data__path=str(folder), data__image_size=None, data__validation="10%"
    )
    with pytest.raises(ValueError, match=r"validation: 10% is no directory; .* such as 0.1"):
        runs.check(config)


@pytest.mark.parametrize("budget", ["abc", "50%", "0"])
def test_check_reads_the_budget(budget):
    with pytest.raises(ValueError, match="budget"):
        runs.check(tiny_runs.configured(strategy__name="stream", strategy__budget=budget))


def test_check_looks_at_the_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to"):
        runs.check(tiny_runs.configured(), tmp_path / "file")


def test_every_strategy_that_is_compared_has_a_directory_of_its_own(tmp_path):
    specs = ["stream:2,4@pool1", "stream:2/4@pool1", "stream:2-4@pool1", "column"]
    places = compare._directories(tmp_path, specs)
    assert len(set(places.values())) == len(specs)
    assert places["column"] == tmp_path / "column"


@pytest.mark.parametrize(
    ("raised", "status"), [(KeyboardInterrupt(), 130), (ValueError("another"), None)]
)
def test_an_interrupted_command_ends_at_once(monkeypatch, raised, status):
    """While XLA compiles in threads, Python's own end is a segmentation fault."""

    def command():
        try:
            raise raised
        except BaseException:
            raise SystemExit(7)  # noqa: B904 - as click does

    ended = []
    monkeypatch.setattr(cli, "app", command)
    monkeypatch.setattr(os, "_exit", ended.append)
    if status is None:
        with pytest.raises(SystemExit):
            cli.main()
    else:
        cli.main()
    assert ended == ([] if status is None else [status])
