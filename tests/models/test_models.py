"""The models are the published ones: their parameter counts, shapes, names and settings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.small_models import MODELS
from lrjax import models
from lrjax.models.layers import BlockBatchNorm
from structure import count_parameters, named_values

IMAGES = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        # torchvision's.
        (models.ResNet18(), 11_689_512),
        (models.ResNet34(), 21_797_672),
        (models.ResNet50(), 25_557_032),
        (models.ResNet101(), 44_549_160),
        (models.ConvNeXtT(), 28_589_128),
        (models.MobileNetV2(), 3_504_872),
        (models.EfficientNetB0(), 5_288_548),
        (models.DenseNet121(), 7_978_856),
        # milesial/Pytorch-UNet, and mateuszbuda/brain-segmentation-pytorch with half the channels.
        (models.UNet(num_classes=1), 31_037_633),
        (models.UNet(num_classes=1, width=0.5), 7_763_041),
    ],
    ids=lambda value: f"{value:,}" if isinstance(value, int) else type(value).__name__,
)
def test_parameter_count_is_the_published_one(model, expected):
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    assert (
        sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables["params"])) == expected
    )


def test_statistics_are_those_of_torchvision():
    """Two running statistics for every channel that a BatchNorm scales and shifts."""
    variables = jax.eval_shape(models.ResNet50().init, jax.random.key(0), IMAGES)
    statistics = sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"]))
    assert statistics == 2 * 26_560


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (models.ResNet18(num_classes=None), (1, 97, 64, 3), (1, 4, 2, 512)),
        (models.ResNet50(num_classes=None), (1, 224, 224, 3), (1, 7, 7, 2048)),
        (models.ConvNeXtT(num_classes=None), (1, 97, 64, 3), (1, 3, 2, 768)),
        (models.MobileNetV2(num_classes=None), (1, 97, 64, 3), (1, 4, 2, 1280)),
        (models.EfficientNetB0(num_classes=None), (1, 97, 64, 3), (1, 4, 2, 1280)),
        (models.DenseNet121(num_classes=None), (1, 97, 64, 3), (1, 3, 2, 1024)),
        (models.UNet(num_classes=5), (1, 37, 50, 1), (1, 37, 50, 5)),
        (models.UNet(num_classes=5, upsampling="nearest"), (1, 37, 50, 1), (1, 37, 50, 5)),
        (models.ResNet34(num_classes=7), (3, 40, 40, 1), (3, 7)),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "init") else None,
)
def test_output_shape(model, shape, expected):
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    outputs, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert outputs.shape == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet", ["stem", "stage1_block1", "stage2_block1"]),
        ("unet", ["down1", "bottom", "up1"]),
        ("convnext", ["stem", "stage1_block1", "stage2_block1"]),
        ("mobilenet", ["stem", "stage1_block1", "stage2_block1", "head"]),
        ("efficientnet", ["stem", "stage1_block1", "stage2_block1", "head"]),
        ("densenet", ["stem", "block1", "transition1", "block2"]),
    ],
)
def test_blocks_are_named_in_order(name, expected):
    model = MODELS[name]
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    jaxpr = jax.make_jaxpr(model.apply)(variables, IMAGES).jaxpr
    assert [found for found, _ in named_values(jaxpr)] == expected


@pytest.mark.parametrize("norm", ["frozen", "group", "none"])
def test_other_normalisations_keep_no_statistics_of_the_batch(norm):
    model = MODELS["resnet"].clone(norm=norm)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    _, updated = jax.eval_shape(
        lambda v: model.apply(v, jnp.ones(IMAGES.shape), train=True, mutable=["batch_stats"]),
        variables,
    )
    assert ("batch_stats" in variables) == (norm == "frozen")
    assert jax.tree.structure(updated) == jax.tree.structure(
        {k: v for k, v in variables.items() if k == "batch_stats"}
    )
    batch = count_parameters(MODELS["resnet"], IMAGES.shape)
    assert count_parameters(model, IMAGES.shape) <= batch


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_keeps_parameters_and_results_in_float32(name):
    model = MODELS[name].clone(dtype=jnp.bfloat16)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), IMAGES)
    jaxpr = jax.make_jaxpr(model.apply)(variables, IMAGES).jaxpr
    convolutions = [e for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated"]
    assert {e.outvars[0].aval.dtype for e in convolutions} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, variables))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (models.ResNet50(norm="layer"), (1, 64, 64, 3), "norm: got 'layer'; use one of batch"),
        (models.ResNet18(width=-1), (1, 64, 64, 3), "width: got -1"),
        (models.UNet(upsampling="cubic"), (1, 64, 64, 3), "upsampling: got 'cubic'"),
        (models.UNet(), (1, 8, 64, 3), "U-Net needs height and width of at least 16"),
        (models.ConvNeXtT(), (1, 31, 64, 3), "at least 32"),
        (models.DenseNet121(), (64, 64, 3), r"\[batch, height, width, channels\]"),
    ],
)
def test_bad_settings_say_what_to_do(model, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def test_statistics_of_blocks_are_those_of_batch_norm_on_every_block():
    images = jax.random.normal(jax.random.key(0), (2, 8, 3, 4)) + 3 * jnp.arange(8.0)[:, None, None]
    by_block = BlockBatchNorm(use_running_average=False)
    variables = by_block.init(jax.random.key(1), images)
    found, updated = by_block.apply(variables, images, mutable=["batch_stats"])
    plain = nn.BatchNorm(use_running_average=False, momentum=by_block.momentum)
    rows = [images[:, start : start + 2] for start in range(0, 8, 2)]
    expected = [plain.apply(variables, r, mutable=["batch_stats"]) for r in rows]
    np.testing.assert_allclose(found, jnp.concatenate([y for y, _ in expected], 1), atol=1e-3)
    means = [new["batch_stats"]["mean"] for _, new in expected]
    np.testing.assert_allclose(updated["batch_stats"]["mean"], sum(means) / 4, atol=1e-5)
    whole, _ = plain.apply(variables, images, mutable=["batch_stats"])
    assert jnp.abs(found - whole).max() > 0.5, "another network"
