"""Whole runs: what they leave, how they are judged, and how a trained network is used."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs
from PIL import Image
from tiny_runs import Notes, go_on, train
from typer.testing import CliRunner

import lrjax
from lrjax.app import building, logs, report, runs, saved, using
from lrjax.app.cli import app
from lrjax.app.evaluation import Evaluator
from lrjax.app.strategy import Planned, Strategy


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """A run with held-out images, not to be changed, and what it was told."""
    out = tmp_path_factory.mktemp("classified") / "run"
    notes = Notes()
    result = train(
        out,
        notes,
        data__validation=0.4,
        train__validate_every=3,
        run__samples=4,
        augment__flip=True,
        model__dtype="bfloat16",
    )
    return out, result, notes


@pytest.fixture(scope="module")
def labelled_pixels(tmp_path_factory):
    """A run on a folder of images and masks: the bright part of an image is class 1."""
    folder = tmp_path_factory.mktemp("pixels")
    for name in ("images", "masks"):
        (folder / "data" / name).mkdir(parents=True)
    for number in range(6):
        mask = np.zeros((16, 16), np.uint8)
        mask[number : number + 8, number:] = 1
        Image.fromarray(mask).save(folder / "data" / "masks" / f"{number}.png")
        Image.fromarray(mask * 200 + 20).save(folder / "data" / "images" / f"{number}.jpg")
    result = train(
        folder / "run",
        data__path=str(folder / "data"),
        data__image_size=None,
        data__validation=0.34,
        model__name="tiny_pixels",
        strategy__name="stream",
        optimizer__name="adam",
        train__steps=60,
        run__checkpoint_every=100,
    )
    return folder, result


def test_held_out_images_are_looked_at(classified):
    out, result, notes = classified
    assert [step for step, _ in notes.evaluations] == [3, 4]
    lines = [line for line in logs.read(out) if "validation_accuracy" in line]
    assert [line["step"] for line in lines] == [3, 4]
    metrics = report.read_metrics(out)
    assert metrics["validation"]["validation_accuracy"] == result.evaluation.accuracy
    assert result.evaluation.count == 4
    with Image.open(out / logs.SAMPLES_FILE) as samples:
        assert samples.size == (40, 40)  # two by two of 16 pixels and a border


def test_evaluation_is_what_the_model_says(classified):
    """Against one image at a time, by the plain module."""
    out, result, _ = classified
    prepared = building.prepare(saved.read_config(out))
    variables = {"params": result.training.params, **result.training.statistics}
    right, losses = [], []
    for index in range(len(prepared.validation)):
        example = prepared.validation[index]
        logits = prepared.model.apply(variables, example["image"][None], train=False)
        label = example["label"][None]
        right.append(int(logits.argmax()) == int(label[0]))
        losses.append(optax.softmax_cross_entropy_with_integer_labels(logits, label)[0])
    assert result.evaluation.accuracy == np.mean(right)
    np.testing.assert_allclose(result.evaluation.loss, np.mean(losses), rtol=1e-2)  # bfloat16


@pytest.mark.parametrize(
    "strategy", [Strategy("stream", 4), Strategy("stream", 2, micro_batches=2)], ids=str
)
def test_evaluation_by_rows_is_columns(labelled_pixels, strategy):
    folder, result = labelled_pixels
    prepared = building.prepare(saved.read_config(folder / "run"))
    found, expected = (
        Evaluator(prepared.model, prepared.source, execution, batch_size=2)(
            result.training.params, {}, prepared.source
        )
        for execution in (strategy, Strategy("column"))
    )
    assert found.accuracy_by_class == expected.accuracy_by_class
    assert found.mean_iou == expected.mean_iou
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)


def test_parameters_are_float32_whatever_is_computed_in(classified):
    _, result, _ = classified
    assert {leaf.dtype for leaf in jax.tree.leaves(result.training.params)} == {jnp.dtype("f4")}
    config = tiny_runs.configured(model__dtype="bfloat16")
    assert building.prepare(config).model.dtype == jnp.bfloat16


def test_evaluate_repeats_what_the_run_said(classified):
    out, result, _ = classified
    answer = invoke("evaluate", out)
    assert answer.exit_code == 0, answer.output
    numbers = json.loads(answer.stdout)
    assert numbers["data"] == "held out by the run"
    assert (numbers["accuracy"], numbers["loss"]) == (
        result.evaluation.accuracy,
        result.evaluation.loss,
    )
    assert (numbers["step"], numbers["images"], numbers["classes"]) == (4, 4, ["0", "1"])
    assert json.loads(invoke("evaluate", out, "--step", 2, "--batch", 3).stdout)["step"] == 2


def test_predict_gives_a_line_for_every_image(classified, tmp_path):
    out, result, _ = classified
    prepared = building.prepare(saved.read_config(out))
    for index in range(3):
        Image.fromarray(prepared.source[index]["image"]).save(tmp_path / f"{index}.png")
    (tmp_path / "1-broken.png").write_text("no image")
    (tmp_path / "3.heic").write_text("no image either")
    answer = invoke("predict", out, tmp_path)
    assert answer.exit_code == 1  # for the one that is broken
    assert "files that are not read, as they have no image's suffix: 1 .heic" in answer.stderr
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [line["file"].split("/")[-1] for line in lines] == [
        *("0.png", "1-broken.png", "1.png", "2.png")
    ]
    assert "UnidentifiedImageError" in lines.pop(1)["error"]
    variables = {"params": result.training.params, **result.training.statistics}
    for index, line in enumerate(lines):
        image = prepared.source[index]["image"][None]
        expected = jax.nn.softmax(prepared.model.apply(variables, image, train=False)[0])
        np.testing.assert_allclose(
            list(line["probabilities"].values()), np.float32(expected), atol=1e-2
        )
        assert line["class"] == str(int(np.argmax(list(line["probabilities"].values()))))


def test_masks_are_learnt_and_predicted(labelled_pixels, tmp_path):
    folder, result = labelled_pixels
    assert result.evaluation.mean_iou > 0.95
    lines = list(using.predict(folder / "run", [folder / "data" / "images"], out=tmp_path / "new"))
    for number, line in enumerate(lines):
        with Image.open(line["mask"]) as mask:
            found = np.asarray(mask)
        with Image.open(folder / "data" / "masks" / f"{number}.png") as mask:
            assert (np.asarray(mask) == found).mean() > 0.9
        assert line["pixels"] == {"0": int((found == 0).sum()), "1": int((found == 1).sum())}
    again = using.evaluate(folder / "run", str(folder / "data"))
    assert again["images"] == 6
    assert again["mean_iou"] > 0.95


@pytest.fixture
def photo(tmp_path):
    """A directory with one image, which is a PNG as masks are."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "photos" / "a.png")
    return tmp_path / "photos" / "a.png"


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("through", ["itself", "symbolic link", "hard link"])
def test_masks_never_replace_the_images(labelled_pixels, photo, options, through):
    out = photo.parent.parent / "masks"
    if through == "itself":
        out = photo.parent / ".." / "photos"
    elif through == "symbolic link":
        out.symlink_to(photo.parent)
    else:
        out.mkdir()
        (out / "a.png").hardlink_to(photo)
    before = photo.read_bytes()
    answer = invoke("predict", labelled_pixels[0] / "run", photo.parent, "--out", out, *options)
    assert answer.exit_code == 2
    assert f"masks would replace images to predict, {out / 'a.png'}; give another" in answer.output
    assert photo.read_bytes() == before


