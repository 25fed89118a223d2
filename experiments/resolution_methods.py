"""Four ways to train one network on a large image: column, lrjax, patches, PatchGD; and what fits.

Every method is a `Method`: the loss and gradient of one image, and the logits of one. The optimizer
adds up the gradients of several images before it moves (`optax.MultiSteps`), so that no method
holds more than one image and the memory of its step is as small as it can be made.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lrjax

COLUMN, LRJAX, PATCHES, PATCHGD = "column", "lrjax", "patches", "PatchGD"
# Rows of the image admitted in one step of the row loop.
ROWS_PER_STEP = 8
# Sides that column is tried at, and sides of patches, are multiples of the network's strides.
STRIDE = 8
# Part of an image's patches whose gradient PatchGD takes, over all its inner iterations.
PATCHGD_PART = 0.5
# Sums over a canvas grow with the digits on it; this brings the first logits near one.
FEATURE_SCALE = 0.1

Params = Any
Step = Callable[..., tuple[Params, Any, jax.Array]]


class SumNetwork(nn.Module):
    """Five 3x3 convolutions, the first at full resolution, summed over the image, and a classifier.

    The convolutions have no bias: black stays zero, and what a canvas sums to does not depend on
    its size. `features` and `classify` are apart because PatchGD needs them so.
    """

    num_classes: int
    channels: tuple[int, ...] = (8, 16, 16, 32, 32)
    strides: tuple[int, ...] = (1, 2, 2, 2, 1)

    def setup(self) -> None:
        self.convolutions = [
            nn.Conv(channels, (3, 3), strides=stride, use_bias=False)
            for channels, stride in zip(self.channels, self.strides, strict=True)
        ]
        self.classifier = nn.Dense(self.num_classes)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits `[batch, num_classes]` of uint8 images `[batch, height, width, 1]`."""
        return self.classify(self.features(images))

    def features(self, images: jax.Array) -> jax.Array:
        """Sums over the image, `[batch, channels]`."""
        maps = images.astype(jnp.float32) / 85
        for convolution in self.convolutions:
            maps = nn.leaky_relu(convolution(maps))
        return FEATURE_SCALE * maps.sum((1, 2))

    def classify(self, features: jax.Array) -> jax.Array:
        return self.classifier(features)


