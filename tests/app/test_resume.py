"""A run that is interrupted, however, ends with the bits of one that was not."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
from PIL import Image
from tiny_runs import Notes, assert_same_bits, go_on, train

import quick
from lrjax.app import building, checkpoints, directory, logs, report, runs, saved, using
from lrjax.app.data import SegmentationFolder
from lrjax.app.data.sources import checksum_of_files
from marks import slow

SETTINGS = {
    "all": {
        "augment__flip": True,
        "augment__crop": 3,
        "augment__brightness": 0.2,
        "data__balanced": True,
        "optimizer__name": "adamw",
        "optimizer__accumulate": 2,
        "optimizer__clip_norm": 1.0,
        "data__validation": 0.25,
    },
    "random keys": {"optimizer__name": "noisy_sgd", "strategy__name": "stream"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps with checkpoints of 2 and 4, not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(out)
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run, of six steps."""
    return train(tmp_path_factory.mktemp("whole") / "run", train__steps=6)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of `finished`."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_run_goes_on_with_the_same_bits(run, whole):
    assert_same_bits(go_on(run, train__steps=6), whole)
    lines = logs.read(run)
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert [line["loss"] for line in lines] == list(whole.training.losses)


@pytest.mark.parametrize(
    "settings", [SETTINGS["all"], pytest.param(SETTINGS["random keys"], marks=pytest.mark.slow)]
)
def test_everything_that_is_random_goes_on(tmp_path, settings):
    whole = train(tmp_path / "whole", train__steps=7, **settings)
    train(tmp_path / "parts", train__steps=3, **settings)
    assert_same_bits(go_on(tmp_path / "parts", train__steps=7), whole)


def test_steps_after_the_checkpoint_are_made_again(run, whole):
    """Killed within step 4, the last checkpoint is of step 2."""
    shutil.rmtree(run / checkpoints.DIRECTORY / "4")
    assert_same_bits(go_on(run, train__steps=6), whole)


def test_a_run_without_checkpoint_starts_at_the_beginning(run, whole):
    shutil.rmtree(run / checkpoints.DIRECTORY)
    directory.remove_results(run)
    notes = Notes()
    assert_same_bits(go_on(run, notes, train__steps=6, run__keep=0), whole)
    assert "no checkpoint yet" in notes.notes[0]
    assert not (run / checkpoints.DIRECTORY).exists()


def test_a_finished_run_writes_its_results_again(run):
    """It may have been killed between the last checkpoint and the results."""
    before = report.read_metrics(run)
    (run / report.METRICS_FILE).unlink()
    go_on(run)
    assert report.read_metrics(run)["losses"] == before["losses"]


@pytest.mark.parametrize("lost", [None, report.METRICS_FILE, "log's last line"])
def test_a_finished_run_that_goes_on_has_the_same_results(of_folders, tmp_path, lost):
    """With held-out images, and with nothing left to train."""
    run = shutil.copytree(of_folders / "run", tmp_path / "run")
    before, lines = report.read_metrics(run), logs.read(run)
    if lost == report.METRICS_FILE:
        (run / lost).unlink()
    elif lost:
        text = (run / logs.LOG_FILE).read_text()
        (run / logs.LOG_FILE).write_text(text[: text.rindex('{"step": 4')])
    notes = Notes()
    go_on(run, notes)
    after = report.read_metrics(run)
    assert after["losses"] == before["losses"]
    assert after["validation"] == before["validation"]
    assert logs.read(run) == lines
    assert [step for step, _ in notes.evaluations] == [4]
    if lost != report.METRICS_FILE:
        assert after["rss_peak_bytes"] == before["rss_peak_bytes"] > 0


class Interrupted(runs.Listener):
    def step(self, progress, steps):
        raise KeyboardInterrupt


def test_results_of_fewer_steps_are_gone_while_a_run_goes_on(run):
    with pytest.raises(KeyboardInterrupt):
        go_on(run, Interrupted(), train__steps=6)
    assert not [name for name in report.RESULT_FILES if (run / name).exists()]
    assert checkpoints.saved_steps(run) == [2, 4]