def test_masks_replace_files_only_where_asked_to(labelled_pixels, photo, tmp_path):
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").write_text("another's")
    arguments = ["predict", labelled_pixels[0] / "run", photo, "--out", tmp_path / "masks"]
    refused = invoke(*arguments)
    assert refused.exit_code == 2
    assert f"files that are there, {tmp_path / 'masks' / 'a.png'}; give" in refused.output
    assert (tmp_path / "masks" / "a.png").read_text() == "another's"
    assert invoke(*arguments, "--overwrite").exit_code == 0
    with Image.open(tmp_path / "masks" / "a.png") as mask:
        assert mask.size == (16, 16)


def test_a_mask_says_where_it_lies_in_its_image(labelled_pixels, tmp_path):
    Image.new("RGB", (20, 12)).save(tmp_path / "a.png")
    run = labelled_pixels[0] / "run"
    (line,) = using.predict(run, [tmp_path / "a.png"], out=tmp_path / "masks")
    assert (line["offset"], line["scale"]) == ([-2, 2], [1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "nowhere"], "run: nowhere has no config.json"),
        (["evaluate", "RUN", "--step", "3"], "step: got 3; RUN has checkpoints of 2, 4"),
        (["evaluate", "RUN", "--data", "nowhere"], "nowhere is not a directory"),
        (["evaluate", "RUN", "--batch", "0"], "batch: got 0"),
        (["predict", "RUN", "nowhere.png"], "images: nowhere.png does not exist"),
        (["predict", "RUN", "EMPTY"], "images: no image in EMPTY"),
        (["predict", "RUN", "IMAGE", "--out", "masks"], "no masks; leave it out"),
        (["predict", "PIXELS", "IMAGE"], "out: this network gives a mask per image"),
        (["predict", "PIXELS", "IMAGE", "IMAGE", "--out", "EMPTY"], "would have one mask"),
    ],
)
def test_bad_use_says_what_to_do(classified, labelled_pixels, tmp_path, arguments, message):
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    (tmp_path / "empty").mkdir()
    places = {
        "RUN": classified[0],
        "PIXELS": labelled_pixels[0] / "run",
        "EMPTY": tmp_path / "empty",
        "IMAGE": tmp_path / "image.png",
    }
    for name, place in places.items():
        message = message.replace(name, str(place))
    answer = invoke(*(places.get(argument, argument) for argument in arguments))
    assert answer.exit_code == 2
    assert message in answer.output
    assert "Traceback" not in answer.output


