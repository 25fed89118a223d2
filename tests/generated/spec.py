"""A network as plain data, and how it runs.

A :class:`Spec` is a tree of layers with their parameters, the image and the options of ``rowwise``.
Its ``repr`` is its source, so that a failure can be pasted as a test.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrjax.strategies import Strategy

Array = Any


class Layer:
    """A layer of a description: its kind and the parameters that are not its defaults."""

    def __init__(self, kind: str, /, **params: Any):
        self.kind, self.params = kind, params

    def __repr__(self) -> str:
        shown = "".join(f", {name}={value!r}" for name, value in self.params.items())
        return f"L({self.kind!r}{shown})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layer) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


L = Layer
MAP = L("head")


@dataclasses.dataclass(frozen=True)
class Spec:
    """A function by rows.

    Attributes:
      layers: of the network, in order.
      head: what is made of the last map: a layer too.
      layout: letters of the image's axes; H are the rows, W and D further spatial axes.
      batch, height, width, channels: of the image (W and D are both ``width``).
      dtype: of parameters and images.
      image: "float", or "uint8" for bytes.
      seed: of the values of parameters and images.
      strategy, num_blocks, cuts: as for ``rowwise``; ``num_blocks`` is lowered to its limit.
      argnums: arguments that are differentiated.
      negative_axes: row axes are counted from the end.
      keyword: "static" (a flag), "array" or None, an argument of the network given by its name.
      devices: how many share the rows of the image.
    """

    layers: Sequence[Layer]
    head: Layer = MAP
    layout: str = "NHWC"
    batch: int = 1
    height: int = 6
    width: int = 2
    channels: int = 1
    dtype: str = "float64"
    image: str = "float"
    seed: int = 0
    strategy: str | Strategy | tuple[str, ...] = "stream"
    num_blocks: int | tuple[int, ...] = 2
    cuts: Any = ()
    argnums: tuple[int, ...] = (0, 1)
    negative_axes: bool = False
    keyword: str | None = None
    devices: int = 1

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "layers" or value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"Spec({', '.join(shown)})"

    @property
    def image_shape(self) -> tuple[int, ...]:
        sizes = {"N": self.batch, "H": self.height, "C": self.channels}
        return tuple(sizes.get(letter, self.width) for letter in self.layout)


class Context:
    """Parameters, images and outputs of a network while it runs.

    Attributes:
      values: arrays by name; missing ones are made where ``makes`` is true.
      images: further images by name.
      row_axes: their row axes.
      outputs: maps and sums that layers give besides the last one.
      is_nested: within a function of its own (a branch, a checkpoint), which gives no outputs.
      noise: seed of a unit in the last place by which every layer's map moves, None for none.
    """

    def __init__(
        self,
        seed: int,
        values: Any = None,
        images: Any = None,
        keywords: Any = None,
        dtype: str = "float64",
    ):
        self.seed, self.dtype = seed, jnp.dtype(dtype)
        self.makes = values is None
        self.values: dict[str, Any] = {} if values is None else values
        self.images: dict[str, Any] = {} if images is None else images
        self.keywords: dict[str, Any] = keywords or {}
        self.row_axes: dict[str, int] = {}
        self.outputs: list[Any] = []
        self.is_nested = False
        self.noise: int | None = None

    def generator(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def typed(self, array: Any) -> Any:
        """Floating-point numbers in the network's precision."""
        array = np.asarray(array)
        return array.astype(self.dtype) if np.issubdtype(array.dtype, np.floating) else array

    def parameter(self, name: str, make: Callable[[np.random.Generator], Any]) -> Array:
        if self.makes and name not in self.values:
            self.values[name] = self.typed(make(self.generator(name)))
        return jnp.asarray(self.values[name])

    def image(self, name: str, row_axis: int, make: Callable[[np.random.Generator], Any]) -> Array:
        if self.makes and name not in self.images:
            self.images[name] = self.typed(make(self.generator(name)))
            self.row_axes[name] = row_axis
        return jnp.asarray(self.images[name])


