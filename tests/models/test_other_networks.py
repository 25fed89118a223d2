"""Networks of other people's libraries pass through rowwise unchanged.

Each takes one training step's forward pass in double precision: outputs, updated statistics and the
gradients of all weights and of the images are those of column. Weights are drawn here, not by the
libraries, whose zero scales and biases would hide errors. Where a library lets depth and width be
chosen, they are small; of Keras's networks some have their full depth, others end early, behind
blocks of every kind. Updated statistics are not differentiated, as in training.
"""

import functools
import types

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrjax.testing import assert_same_as_column

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("x64")]

# One program by every strategy: segments between the network's narrowest maps.
EVERY_STRATEGY = ("stream", "overl", "2ps", "column", "column", "column")


def images(height, width, channels=3, batch=2, *, channels_first=False):
    shape = (channels, height, width) if channels_first else (height, width, channels)
    return jax.random.normal(jax.random.key(1), (batch, *shape))


def drawn(structs, seed=7):
    """Values for every array: kernels with their fan-in's scale, scales and variances near 1."""
    generator = np.random.default_rng(seed)

    def draw(path, struct):
        if not jnp.issubdtype(struct.dtype, jnp.inexact):
            return jnp.zeros(struct.shape, struct.dtype)
        name = jax.tree_util.keystr(path[-1:]).lower()
        values = generator.standard_normal(struct.shape)
        if len(struct.shape) > 1:
            values /= np.sqrt(max(np.prod(struct.shape[:-1]), 1))
        elif any(word in name for word in ("scale", "var", "average", "weight")):
            values = 1 + 0.1 * np.abs(values)
        else:
            values *= 0.1
        if jnp.issubdtype(struct.dtype, jnp.complexfloating):
            values = values * (1 + 1j)
        return jnp.asarray(values)

    return jax.tree_util.tree_map_with_path(draw, structs)


def without_gradient(result):
    """(output, updated statistics), the statistics not differentiated."""
    output, statistics = result
    return output, jax.lax.stop_gradient(statistics)


def linen_network(module, inputs, *others, row_axis=1, **options):
    """A Flax module's call on variables, images and what else it takes."""
    key = jax.random.key(0)
    variables = drawn(jax.eval_shape(lambda: module.init(key, inputs, *others, **options)))
    params = variables.pop("params")

    def forward(params, inputs, statistics, *others):
        variables = {"params": params, **statistics}
        return without_gradient(
            module.apply(variables, inputs, *others, mutable=list(statistics), **options)
        )

    args = (params, inputs, variables, *others)
    return forward, args, (None, row_axis, None, *(None for _ in others))


def haiku_network(make):
    network = hk.transform_with_state(lambda images: make()(images, True))
    inputs = images(64, 33)
    params, statistics = drawn(jax.eval_shape(network.init, jax.random.key(0), inputs))

    def forward(params, inputs, statistics):
        return without_gradient(network.apply(params, statistics, None, inputs))

    return forward, (params, inputs, statistics), (None, 1, None)


def equinox_network(make, inputs, call):
    """A model of one image, channels first, under ``vmap``."""
    import equinox as eqx

    arrays, static = eqx.partition(make(), eqx.is_inexact_array)

    def forward(arrays, inputs):
        return jax.vmap(functools.partial(call, eqx.combine(arrays, static)))(inputs)

    return forward, (drawn(arrays), inputs), (None, 2)


def haiku_resnet(**options):
    channels = (16, 32, 64, 128)
    return haiku_network(
        lambda: hk.nets.ResNet((1, 1, 1, 1), 10, channels_per_group=channels, **options)
    )


def haiku_mobilenet_v1():
    return haiku_network(
        lambda: hk.nets.MobileNetV1(strides=(1, 2, 1, 2), channels=(8, 16, 16, 32), num_classes=10)
    )


def jax_resnet_network(name, batch, **options):
    import jax_resnet

    network = getattr(jax_resnet, name)(n_classes=10, **options)
    return linen_network(network, images(64, 32, batch=batch))


def transformers_network(name, **options):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        embedding_size=8, hidden_sizes=[16, 32, 32], depths=[1, 1, 1], **options
    )
    model = getattr(transformers, f"Flax{name}Model")(config, _do_init=False, dtype=jnp.float64)
    return linen_network(model.module, images(64, 32), deterministic=False, return_dict=False)


def diffusers_unet():
    """Cross-attention to a text, and the time of each image."""
    from diffusers import FlaxUNet2DConditionModel

    unet = FlaxUNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=8,
        dtype=jnp.float64,
    )
    times, text = jnp.array([3.0, 7.0]), jax.random.normal(jax.random.key(3), (2, 5, 8))
    inputs = images(16, 16, 4, channels_first=True)
    return linen_network(unet, inputs, times, text, row_axis=2, return_dict=False)


def diffusers_autoencoder():
    from diffusers import FlaxAutoencoderKL

    autoencoder = FlaxAutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        dtype=jnp.float64,
    )
    inputs = images(32, 16, channels_first=True)
    forward, args, in_axes = linen_network(autoencoder, inputs, row_axis=2)
    return lambda *args: forward(*args)[0].sample, args, in_axes


