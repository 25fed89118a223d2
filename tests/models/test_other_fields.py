"""Losses as people of other fields write them: sound, climate, physics, medicine, documents."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.scipy.ndimage import map_coordinates

from lrjax.testing import assert_same_as_column
from marks import slow

pytestmark = pytest.mark.usefixtures("x64")

HEIGHT, WIDTH = 24, 12


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape) / np.sqrt(np.prod(shape[:-1]))


IMAGE = np.random.default_rng(9).standard_normal((2, HEIGHT, WIDTH, 3))
SOUND = np.random.default_rng(8).standard_normal((2, 96, 3))
KERNEL = normal(3, 3, 3, 3, seed=1)


def convolve(maps, kernel, stride=1, padding="SAME", **options):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        maps, kernel, (stride, stride), padding, dimension_numbers=layout, **options
    )


def along(sound, kernel, padding="SAME", dilation=1):
    layout = ("NHC", "HIO", "NHC")
    return lax.conv_general_dilated(
        sound, kernel, (1,), padding, rhs_dilation=(dilation,), dimension_numbers=layout
    )


# --- Sound, by time ------------------------------------------------------------------------------


def wavenet(params, sound):
    first, layers = params
    hidden, skipped = along(sound, first), 0
    for i, kernel in enumerate(layers):
        both = along(hidden, kernel, [(2**i, 0)], 2**i)
        values, gates = jnp.split(both, 2, -1)
        values = jnp.tanh(values) * jax.nn.sigmoid(gates)
        hidden, skipped = hidden + values, skipped + values
    return jnp.mean(jax.nn.log_softmax(skipped)[:, 1:] ** 2)


def spectrogram(params, sound):
    frames = np.arange(0, 96 - 15, 4)[:, None] + np.arange(16)
    found = jnp.fft.rfft(sound[:, frames, 0] * np.hanning(16))
    return jnp.mean(jnp.tanh(along(jnp.log1p(jnp.abs(found + 1e-3)), params)) ** 2)


# --- Climate and physics -------------------------------------------------------------------------


def around_the_globe(maps, kernel, stride=1):
    maps = jnp.pad(maps, ((0, 0), (0, 0), (1, 1), (0, 0)), mode="wrap")
    maps = jnp.pad(maps, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="reflect")
    return convolve(maps, kernel, stride, "VALID")


def forecast(params, state):
    first = jax.nn.gelu(around_the_globe(state, params))
    deep = jax.nn.gelu(around_the_globe(first, params, 2))
    return around_the_globe(first + jax.image.resize(deep, first.shape, "bilinear"), params)


AREA = np.cos(np.linspace(-1.5, 1.5, HEIGHT))[:, None, None]


def weighted_by_latitude(params, state):
    return jnp.mean((forecast(params, state) - state) ** 2 * AREA)


def anomaly_correlation(params, state):
    found = forecast(params, state)
    product = jnp.sum(AREA * found * state, (1, 2))
    squares = jnp.sum(AREA * found**2, (1, 2)) * jnp.sum(AREA * state**2, (1, 2))
    return -jnp.mean(product / jnp.sqrt(squares))


def rollout(params, state):
    found, _ = lax.scan(lambda s, _: (s + 0.1 * forecast(params, s), None), state, None, length=2)
    return jnp.mean((found - state) ** 2)


def land_only(params, state):
    is_land = np.random.default_rng(7).random((HEIGHT, WIDTH, 1)) > 0.3
    seen = jnp.where(is_land, state, jnp.nan)
    return jnp.sum(jnp.where(is_land, forecast(params, state) - seen, 0.0) ** 2) / is_land.sum()


def spectrum_along_latitudes(params, state):
    error = jnp.fft.rfft(forecast(params, state) - state, axis=2)
    return jnp.mean(jnp.abs(error) ** 2 * AREA)


def cellular_automaton(params, state):
    def step(state, _):
        return state + 0.1 * jnp.tanh(convolve(state, params)), None

    return jnp.mean(lax.scan(step, state, None, length=6)[0] ** 2)


def jacobi(params, image):
    cross = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])[:, :, None, None] * np.eye(3) / 4
    source = convolve(image, params)
    return jnp.mean(lax.fori_loop(0, 8, lambda _, u: convolve(u, cross) + source / 9, source) ** 2)


def laplacian(params, image):
    u = jnp.tanh(convolve(image, params))
    inner = u[:, 2:, 1:-1] + u[:, :-2, 1:-1] + u[:, 1:-1, 2:] + u[:, 1:-1, :-2]
    varies = jnp.abs(jnp.diff(u, axis=1)).mean() + jnp.abs(jnp.diff(u, axis=2)).mean()
    return jnp.mean((inner - 4 * u[:, 1:-1, 1:-1]) ** 2) + varies / 9


def coordinates_alone(params, image):
    lines = jnp.linspace(-1, 1, HEIGHT), jnp.linspace(-1, 1, WIDTH)
    places = jnp.stack(jnp.meshgrid(*lines, indexing="ij"), -1)[None]
    return jnp.mean((jnp.sin(9 * places @ params[0, 0, :2]) @ params[1, 1] - image) ** 2)


# --- Images --------------------------------------------------------------------------------------


def structural_similarity(params, image):
    found, window = convolve(image, params), np.ones((5, 5, 1, 3)) / 25

    def mean(maps):
        return convolve(maps, window, 1, "VALID", feature_group_count=3)

    a, b = mean(image), mean(found)
    variances = mean(image**2) - a**2 + mean(found**2) - b**2
    covariance = mean(image * found) - a * b
    alike = (2 * a * b + 0.01) * (2 * covariance + 0.03)
    return 1 - jnp.mean(alike / ((a**2 + b**2 + 0.01) * (variances + 0.03)))


def soft_histogram(params, image):
    values = convolve(image, params)[..., None]
    below = jax.nn.sigmoid(5 * (values - jnp.linspace(-1, 1, 5))).mean((1, 2))
    return jnp.sum(jnp.diff(below) ** 2)


def box_filter(params, image):
    sums = jnp.cumsum(jnp.cumsum(convolve(image, params), 1), 2)
    boxes = sums[:, 4:, 4:] - sums[:, :-4, 4:] - sums[:, 4:, :-4] + sums[:, :-4, :-4]
    return jnp.mean(convolve(boxes / 16, params) ** 2)


def optical_flow(params, image):
    flow = 3 * jnp.tanh(convolve(image, params))[..., :2]
    grid = jnp.meshgrid(jnp.arange(HEIGHT), jnp.arange(WIDTH), indexing="ij")

    def warped(plane, flow):
        places = [grid[0] + flow[..., 0], grid[1] + flow[..., 1]]
        return map_coordinates(plane, places, 1, mode="nearest")

    moved = jax.vmap(jax.vmap(warped, (-1, None), -1))(image, flow)
    return jnp.mean((convolve(moved, params) - image) ** 2)


def lines_of_text(params, image):
    scores = convolve(image, params, 2).mean(2)
    labels = jnp.array([[1, 2, 1], [2, 2, 1]])
    return optax.ctc_loss(
        scores, jnp.zeros(scores.shape[:2]), labels, jnp.zeros(labels.shape)
    ).mean()


def mixture_of_experts(params, image):
    maps = convolve(image, params)
    gates = jax.nn.softmax(maps.mean((1, 2)) @ params[0, 0])
    gates = jnp.where(gates >= lax.top_k(gates, 2)[0][:, -1:], gates, 0)
    experts = jnp.stack([jnp.tanh(convolve(maps, kernel)) for kernel in (params, params**2)], -1)
    return jnp.mean(jnp.einsum("bhwce,be->bhwc", experts, gates[:, :2]) ** 2)


def detector(params, image):
    """Scores of three resolutions, one after the other."""
    levels = [convolve(image, params, 2)]
    levels += [convolve(levels[0], params, 2)]
    scores = jax.nn.sigmoid(jnp.concatenate([x.reshape(2, -1, 3) for x in levels], 1))
    return jnp.mean(-((1 - scores) ** 2) * jnp.log(scores + 1e-6))


def slide(params, image):
    """Attention over the tiles of a slide."""
    maps = jnp.tanh(convolve(image, params, 2))
    tiles = maps.reshape(2, 3, 4, 3, 2, 3).mean((2, 4))
    weights = jax.nn.softmax((tiles @ params[0, 0, :, :1]).reshape(2, -1))
    return jnp.mean(jnp.sum(weights[..., None] * tiles.reshape(2, -1, 3), 1) ** 2)


def learned_positions(params, image):
    kernel, positions = params
    maps = jnp.tanh(convolve(image + positions, kernel))
    return jnp.mean((maps + jnp.roll(positions, 1, 2)) ** 2)


LAYERS = [normal(2, 4, 8, seed=i) for i in range(5)]
LOSSES = {
    wavenet: ((normal(3, 3, 4), LAYERS), SOUND),
    spectrogram: (normal(3, 9, 4), SOUND),
    learned_positions: ((KERNEL, normal(1, HEIGHT, WIDTH, 3)), IMAGE),
    **dict.fromkeys(
        (
            *(weighted_by_latitude, anomaly_correlation, rollout, land_only),
            *(spectrum_along_latitudes, cellular_automaton, jacobi, laplacian, coordinates_alone),
            *(structural_similarity, soft_histogram, box_filter, optical_flow, lines_of_text),
            *(mixture_of_experts, detector, slide),
        ),
        (KERNEL, IMAGE),
    ),
}


@pytest.mark.parametrize("strategy", ["stream", *slow("2ps", "overl")])
@pytest.mark.parametrize("loss", LOSSES)
def test_by_rows_is_column(loss, strategy):
    assert_same_as_column(loss, LOSSES[loss], (None, 1), num_blocks=3, strategy=strategy)