def damage_array(checkpoint: Path):
    """Turns a byte of the largest file, which holds arrays."""
    largest = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(bytes(content))


def remove_half(checkpoint: Path):
    shutil.rmtree(checkpoint / "state")


def truncate_facts(checkpoint: Path):
    path = checkpoint / "facts" / "metadata"
    path.write_text(path.read_text()[:40])


def forget_facts(checkpoint: Path):
    (checkpoint / "facts" / "metadata").write_text('{"format": 1}')


def empty(checkpoint: Path):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        damage_array,
        *(pytest.param(d, marks=pytest.mark.slow) for d in (remove_half, truncate_facts, empty)),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(run, whole, damage):
    damage(run / checkpoints.DIRECTORY / "4")
    notes = Notes()
    assert_same_bits(go_on(run, notes, train__steps=6), whole)
    assert "step 4" in notes.notes[0]
    assert "trying the one before" in notes.notes[0]
    assert (run / "damaged" / "4").is_dir()
    assert "going on after step 2" in notes.notes[-1]


@pytest.mark.parametrize("damage", [damage_array, remove_half, truncate_facts, forget_facts, empty])
def test_no_whole_checkpoint_is_an_error(run, damage):
    for step in (2, 4):
        damage(run / checkpoints.DIRECTORY / str(step))
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read; step 2"):
        saved.load(run, print)


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(runs, "compile_step", None)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer__lr": 0.1}, r"optimizer.lr: 0.05 in the run, 0.1 given"),
        ({"data__digits": "0,2"}, r"data.digits: '0,1' in the run, '0,2' given"),
        ({"optimizer__momentum": 0.5}, r"optimizer.momentum: 0.9 in the run, 0.5 given"),
        ({"train__steps": 2}, "steps: got 2, and 4 are done"),
        ({"train__stepps": 2}, "did you mean 'train.steps'"),
    ],
)
def test_other_settings_are_refused(finished, settings, message):
    with pytest.raises(ValueError, match=message):
        go_on(finished, **settings)


def test_another_length_is_refused_where_rates_depend_on_it(tmp_path):
    saved.write_config(tmp_path, tiny_runs.configured(schedule__name="cosine"))
    with pytest.raises(ValueError, match=r"train.steps: 4 in the run, 6 given \(its schedule"):
        go_on(tmp_path, train__steps=6)


def test_a_run_is_not_overwritten_by_mistake(finished):
    with pytest.raises(ValueError, match="holds a run with checkpoints, the newest of step 4"):
        train(finished)


