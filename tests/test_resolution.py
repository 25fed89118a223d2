"""The experiment on resolution: its canvases, its gradients, and what it takes for fitting."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrjax.testing
from experiments import resolution
from experiments import resolution_methods as methods
from experiments.digit_sums import INK, DigitSums, enlarged, scans, shrunk

SIDE = 64


class TestCanvases:
    @pytest.mark.parametrize("split", ["train", "held-out"])
    def test_the_label_is_the_sum_of_scans_of_this_split(self, split):
        source = DigitSums(SIDE, split, digits=(3, 8), count=2)
        assert source.sums == (6, 11, 16)
        for index in range(9):
            canvas = source[index]
            total, left = 0, canvas.image.copy()
            for top, start, size in canvas.boxes:
                glyph = canvas.image[top : top + size, start : start + size]
                left[top : top + size, start : start + size] = 0
                found = [
                    digit
                    for digit in (3, 8)
                    if any((enlarged(scan, size) == glyph).all() for scan in scans(digit, split))
                ]
                assert len(found) == 1
                total += found[0]
            assert total == source.sums[canvas.label]
            assert not left.any()

    def test_no_scan_is_in_both_splits_and_none_is_lost(self):
        for digit, count in ((0, 178), (8, 174)):
            train, held_out = (
                {scan.tobytes() for scan in scans(digit, split)} for split in ("train", "held-out")
            )
            assert not train & held_out
            assert len(scans(digit, "train")) + len(scans(digit, "held-out")) == count
            assert len(held_out) == round(count / 4)

    def test_canvases_depend_on_seed_split_and_index_alone(self):
        image = DigitSums(SIDE, "train", seed=1)[5].image
        np.testing.assert_array_equal(image, DigitSums(SIDE, "train", seed=1)[5].image)
        for other in (DigitSums(SIDE, "train", seed=2)[5], DigitSums(SIDE, "held-out", seed=1)[5]):
            assert (image != other.image).any()
        assert (image != DigitSums(SIDE, "train", seed=1)[5 + 3].image).any()

    def test_sums_are_equally_frequent(self):
        labels = [DigitSums(128, "train", count=3)[index].label for index in range(40)]
        assert np.bincount(labels).tolist() == [10, 10, 10, 10]

    def test_ink_does_not_tell_the_digit(self):
        for size in (8, 11, 16):
            means = [enlarged(scan, size).mean() for d in range(10) for scan in scans(d, "train")]
            np.testing.assert_allclose(means, INK, atol=0.35)

    def test_reduced_pixels_are_means_of_areas(self):
        image = DigitSums(SIDE, "train")[0].image
        blocks = image.reshape(16, 4, 16, 4).mean((1, 3))
        np.testing.assert_allclose(shrunk(image, 16), blocks, atol=0.5)
        assert shrunk(image, SIDE) is image
        assert abs(shrunk(image, 24).mean() - image.mean()) < 0.2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"split": "test"}, "split: got 'test'; use one of train, held-out"),
            ({"digits": (8, 0)}, "digits: got"),
            ({"digits": (0, 10)}, "digits: got"),
            ({"count": 0}, "count: got 0"),
            ({"sizes": (12, 10)}, "sizes: got"),
            ({"side": 53}, "side: got 53; 2 digits of up to 13 pixels need 54 or more"),
        ],
    )
    def test_bad_options_are_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            DigitSums(**{"side": SIDE, "split": "train", **options})


NETWORK = methods.SumNetwork(3, channels=(2, 3, 3, 4, 4))
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def example():
    """Parameters, an image of 32 x 32, its label."""
    image = np.random.default_rng(0).integers(0, 200, (1, 32, 32, 1)).astype(np.uint8)
    return NETWORK.init(jax.random.key(1), image), jnp.asarray(image), jnp.array([2])


def same(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected
    )


class TestMethods:
    def test_by_rows_is_column(self, example):
        params, image, _ = example
        lrjax.testing.assert_same_as_column(
            NETWORK.apply,
            (params, image.astype(jnp.float32)),
            in_axes=(None, 1),
            num_blocks=4,
        )

    def test_black_around_a_canvas_changes_nothing(self, example):
        params, image, _ = example
        inner = image.at[:, :8].set(0).at[:, 24:].set(0).at[:, :, :8].set(0).at[:, :, 24:].set(0)
        padded = jnp.pad(inner, ((0, 0), (16, 16), (16, 16), (0, 0)))
        np.testing.assert_allclose(
            NETWORK.apply(params, padded).sum(),
            NETWORK.apply(params, padded[:, 8:56, 8:56]).sum(),
            rtol=1e-4,
        )

    def test_one_patch_is_the_image(self, example):
        column = methods.whole_image(NETWORK, 32, by_rows=False)
        for method in (methods.patchwise(NETWORK, 32, 32), methods.patchgd(NETWORK, 32, 32, 1)):
            same(method.value_and_grad(*example, KEY), column.value_and_grad(*example, KEY))
            same(method.logits(*example[:2]), column.logits(*example[:2]))

    def test_patches_are_images_with_the_canvas_label(self, example):
        params, image, label = example
        crops = [image[:, i : i + 16, j : j + 16] for i in (0, 16) for j in (0, 16)]

        def mean_loss(p):
            return sum(methods.cross_entropy(NETWORK.apply(p, crop), label) for crop in crops) / 4

        method = methods.patchwise(NETWORK, 32, 16)
        same(method.value_and_grad(*example, KEY), jax.value_and_grad(mean_loss)(params))
        mean_logits = sum(NETWORK.apply(params, crop) for crop in crops) / 4
        same(method.logits(params, image), mean_logits)

    def test_patchgd_differentiates_the_drawn_patches_alone(self, example):
        params, image, label = example
        block = methods.latent_block(NETWORK, params, image, jnp.arange(4), 16)
        assert block.shape == (4, 4)
        drawn = [int(number) for number in jax.random.permutation(KEY, 4)[:2]]

        def loss(p, number):
            crop = methods.patch_at(image, number, 16)
            own = NETWORK.apply(p, crop, method="features")[0]
            features = own + sum(block[other] for other in range(4) if other != number)
            return methods.cross_entropy(NETWORK.apply(p, features[None], method="classify"), label)

        values, grads = zip(*(jax.value_and_grad(loss)(params, n) for n in drawn), strict=True)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
        found = methods.patchgd(NETWORK, 32, 16, 1).value_and_grad(*example, KEY)
        same(found, (sum(values) / 2, mean))

    def test_patches_are_numbered_row_by_row(self):
        image = jnp.arange(16).reshape(1, 4, 4, 1)
        corners = [int(methods.patch_at(image, number, 2)[0, 0, 0, 0]) for number in range(4)]
        assert corners == [0, 2, 8, 10]

    def test_patches_that_do_not_tile_are_refused(self):
        with pytest.raises(
            ValueError, match="patch: got 12; use a divisor of the image's side, 32"
        ):
            methods.patchwise(NETWORK, 32, 12)
        with pytest.raises(ValueError, match="sampled: got 5; an image has 1 to 4 patches"):
            methods.patchgd(NETWORK, 32, 16, 5)


class TestBudget:
    @pytest.mark.parametrize("fitting", [16, 24, 40, 64])
    def test_the_largest_that_fits_is_found(self, fitting):
        candidates = methods.column_candidates(NETWORK, 64)
        assert [candidate.side for candidate in candidates] == list(range(16, 65, 8))

        def compile_one(method):
            return methods.CompiledMethod(method, None, method.side**2)

        found = methods.largest_fitting(candidates, fitting**2 + 7, compile_one)
        assert found.method.side == fitting
        with pytest.raises(ValueError, match="budget_bytes: got 255, which not even column's"):
            methods.largest_fitting(candidates, 255, compile_one)

    def test_patches_tile(self):
        assert methods.patch_sides(96) == [16, 24, 32, 48, 96]
        drawn = [m.sampled for m in methods.patchgd_candidates(NETWORK, 64, 16)]
        assert drawn == [1, 2, 4, 8]
        assert [m.sampled for m in methods.patchgd_candidates(NETWORK, 64, 64)] == [1]

    def test_a_canvas_that_sums_to_more_takes_more(self, example):
        params = example[0]
        optimizer = resolution.Experiment(TINY).optimizer(1e-2)
        sizes = [
            methods.compile_method(method, params, optimizer).peak_bytes
            for method in methods.column_candidates(NETWORK, 32)[::2]
        ]
        assert sizes[0] < sizes[1]


TINY = resolution.Settings(
    canvas=64, sides=(32,), steps=2, batch=2, column_rates=(1e-2,), held_out=4
)


@pytest.mark.slow
def test_everything_runs_and_is_drawn_again_from_the_json_alone(tmp_path, capsys):
    results = resolution.measure(TINY)
    path = tmp_path / "resolution.json"
    resolution.write(results, path)
    table = path.with_suffix(".md").read_text()
    assert [(run["method"], run["side"]) for run in results["runs"][:1]] == [("lrjax", 64)]
    assert [run["method"] for run in results["runs"]] == [
        *("lrjax", "column", "PatchGD", "patches", "lrjax")
    ]
    assert all(len(run["losses"]) == 2 for run in results["runs"])
    assert all(run["peak_bytes"] <= results["budget_bytes"] for run in results["runs"])
    path.with_suffix(".md").unlink()
    path.with_suffix(".png").unlink()
    resolution.main(["--redraw", "--out", str(path)])
    assert path.with_suffix(".md").read_text() == table
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert table.strip() in capsys.readouterr().out


def test_shortfalls_are_told():
    def run(method, side, accuracy, peak=5):
        return {"method": method, "side": side, "accuracy": accuracy, "peak_bytes": peak}

    results = {
        "settings": dataclasses.asdict(TINY),
        "budget_bytes": 5,
        "column_peak_bytes": {"64": 9},
        "runs": [run("lrjax", 64, 0.95), run("column", 16, 0.4)],
    }
    assert resolution.shortfalls(results) == []
    assert "below 90%" in resolution.shortfalls({**results, "runs": results["runs"][1:]})[0]
    near = [run("lrjax", 64, 0.95), run("column", 16, 0.8), run("patches", 64, 0.5, peak=6)]
    lead, over = resolution.shortfalls({**results, "runs": near})
    assert lead == "lrjax leads column by less than 20 points"
    assert over == "patches at 64 takes more than the budget"
    fits = {**results, "column_peak_bytes": {"64": 5}}
    assert resolution.shortfalls(fits) == ["column fits the budget at 64"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "--quick, --seed: give --out, so that the committed results stay"),
        (["--seed", "1"], "--quick, --seed: give --out, so that the committed results stay"),
        (["--seed", "-1", "--out", "results.json"], "--seed: got -1; use 0 or more"),
        (["--quick", "--out", "results.md"], "--out: got results.md; name a .json file"),
        (["--redraw", "--out", "nowhere.json"], "--redraw: nowhere.json is not there"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        resolution.main(arguments)
    assert message in capsys.readouterr().err


def test_the_most_crowded_canvas_can_be_drawn():
    for count, size in ((1, 1), (10, 1), (6, 3)):
        side = math.ceil((2 * size + 1) * math.sqrt(2 * count))
        source = DigitSums(side, "train", count=count, sizes=(size, size))
        assert all(len(source[index].boxes) == count for index in range(20))


def test_the_committed_results_hold_what_is_claimed():
    results = json.loads((resolution.report.RESULTS / "resolution.json").read_text())
    assert resolution.shortfalls(results) == []
    assert results["settings"] == json.loads(json.dumps(dataclasses.asdict(resolution.Settings())))
    committed = (resolution.report.RESULTS / "resolution.md").read_text()
    assert committed == resolution.table(results) + "\n"