# --- A budget -------------------------------------------------------------------------------------


def test_a_budget_is_planned_for_held_and_remembered(tmp_path):
    settings = {
        "data__image_size": 256,
        "optimizer__name": "adam",
        "strategy__name": "stream",
        "train__steps": 2,
    }
    column = building.prepare(tiny_runs.configured(**settings))
    needed = runs.compile_step(
        column.model,
        column.source,
        column.optimizer,
        Strategy("column"),
        batch_size=2,
        seed=0,
    ).xla_peak
    allowed = needed * 2 // 3
    made = []

    class Plans(Notes):
        def planned(self, plan):
            made.append(plan)

    result = train(tmp_path, Plans(), strategy__budget=str(allowed), **settings)
    assert isinstance(result.execution, Planned)
    assert made[-1] == result.execution.plan == lrjax.Plan.load(tmp_path / saved.PLAN_FILE)
    assert result.training.memory.xla_peak <= allowed < needed
    assert report.read_metrics(tmp_path)["label"] == "plan"
    made.clear()
    longer = go_on(tmp_path, Plans(), train__steps=3)
    assert not made  # the saved plan runs
    assert longer.execution.plan == result.execution.plan
    assert using.evaluate(tmp_path, None)["images"] == 12


def test_a_budget_that_nothing_fits_ends_with_status_3(tmp_path):
    arguments = ["--budget", "1kB", "--image-size", 32, "--width", 0.03125]
    answer = invoke("train", "--out", tmp_path / "run", *arguments)
    assert answer.exit_code == 3
    assert "budget=1,000 bytes: the optimizer alone holds" in answer.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy__budget": "1GiB", "strategy__num_blocks": 4}, "the plan chooses strategy"),
        ({"strategy__plan": "nowhere.json"}, "plan: cannot read nowhere.json"),
        ({"strategy__budget": "much"}, "budget='much' is no number with a unit"),
    ],
)
def test_a_bad_budget_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **{"strategy__name": "stream", **settings})
    assert not (tmp_path / "run").exists()


# --- The command ----------------------------------------------------------------------------------


