"""VGG-16 (Simonyan & Zisserman, arXiv 1409.1556, configuration D) in Flax Linen.

The network as published, in plain Flax: nothing here knows of row blocks. What row-wise training
needs is only the names of the five pooling outputs, `"pool1"` to `"pool5"`, given with
`jax.ad_checkpoint.checkpoint_name`, so that `lrjax.rowwise(..., cuts=("pool2",))` can cut there.
"""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lrjax.models.layers import (
    Layer,
    as_float,
    at_least_float32,
    check_images,
    check_settings,
    scaled,
)

Head = Literal["dense", "gap"]

# (convolutions, channels) of each of the five stages; each ends with a 2x2 max pool.
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
POOL_NAMES = tuple(f"pool{stage}" for stage in range(1, len(STAGES) + 1))
DENSE_WIDTH = 4096
DROPOUT_RATE = 0.5
HE = nn.initializers.he_normal()
TOTAL_STRIDE = 2 ** len(STAGES)


class VGGFeatures(nn.Module):
    """VGG-16's convolution stack: 13 3x3 convolutions with bias and ReLU, five 2x2 max pools.

    Maps `[B, H, W, C]` to `[B, H // 32, W // 32, 512 * width]`. Integer images (uint8) are
    converted to `dtype` and scaled to [-1, 1]; floating-point inputs are taken as they are.

    The outputs of the pools are named `"pool1"` .. `"pool5"`.

    Attributes:
      width: multiplier of every channel count; 1.0 is the published network (14,714,688 parameters
        for three input channels).
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    width: float = 1.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        check_images(images, "VGG-16", TOTAL_STRIDE)
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv: Layer = functools.partial(nn.Conv, padding=1, kernel_init=HE, **dtypes)
        x = as_float(images, self.dtype)
        for stage, (convolutions, channels) in enumerate(STAGES, start=1):
            for layer in range(1, convolutions + 1):
                own, name = scaled(channels, self.width), f"conv{stage}_{layer}"
                x = nn.relu(conv(own, (3, 3), name=name)(x))
            x = checkpoint_name(nn.max_pool(x, (2, 2), strides=(2, 2)), f"pool{stage}")
        return x


class VGG16(nn.Module):
    """VGG-16: `VGGFeatures` and a classifier, `[B, H, W, C]` images to `[B, num_classes]` logits.

    With the defaults and 224x224 RGB images it is the published network of 138,357,544 parameters.
    The convolution stack is the submodule `features` and runs alone::

        model = VGG16()
        maps = model.apply(variables, images, method=lambda m, x: m.features(x))

    Dropout is active with `train=True` and then takes its key from `rngs={"dropout": key}`.

    Attributes:
      num_classes: logits per image; `None`: no classifier, as with `head=None`.
      width: multiplier of the channels, and of the two hidden layers of the dense head.
      head: `"dense"`, the published one: flatten, 4096, 4096, classes, with dropout; its size is
        tied to the image size. `"gap"`: global average pool and one dense layer, for images of any
        size. `None`: no classifier, the result is the feature map of `VGGFeatures`.
      dropout_rate: of the dense head.
      classifier_init: initialiser of the last dense layer's weights. Zeros start training at equal
        logits, and give the convolutions no gradient until the first update.
      dtype: of the computation. Logits are float32 at least.
      param_dtype: of the parameters.
    """

    num_classes: int | None = 1000
    width: float = 1.0
    head: Head | None = "dense"
    dropout_rate: float = DROPOUT_RATE
    classifier_init: nn.initializers.Initializer = HE
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        if self.head not in ("dense", "gap", None):
            raise ValueError(
                f'head: got {self.head!r}; use "dense" (flatten and three dense layers), '
                '"gap" (global average pool and one dense layer) or None (no classifier)'
            )
        check_settings(width=self.width)
        self.features = VGGFeatures(self.width, self.dtype, self.param_dtype)
        if self.num_classes is None:
            return
        if self.head == "dense":
            hidden = scaled(DENSE_WIDTH, self.width)
            self.fc6 = self._dense(hidden)
            self.fc7 = self._dense(hidden)
            self.fc8 = self._dense(self.num_classes, self.classifier_init)
            self.dropout = nn.Dropout(self.dropout_rate)
        elif self.head == "gap":
            self.classifier = self._dense(self.num_classes, self.classifier_init)

    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        x = self.features(images)
        if self.num_classes is None or self.head is None:
            return x
        if self.head == "dense":
            x = x.reshape(x.shape[0], -1)
            x = self.dropout(nn.relu(self.fc6(x)), deterministic=not train)
            x = self.dropout(nn.relu(self.fc7(x)), deterministic=not train)
            return at_least_float32(self.fc8(x))
        return at_least_float32(self.classifier(x.mean(axis=(1, 2))))

    def _dense(self, features: int, kernel_init: nn.initializers.Initializer = HE) -> nn.Dense:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(features, kernel_init=kernel_init, **dtypes)