FOREIGN = (saved.CONFIG_FILE, logs.LOG_FILE, logs.SAMPLES_FILE, *report.RESULT_FILES)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_a_run_would_write_are_not_replaced_by_mistake(tmp_path, name):
    (tmp_path / name).write_text("somebody's")
    with pytest.raises(ValueError, match=f"holds {name}, which the run would write; name another"):
        train(tmp_path, run__samples=1, run__keep=0)
    with pytest.raises(ValueError, match=f"holds {name}"):
        runs.check(tiny_runs.configured(run__samples=1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "somebody's"


def test_nothing_of_a_run_stands_beside_the_one_that_replaces_it(tmp_path):
    for name in (*FOREIGN, saved.PLAN_FILE):
        (tmp_path / name).write_text("of an earlier run")
    with pytest.raises(KeyboardInterrupt):
        runs.run(
            tiny_runs.configured(run__keep=0), tmp_path, overwrite=True, listener=Interrupted()
        )
    assert {path.name for path in tmp_path.iterdir()} == {saved.CONFIG_FILE, logs.LOG_FILE}
    assert [line["step"] for line in logs.read(tmp_path)] == [1]


def test_a_run_is_overwritten_when_asked_to(run):
    (run / saved.PLAN_FILE).write_text("of an earlier run")
    runs.run(tiny_runs.configured(train__steps=1), run, overwrite=True)
    assert checkpoints.saved_steps(run) == [1]
    assert not (run / saved.PLAN_FILE).exists()
    assert [line["step"] for line in logs.read(run)] == [1]


def test_no_run_to_go_on_with(tmp_path):
    with pytest.raises(ValueError, match=f"has no {saved.CONFIG_FILE}"):
        go_on(tmp_path)


def test_a_checkpoint_of_another_version_is_refused(finished, monkeypatch):
    monkeypatch.setattr(checkpoints, "FORMAT", checkpoints.FORMAT + 1)
    with pytest.raises(ValueError, match="it is of format 1, and this lrjax reads 2"):
        saved.load(finished, print)


def test_a_checkpoint_of_another_model_is_refused(finished):
    like = saved.load(finished, print).state
    wider = like._replace(params={**like.params, "more": like.params["conv"]})
    with pytest.raises(ValueError, match="another model or optimizer: state/0/more"):
        checkpoints.restore(finished, 4, wider)


@pytest.mark.usefixtures("nothing_compiled")
def test_other_data_are_refused(run):
    path = run / saved.CONFIG_FILE
    path.write_text(path.read_text().replace('"num_images": 12', '"num_images": 14'))
    with pytest.raises(ValueError, match="the data are not those of the run: images is 14 and was"):
        go_on(run)


# --- Folders --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_folders(tmp_path_factory):
    """A run on a folder, with held-out images in another; not to be changed."""
    root = tmp_path_factory.mktemp("folders")
    for name, count in (("images", 3), ("held out", 1)):
        for label in ("ant", "bee"):
            (root / name / label).mkdir(parents=True)
            for number in range(count):
                colour = (40 * number, 200 * (label == "ant"), 9)
                Image.new("RGB", (16, 16), colour).save(root / name / label / f"{number}.png")
    train(
        root / "run",
        data__path=str(root / "images"),
        data__image_size=None,
        data__validation=str(root / "held out"),
    )
    return root


@pytest.fixture
def folders(of_folders, tmp_path):
    """A copy of `of_folders`, whose run names the copies."""
    shutil.copytree(of_folders, tmp_path / "copy")
    go_on(
        tmp_path / "copy" / "run",
        data__path=str(tmp_path / "copy" / "images"),
        data__validation=str(tmp_path / "copy" / "held out"),
    )
    return tmp_path / "copy"


def rename(folders):
    (folders / "images" / "ant" / "0.png").rename(folders / "images" / "ant" / "00.png")


def repaint(folders):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folders / "images" / "ant" / "0.png")


def repaint_held_out(folders):
    repaint(folders)
    (folders / "images" / "ant" / "0.png").rename(folders / "held out" / "bee" / "0.png")
    Image.new("RGB", (16, 16), (0, 200, 9)).save(folders / "images" / "ant" / "0.png")


def add(folders):
    shutil.copy(folders / "images" / "ant" / "0.png", folders / "images" / "ant" / "9.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "checksum of the files' names and sizes"),
        (repaint, "checksum of the files' names and sizes"),
        (repaint_held_out, "checksum of the held-out files' names and sizes"),
        (add, "images is 7 and was 6"),
    ],
)
def test_other_files_are_not_trained_on_nor_evaluated(folders, monkeypatch, change, message):
    change(folders)
    monkeypatch.setattr(runs, "compile_step", None)
    with pytest.raises(ValueError, match=f"resume: the data are not those of the run: .*{message}"):
        go_on(folders / "run")
    with pytest.raises(ValueError, match=rf"{message}.*; restore it, or name other .* --data"):
        using.evaluate(folders / "run", None)
    assert using.evaluate(folders / "run", str(folders / "images"))["images"] >= 6


def test_a_split_is_not_drawn_again_from_other_images(of_folders, tmp_path):
    images = shutil.copytree(of_folders / "images", tmp_path / "images")
    settings = {"data__path": str(images), "data__image_size": None, "data__validation": 0.34}
    train(tmp_path / "run", **settings)
    assert using.evaluate(tmp_path / "run", None)["data"] == "held out by the run"
    add(tmp_path)
    with pytest.raises(ValueError, match="not what the run learnt from and held out: images is"):
        using.evaluate(tmp_path / "run", None)


