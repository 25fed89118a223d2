"""Configurations are read, overridden and checked; optimisers and rates are optax's by name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lrjax.app import config, optimization
from lrjax.app.config import Config
from lrjax.app.optimization import Optimizer, Schedule

TOML = """
[data]
path = "images"
validation = 0.1
[model]
name = "resnet18"
[optimizer]
name = "adamw"
lr = 1e-4
weight_decay = 1e-2
[schedule]
name = "step"
boundaries = [100, 200]
"""
YAML = """
data: {path: images, validation: 0.1}
model: {name: resnet18}
optimizer: {name: adamw, lr: 1e-4, weight_decay: 1e-2}
schedule: {name: step, boundaries: [100, 200]}
"""


@pytest.mark.parametrize(("suffix", "text"), [("toml", TOML), ("yaml", YAML), ("yml", YAML)])
def test_a_file_is_read(tmp_path, suffix, text):
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    found = Config.of(config.read(path))
    assert (found.data.path, found.data.validation, found.model.name) == ("images", 0.1, "resnet18")
    assert found.optimizer.build() == Optimizer("adamw", 1e-4, {"weight_decay": 0.01})
    assert found.schedule.build() == Schedule("step", boundaries=(100, 200))
    assert found.train.batch == 2  # what is not given has its default
    assert Config.of(found.flat()) == found


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{}", r"use a \.toml, \.yaml or \.yml file"),
        ("a.toml", None, "cannot read"),
        ("a.toml", "[data\n", "Expected"),
        ("a.yaml", "a: [", "while parsing"),
        ("a.yaml", "- a", "is no table"),
        ("a.toml", "steps = 3", "steps is no section; did you mean 'train.steps'"),
        ("a.yaml", "train.steps: 3", "train.steps is no section; write steps into section train"),
        ("a.toml", "data = 3", "data is a section; give it keys"),
        ("a.yaml", "data: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a.toml", b"\xff\xfe", "cannot read"),
        ("a.yaml", "train: !!map [1]", "expected a mapping"),
        ("a.yaml", "train: {batch: 1, steps: 2, batch: 3}", "line 1: batch is given twice"),
        ("a.yaml", "data: {fit: native}\ndata: {fit: resize}", "line 1: data is given twice"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        config.read(path)


def test_files_may_begin_with_a_mark_and_yaml_may_merge(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf[train]\nbatch = 3\n")
    assert config.read(tmp_path / "a.toml") == {"train.batch": 3}
    (tmp_path / "a.yaml").write_text("train: &a {batch: 3}\nrun: {<<: *a, keep: 1}\n")
    assert config.read(tmp_path / "a.yaml")["run.batch"] == 3


def test_assignments_have_types():
    found = config.assignments(["a.b=1e-4", "c=adamw", "d=[1, 2]", "e=true", "f=0,1", "g="])
    assert found == {"a.b": 1e-4, "c": "adamw", "d": [1, 2], "e": True, "f": "0,1", "g": ""}
    with pytest.raises(ValueError, match="got 'lr'; write key=value"):
        config.assignments(["lr"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data.balancd": True}, r"data\.balancd: there is no such key; did you mean 'data.bal"),
        ({"dta.path": "x"}, r"dta\.path: there is no such key; did you mean 'data'"),
        ({"lr": 1}, r"lr: there is no such key; did you mean 'optimizer\.lr'"),
        ({"train.steps": "many"}, r"train\.steps: got 'many'"),
        ({"train.steps": 1.5}, r"train\.steps: got 1\.5"),
        ({"train.batch": 0}, "batch: got 0; use 1 or more"),
        ({"train.epochs": -1}, "epochs: got -1.0; use more than 0"),
        ({"train.batch": True}, r"train\.batch: got True; write a number"),
        ({"train.steps": True}, r"train\.steps: got True; write a number"),
        ({"data.path": ""}, r"data\.path: got ''; give a value, or leave the key out"),
        ({"data.validation": " "}, r"data\.validation: got ' '; give a value"),
        ({"strategy.budget": ""}, r"strategy\.budget: got ''; give a value"),
        ({"train.seed": 2**32}, "seed: got 4294967296; use 4294967295 or less"),
        ({"train.seed": 10**20}, "seed: got 1"),
        ({"schedule.boundaries": 5}, r"got 5; write a list of steps, such as \[1000, 2000\]"),
        ({"schedule.boundaries": "5,6"}, "got '5,6'; write a list of steps"),
        ({"train.epochs": float("inf")}, r"train\.epochs: got inf"),
        ({"train.steps": 3, "train.epochs": 2}, "epochs=2.0 too; give one of them"),
        ({"run.keep": -1}, "keep: got -1; use 0 or more"),
        ({"train.seed": -1}, "seed: got -1; use 0 or more"),
        ({"data.unreadable": "ignore"}, "'skip' or 'error'"),
        ({"optimizer.name": "adamww"}, "optimizer: got 'adamww'; did you mean 'adamw'"),
        ({"optimizer.name": "dpsgd"}, "it needs the gradient of every image by itself"),
        ({"optimizer.weight_decy": 1}, "sgd has no such option; did you mean 'weight_decay'"),
        ({"optimizer.lr": float("nan")}, "lr: got nan"),
        ({"optimizer.lr": 0}, "lr: got 0"),
        ({"optimizer.clip_norm": 0}, "clip_norm: got 0"),
        ({"optimizer.accumulate": 0}, "accumulate: got 0"),
        ({"optimizer.name": "lbfgs", "optimizer.accumulate": 2}, "searches along every batch"),
        ({"schedule.name": "cosin"}, "schedule: got 'cosin'; did you mean 'cosine'"),
        ({"schedule.name": "warmup"}, r"schedule\.warmup_steps: got 0; warmup needs some"),
        ({"schedule.name": "step"}, r"schedule\.boundaries: got none"),
        ({"schedule.name": "step", "schedule.boundaries": [3, 2]}, "use rising positive steps"),
        ({"schedule.factor": 0}, r"schedule\.factor: got 0"),
        ({"augment.crop": -1}, r"augment\.crop: got -1"),
        ({"augment.contrast": 2}, r"augment\.contrast: got 2"),
        ({"strategy.budget": "1GiB", "strategy.plan": "x"}, "a plan is given too"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_bad_values_are_refused_with_what_to_do(given, message):
    with pytest.raises(ValueError, match=message):
        Config.of(given)


PRODIGY = {"optimizer.name": "prodigy"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"data.validation": "0.3"}, {"data.validation": 0.3}),
        ({"data.validation": "0.30"}, {"data.validation": "0.3"}),
        ({"data.image_size": 64}, {"data.image_size": "64x64"}),
        ({"data.image_size": [64, 32]}, {"data.image_size": "64x32"}),
        ({"data.digits": "0, 1"}, {"data.digits": [0, 1]}),
        ({"strategy.num_blocks": 4}, {"strategy.num_blocks": "4"}),
        ({"strategy.budget": "8 GiB"}, {"strategy.budget": "8GiB"}),
        ({"optimizer.momentum": 0.9}, {}),
        ({"optimizer.nesterov": "no"}, {}),
        (PRODIGY, PRODIGY | {"optimizer.betas": [0.9, 0.999]}),
    ],
)
def test_a_run_goes_on_with_settings_that_mean_the_same(one, other):
    assert config.differences(Config.of(one), Config.of(other)) == {}
    assert config.differences(Config.of(other), Config.of(one)) == {}


@pytest.mark.parametrize(
    ("one", "other", "keys"),
    [
        ({"data.validation": "0.3"}, {"data.validation": "0.31"}, ["data.validation"]),
        ({"data.image_size": "64x32"}, {"data.image_size": 64}, ["data.image_size"]),
        ({"optimizer.momentum": 0.8}, {}, ["optimizer.momentum"]),
        ({"optimizer.name": "adam"}, {}, ["optimizer.name"]),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(one, other, keys):
    assert list(config.differences(Config.of(one), Config.of(other))) == keys


def test_judging_by_the_images_that_are_learnt_from_is_said(tmp_path):
    images, other = str(tmp_path / "images"), str(tmp_path / "other")
    same = {"data.path": images, "data.validation": f"{images}/../images"}
    assert "of images that were learnt from" in Config.of(same).notes(steps=4)[0]
    assert Config.of({**same, "data.validation": other}).notes(steps=4) == ()
    assert Config.of({**same, "data.validation": 0.2}).notes(steps=4) == ()


def test_epochs_count_in_steps():
    assert Config.of({"train.epochs": 2, "train.batch": 4}).steps(num_images=10) == 5
    assert Config.of({"train.epochs": 0.01}).steps(num_images=10) == 1
    assert Config().steps(num_images=10) == 20


def rates(schedule, steps=10, rate=1.0):
    made = schedule.of(rate, steps)
    return [float(made(step)) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), [1.0] * 10),
        (Schedule("warmup", warmup_steps=3), [0.25, 0.5, 0.75] + [1.0] * 7),
        (Schedule("step", boundaries=(4, 8), factor=0.5), [1.0] * 4 + [0.5] * 4 + [0.25] * 2),
        (Schedule("exponential", factor=0.25, every=2), [0.5**step for step in range(10)]),
        (
            Schedule("cosine", end=0.1),
            [0.1 + 0.9 * (1 + np.cos(np.pi * step / 9)) / 2 for step in range(10)],
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Schedule) else "",
)
def test_rates(schedule, expected):
    np.testing.assert_allclose(rates(schedule), expected, rtol=1e-6)


def test_warmup_comes_before_any_schedule():
    found = rates(Schedule("cosine", warmup_steps=4))
    np.testing.assert_allclose(found[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(found[-1], 0, atol=1e-6)


PARAMS = {"kernel": jnp.full((3, 3, 2, 4), 0.1), "bias": jnp.full((4,), 0.2)}


def moved(optimizer, gradients, schedule=None):
    """The parameters after a step for each gradient."""
    params = PARAMS
    update = optimizer.build(schedule or Schedule(), steps=10)
    state = update.init(params)
    for gradient in gradients:
        grads = jax.tree.map(lambda leaf, g=gradient: jnp.full_like(leaf, g), params)
        updates, state = update.update(
            grads, state, params, value=jnp.float32(1.0), grad=grads, value_fn=lambda _: 1.0
        )
        params = optax.apply_updates(params, updates)
    return params


def test_sgd_has_momentum_and_takes_decay():
    found = moved(Optimizer("sgd", 0.1), [1.0, 1.0])
    np.testing.assert_allclose(found["bias"], 0.2 - 0.1 * (1 + 1.9), rtol=1e-6)
    decayed = moved(Optimizer("sgd", 0.1, {"weight_decay": 0.5, "momentum": 0.0}), [1.0])
    np.testing.assert_allclose(decayed["bias"], 0.2 - 0.1 * (1 + 0.5 * 0.2), rtol=1e-6)


def test_accumulation_averages_and_counts_steps():
    plain = {"momentum": 0.0}
    found = moved(Optimizer("sgd", 0.1, plain, accumulate=2), [1.0, 3.0])
    np.testing.assert_allclose(found["bias"], 0.2 - 0.1 * 2, rtol=1e-6)
    halved = Schedule("step", boundaries=(1,), factor=0.5)
    found = moved(Optimizer("sgd", 0.1, plain, accumulate=2), [1.0] * 4, halved)
    np.testing.assert_allclose(found["bias"], 0.2 - 0.1 - 0.05, rtol=1e-6)


def test_clipping_bounds_the_norm_of_all():
    found = moved(Optimizer("sgd", 1.0, {"momentum": 0.0}, clip_norm=0.5), [10.0])
    change = jax.tree.map(lambda new, old: new - old, found, PARAMS)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(change)))
    np.testing.assert_allclose(norm, 0.5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("adamw", {"b1": [1, 2]}), ("adamw", {"mu_dtype": "flat32"}), ("sgd", {"momentum": [1, 2]})],
)
def test_a_setting_that_optax_refuses_is_named_before_anything_is_compiled(name, settings):
    with pytest.raises(ValueError, match=f"optimizer: {name} does not accept"):
        Optimizer(name, settings=settings).build(Schedule(), steps=1)


@pytest.mark.parametrize("text", ["False", "false", "no", "OFF", '"False"'])
def test_a_setting_is_off_however_that_is_written(text):
    given = config.assignments([f"optimizer.nesterov={text}"])
    assert Config.of(given).optimizer.build().settings == {"nesterov": False}


@pytest.mark.parametrize(
    ("name", "setting", "value", "message"),
    [
        ("sgd", "nesterov", "never", "got 'never'; write true or false"),
        ("sgd", "nesterov", 2, "got 2; write true or false"),
        ("sgd", "momentum", "high", "got 'high'; write a number"),
        ("sgd", "momentum", True, "got True; write a number"),
        ("adamw", "b1", "high", "got 'high'; write a number"),
        ("adamw", "b1", float("nan"), "got nan; write a number"),
        ("sgd", "weight_decay", "high", "got 'high'; write a number, 0 or more"),
        ("sgd", "weight_decay", [1, 2], "write a number, 0 or more"),
        ("sgd", "weight_decay", -1, "got -1; write a number, 0 or more"),
        ("adamw", "weight_decay", float("inf"), "got inf; write a number, 0 or more"),
    ],
)
def test_a_setting_that_optax_would_misread_is_refused_by_name(name, setting, value, message):
    with pytest.raises(ValueError, match=rf"optimizer\.{setting}: .*{message}"):
        Config.of({"optimizer.name": name, f"optimizer.{setting}": value})


@pytest.mark.parametrize("name", ["adamw", "lion", "polyak_sgd"])
def test_optimisers_by_name(name):
    assert bool(jnp.isfinite(moved(Optimizer(name, 0.01), [1.0, 0.5])["kernel"]).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in optimization.names() if name != "lbfgs"])
def test_every_optimiser_runs_with_accumulation_and_a_schedule(name):
    schedule = Schedule("cosine", warmup_steps=1)
    if name in optimization._WITHOUT_SCHEDULE:
        with pytest.raises(ValueError, match="takes one learning rate"):
            moved(Optimizer(name), [1.0], schedule)
        schedule = Schedule()
    found = moved(Optimizer(name, 0.01, accumulate=2, clip_norm=1.0), [1.0, 0.5, 0.7], schedule)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found))


def test_optimisers_of_optax_are_found():
    assert {"adam", "adamw", "lamb", "lbfgs", "lion", "muon", "sgd"} <= set(optimization.names())
