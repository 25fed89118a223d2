"""Training on a mesh of devices: the losses of one device, whatever is divided.

Devices are counted when JAX starts, so most cases run in a process of their own, with four.
"""

import jax
import numpy as np
import pytest
import tiny_runs
from PIL import Image
from tiny_runs import go_on, train

from lrjax.app import building, config, placement, using
from lrjax.app.data import ScatteredDigits, batches, in_order
from lrjax.app.data.batching import Share
from lrjax.plan import Plan
from several_devices import is_process_with, run_with

IS_CHILD = is_process_with(4)
in_child = pytest.mark.skipif(not IS_CHILD, reason="runs in the process with four devices")
BY_ROWS = {"strategy__name": "stream", "strategy__num_blocks": "2", "data__validation": 0.25}


@pytest.mark.skipif(IS_CHILD, reason="starts that process")
@pytest.mark.slow
def test_on_four_devices():
    run_with(4, __file__)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """A run of six steps on one device."""
    return train(tmp_path_factory.mktemp("one") / "run", train__steps=6, **BY_ROWS)


def assert_same_losses(found, expected):
    np.testing.assert_allclose(found.training.losses, expected.training.losses, rtol=2e-6)
    assert found.evaluation.loss == pytest.approx(expected.evaluation.loss, rel=2e-6)


MESHES = {
    "rows": {"mesh__rows": 4, "strategy__num_blocks": "1"},
    "data": {"mesh__data": 2},
    "column": {
        "mesh__rows": 2,
        "mesh__data": 2,
        "strategy__name": "column",
        "strategy__num_blocks": None,
    },
}


@in_child
@pytest.mark.parametrize("name", MESHES)
def test_losses_are_those_of_one_device(name, tmp_path, one_device):
    settings = {**BY_ROWS, **MESHES[name], "train__steps": 6}
    assert_same_losses(train(tmp_path / "run", **settings), one_device)


@in_child
def test_rows_and_data_then_another_mesh_then_one_device(tmp_path, one_device):
    out = tmp_path / "run"
    train(out, **BY_ROWS, mesh__rows=2, mesh__data=2, train__steps=2)
    go_on(out, mesh__rows=3, mesh__data=1, train__steps=4, strategy__num_blocks="1")
    assert_same_losses(go_on(out, mesh__rows=1, train__steps=6), one_device)
    alone, shared = using.evaluate(out, None), using.evaluate(out, None, devices=4)
    assert shared["loss"] == pytest.approx(alone["loss"], rel=2e-6)
    Image.new("RGB", (16, 16), "white").save(tmp_path / "white.png")
    answers = [
        next(using.predict(out, [tmp_path / "white.png"], devices=count)) for count in (1, 2)
    ]
    assert answers[0]["probability"] == pytest.approx(answers[1]["probability"], rel=2e-6)


@in_child
def test_pixels_with_labels_are_divided_with_their_images(tmp_path):
    settings = {**BY_ROWS, "model__name": "tiny_pixels", "data__validation": 0.25}
    expected = train(tmp_path / "one", **settings)
    found = train(tmp_path / "four", **settings, mesh__rows=2, mesh__data=2)
    assert_same_losses(found, expected)


@in_child
def test_heights_that_devices_do_not_divide(tmp_path):
    settings = {**BY_ROWS, "data__image_size": "22x16", "train__steps": 2}
    expected = train(tmp_path / "one", **settings)
    assert_same_losses(train(tmp_path / "three", **settings, mesh__rows=3), expected)


@in_child
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh__rows": 3, "mesh__data": 2}, "there are 4 .*host_platform_device_count=6"),
        ({"mesh__data": 4, "train__batch": 6}, "batch: got 6.*use --batch 4, or another"),
        ({"mesh__data": 4, "train__batch": 2}, "batch: got 2.*use --batch 4"),
        (
            {"mesh__data": 2, "strategy__budget": "1GiB", "strategy__num_blocks": None},
            "budget: a plan is for devices that share the rows",
        ),
        ({"mesh__rows": 2, "strategy__num_blocks": "9"}, "largest allowed is"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **{**BY_ROWS, **settings})
    assert not (tmp_path / "run").exists()


