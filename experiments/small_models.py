"""Every model family, small enough to check against column in seconds: all its kinds of layers."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lrjax import models

# An odd height, and a width that no stride divides for long.
IMAGES = (2, 37, 24, 3)

MODELS: dict[str, nn.Module] = {
    "resnet_basic": models.ResNet(blocks=(1,), bottleneck=False, width=1 / 16, num_classes=3),
    "resnet": models.ResNet(blocks=(1, 1), bottleneck=True, width=1 / 16, num_classes=3),
    "resnet_frozen": models.ResNet(
        blocks=(1, 1), bottleneck=True, width=1 / 16, num_classes=3, norm="frozen"
    ),
    "unet": models.UNet(channels=(4, 6), num_classes=3),
    "unet_group": models.UNet(channels=(4, 8), num_classes=3, norm="group"),
    "unet_none": models.UNet(channels=(4, 6), num_classes=3, norm="none", upsampling="nearest"),
    "convnext": models.ConvNeXt(
        blocks=(1, 1), channels=(4, 6), num_classes=3, layer_scale=0.5, drop_path_rate=0.3
    ),
    "mobilenet": models.MobileNetV2(
        stages=((1, 8, 1, 1), (3, 8, 1, 2)), num_classes=3, width=1 / 4
    ),
    "efficientnet": models.EfficientNet(
        stages=((1, 8, 1, 1, 3), (3, 8, 1, 2, 5)), num_classes=3, width=1 / 4, drop_path_rate=0.3
    ),
    "densenet": models.DenseNet(blocks=(2, 1), num_classes=3, width=1 / 8),
    "vgg": models.VGG16(num_classes=3, width=1 / 64, head="gap"),
}

# VGG-16 halves five times; three rows are left.
SHAPES = {"vgg": (1, 101, 33, 3)}


@dataclasses.dataclass(frozen=True)
class TrainingCall:
    """A model's call in training mode as a function of parameters, images and running statistics.

    Gives the outputs and the updated statistics.
    """

    model: nn.Module
    shape: tuple[int, ...] = IMAGES

    def __call__(self, params: Any, images: jax.Array, statistics: Any) -> Any:
        return self.model.apply(
            {"params": params, **statistics},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(5)},
        )

    def arguments(self, seed: int = 1) -> tuple[Any, jax.Array, Any]:
        """Parameters (none of them zero or one), images of a seed, and running statistics."""
        images = jax.random.normal(jax.random.key(seed), self.shape, self.model.dtype)
        variables = jax.jit(self.model.init)(jax.random.key(0), images)
        params = jax.tree.map(
            lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(3), leaf.shape, leaf.dtype),
            variables["params"],
        )
        return params, images, {k: v for k, v in variables.items() if k != "params"}


def training_call(
    name: str, dtype: Any = jnp.float64, *, num_classes: int | None = None
) -> TrainingCall:
    """A model's call; a number of classes of its own for one that classifies images."""
    model = MODELS[name].clone(dtype=dtype, param_dtype=dtype)
    if num_classes is not None and not name.startswith("unet"):
        model = model.clone(num_classes=num_classes)
    return TrainingCall(model, SHAPES.get(name, IMAGES))
