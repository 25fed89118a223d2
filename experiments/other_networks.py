"""Networks as other people write them, that no benchmark of this project was made with."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


class EDSR(nn.Module):
    """Super-resolution: residual blocks without normalisation, one long skip, pixel shuffle."""

    dtype: Any
    blocks: int = 16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(features: int) -> nn.Conv:
            return nn.Conv(features, (3, 3), dtype=self.dtype)

        first = x = conv(64)(x)
        for _ in range(self.blocks):
            x = x + 0.1 * conv(64)(nn.relu(conv(64)(x)))
        x = conv(64 * 4)(conv(64)(x) + first)
        b, h, w, c = x.shape
        x = x.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
        return conv(3)(x.reshape(b, 2 * h, 2 * w, c // 4))


class StandardisedConv(nn.Conv):
    """BiT's: kernels of mean zero and variance one."""

    def param(self, name: str, init: Any, *args: Any, **options: Any) -> Any:
        value = super().param(name, init, *args, **options)
        if name != "kernel":
            return value
        value = value - value.mean(axis=(0, 1, 2))
        return value * lax.rsqrt(jnp.square(value).mean(axis=(0, 1, 2)) + 1e-5)


class BiT(nn.Module):
    """ResNet-50 v2 with GroupNorm and weight standardisation (Big Transfer)."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(features: int, size: int, stride: int = 1) -> nn.Conv:
            return StandardisedConv(
                features, (size, size), (stride, stride), use_bias=False, dtype=self.dtype
            )

        def norm(x: jax.Array) -> jax.Array:
            return nn.relu(nn.GroupNorm(32, dtype=self.dtype)(x))

        x = nn.max_pool(conv(64, 7, 2)(x), (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                y, width = norm(x), 64 * 2**stage
                x = x if block else conv(4 * width, 1, stride)(y)
                y = conv(width, 3, stride)(norm(conv(width, 1)(y)))
                x = x + conv(4 * width, 1)(norm(y))
        return nn.Dense(1000, dtype=self.dtype)(norm(x).mean(axis=(1, 2)))


class KerasUNet(nn.Module):
    """The Keras example: batch statistics, transposed convolutions, concatenations."""

    dtype: Any
    features: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def twice(x: jax.Array, features: int) -> jax.Array:
            for _ in range(2):
                x = nn.Conv(features, (3, 3), dtype=self.dtype)(x)
                norm = nn.BatchNorm(use_running_average=False, dtype=self.dtype)
                x = nn.relu(norm(x))
            return x

        skips = []
        for level in range(4):
            x = twice(x, self.features * 2**level)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = twice(x, self.features * 16)
        for level in reversed(range(4)):
            features = self.features * 2**level
            x = nn.ConvTranspose(features, (2, 2), (2, 2), dtype=self.dtype)(x)
            x = twice(jnp.concatenate([skips[level], x], axis=-1), features)
        return nn.Conv(1, (1, 1), dtype=self.dtype)(x)


class DenseVGG(nn.Module):
    """VGG-16 with pools, dense layers behind a mean, and logits."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for count, features in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            for _ in range(count):
                x = nn.relu(nn.Conv(features, (3, 3), dtype=self.dtype)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(4096, dtype=self.dtype)(x.mean(axis=(1, 2))))
        return nn.Dense(1000, dtype=self.dtype)(x)


class DnCNN(nn.Module):
    """Denoising: seventeen convolutions with batch statistics at full resolution."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(nn.Conv(64, (3, 3), dtype=self.dtype)(x))
        for _ in range(15):
            y = nn.Conv(64, (3, 3), use_bias=False, dtype=self.dtype)(y)
            y = nn.relu(nn.BatchNorm(use_running_average=False, dtype=self.dtype)(y))
        return x - nn.Conv(3, (3, 3), dtype=self.dtype)(y)


class NNXBlock(nnx.Module):
    def __init__(self, before: int, after: int, stride: int, dtype: Any, rngs: nnx.Rngs):
        def conv(before: int, size: int, stride: int) -> nnx.Conv:
            return nnx.Conv(
                before, after, (size, size), stride, use_bias=False, dtype=dtype, rngs=rngs
            )

        self.first, self.second = conv(before, 3, stride), conv(after, 3, 1)
        self.norms = nnx.List([nnx.BatchNorm(after, dtype=dtype, rngs=rngs) for _ in range(2)])
        self.shortcut = None if before == after else conv(before, 1, stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.norms[0](self.first(x)))
        y = self.norms[1](self.second(y))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class NNXResNet(nnx.Module):
    """ResNet-34 with batch statistics, in NNX."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        self.stem = nnx.Conv(3, 64, (7, 7), 2, use_bias=False, dtype=dtype, rngs=rngs)
        blocks, before = [], 64
        for stage, count in enumerate((3, 4, 6, 3)):
            for block in range(count):
                after = 64 * 2**stage
                stride = 2 if stage and not block else 1
                blocks.append(NNXBlock(before, after, stride, dtype, rngs))
                before = after
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(before, 1000, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.stem(x)), (3, 3), (2, 2), "SAME")
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))
