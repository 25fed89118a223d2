"""A smaller network that fails in the same way.

Greedy: of the simpler descriptions of a failing one, the first that fails too is taken, until none
does. Descriptions are trees of plain data, so "simpler" is: fewer layers, parameters at their
defaults, smaller images, fewer options.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from generated.draw import BODIES
from generated.spec import KINDS, L, Layer, Spec

Layers = tuple[Layer, ...]


def shrink(spec: Spec, fails: Callable[[Spec], bool], *, seconds: float = 300.0) -> Spec:
    """The simplest description found that ``fails``.

    Args:
      spec: one that fails.
      fails: whether another fails in the same way; it must not raise.
      seconds: after which the best so far is returned.
    """
    end = time.monotonic() + seconds
    tried = {repr(spec)}
    while True:
        for candidate in simpler(spec):
            if time.monotonic() > end:
                return spec
            if repr(candidate) in tried:
                continue
            tried.add(repr(candidate))
            if fails(candidate):
                spec = candidate
                break
        else:
            return spec


def simpler(spec: Spec) -> Iterator[Spec]:
    """Descriptions that are simpler in one respect, the largest steps first."""

    def changed(**fields: Any) -> Spec:
        return dataclasses.replace(spec, **fields)

    layers = tuple(spec.layers)
    for part in _fewer(layers):
        yield changed(layers=part)
    if spec.cuts:
        strategies = spec.strategy if isinstance(spec.strategy, tuple) else (spec.strategy,)
        for strategy in dict.fromkeys(strategies):
            yield changed(cuts=(), strategy=strategy)
    if isinstance(spec.strategy, tuple):
        for strategy in dict.fromkeys(spec.strategy):
            yield changed(strategy=strategy)
    for field in ("head", "keyword", "negative_axes", "image", "layout", "batch", "channels"):
        default = Spec.__dataclass_fields__[field].default
        if getattr(spec, field) != default:
            yield changed(**{field: default})
    for argnums in ((0, 1), (1,), (0,)):
        if argnums != spec.argnums and (argnums == (0, 1) or spec.argnums != (0, 1)):
            yield changed(argnums=argnums)
    yield from (changed(layers=part) for part in _with_smaller_bodies(layers))
    if spec.devices > 1:
        yield from (changed(devices=devices) for devices in (1, 2) if devices < spec.devices)
    for field, least in (("height", 1), ("num_blocks", 1), ("width", 1), ("channels", 1)):
        value = getattr(spec, field)
        if isinstance(value, int):
            for smaller in dict.fromkeys((least, value // 2, value - 1)):
                if least <= smaller < value:
                    yield changed(**{field: smaller})
    yield from (changed(layers=part) for part in _with_simpler_parameters(layers))
    for head in _simpler_parameters(spec.head):
        yield changed(head=head)


def _fewer(layers: Layers) -> Iterator[Layers]:
    """Some layers left out; layers made of layers replaced by what is in them."""
    count = len(layers)
    size = count // 2
    while size >= 1:
        for start in range(0, count, size):
            yield layers[:start] + layers[start + size :]
        size //= 2
    for i, layer in enumerate(layers):
        for body in _bodies(layer):
            yield layers[:i] + body + layers[i + 1 :]


def _bodies(layer: Layer) -> list[Layers]:
    found: list[Layers] = []
    for field in BODIES.get(layer.kind, ((), 0))[0]:
        value = layer.params.get(field, ())
        found += [tuple(body) for body in value] if field == "bodies" else [tuple(value)]
    return [body for body in found if body]


def _with_smaller_bodies(layers: Layers) -> Iterator[Layers]:
    for i, layer in enumerate(layers):
        for field in BODIES.get(layer.kind, ((), 0))[0]:
            value = layer.params.get(field, ())
            for smaller in _smaller_field(field, value):
                params = {**layer.params, field: smaller}
                yield layers[:i] + (L(layer.kind, **params),) + layers[i + 1 :]


def _smaller_field(field: str, value: Sequence[Any]) -> Iterator[Any]:
    if field != "bodies":
        yield from _smaller_body(tuple(value))
        return
    bodies = tuple(tuple(body) for body in value)
    for j in range(len(bodies)):
        if len(bodies) > 2:
            yield bodies[:j] + bodies[j + 1 :]
        for body in _smaller_body(bodies[j]):
            yield bodies[:j] + (body,) + bodies[j + 1 :]


def _smaller_body(body: Layers) -> Iterator[Layers]:
    if body:
        yield ()
    yield from _fewer(body)
    yield from _with_smaller_bodies(body)
    yield from _with_simpler_parameters(body)


def _with_simpler_parameters(layers: Layers) -> Iterator[Layers]:
    for i, layer in enumerate(layers):
        for simple in _simpler_parameters(layer):
            yield layers[:i] + (simple,) + layers[i + 1 :]


def _simpler_parameters(layer: Layer) -> Iterator[Layer]:
    fields = BODIES.get(layer.kind, ((), 0))[0]
    defaults = KINDS[layer.kind].defaults
    for name, value in layer.params.items():
        if name in fields:
            continue
        yield L(layer.kind, **{k: v for k, v in layer.params.items() if k != name})
        if isinstance(value, int) and not isinstance(value, bool):
            least = defaults[name] if isinstance(defaults[name], int) else 1
            for smaller in dict.fromkeys((value // 2, value - 1)):
                if least < smaller < value:
                    yield L(layer.kind, **{**layer.params, name: smaller})
        if isinstance(value, tuple):
            for j, entry in enumerate(value):
                if isinstance(entry, int) and entry > 0:
                    reduced = value[:j] + (entry - 1,) + value[j + 1 :]
                    yield L(layer.kind, **{**layer.params, name: reduced})