def test_images_with_fewer_rows_than_devices_are_refused():
    mesh = jax.sharding.AbstractMesh((1, 8), ("data", "rows"))
    with pytest.raises(ValueError, match="5 rows of an image cannot be shared by 8; use at most 5"):
        placement.Placement(mesh).check((5, 64, 3), 1)


def test_numbers_of_devices_below_one_are_refused():
    for key in ("mesh.rows", "mesh.data"):
        with pytest.raises(ValueError, match="devices: got 0; use 1 or more"):
            config.Config.of({key: 0})


def test_other_settings_still_may_not_change_with_the_devices():
    before = tiny_runs.configured(strategy__name="stream", strategy__num_blocks="4")
    more = {**before.flat(), "mesh.rows": 2, "strategy.num_blocks": "2"}
    assert config.differences(before, config.Config.of(more)) == {}
    blocks = {**before.flat(), "strategy.num_blocks": "2"}
    assert list(config.differences(before, config.Config.of(blocks))) == ["strategy.num_blocks"]
    rate = {**more, "optimizer.lr": 1.0}
    assert list(config.differences(before, config.Config.of(rate))) == ["optimizer.lr"]


class Counting(ScatteredDigits):
    """Remembers which images were read."""

    def __init__(self):
        super().__init__((32, 32), num_images=10)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


class TestShares:
    """What several processes read of every batch is the batch, and they read nothing else."""

    SHARES = (Share(0, 2, (0, 16)), Share(0, 2, (16, 32)), Share(2, 4))

    def test_of_training(self):
        whole = batches(Counting(), 4, seed=3)
        sources = [Counting() for _ in self.SHARES]
        parts = [
            batches(source, 4, seed=3, share=share)
            for source, share in zip(sources, self.SHARES, strict=True)
        ]
        for _ in range(4):
            batch = next(whole)
            found = [next(part) for part in parts]
            top = np.concatenate([found[0]["image"], found[1]["image"]], axis=1)
            np.testing.assert_array_equal(np.concatenate([top, found[2]["image"]]), batch["image"])
            labels = np.concatenate([found[0]["label"], found[2]["label"]])
            np.testing.assert_array_equal(labels, batch["label"])
            assert {str(part.get_state()) for part in parts} == {str(whole.get_state())}

    def test_a_position_holds_in_every_process(self):
        whole = batches(Counting(), 4, seed=3)
        for _ in range(3):
            next(whole)
        share = batches(Counting(), 4, seed=3, share=Share(2, 4))
        share.set_state(whole.get_state())
        np.testing.assert_array_equal(next(share)["image"], next(whole)["image"][2:])

    def test_of_evaluation(self):
        source = Counting()
        found = [*in_order(source, 4, Share(2, 4, (8, 16)))]
        assert sorted(set(source.read)) == [2, 3, 6, 7, 9]  # 9 fills up the last batch
        assert [count for _, count in found] == [4, 4, 2]
        for batch, (whole, _) in zip(found, in_order(Counting(), 4), strict=True):
            np.testing.assert_array_equal(batch[0]["image"], whole["image"][2:, 8:16])


@in_child
def test_a_budget_is_planned_for_on_a_mesh_and_the_plan_goes_on(tmp_path):
    """It is of each device's memory; the plan in the run's directory serves another run."""
    settings = {"strategy__name": "stream", "train__steps": 2, "mesh__rows": 2}
    by_budget = train(tmp_path / "budget", **settings, strategy__budget="1GiB")
    plan = Plan.load(tmp_path / "budget" / "plan.json")
    assert (plan.row_mesh_axis, plan.devices) == ("rows", 2)
    saved = tmp_path / "budget" / "plan.json"
    by_plan = train(tmp_path / "plan", **settings, strategy__plan=str(saved))
    assert by_plan.training.losses == by_budget.training.losses
    with pytest.raises(ValueError, match="made for 2 devices along 'rows', and the run has 4"):
        train(tmp_path / "four", **{**settings, "mesh__rows": 4}, strategy__plan=str(saved))


def test_a_plan_is_for_devices_that_share_rows():
    section = config.StrategySection(plan="nowhere.json")
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "rows"))
    with pytest.raises(ValueError, match="plan: a plan is for devices that share the rows"):
        building.execution_of(section, placement.Placement(mesh))
