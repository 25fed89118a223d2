"""3-D U-Net: the published network, and volumes by rows, which are slices of the depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrjax
from lrjax import models
from lrjax.testing import assert_same_as_column
from structure import count_parameters, named_values

VOLUME = (1, 9, 7, 6, 2)  # an odd depth, and an odd height


def small(norm, dtype=jnp.float64):
    return models.UNet3D(num_classes=2, channels=(4, 6), norm=norm, dtype=dtype, param_dtype=dtype)


def test_parameter_count_is_the_published_one():
    """arXiv 1606.06650: 19,069,955, of convolutions alone."""
    model = models.UNet3D(num_classes=3, norm="none")
    assert count_parameters(model, (1, 16, 16, 16, 3)) == 19_069_955


def test_every_voxel_has_logits_and_levels_have_names():
    model = small("batch", jnp.float32)
    volumes = jax.ShapeDtypeStruct(VOLUME, jnp.uint8)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), volumes)
    assert logits.shape == (1, 9, 7, 6, 2)
    jaxpr = jax.make_jaxpr(model.apply)(variables, volumes).jaxpr
    assert named_values(jaxpr) == [
        ("down1", (1, 9, 7, 6, 4)),
        ("bottom", (1, 4, 3, 3, 6)),
        ("up1", (1, 9, 7, 6, 4)),
    ]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 16, 16, 3), r"takes \[batch, depth, height, width, channels\]"),
        ((1, 4, 16, 16, 3), "got 4x16x16; 3-D U-Net needs depth, height and width of at least 8"),
    ],
)
def test_other_arrays_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            models.UNet3D().init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32)
        )


def test_a_loss_over_voxels_is_one_pass():
    model = small("none", jnp.float32)
    volumes = jax.ShapeDtypeStruct((1, 32, 8, 8, 1), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), volumes)["params"]

    def loss(params, volumes):
        return jnp.mean(jnp.square(model.apply({"params": params}, volumes)))

    told = lrjax.explain(loss, params, volumes, in_axes=(None, 1), num_blocks=8)
    assert [one.name for one in told.segments[0].passes] == ["forward and backward"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("norm", "strategy", "num_blocks"),
    [
        ("none", "stream", 4),
        ("none", "2ps", 3),
        pytest.param("batch", "stream", 3, marks=pytest.mark.slow),
        pytest.param("group", "stream", 3, marks=pytest.mark.slow),
        pytest.param("none", "overl", 3, marks=pytest.mark.slow),
    ],
)
def test_volumes_train_by_slices_as_column(norm, strategy, num_blocks):
    model = small(norm)
    volumes = jax.random.normal(jax.random.key(1), VOLUME, jnp.float64)
    variables = dict(jax.jit(model.init)(jax.random.key(0), volumes))
    params = variables.pop("params")

    def call(params, volumes, statistics):
        return model.apply(
            {"params": params, **statistics}, volumes, train=True, mutable=["batch_stats"]
        )

    found = assert_same_as_column(
        call,
        (params, volumes, variables),
        (None, 1, None),
        num_blocks=num_blocks,
        strategy=strategy,
    )
    assert np.isfinite(found.outputs[0]).all()
