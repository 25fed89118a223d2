"""Random descriptions: every choice comes from one generator, so a seed gives a network."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Sequence
from random import Random
from typing import Any

import jax
import numpy as np

from generated.spec import KINDS, Context, L, Layer, Map, Spec, apply_layer

MOST_ELEMENTS = 4000
MOST_ROWS = 150
MOST_WIDTH = 12
MOST_CHANNELS = 12

LAYOUTS = (
    "NHWC", "NHWC", "NHWC", "NCHW", "NCHW", "NHC", "NCH", "NHWDC", "NWHC", "NCWH", "HNWC", "NCDHW",
    "NWDHC", "CHNW", "WHCN",
)  # fmt: skip
HEIGHTS = ((2, 8), (5, 14), (1, 4), (10, 30), (30, 70))
DEPTHS = ((1, 3), (1, 3), (2, 5), (2, 5), (1, 3), (2, 5), (4, 8), (6, 20))
STRATEGIES = ("stream", "2ps", "overl")

# Kinds whose parameters hold layers: how many bodies, and of how many layers at most.
BODIES: dict[str, tuple[tuple[str, ...], int]] = {
    "residual": (("body",), 3),
    "shortcut": (("body", "other"), 2),
    "inception": (("bodies",), 2),
    "dense_block": (("bodies",), 2),
    "u_shape": (("body",), 2),
    "sliced_apart": (("body", "other"), 2),
    "checkpoint": (("body",), 3),
    "jitted": (("body",), 2),
    "cond": (("bodies",), 2),
}


def spec_of(
    random: Random,
    without: Collection[str] = (),
    *,
    most_layers: int = 20,
    dtype: str = "float64",
    heights: Sequence[tuple[int, int]] = HEIGHTS,
) -> Spec:
    """A description from random choices.

    Args:
      random: the choices.
      without: families, kinds, and kinds with one of their parameters ("head=max") left out.
      most_layers: at the top.
      dtype: of parameters and images.
      heights: of images, ranges of which one is chosen.
    """
    with jax.enable_x64(True):
        return _spec_of(random, frozenset(without), most_layers, dtype, heights)


def _spec_of(
    random: Random,
    without: frozenset[str],
    most_layers: int,
    dtype: str,
    heights: Sequence[tuple[int, int]],
) -> Spec:
    layout = random.choice(LAYOUTS)
    spec = Spec(
        layers=(),
        layout=layout,
        batch=random.choice([1, 1, 2, 3]),
        height=random.randint(*random.choice(heights)),
        width=random.choice([1, 2, 3, 4, 5]) if len(layout) < 5 else random.choice([1, 2, 3]),
        channels=random.choice([1, 2, 3]),
        dtype=dtype,
        image=random.choice(["float"] * 9 + ["uint8"]),
        seed=random.randint(0, 9999),
    )
    net = Context(spec.seed, dtype=dtype)
    m = _abstract_image(spec, net)
    least, most = random.choice(DEPTHS)
    depth = random.randint(min(least, most_layers), min(most, most_layers))
    layers, m = _Drawer(random, without).layers(m, depth)
    head = L("head", **_changed("head", KINDS["head"].draw(random, m)))
    is_left_out = f"head={head.params.get('how')}" in without
    if is_left_out or _abstractly(head, m, "head") is None:
        head = L("head")
    spec = dataclasses.replace(spec, layers=tuple(layers), head=head)
    return _with_options(random, spec)


def _with_options(random: Random, spec: Spec) -> Spec:
    """How it runs."""
    h = spec.height
    num_blocks = random.choice([2, 3, h, max(1, h - 1), max(1, h // 2), random.randint(1, h), 1])
    options: dict[str, Any] = {
        "strategy": random.choice(STRATEGIES),
        "num_blocks": num_blocks,
        "argnums": random.choice([(0, 1), (0, 1), (0, 1), (0,), (1,)]),
        "negative_axes": random.choice([False, False, True]),
        "keyword": random.choice([None] * 6 + ["static", "array"]),
    }
    if spec.image == "uint8":
        options["argnums"] = (0,)
    names = list(dict.fromkeys(l.params.get("name", "a") for l in spec.layers if l.kind == "name"))
    how = random.choice(["none", "none", "number", "names", "groups"])
    segments = 1
    if how == "number":
        segments = random.choice([2, 3])
        options["cuts"] = segments
    elif names and how == "names":
        segments = len(names) + 1
        options["cuts"] = tuple(names)
    elif names and how == "groups":
        count = random.randint(1, len(names))
        options["cuts"] = (tuple(names[:count]), *names[count:])
        segments = len(names) + 1
    if segments > 1 and random.choice([True, False]):
        options["strategy"] = tuple(random.choice([*STRATEGIES, "column"]) for _ in range(segments))
    return dataclasses.replace(spec, **options)


@dataclasses.dataclass
class _Drawer:
    random: Random
    without: frozenset[str]
    nesting: int = 0

    @functools.cached_property
    def kinds(self) -> list[str]:
        return [
            name
            for name, kind in KINDS.items()
            for _ in range(round(10 * kind.weight))
            if name not in self.without and kind.family not in self.without
        ]

    def layers(self, m: Map, count: int) -> tuple[list[Layer], Map]:
        found: list[Layer] = []
        for _ in range(count):
            for _ in range(8):
                layer = self.layer(m)
                name = f"{'x' * self.nesting}{len(found)}"
                after = None if layer is None else _abstractly(layer, m, name)
                if after is not None:
                    found.append(layer)
                    m = after
                    break
        return found, m

    def layer(self, m: Map) -> Layer | None:
        name = self.random.choice(self.kinds)
        if name in BODIES and self.nesting > 1:
            return None
        params = KINDS[name].draw(self.random, m)
        if self.without.intersection(f"{name}={value}" for value in params.values()):
            return None
        if name in BODIES:
            params.update(self.bodies(name, m))
        return Layer(name, **_changed(name, params))

    def bodies(self, name: str, m: Map) -> dict[str, Any]:
        fields, most = BODIES[name]
        self.nesting += 1
        try:
            found: dict[str, Any] = {}
            for field in fields:
                if field == "body" or field == "other":
                    found[field] = tuple(self.layers(m, self.random.randint(1, most))[0])
                else:
                    count = self.random.choice([2, 2, 3])
                    found[field] = tuple(
                        tuple(self.layers(m, self.random.randint(1, most))[0]) for _ in range(count)
                    )
            return found
        finally:
            self.nesting -= 1


def _changed(name: str, params: dict[str, Any]) -> dict[str, Any]:
    """Parameters that are not the default."""
    defaults = KINDS[name].defaults
    return {k: v for k, v in params.items() if v != defaults[k]}


def _abstract_image(spec: Spec, net: Context) -> Map:
    return Map(jax.ShapeDtypeStruct(spec.image_shape, net.dtype), spec.layout, net)


def _abstractly(layer: Layer, m: Map, name: str) -> Any:
    """The map behind a layer, None where it does not fit."""
    layout = m.layout

    def function(x: Any) -> Any:
        nonlocal layout
        # Abstract maps have parameters and images of their own: nothing is kept.
        out = apply_layer(layer, Map(x, m.layout, Context(0, dtype=m.net.dtype)), name)
        if isinstance(out, Map):
            layout = out.layout
            return out.x
        return out

    try:
        out = jax.eval_shape(function, m.x)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    if layer.kind == "head":
        return out
    shape = dict(zip(layout, out.shape, strict=True))
    if min(out.shape) < 1 or np.prod(out.shape) > MOST_ELEMENTS or shape["H"] > MOST_ROWS:
        return None
    if shape["C"] > MOST_CHANNELS or max(shape.get("W", 1), shape.get("D", 1)) > MOST_WIDTH:
        return None
    if out.dtype != m.net.dtype:
        return None
    return Map(out, layout, m.net, "")