def test_options_override_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nname = "tiny"\n[data]\nimage_size = 16\n[train]\nsteps = 2\nseed = 7\n'
    )
    answer = invoke(
        *("train", "--out", tmp_path / "run", "--config", path, "--strategy", "column"),
        *("--set", "optimizer.momentum=0.5", "--steps", 3),
    )
    assert answer.exit_code == 0, answer.output
    config = saved.read_config(tmp_path / "run")
    assert (config.train.steps, config.train.seed, config.data.image_size) == (3, 7, "16")
    assert config.optimizer.build().settings == {"momentum": 0.5}
    options = report.read_metrics(tmp_path / "run")["options"]
    assert (options["steps"], options["model"], options["optimizer.momentum"]) == (3, "tiny", 0.5)
    again = invoke("train", "--out", tmp_path / "run", "--resume", "--lr", "0.5")
    assert again.exit_code == 2
    assert "optimizer.lr: 0.001 in the run, 0.5 given" in again.output


@pytest.mark.parametrize("options", [[], ["--resume"]], ids=["", "resume"])
def test_check_says_what_would_be_trained(tmp_path, options):
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (16, 16)).save(tmp_path / "images" / name / f"{number}.png")
    (tmp_path / "images" / "ant" / "broken.png").write_text("no image")
    (tmp_path / "images" / "bee" / "5.heic").write_text("no image")
    settings = {
        "data__path": str(tmp_path / "images"),
        "data__image_size": None,
        "data__validation": 0.25,
        "train__epochs": 3,
        "train__steps": None,
    }
    config = tiny_runs.configured(**settings)
    if options:
        train(tmp_path / "run", **settings)
    given = {key: value for key, value in config.flat().items() if value is not None}
    sets = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    answer = invoke("train", "--out", tmp_path / "run", "--check", *(options or sets))
    assert answer.exit_code == 0, answer.output
    assert "6 images of 16x16, 2 classes, 2 held out" in answer.output
    assert "classes: ant, bee" in answer.output
    assert "9 steps of 2 images; checked, and nothing trained" in answer.output
    assert "1 unreadable files left out" in answer.output
    assert "broken.png: UnidentifiedImageError" in answer.output
    assert "no image's suffix: 1 .heic" in answer.output
    assert ("going on after step 9" in answer.output) == bool(options)
    assert (tmp_path / "run").exists() == bool(options)


def test_check_refuses_a_directory_that_is_taken(classified):
    answer = invoke("train", "--out", classified[0], "--check")
    assert answer.exit_code == 2
    assert "holds a run with checkpoints" in answer.output


def test_tensorboard_has_its_events(tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install 'lrjax[experiments]'")
    with logs.Log(tmp_path, tensorboard=True) as log:
        log.write(1, {"loss": 2.0, "validation_accuracy": 0.5})
    (events,) = (tmp_path / logs.TENSORBOARD_DIRECTORY).iterdir()
    assert b"validation/accuracy" in events.read_bytes()


def test_tensorboard_that_is_not_installed_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install 'lrjax\[experiments\]'"):
        train(tmp_path / "run", run__tensorboard=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "data.balancd=true"], "did you mean 'data.balanced'"),
        (["--set", "data"], "write key=value"),
        (["--config", "nowhere.toml"], "config: cannot read nowhere.toml"),
        (["--validation", "nowhere"], "nowhere is no directory; give one, or a part"),
        (["--validation", "1.5"], "validation: got 1.5"),
        (["--resume"], "has no config.json"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--set", "augment.crop=40"], "augment.crop: got 40 for images of 32x32"),
        (["--optimizer", "rprop", "--schedule", "cosine"], "rprop takes one learning rate"),
        (["--epochs", "1", "--steps", "2"], "give one of them"),
    ],
)
def test_bad_options_are_refused_before_anything_is_compiled(
    tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr(runs, "compile_step", None)
    answer = invoke("train", "--out", tmp_path / "run", "--image-size", 32, *arguments)
    assert answer.exit_code == 2
    assert message in answer.output
    assert not (tmp_path / "run").exists()