def equimo_mobilenet_v3():
    """Its maps: the mean of the last one, behind GroupNorm, is the same for every image."""
    try:
        from equimo.vision.models.mobilenet import MobileNetv3
    except ModuleNotFoundError:  # before equimo 2
        from equimo.models.mobilenet import MobileNetv3

    layers = [
        (16, 16, 3, 2, True, "relu"),
        (24, 72, 3, 2, False, "relu"),
        (24, 88, 3, 1, False, "relu"),
        (40, 96, 5, 2, True, "hard_swish"),
    ]
    key = jax.random.key(0)
    return equinox_network(
        lambda: MobileNetv3(3, layers, last_channels=32, num_classes=10, key=key),
        images(64, 32, channels_first=True),
        lambda model, image: model.features(image, key=key, inference=True),
    )


def jax_models_poolformer():
    from jax_models.models.poolformer import S12

    return linen_network(S12(attach_head=True, num_classes=10), images(64, 32), deterministic=True)


def neojax_fno(monkeypatch):
    """Fourier layers; its spectra are complex64, whatever the image is, but for one name."""
    from neojax.models.fno import FNO
    from neojax.nn import spectral_conv

    wide = types.SimpleNamespace(**{**vars(jnp), "complex64": jnp.complex128})
    monkeypatch.setattr(spectral_conv, "jnp", wide)
    options = {"positional_embedding": "grid", "normalization": "instance"}
    return equinox_network(
        lambda: FNO(jax.random.key(0), 1, 1, 8, 2, (4, 4), **options),
        images(24, 20, 1, channels_first=True),
        lambda model, image: model(image),
    )


SMALL_NETWORKS = {
    "haiku ResNet": (haiku_resnet, "2ps"),
    "haiku ResNet v2": (functools.partial(haiku_resnet, resnet_v2=True), "overl"),
    "haiku MobileNetV1": (haiku_mobilenet_v1, "2ps"),
    "jax-resnet ResNetD50": (
        functools.partial(
            jax_resnet_network, "ResNetD50", 2, stage_sizes=(1, 1, 1), hidden_sizes=(16, 32, 32)
        ),
        "overl",
    ),
    # Its attention normalises one value per image and channel: over more than two images.
    "jax-resnet ResNeSt50Fast": (
        functools.partial(
            jax_resnet_network, "ResNeSt50Fast", 4, stage_sizes=(1, 1), hidden_sizes=(16, 32)
        ),
        "2ps",
    ),
    "jax-resnet ResNeXt50": (
        functools.partial(
            jax_resnet_network, "ResNeXt50", 2, stage_sizes=(1, 1), hidden_sizes=(16, 32)
        ),
        "overl",
    ),
    "transformers ResNet": (functools.partial(transformers_network, "ResNet"), "2ps"),
    "transformers RegNet": (
        functools.partial(transformers_network, "RegNet", groups_width=8),
        "overl",
    ),
    "diffusers UNet2DCondition": (diffusers_unet, "overl"),
    "diffusers AutoencoderKL": (diffusers_autoencoder, "2ps"),
    "equimo MobileNetV3": (equimo_mobilenet_v3, "overl"),
    "jax-models PoolFormer S12": (jax_models_poolformer, "2ps"),
    "neojax FNO": (neojax_fno, "2ps"),
}


@pytest.mark.parametrize("name", SMALL_NETWORKS)
def test_small_network(name, monkeypatch):
    make, strategy = SMALL_NETWORKS[name]
    forward, args, in_axes = make(monkeypatch) if make is neojax_fno else make()
    column = assert_same_as_column(forward, args, in_axes, num_blocks=3, strategy="stream")
    assert_same_as_column(forward, args, in_axes, num_blocks=2, strategy=strategy, expected=column)


@pytest.fixture
def keras(monkeypatch):
    """Keras on JAX in double precision, which its rules of promotion have for TensorFlow alone."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    import keras
    from keras.src.backend.common import dtypes

    assert keras.backend.backend() == "jax"
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")
    policy = keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(0)
    yield keras
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy(policy)


@pytest.mark.parametrize(
    ("name", "size", "last", "options"),
    [
        ("ResNet50", 64, None, {}),
        ("DenseNet121", 64, "pool3_conv", {}),
        ("EfficientNetB0", 64, "block3b_add", {}),
        ("MobileNet", 64, None, {"alpha": 0.25}),
        ("InceptionV3", 107, "mixed4", {}),
    ],
)
def test_keras(keras, name, size, last, options):
    """In training mode, as far as the layer ``last``; None: at full depth."""
    whole = getattr(keras.applications, name)(
        weights=None, include_top=False, input_shape=(size, size, 3), **options
    )
    maps = whole.output if last is None else whole.get_layer(last).output
    network = keras.Model(whole.input, keras.layers.GlobalAveragePooling2D()(maps))

    def forward(trainable, inputs, others):
        return without_gradient(network.stateless_call(trainable, others, inputs, training=True))

    variables = network.trainable_variables, network.non_trainable_variables
    trainable, others = ([variable.value for variable in group] for group in variables)
    assert_same_as_column(
        forward,
        (trainable, images(size, size), others),
        (None, 1, None),
        num_blocks=2,
        strategy=EVERY_STRATEGY,
        cuts=len(EVERY_STRATEGY),
    )
