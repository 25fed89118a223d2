"""A run that is interrupted, however, ends with the bits of one that was not."""

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import Notes, assert_same_bits, go_on, train

from lrjax.app import checkpoints, logs, report, saved

SETTINGS = {
    "plain": {},
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
    "random": {"optimizer__name": "noisy_sgd", "strategy__name": "stream"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_run_goes_on_with_the_same_bits(tmp_path, settings):
    whole = train(tmp_path / "whole", train__steps=7, **settings)
    train(tmp_path / "parts", train__steps=3, **settings)
    parts = go_on(tmp_path / "parts", train__steps=7)
    assert_same_bits(parts, whole)
    lines = [logs.read(tmp_path / name) for name in ("parts", "whole")]
    assert [line["step"] for line in lines[0] if "loss" in line] == list(range(1, 8))
    without_times = [[{**line, "seconds": None} for line in own if "loss" in line] for own in lines]
    assert without_times[0] == without_times[1]


def test_steps_after_the_checkpoint_are_made_again(tmp_path):
    """Killed at step 3, the last checkpoint is of step 2."""
    whole = train(tmp_path / "whole", train__steps=5)
    train(tmp_path / "run", train__steps=3)
    shutil.rmtree(tmp_path / "run" / checkpoints.DIRECTORY / "3")
    assert_same_bits(go_on(tmp_path / "run", train__steps=5), whole)


def test_a_run_without_checkpoint_starts_at_the_beginning(tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "run", run__keep=0, train__steps=2)
    assert not (tmp_path / "run" / checkpoints.DIRECTORY).exists()
    notes = Notes()
    assert_same_bits(go_on(tmp_path / "run", notes, train__steps=4), whole)
    assert "no checkpoint yet" in notes.notes[0]


def test_a_finished_run_writes_its_results_again(tmp_path):
    """It may have been killed between the last checkpoint and the results."""
    whole = train(tmp_path)
    (tmp_path / report.METRICS_FILE).unlink()
    assert_same_bits(go_on(tmp_path), whole)
    assert len(report.read_metrics(tmp_path)["losses"]) == 4


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


def empty(checkpoint: Path):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


@pytest.mark.parametrize("damage", [damage_array, remove_half, truncate_facts, empty])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    whole = train(tmp_path / "whole", train__steps=6)
    train(tmp_path / "run")
    damage(tmp_path / "run" / checkpoints.DIRECTORY / "4")
    notes = Notes()
    assert_same_bits(go_on(tmp_path / "run", notes, train__steps=6), whole)
    assert "step 4" in notes.notes[0]
    assert "trying the one before" in notes.notes[0]
    assert (tmp_path / "run" / "damaged" / "4").is_dir()
    assert "going on after step 2" in notes.notes[-1]


def test_no_whole_checkpoint_is_an_error(tmp_path):
    train(tmp_path)
    for step in (2, 4):
        damage_array(tmp_path / checkpoints.DIRECTORY / str(step))
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read; step 2"):
        go_on(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, not to be changed."""
    out = tmp_path_factory.mktemp("finished")
    train(out)
    return out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer__lr": 0.1}, r"optimizer.lr: 0.05 in the run, 0.1 given"),
        ({"data__digits": "0,2"}, r"data.digits: '0,1' in the run, '0,2' given"),
        ({"optimizer__momentum": 0.5}, r"optimizer.momentum: None in the run, 0.5 given"),
        ({"train__steps": 2}, "steps: got 2, and 4 are done"),
        ({"train__stepps": 2}, "did you mean 'train.steps'"),
    ],
)
def test_other_settings_are_refused(finished, settings, message):
    with pytest.raises(ValueError, match=message):
        go_on(finished, **settings)


def test_another_length_is_refused_where_rates_depend_on_it(tmp_path):
    train(tmp_path, schedule__name="cosine")
    with pytest.raises(ValueError, match=r"train.steps: 4 in the run, 6 given \(its schedule"):
        go_on(tmp_path, train__steps=6)


def test_a_run_is_not_overwritten_by_mistake(finished):
    with pytest.raises(ValueError, match="holds a run with checkpoints, the newest of step 4"):
        train(finished)


def test_no_run_to_go_on_with(tmp_path):
    with pytest.raises(ValueError, match=f"has no {saved.CONFIG_FILE}"):
        go_on(tmp_path)


def test_a_checkpoint_of_another_version_or_model_is_refused(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(checkpoints, "FORMAT", checkpoints.FORMAT + 1)
    with pytest.raises(ValueError, match="it is of format 1, and this lrjax reads 2"):
        go_on(tmp_path / "run")
    monkeypatch.undo()
    like = saved.load(finished, print).state
    wider = like._replace(params={**like.params, "more": like.params["conv"]})
    with pytest.raises(ValueError, match="another model or optimizer: state/0/more"):
        checkpoints.restore(finished, 4, wider)


def test_other_data_are_refused(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / saved.CONFIG_FILE
    path.write_text(path.read_text().replace('"num_images": 12', '"num_images": 14'))
    with pytest.raises(ValueError, match="the data are not those of the run: images is 14 and was"):
        go_on(tmp_path / "run")


# --- Killed ---------------------------------------------------------------------------------------

PROGRAM = [sys.executable, str(Path(tiny_runs.__file__))]
# Most of the time goes into checkpoints, so most kills come within one.
KILLED = ("run.checkpoint_every=1", "optimizer.name=adam", "data.balanced=true")


def killed_after(step, seconds, out, *settings):
    """Starts the run, and kills it some time after a step; gives whether it was still running."""
    child = subprocess.Popen(
        [*PROGRAM, str(out), *settings], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
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
    subprocess.run([*PROGRAM, str(tmp_path / "whole"), *settings], check=True, capture_output=True)
    hits = 0
    for _ in range(kills):
        hits += killed_after(
            draw.randint(1, 4), draw.uniform(0, 0.3), tmp_path / "killed", *settings
        )
    subprocess.run([*PROGRAM, str(tmp_path / "killed"), *settings], check=True, capture_output=True)
    whole, killed = (report.read_metrics(tmp_path / name) for name in ("whole", "killed"))
    assert killed["losses"] == whole["losses"]
    for name in (report.PARAMETERS_FILE, report.STATISTICS_FILE):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    return hits


def test_killed_twice_it_ends_with_the_same_bits(tmp_path):
    assert run_with_kills(tmp_path, kills=2, steps=25) == 2


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_bits(tmp_path):
    assert run_with_kills(tmp_path, kills=20, steps=250) == 20