@dataclasses.dataclass
class Map:
    """A map, its layout, and where it is in the network."""

    x: Array
    layout: str
    net: Context
    path: str = ""

    def axis(self, letter: str) -> int:
        return self.layout.index(letter)

    def axes(self, letters: str) -> tuple[int, ...]:
        return tuple(self.layout.index(letter) for letter in letters if letter in self.layout)

    def size(self, letter: str) -> int:
        return int(self.x.shape[self.axis(letter)])

    @property
    def spatial(self) -> str:
        return "".join(letter for letter in self.layout if letter in "HWD")

    def of(self, x: Array, layout: str | None = None) -> Map:
        return Map(x, layout or self.layout, self.net, self.path)

    def broadcast(self, values: Array, letters: str) -> Array:
        """``values`` with axes ``letters`` (in this order) as an array that meets the map's."""
        order = sorted(range(len(letters)), key=lambda i: self.layout.index(letters[i]))
        values = jnp.transpose(values, order)
        missing = [a for a, letter in enumerate(self.layout) if letter not in letters]
        return jnp.expand_dims(values, missing)

    def parameter(self, name: str, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Array:
        def make(generator: np.random.Generator) -> Any:
            return offset + scale * generator.standard_normal(shape)

        return self.net.parameter(f"{self.path}.{name}", make)

    def integers(self, name: str, high: int, *shape: int) -> Array:
        def make(generator: np.random.Generator) -> Any:
            return generator.integers(0, high, shape, dtype=np.int32)

        return self.net.parameter(f"{self.path}.{name}", make)

    def image(self, name: str, make: Callable[[np.random.Generator], Any], row_axis: int) -> Array:
        return self.net.image(f"{self.path}.{name}", row_axis, make)

    def output(self, value: Any) -> None:
        if not self.net.is_nested:
            self.net.outputs.append(value)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of layer.

    Attributes:
      apply: a map to a map (a head: to anything).
      draw: parameters from random choices and the map so far.
      weight: how often it is drawn.
      family: a word by which kinds are left out together.
      defaults: the simplest parameters.
    """

    name: str
    apply: Callable[..., Any]
    draw: Callable[..., dict[str, Any]]
    weight: float
    family: str
    defaults: dict[str, Any]


KINDS: dict[str, Kind] = {}


def kind(
    family: str, weight: float = 1.0, draw: Callable[..., dict[str, Any]] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``apply(map, **params)`` under its own name; ``draw(random, map)`` gives params."""

    def register(apply: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(apply).parameters.values())[1:]
        defaults = {p.name: p.default for p in parameters}
        name = apply.__name__.rstrip("_")
        KINDS[name] = Kind(name, apply, draw or (lambda random, m: {}), weight, family, defaults)
        return apply

    return register


def apply_layer(layer: Layer, m: Map, name: str) -> Any:
    path = f"{m.path}/{name}"
    return KINDS[layer.kind].apply(dataclasses.replace(m, path=path), **layer.params)


def apply_layers(layers: Sequence[Layer], m: Map, prefix: str = "") -> Map:
    path = m.path
    for i, layer in enumerate(layers):
        m = dataclasses.replace(apply_layer(layer, m, f"{prefix}{i}"), path=path)
        if m.net.noise is not None:
            # What such a layer adds up, in cotangents too, has single precision's roundings.
            precision = np.float32 if layer.params.get("name") == "single" else np.float64
            m = _moved(m, f"{path}/{prefix}{i}", precision)
    return m


def _moved(m: Map, name: str, precision: Any) -> Map:
    """Every number up or down by a unit in the last place of a precision."""
    generator = np.random.default_rng([m.net.noise or 0, zlib.crc32(name.encode())])
    steps = generator.integers(0, 2, m.x.shape) * 2 - 1
    return m.of(m.x * (1 + steps * float(np.finfo(precision).eps)))


def nested(layers: Sequence[Layer], m: Map, prefix: str = "") -> Map:
    """Layers in a function of its own, which gives no outputs to the network."""
    outer, m.net.is_nested = m.net.is_nested, True
    try:
        return apply_layers(layers, m, prefix)
    finally:
        m.net.is_nested = outer


def fitted(m: Map, shape: Sequence[int], layout: str) -> Array:
    """A map brought to a shape: transposed, strided, cropped or padded, channels mixed."""
    x = jnp.transpose(m.x, [m.layout.index(letter) for letter in layout])
    for axis, (letter, size) in enumerate(zip(layout, shape, strict=True)):
        if letter == "C" and x.shape[axis] != size:
            weights = m.parameter("fit", x.shape[axis], size)
            x = jnp.moveaxis(jnp.tensordot(x, weights, [[axis], [0]]), -1, axis)
        elif x.shape[axis] != size:
            step = max(1, round(x.shape[axis] / size))
            x = jax.lax.slice_in_dim(x, 0, x.shape[axis], step, axis)
            x = jax.lax.slice_in_dim(x, 0, min(size, x.shape[axis]), 1, axis)
            pads = [(0, size - x.shape[axis] if a == axis else 0) for a in range(x.ndim)]
            x = jnp.pad(x, pads)
    return x


def run(spec: Spec, net: Context, image: Array) -> Any:
    """The network's outputs."""
    x = jnp.asarray(image)
    if spec.image == "uint8":
        x = x.astype(spec.dtype) / 255 - 0.4
    m = Map(x, spec.layout, net)
    if "scale" in net.keywords:
        m = m.of(m.x * net.keywords["scale"])
    m = apply_layers(spec.layers, m)
    last = apply_layer(spec.head, m, "head")
    if net.keywords.get("train"):
        last = jax.tree.map(lambda y: y * 2, last)
    return [*net.outputs, last] if net.outputs else last


@dataclasses.dataclass(frozen=True)
class Case:
    """A function with its arguments: ``fun(params, images, **kwargs)``.

    Attributes:
      moved: the function with every layer's map moved by units in the last place, from a seed.
    """

    fun: Callable[..., Any]
    moved: Callable[[int], Callable[..., Any]]
    args: tuple[Any, ...]
    in_axes: Any
    kwargs: dict[str, Any]


def keywords_of(spec: Spec) -> dict[str, Any]:
    scale = np.asarray(1.25, jnp.dtype(spec.dtype))
    return {None: {}, "static": {"train": True}, "array": {"scale": scale}}[spec.keyword]


def case_of(spec: Spec) -> Case:
    """The function, arguments and row axes of a description."""
    keywords = keywords_of(spec)
    made = Context(spec.seed, keywords=keywords, dtype=spec.dtype)
    if spec.image == "uint8":
        image = made.generator("image").integers(0, 256, spec.image_shape, np.uint8)
    else:
        image = made.typed(made.generator("image").standard_normal(spec.image_shape))
    jax.eval_shape(lambda image: run(spec, made, image), image)
    images = {"image": image, **made.images}
    axes = {"image": spec.layout.index("H"), **made.row_axes}
    if spec.negative_axes:
        axes = {name: axis - np.ndim(images[name]) for name, axis in axes.items()}

    def fun(params: Any, images: Any, noise: int | None = None, **keywords: Any) -> Any:
        further = {name: value for name, value in images.items() if name != "image"}
        net = Context(spec.seed, params, further, keywords, spec.dtype)
        net.noise = noise
        return run(spec, net, images["image"])

    def moved(seed: int) -> Callable[..., Any]:
        return functools.partial(fun, noise=seed)

    return Case(fun, moved, (made.values, images), (None, axes), keywords)