def test_checkpoints_without_checksums_of_files_go_on(folders):
    prepared = building.prepare(saved.read_config(folders / "run"))
    older = {name: value for name, value in prepared.facts.items() if "held" not in name}
    del older["files_checksum"]
    assert prepared.difference(older) is None
    assert "images is 6 and was 5" in prepared.difference({**older, "images": 5})


def test_masks_count_among_the_files(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    mask = np.arange(16, dtype=np.uint8).reshape(4, 4) % 2
    Image.fromarray(mask).save(tmp_path / "images" / "a.png")
    found = []
    for kind in ("png", "gif"):
        Image.fromarray(mask).save(tmp_path / "masks" / f"a.{kind}")
        found.append(checksum_of_files(SegmentationFolder(tmp_path)))
        (tmp_path / "masks" / f"a.{kind}").unlink()
    assert found[0] != found[1]


@pytest.mark.parametrize("spelling", ["absolute", *slow("relative", "with a slash")])
def test_data_that_moved_are_named_again(folders, tmp_path, monkeypatch, spelling):
    (folders / "images").rename(tmp_path / "moved")
    (folders / "held out").rename(tmp_path / "also moved")
    for call in (lambda: go_on(folders / "run"), lambda: using.evaluate(folders / "run", None)):
        with pytest.raises(ValueError, match=r"of the run.*images.* not there.* --data"):
            call()
    monkeypatch.chdir(tmp_path)
    place = {"absolute": str(tmp_path / "moved"), "relative": "moved", "with a slash": "./moved/"}
    with pytest.raises(ValueError, match=r"of the run.*held out.* not there.* --validation"):
        go_on(folders / "run", data__path=place[spelling])
    result = go_on(folders / "run", data__path=place[spelling], data__validation="also moved")
    assert len(result.training.losses) == 4
    assert saved.read_config(folders / "run").data.path == str(tmp_path / "moved")
    monkeypatch.chdir("/")
    assert using.evaluate(folders / "run", None)["data"] == "held out by the run"


def test_a_folder_does_not_stand_for_digits(finished, of_folders):
    with pytest.raises(ValueError, match=r"data.path: 'digits' in the run, .* given"):
        go_on(finished, data__path=str(of_folders / "images"))


# --- Killed ---------------------------------------------------------------------------------------

PROGRAM = [sys.executable, str(Path(tiny_runs.__file__))]
# Most of the time goes into checkpoints, so most kills come within one.
KILLED = ("run.checkpoint_every=1", "optimizer.name=adam", "data.balanced=true")


ENVIRONMENT = {
    **os.environ,
    "XLA_FLAGS": quick.FLAGS,
    # Compiled once for all processes.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def completed(environment, out, *settings):
    subprocess.run(
        [*PROGRAM, str(out), *settings], check=True, capture_output=True, env=environment
    )


def killed_after(step, seconds, environment, out, *settings):
    """Starts the run, and kills it some time after a step; gives whether it was still running."""
    child = subprocess.Popen(
        [*PROGRAM, str(out), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    for _, line in zip(range(step), child.stdout, strict=False):
        assert line.strip().isdecimal()
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
    _, errors = child.communicate()
    assert child.returncode in (0, -signal.SIGKILL), errors
    return child.returncode != 0


def run_with_kills(tmp_path, kills, steps):
    settings = (*KILLED, f"train.steps={steps}")
    draw = random.Random(0)
    environment = {**ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    completed(environment, tmp_path / "whole", *settings)
    out = tmp_path / "killed"
    hits = 0
    for _ in range(kills):
        step, seconds = draw.randint(1, 4), draw.uniform(0, 0.3)
        hits += killed_after(step, seconds, environment, out, *settings)
    completed(environment, out, *settings)
    whole, killed = (report.read_metrics(tmp_path / name) for name in ("whole", "killed"))
    assert killed["losses"] == whole["losses"]
    for name in (report.PARAMETERS_FILE, report.STATISTICS_FILE):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    return hits


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_twenty_times_it_ends_with_the_same_bits(tmp_path):
    assert run_with_kills(tmp_path, kills=20, steps=160) == 20
