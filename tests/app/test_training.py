"""Training learns, repeats itself from its seed, and reports the memory it really used."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

import lrjax
from lrjax import memory
from lrjax.app.data import Example
from lrjax.app.training import (
    DivergedError,
    Strategy,
    Training,
    classification_loss,
    compile_step,
    measured_rss,
    parse_num_blocks,
    train,
)
from lrjax.models import UNet
from lrjax.testing import Results, check

BATCH = 2


class BrightOrDark:
    """An easy problem: label 1 is a bright image, label 0 a dark one."""

    image_shape = (64, 32, 3)
    label_shape = ()
    class_names = ("dark", "bright")
    labels = np.arange(8, dtype=np.int32) % 2

    def __len__(self):
        return 8

    def __getitem__(self, index):
        label = index % 2
        image = np.full(self.image_shape, 40 + 150 * label, np.uint8)
        return Example(image=image, label=np.asarray(label, np.int32))


class SmallCNN(nn.Module):
    """Two stages as VGG has them: what the loop needs of a network, and quick to compile."""

    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, images, *, train=False):
        x = images.astype(jnp.float32) / 127.5 - 1
        for stage in (1, 2):
            x = nn.relu(nn.Conv(4 * stage, (3, 3))(x))
            x = checkpoint_name(nn.max_pool(x, (2, 2), (2, 2)), f"pool{stage}")
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x.mean(axis=(1, 2)))
        return nn.Dense(2)(x)


def run(strategy=None, *, model=None, learning_rate=1e-2, steps=3, seed=0, **options):
    source = BrightOrDark()
    compiled = compile_step(
        model or SmallCNN(),
        source,
        optax.sgd(learning_rate, momentum=0.9),
        strategy or Strategy("column"),
        batch_size=BATCH,
        seed=seed,
    )
    return train(compiled, source, batch_size=BATCH, steps=steps, seed=seed, **options)


def assert_same_losses(found, expected):
    """Rounding grows from step to step: ten times what one step is allowed."""
    check(*(Results(np.float32(one.losses)) for one in (found, expected)), tolerance=1e-5)


@pytest.fixture(scope="module")
def column():
    return run()


def test_training_learns():
    losses = run(steps=60, learning_rate=3e-2).losses
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4])


@pytest.mark.slow
def test_training_repeats_itself_from_its_seed(column):
    first, again, other = column, run(), run(seed=2)
    assert first.losses == again.losses
    assert first.losses != other.losses
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first.params, again.params))


def test_first_loss_is_that_of_the_untrained_model():
    source = BrightOrDark()
    model = SmallCNN()
    init_key, _ = jax.random.split(jax.random.key(0))
    variables = model.init(init_key, jnp.zeros((BATCH, *source.image_shape), jnp.uint8))
    by_label = [
        optax.softmax_cross_entropy_with_integer_labels(
            model.apply(variables, source[label]["image"][None]), jnp.array([label])
        )[0]
        for label in (0, 1)
    ]
    halves = [(by_label[a] + by_label[b]) / 2 for a, b in ((0, 0), (0, 1), (1, 1))]
    assert np.isclose(run(steps=1).losses[0], halves, rtol=1e-5).any()


@pytest.mark.parametrize(
    "strategy",
    [
        Strategy("stream", 4),
        Strategy("2ps", 2),
        Strategy("overl", 2),
        Strategy("2ps", 2, ("pool1",)),
        Strategy("checkpoint", None, ("pool1",)),
        Strategy("stream", 4, micro_batches=2),
    ],
    ids=lambda strategy: strategy.label,
)
def test_every_strategy_gives_the_columns_losses(strategy, column):
    assert_same_losses(run(strategy), column)


@pytest.mark.parametrize("strategy", [Strategy("stream", 4), Strategy("2ps", 2, ("pool1",))])
def test_the_model_by_rows_is_as_small_as_the_whole_loss_by_rows(strategy):
    """Images of one class go through `lrjax.linen.rowwise`, which must cost nothing."""
    model = SmallCNN()
    images = jnp.zeros((BATCH, 64, 32, 3), jnp.uint8)
    params = model.init(jax.random.key(0), images)["params"]
    args = (params, images, jnp.zeros(BATCH, jnp.int32), {}, jax.random.key(0))
    whole = lrjax.rowwise(
        classification_loss(model),
        in_axes=(None, 1, None, None, None),
        num_blocks=strategy.num_blocks,
        strategy=strategy.name,
        cuts=strategy.cuts,
    )
    losses = (strategy.loss(model, labels_pixels=False), whole)
    compiled = [jax.jit(jax.grad(loss, has_aux=True)).lower(*args).compile() for loss in losses]
    by_model, by_loss = map(memory.peak_bytes, compiled)
    assert by_model <= 1.01 * by_loss
    check(*(Results(c(*args)) for c in compiled))


class BrightOrDarkRows(BrightOrDark):
    """The same with a label for every pixel: whether it lies in the upper half of a bright one."""

    label_shape = (64, 32)

    def __getitem__(self, index):
        label = np.zeros(self.label_shape, np.int32)
        label[:32] = index % 2
        return Example(image=super().__getitem__(index)["image"], label=label)


@pytest.mark.slow
def test_labels_of_pixels_carry_rows_and_statistics_are_kept():
    source = BrightOrDarkRows()
    model = UNet(channels=(3, 4), norm="batch")

    def training(strategy):
        step = compile_step(model, source, optax.sgd(1e-2), strategy, batch_size=BATCH, seed=0)
        return train(step, source, batch_size=BATCH, steps=2, seed=0)

    column, stream = training(Strategy("column")), training(Strategy("stream", 4))
    assert_same_losses(stream, column)
    check(Results(stream.statistics), Results(column.statistics), tolerance=1e-5)
    means = column.statistics["batch_stats"]["down1"]["norm1"]["mean"]
    assert (means != 0).all()


def test_dropout_is_active_and_seeded():
    def losses(seed):
        # Labels take turns and nothing is learned: what varies from step to step is dropout.
        model = SmallCNN(dropout_rate=0.5)
        return run(model=model, learning_rate=0.0, balanced=True, seed=seed).losses

    assert len(set(losses(0))) == 3
    assert losses(0) == losses(0)


def test_progress_is_reported_every_step():
    seen = []
    result = run(on_step=lambda *report: seen.append(report))
    assert seen == [
        (step, loss, seconds)
        for step, (loss, seconds) in enumerate(
            zip(result.losses, result.step_seconds, strict=True), start=1
        )
    ]


def test_memory_holds_parameters_and_temporaries(column):
    memory = column.memory
    assert memory.xla_peak > memory.xla_temp > 0
    # At the least the first stage's two maps of 4 channels must have been there.
    assert memory.xla_temp > 2 * 4 * BATCH * 64 * 32 * 4


def test_divergence_stops_training():
    with pytest.raises(DivergedError, match="use a smaller learning rate"):
        run(learning_rate=1e30, steps=10)


def test_rss_is_measured_above_the_baseline():
    with measured_rss() as size:
        block = np.ones(64 * 2**20, np.uint8)
        time.sleep(0.2)
        del block
        time.sleep(0.05)
    assert 56 * 2**20 < size.peak - size.baseline < 200 * 2**20


def test_step_time_leaves_the_first_step_out():
    def median(*seconds):
        return Training(None, {}, (), seconds, 0.0, None).seconds_per_step

    assert median(9.0, 1.0, 2.0, 3.0) == 2.0
    assert median(9.0) == 9.0


@pytest.mark.parametrize(
    ("spec", "expected", "label"),
    [
        ("column", Strategy("column"), "column"),
        ("stream:16", Strategy("stream", 16), "stream"),
        ("overl@pool3", Strategy("overl", None, ("pool3",)), "OverL-H"),
        ("2ps:8,4,2@pool2,pool4", Strategy("2ps", (8, 4, 2), ("pool2", "pool4")), "2PS-H"),
        ("checkpoint@pool2", Strategy("checkpoint", None, ("pool2",)), "checkpoint-H"),
        ("stream:8/2@pool2", Strategy("stream", 8, ("pool2",), 2), "stream-H /2"),
    ],
)
def test_strategy_is_read_from_its_spec(spec, expected, label):
    assert Strategy.parse(spec) == expected
    assert expected.label == label


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rows", "strategy: got 'rows'; use one of column, checkpoint, stream, 2ps, overl"),
        ("stream:many", "num_blocks: got 'many'"),
        ("2ps:8,4", "got 2 numbers for 1 segments"),
        ("column:4", "column runs whole maps"),
        ("checkpoint:4", "checkpoint runs whole maps"),
        ("column@pool1", "column keeps all maps"),
        ("stream/many", "micro_batches: got 'many'"),
        ("stream/0", "micro_batches: got 0"),
    ],
)
def test_bad_strategy_says_what_to_do(spec, message):
    with pytest.raises(ValueError, match=message):
        Strategy.parse(spec)


def test_number_of_blocks_is_one_or_one_per_segment():
    assert parse_num_blocks("8") == 8
    assert parse_num_blocks("8,4") == (8, 4)


def test_no_steps_is_refused():
    with pytest.raises(ValueError, match="steps: got 0"):
        run(steps=0)
