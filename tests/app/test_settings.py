"""Settings that together make no sense are refused, or said, before a run begins."""

import jax
import pytest
from tiny_runs import Notes, configured, train

from lrjax.app import lock


def test_batches_that_make_no_update_are_refused_before_anything_is_compiled(tmp_path):
    message = r"optimizer\.accumulate: got 8, and training has 4 steps .* use 4 or less"
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", optimizer__accumulate=8)
    assert not (tmp_path / "run").exists()


def test_what_so_many_steps_leave_undone_is_said(tmp_path):
    notes = Notes()
    train(tmp_path / "run", notes, optimizer__accumulate=3, schedule__warmup_steps=4)
    assert len(notes.notes) == 2
    assert (
        "4 steps make 1 update of 3 batches, and the last batch changes nothing" in notes.notes[0]
    )
    assert "use 3 steps, or 6" in notes.notes[0]
    assert "got 4, and training has 4 steps: the learning rate never reaches" in notes.notes[1]


def test_whole_updates_and_a_shorter_warmup_need_no_word():
    whole = configured(optimizer__accumulate=2, schedule__warmup_steps=3)
    assert whole.notes(steps=4) == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy__num_blocks": 0}, "num_blocks"),
        ({"strategy__num_blocks": 33}, "num_blocks"),
        ({"strategy__cuts": "nope"}, "nope"),
        ({"strategy__micro_batches": 3}, "micro"),
    ],
)
def test_a_strategy_that_does_not_fit_is_refused_before_anything_is_compiled(
    tmp_path, monkeypatch, settings, message
):
    def compiled(*_, **__):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(jax, "jit", compiled)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", strategy__name="stream", **settings)
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_made_is_said_by_its_option(tmp_path):
    (tmp_path / "file").touch()
    message = r"out: cannot write to .*give a directory you may"
    with pytest.raises(ValueError, match=message), lock.locked(tmp_path / "file" / "run"):
        pass