@dataclass(frozen=True)
class Method:
    """A way to train on images of one size.

    Attributes:
      name: of the method.
      side: of the images it is given, in pixels.
      value_and_grad: `(params, image [1, side, side, 1], label [1], key)` to loss and gradient.
      logits: `(params, image)` to `[1, num_classes]`.
      patch: side of its patches in pixels, where it has any.
      sampled: patches in one of PatchGD's inner iterations.
    """

    name: str
    side: int
    value_and_grad: Callable[..., tuple[jax.Array, Params]]
    logits: Callable[[Params, jax.Array], jax.Array]
    patch: int | None = None
    sampled: int | None = None


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def whole_image(network: nn.Module, side: int, *, by_rows: bool) -> Method:
    """Column, or lrjax: the gradient of the whole image, exact in both."""
    logits = network.apply
    if by_rows:
        blocks = max(1, side // ROWS_PER_STEP)
        logits = lrjax.rowwise(logits, in_axes=(None, 1), num_blocks=blocks)

    def value_and_grad(params, image, label, key):
        del key
        return jax.value_and_grad(lambda p: cross_entropy(logits(p, image), label))(params)

    return Method(LRJAX if by_rows else COLUMN, side, value_and_grad, logits)


def patch_at(image: jax.Array, index: jax.Array, patch: int) -> jax.Array:
    """Patch number `index`, row by row, of `image` `[1, side, side, 1]`."""
    per_row = image.shape[2] // patch
    start = (0, index // per_row * patch, index % per_row * patch, 0)
    return jax.lax.dynamic_slice(image, start, (1, patch, patch, 1))


def patchwise(network: nn.Module, side: int, patch: int) -> Method:
    """Every patch is an image of its own with the canvas's label; logits are averaged.

    The loss is the mean over patches of each one's own cross-entropy, its gradient accumulated
    patch by patch. Each patch is padded with zeros, so a digit that an edge cuts is seen in parts.
    """
    _check_patch(side, patch)
    patches = jnp.arange((side // patch) ** 2)

    def value_and_grad(params, image, label, key):
        del key

        def loss(p, index):
            return cross_entropy(network.apply(p, patch_at(image, index, patch)), label)

        def add(total, index):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, index)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, patches)
        return jax.tree.map(lambda leaf: leaf / len(patches), total)

    def logits(params, image):
        return jax.lax.map(
            lambda index: network.apply(params, patch_at(image, index, patch)), patches
        ).mean(0)

    return Method(PATCHES, side, value_and_grad, logits, patch=patch)


def latent_block(
    network: nn.Module, params: Params, image: jax.Array, patches: jax.Array, patch: int
) -> jax.Array:
    """PatchGD's Z: the features of the patches numbered `patches`, `[len(patches), channels]`."""
    return jax.lax.map(
        lambda index: network.apply(params, patch_at(image, index, patch), method="features")[0],
        patches,
    )


def patchgd(network: nn.Module, side: int, patch: int, sampled: int) -> Method:
    """PatchGD (arXiv 2301.13817): a latent block of all patches, gradients through a few of them.

    The block Z holds every patch's features, computed without a gradient. An inner iteration draws
    `sampled` patches, puts their features, now with a gradient, into Z, and differentiates the loss
    of the classifier on all of Z. Inner iterations draw without replacement until half of the
    patches have been drawn; their gradients are averaged, and the parameters move once per
    mini-batch (the paper's epsilon is the number of inner iterations). Features are summed over the
    patches, as the network sums them over the image. Two things are approximate: the gradient
    leaves out the patches that were not drawn, and each patch is padded with zeros.
    """
    _check_patch(side, patch)
    count = (side // patch) ** 2
    if not 1 <= sampled <= count:
        raise ValueError(f"sampled: got {sampled}; an image has 1 to {count} patches")
    iterations = max(1, round(PATCHGD_PART * count / sampled))
    patches = jnp.arange(count)

    def classify(params, block):
        return network.apply(params, block.sum(0, keepdims=True), method="classify")

    def value_and_grad(params, image, label, key):
        block = latent_block(network, params, image, patches, patch)

        def loss(p, chosen):
            crops = jnp.concatenate([patch_at(image, index, patch) for index in chosen])
            features = network.apply(p, crops, method="features")
            return cross_entropy(classify(p, block.at[chosen].set(features)), label)

        def add(total, chosen):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, chosen)), None

        order = jax.random.permutation(key, count)[: iterations * sampled]
        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(add, zero, order.reshape(iterations, sampled))
        return jax.tree.map(lambda leaf: leaf / iterations, total)

    def logits(params, image):
        return classify(params, latent_block(network, params, image, patches, patch))

    return Method(PATCHGD, side, value_and_grad, logits, patch=patch, sampled=sampled)


def _check_patch(side: int, patch: int) -> None:
    if patch < 1 or side % patch:
        raise ValueError(f"patch: got {patch}; use a divisor of the image's side, {side}")


# --- What fits ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CompiledMethod:
    """The training step of a method, compiled, and XLA's figure of its memory in bytes."""

    method: Method
    step: Step
    peak_bytes: int


def compile_method(
    method: Method, params: Params, optimizer: optax.GradientTransformation
) -> CompiledMethod:
    """The step `(params, state, image, label, key)` to new parameters, new state and the loss."""

    def step(params, state, image, label, key):
        value, grads = method.value_and_grad(params, image, label, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    arguments = (
        params,
        jax.eval_shape(optimizer.init, params),
        jax.ShapeDtypeStruct((1, method.side, method.side, 1), jnp.uint8),
        jax.ShapeDtypeStruct((1,), jnp.int32),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    return CompiledMethod(method, compiled, lrjax.memory.peak_bytes(compiled))


def largest_fitting(
    candidates: list[Method],
    budget_bytes: int,
    compile_one: Callable[[Method], CompiledMethod],
) -> CompiledMethod:
    """The last of `candidates`, which need more and more memory, that fits; by bisection.

    Raises:
      ValueError: if not even the first fits.
    """
    fitting = None
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        compiled = compile_one(candidates[middle])
        if compiled.peak_bytes <= budget_bytes:
            fitting, low = compiled, middle + 1
        else:
            high = middle
    if fitting is None:
        name = candidates[0].name if candidates else "no candidate"
        raise ValueError(
            f"budget_bytes: got {budget_bytes}, which not even {name}'s smallest step fits; "
            "give more"
        )
    return fitting


def column_candidates(network: nn.Module, canvas: int) -> list[Method]:
    """Column at every side it may be given the canvas at, smallest first."""
    sides = range(2 * STRIDE, canvas + 1, STRIDE)
    return [whole_image(network, side, by_rows=False) for side in sides]


def patch_sides(side: int) -> list[int]:
    """Sides of patches that tile an image, smallest first."""
    return [p for p in range(2 * STRIDE, side + 1, STRIDE) if side % p == 0]


def patchwise_candidates(network: nn.Module, side: int) -> list[Method]:
    return [patchwise(network, side, patch) for patch in patch_sides(side)]


def patchgd_candidates(network: nn.Module, side: int, patch: int) -> list[Method]:
    """PatchGD with 1, 2, 4, ... patches in an inner iteration, half of all at most."""
    half = max(1, (side // patch) ** 2 // 2)
    sampled = [2**power for power in range(half.bit_length()) if 2**power <= half]
    return [patchgd(network, side, patch, number) for number in sampled]
