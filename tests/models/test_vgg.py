"""VGG-16 is the published network, at every width, head and dtype it is offered in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax.models import VGG16, VGGFeatures
from lrjax.models.vgg import POOL_NAMES
from structure import count_parameters, named_values


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (VGG16(), (1, 224, 224, 3), 138_357_544),
        (VGG16(num_classes=10), (1, 224, 224, 3), 138_357_544 - 990 * 4097),
        (VGG16(head=None), (1, 224, 224, 3), 14_714_688),
        (VGGFeatures(), (1, 64, 64, 3), 14_714_688),
        (VGGFeatures(), (1, 64, 64, 1), 14_714_688 - 2 * 9 * 64),
        (VGG16(num_classes=10, head="gap"), (1, 96, 160, 3), 14_714_688 + 5_130),
    ],
)
def test_parameter_count(model, shape, expected):
    assert count_parameters(model, shape) == expected


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 95), (64, 127)])
def test_feature_map_shape(height, width):
    model = VGGFeatures(width=0.125)
    images = jax.ShapeDtypeStruct((2, height, width, 3), jnp.float32)
    maps, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert maps.shape == (2, height // 32, width // 32, 64)


def test_pooling_outputs_are_named_in_order():
    model = VGGFeatures(width=1 / 64)
    images = jnp.zeros((1, 64, 32, 3))
    variables = model.init(jax.random.key(0), images)
    jaxpr = jax.make_jaxpr(model.apply)(variables, images).jaxpr
    heights = [64 // 2**stage for stage in range(1, 6)]
    found = named_values(jaxpr)
    assert tuple(name for name, _ in found) == POOL_NAMES
    assert [shape[1] for _, shape in found] == heights


def test_convolution_stack_matches_lax():
    """Two stages written out with `lax` give the value named "pool2"."""
    model = VGGFeatures(width=1 / 16)
    images = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
    variables = model.init(jax.random.key(0), images)
    biased = jax.tree.map(lambda leaf: leaf + 0.1, variables)

    x = images
    for stage, layers in ((1, 2), (2, 2), (3, 3), (4, 3), (5, 3)):
        for layer in range(1, layers + 1):
            conv = biased["params"][f"conv{stage}_{layer}"]
            x = jax.lax.conv_general_dilated(
                x, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jnp.maximum(x + conv["bias"], 0)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
    np.testing.assert_allclose(model.apply(biased, images), x, rtol=1e-5, atol=1e-5)


def test_features_submodule_runs_alone():
    model = VGG16(num_classes=3, width=1 / 16, head="gap")
    images = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
    variables = model.init(jax.random.key(0), images)
    maps = model.apply(variables, images, method=lambda m, x: m.features(x))
    alone = VGGFeatures(width=1 / 16).apply({"params": variables["params"]["features"]}, images)
    np.testing.assert_array_equal(maps, alone)
    classifier = variables["params"]["classifier"]
    logits = maps.mean(axis=(1, 2)) @ classifier["kernel"] + classifier["bias"]
    np.testing.assert_allclose(model.apply(variables, images), logits, rtol=1e-5, atol=1e-6)


def test_uint8_images_are_scaled_to_minus_one_to_one():
    model = VGGFeatures(width=1 / 16)
    raw = jax.random.randint(jax.random.key(1), (1, 32, 32, 3), 0, 256).astype(jnp.uint8)
    variables = model.init(jax.random.key(0), raw)
    scaled = raw.astype(jnp.float32) / 127.5 - 1
    np.testing.assert_allclose(
        model.apply(variables, raw), model.apply(variables, scaled), rtol=1e-5, atol=1e-6
    )


def test_dropout_only_when_training():
    model = VGG16(num_classes=5, width=1 / 32)
    images = jax.random.normal(jax.random.key(1), (1, 32, 32, 3))
    variables = model.init(jax.random.key(0), images)

    def logits(seed, train):
        return model.apply(variables, images, train=train, rngs={"dropout": jax.random.key(seed)})

    assert jnp.array_equal(logits(0, False), logits(1, False))
    assert not jnp.array_equal(logits(0, True), logits(1, True))


@pytest.mark.parametrize("model", [VGG16(num_classes=None), VGG16(head=None)])
def test_without_a_head_it_gives_the_map(model):
    images = jax.ShapeDtypeStruct((1, 64, 32, 3), jnp.float32)
    maps, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert maps.shape == (1, 2, 1, 512)
    assert list(variables["params"]) == ["features"]


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters_and_logits():
    model = VGG16(num_classes=5, width=1 / 32, dtype=jnp.bfloat16, head="gap")
    images = jnp.zeros((1, 32, 32, 3), jnp.uint8)
    variables = model.init(jax.random.key(0), images)
    maps = model.apply(variables, images, method=lambda m, x: m.features(x))
    assert maps.dtype == jnp.bfloat16
    assert model.apply(variables, images).dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (VGG16(head="mlp"), (1, 32, 32, 3), "head: got 'mlp'"),
        (VGG16(width=0), (1, 32, 32, 3), "width: got 0"),
        (VGG16(), (1, 31, 64, 3), "at least 32"),
        (VGG16(), (32, 32, 3), r"\[batch, height, width, channels\]"),
    ],
)
def test_bad_settings_say_what_to_do(model, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
